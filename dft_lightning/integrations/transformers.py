"""Any token loss in ``transformers.Trainer`` and in TRL's trainers, on their logits or without any."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dft_lightning.errors import InputError
from dft_lightning.integrations.causal_lm import (
    PER_TOKEN,
    at_least_one,
    check_loss,
    fused_causal_lm_loss,
    language_model_in,
)
from dft_lightning.losses.base import IGNORE_INDEX, TokenLoss, require_default_forward_options, unreduced
from dft_lightning.losses.statistics import normalise_needs, reads_reference
from dft_lightning.ops import TokenOutput

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


def compute_loss_func(loss: TokenLoss) -> Callable[..., Tensor]:
    """Make of a token loss what ``transformers.Trainer(compute_loss_func=...)`` takes.

    The returned function ``(outputs, labels, num_items_in_batch=None)`` shifts the labels by one (the logits at
    position ``t`` predict the label at ``t + 1``), leaves them untouched, and divides the sum over targets by
    ``num_items_in_batch``, or by the number of targets where that is ``None`` (evaluation).

    Args:
        loss: any token loss with the default ``ignore_index`` and ``reduction``.

    Raises:
        ValueError: ``loss`` has other values of ``ignore_index`` or ``reduction``, follows a schedule, or needs a
            reference model's numbers.

    Example:
        >>> import torch
        >>> from dft_lightning.losses import DFTLoss
        >>> outputs = {"logits": torch.zeros(1, 3, 4)}
        >>> compute_loss_func(DFTLoss())(outputs, torch.tensor([[-100, 2, 3]]))
        tensor(0.3466)
    """
    require_default_forward_options(loss, "compute_loss_func")
    if loss.uses_step:
        raise ValueError(
            f"{type(loss).__name__} follows a schedule, and transformers.Trainer tells compute_loss_func no step: "
            "call loss(logits, targets, step=trainer.state.global_step) in a compute_loss of your own"
        )
    for need in normalise_needs(loss.needs):
        if need.name == "reference_log_prob" or reads_reference(need):
            given = "reference_log_prob" if need.name == "reference_log_prob" else "reference_logits"
            raise ValueError(
                f"{type(loss).__name__} needs {need.name}, which transformers.Trainer does not give compute_loss_func: "
                f"call loss(logits, targets, {given}=...) in a compute_loss of your own"
            )
    summed = copy.deepcopy(loss)
    summed.reduction = "sum"

    def loss_function(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        targets = labels[..., 1:].to(logits.device)
        total: Tensor = summed(logits[..., :-1, :], targets)
        count = (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        return total / at_least_one(count, total.device)

    return loss_function


class FusedLossMixin(_Trainer):
    """Trains any token loss in ``transformers.Trainer``, ``trl.SFTTrainer`` and their like, through the fused head.

    Stands before the trainer among the bases, and takes the loss as ``token_loss``:

    ``class SFT(FusedLossMixin, trl.SFTTrainer): pass``, ``SFT(model, args=args, token_loss=DFTLoss(), ...)``

    All else is the trainer's own: its data, packing and padding-free batches, adapters, gradient checkpointing,
    precision, accumulation, DDP, checkpoints. No logits are computed, in training and in evaluation. The loss of a step
    is the sum over its targets, of all micro-batches, over their number (and over all processes', with
    ``average_tokens_across_devices``, which is the default). ``nll``, the cross-entropy of the targets in nats, and
    ``token_accuracy`` are logged beside the loss; in evaluation these and the loss are means over all targets, where
    the trainer's own is a mean over batches. What ``trl.SFTTrainer`` logs of its own loss is not logged.

    Args:
        *args: the trainer's.
        token_loss: any token loss that needs no second model. One with a schedule is given the trainer's
            ``global_step``.
        **kwargs: the trainer's.

    Raises:
        InputError: the trainer was asked for something that this cannot honour: another loss (``compute_loss_func``,
            ``label_smoothing_factor``, TRL's ``loss_type``, Liger's kernels), logits (``compute_metrics``,
            ``predict``), a model that is sharded (FSDP, DeepSpeed's ZeRO-3, tensor and context parallelism), copied
            (``DataParallel``), compiled or made anew (``model_init``); the model or the loss is none for it.
    """

    def __init__(self, *args: Any, token_loss: TokenLoss, **kwargs: Any) -> None:
        check_loss(token_loss, type(self).__name__)
        super().__init__(*args, **kwargs)
        for found in _not_honoured(self):
            raise InputError(f"{type(self).__name__}: {found}")
        language_model_in(self.model)  # type: ignore[arg-type]
        self.token_loss = copy.deepcopy(token_loss)
        self.model_accepts_loss_kwargs = True  # whatever the model does: the loss is divided here
        self._sums = {"train": _Sums(), "eval": _Sums()}

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of a step, and how many targets they have."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum((batch["labels"][..., 1:] != IGNORE_INDEX).sum() for batch in batches if "labels" in batch)
        if not isinstance(count, Tensor):
            return batches, None
        count = count.to(device)
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            count = self.accelerator.gather(count.reshape(1)).sum()
        return batches, count

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """The token loss of a micro-batch, by :func:`fused_causal_lm_loss`."""
        training = bool(model.training)
        count = num_items_in_batch if training else None
        step = self.state.global_step
        output = fused_causal_lm_loss(model, inputs, self.token_loss, count, step=step)
        if training:
            self._sums["train"].add(_sums_of(output))
        else:
            # By row, so that those which fill up the last batch of several processes are left out.
            by_row = _sums_by_row(output, inputs, self.token_loss)
            self._sums["eval"].add(self.accelerator.gather_for_metrics(by_row).sum(0))
        self.loss_is_scaled_for_ga = count is not None
        loss = output.loss
        if count is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The loss alone. Raises ``InputError`` where logits are asked for."""
        if not prediction_loss_only or "labels" not in inputs:
            raise InputError(
                f"{type(self).__name__}: predictions are made of logits, which the fused head never has: use the "
                "trainer without FusedLossMixin for them, and give labels to evaluate"
            )
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own."""
        self._sums["train"] = _Sums()  # of steps that an earlier call did not log
        return super().train(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The trainer's own, with means over all targets."""
        self._sums["eval"] = _Sums()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        found = self._sums["eval"].means()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})  # type: ignore[union-attr]
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's own, with ``nll`` and ``token_accuracy`` of the training targets since it last logged."""
        if "loss" in logs:
            found = self._sums["train"].over(self.accelerator).means()
            logs.update({name: value for name, value in found.items() if name != "loss"})
            self._sums["train"] = _Sums()
        super().log(logs, *args, **kwargs)


class _Sums:
    """Loss, nll, right ones and number of targets, over batches, on the device."""

    def __init__(self, total: Tensor | None = None) -> None:
        self._total = total

    def add(self, values: Tensor) -> None:
        """Take in ``[4]`` of a batch."""
        self._total = values if self._total is None else self._total + values

    def over(self, accelerator: Any) -> _Sums:
        """Of all processes. A collective."""
        total = self._total if self._total is not None else torch.zeros(4, dtype=torch.float64)
        return _Sums(accelerator.gather(total.to(accelerator.device).reshape(1, -1)).sum(0))

    def means(self) -> dict[str, float]:
        """Over all targets; nothing without any."""
        loss, nll, correct, count = [0.0] * 4 if self._total is None else self._total.tolist()
        return {"loss": loss / count, "nll": nll / count, "token_accuracy": correct / count} if count else {}


def _sums_of(output: TokenOutput) -> Tensor:
    """``[4]`` of a batch."""
    values = (
        output.loss_sum,
        -output.log_prob.sum(),
        output.correct.sum(),
        output.loss_sum.new_tensor(len(output.weight)),
    )
    return torch.stack([value.double() for value in values])


def _sums_by_row(output: TokenOutput, batch: Mapping[str, Tensor], loss: TokenLoss) -> Tensor:
    """``[B, 4]`` of a batch."""
    kept = batch["labels"][:, 1:] != IGNORE_INDEX
    own = unreduced(loss, output).detach()
    if batch.get("token_weight") is not None:
        own = own * batch["token_weight"][:, 1:][kept].to(own.device)
    beside = (output.loss_sum - own.sum()) / max(len(own), 1)  # of a router, once a target
    values = torch.stack([own + beside, -output.log_prob, output.correct, torch.ones_like(own)], dim=-1).double()
    rows = kept.nonzero()[:, 0].to(values.device)
    return values.new_zeros(len(kept), 4).index_add(0, rows, values)


def _not_honoured(trainer: Any) -> Iterator[str]:
    """What a trainer was asked for that the fused head cannot give, by the name of the option."""
    args, other_loss = trainer.args, "token_loss is the loss: leave it out"
    if getattr(args, "label_smoothing_factor", 0):
        yield f"label_smoothing_factor: {other_loss}, and take CrossEntropyLoss(label_smoothing=...)"
    if getattr(trainer, "compute_loss_func", None) is not None:
        yield f"compute_loss_func: {other_loss}"
    if getattr(args, "loss_type", None) not in (None, "nll", "chunked_nll"):
        yield f"loss_type={args.loss_type!r}: {other_loss}"
    if getattr(args, "use_liger_kernel", False):
        yield "use_liger_kernel: its kernels compute a loss of their own: leave it out"
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        if getattr(trainer, name, None) is not None:
            yield f"{name} reads logits, which the fused head never has: leave it out"
    if getattr(trainer, "model_init", None) is not None:
        yield "model_init makes the model anew behind it: give a model"
    if getattr(args, "activation_offloading", False):
        yield "activation_offloading hooks the output layer, which the fused head does not call: leave it out"
    for name in _lost_columns(trainer) if args.remove_unused_columns else ():
        yield f"remove_unused_columns would drop {name}: set it to False"
    if getattr(args, "torch_compile", False):
        yield "torch_compile makes one graph of model and loss: leave it out"
    yield from _not_honoured_of_many(trainer)


def _lost_columns(trainer: Any) -> Iterator[str]:
    """What the loss reads of each token, where rows have it and the model takes no such argument."""
    for rows in (trainer.train_dataset, trainer.eval_dataset):
        names = getattr(rows, "column_names", None)
        if names is None and isinstance(rows, Sequence) and rows and isinstance(rows[0], Mapping):
            names = rows[0].keys()
        yield from (name for name in PER_TOKEN if name in (names or ()))


def _not_honoured_of_many(trainer: Any) -> Iterator[str]:
    """Likewise, of how the model is spread."""
    args, way_out = trainer.args, "use DDP, or CausalLMModule with ModelParallelStrategy (FSDP2)"
    if args.n_gpu > 1:
        yield f"{args.n_gpu} GPUs in one process (DataParallel): start one process a GPU with torchrun"
    if getattr(trainer, "is_fsdp_enabled", False):
        yield f"FSDP takes the output layer's weight apart: {way_out}"
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if getattr(plugin, "zero_stage", 0) == 3:
        yield f"DeepSpeed's ZeRO-3 takes the output layer's weight apart: {way_out}"
    parallel = getattr(args, "parallelism_config", None)
    sizes = {name: getattr(parallel, f"{name}_size", 1) or 1 for name in ("tp", "cp", "sp")}
    for name, size in sizes.items():
        if size > 1:
            yield f"parallelism_config: {name}_size={size} cuts rows or weights apart: {way_out}"
