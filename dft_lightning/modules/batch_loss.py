"""From a batch to its token loss, by the fused head or by the model's own logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dft_lightning.errors import InputError
from dft_lightning.losses import CrossEntropyLoss, TokenLoss
from dft_lightning.losses.base import IGNORE_INDEX
from dft_lightning.losses.statistics import names_of, normalise_needs
from dft_lightning.models.documents import ModelChecks, knowing_documents, model_inputs
from dft_lightning.models.head import WAY_OUT, LanguageModelHead, run_without_head
from dft_lightning.models.layout import KEY, BatchLayout, layout_of, shifted, with_layout
from dft_lightning.models.reference import EarlierModel, ReferenceModel
from dft_lightning.models.row_checks import text_config
from dft_lightning.modules.options import Head, StepOptions
from dft_lightning.ops import TokenOutput, linear_token_loss, logits_token_loss

CHANGED = (
    f"a batch was changed after it was made, so that its {KEY!r} is of another: leave that out where you change "
    "labels, attention_mask or position_ids, and it is made anew"
)


class BatchObjective:
    """From batches to their losses: the place where model and loss meet.

    Args:
        head: ``"fused"`` computes them from the last hidden states, without logits; ``"full"`` from the model's own.
        step: of whose options those of the objective are read.
        own_forward: whether the module overrides ``forward``.
        name: of the module's class, for messages.
        earlier: the model as it was some steps before, for a loss that reads its log-probs.

    Raises:
        ValueError: the fused head would not run what the module overrides.
    """

    def __init__(
        self, head: Head, step: StepOptions, own_forward: bool, name: str, earlier: EarlierModel | None
    ) -> None:
        if head == "fused" and own_forward:
            raise ValueError(f"{name} overrides forward, which the fused head does not call: {WAY_OUT}")
        self._head, self._step, self._own_forward, self._earlier = head, step, own_forward, earlier
        self._checks = ModelChecks()
        self._differs: Tensor | None = None

    def output(
        self,
        model: nn.Module,
        forward: Callable[..., Tensor],
        batch: dict[str, Any],
        loss: TokenLoss,
        reference: ReferenceModel | None,
        max_length: int | None,
        alone: bool,
        **options: Any,
    ) -> TokenOutput:
        """Summed loss and per-token statistics of a batch.

        Args:
            model: the language model, tried at its first batch.
            forward: gives its logits ``[B, T, V]``, for the full head.
            batch: as :class:`~dft_lightning.modules.CausalLMModule` takes it.
            loss: any token loss.
            reference: another model, where the loss needs its distribution.
            max_length: of documents, where that is known.
            alone: whether no step of a trainer comes, which would read :meth:`differs`.
            options: ``normalizer``, ``statistics`` and ``step`` of :func:`~dft_lightning.ops.linear_token_loss`.

        Raises:
            InputError: the model, the head or the batch is none for what is asked.
        """
        check_batch(batch)
        layout = layout_of(batch)
        call = _Call(batch, layout, self._checks.before_batch(model, batch, max_length), loss, reference, options)
        if self._head == "full":
            run = partial(_full, model, forward=forward if self._own_forward else None)
        else:
            options["gradient_threshold"] = self._step.gradient_threshold
            run = partial(_fused, model, head=self._checks.head_of(model))
        if self._earlier is not None and "reference_log_prob" in names_of(loss.needs):
            if alone:
                raise InputError(
                    f"{type(loss).__name__} with refresh_every follows the steps of a trainer, and there is none: give "
                    "reference_log_prob with the batch, and leave refresh_every out"
                )
            if torch.is_grad_enabled():
                self._earlier.refresh(model, options["step"])
            call = dataclasses.replace(call, earlier=_log_probs_of(self._earlier, model, call, run))
        output, model_output = run(call)
        if layout is batch.get(KEY):
            differs = layout.differs(batch, output.vocab_size)
            self._differs = differs if self._differs is None else self._differs | differs
            if alone or not torch.is_grad_enabled():
                self.check_pending()
        auxiliary = auxiliary_loss(model, model_output, required=bool(self._step.router_aux_loss_coef))
        return self._with_auxiliary_loss(output, auxiliary, options["normalizer"])

    def differs(self) -> Tensor | None:
        """Whether a batch since the last call was not the one that its layout is of: a scalar bool tensor.

        Read it with what the step has to wait for; :data:`CHANGED` is what to say.
        """
        found, self._differs = self._differs, None
        return found

    def check_pending(self) -> None:
        """Wait for :meth:`differs` where nobody has read it.

        Raises:
            InputError: a batch was changed.
        """
        if (found := self.differs()) is not None and bool(found):
            raise InputError(CHANGED)

    def _with_auxiliary_loss(
        self, output: TokenOutput, auxiliary: Tensor | None, normalizer: float | None
    ) -> TokenOutput:
        """Added once per target token, or per unit of weight, whichever the step is divided by.

        So the mean of the objective is the model's own sum of the two.
        """
        if auxiliary is None:
            return output
        targets = output.log_prob.numel()
        total = auxiliary * (output.weight.sum() if self._step.renormalize else targets)
        loss = output.loss + (total if normalizer is None else total / normalizer)
        return dataclasses.replace(output, loss=loss, loss_sum=output.loss_sum + auxiliary.detach() * targets)


def checked(batch: Any) -> dict[str, Any]:
    """A batch with its layout, which is made once for all that reads it. Raises as :func:`check_batch`."""
    check_batch(batch)
    return with_layout(batch)


def check_batch(batch: Any) -> None:
    """Raise ``InputError`` for what is no batch: any loader may make them. No device is waited for."""
    if not isinstance(batch, Mapping):
        found = f"this one is of type {type(batch).__name__}"
    elif "input_ids" not in batch or "labels" not in batch:
        found = f"this one has {', '.join(map(str, batch)) or 'nothing'}"
    elif not (found := next(_problems(batch), "")):
        return
    raise InputError(
        "a batch must be a dict with input_ids, labels (aligned with them, -100 where nothing is learnt) and, where "
        f"there is padding, attention_mask, each [B, T]: {found}"
    )


def _problems(batch: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the tensors of a batch that has them."""
    ids = batch["input_ids"]
    names = ("input_ids", "labels", "attention_mask", "position_ids", "token_weight", "reference_log_prob", "source")
    for name in names:
        values = batch.get(name)
        if values is None and name in ("attention_mask", "position_ids", "reference_log_prob"):
            continue
        if name not in batch:
            continue
        if not isinstance(values, Tensor):
            yield f"{name} is of type {type(values).__name__}"
        elif name in ("input_ids", "labels") and values.dtype not in (torch.int64, torch.int32):
            yield f"{name} are {values.dtype}, and are to be torch.int64"
        elif name == "attention_mask" and values.ndim == 2 and values.is_floating_point():
            yield f"attention_mask is {values.dtype}, and is to be torch.int64 or torch.bool"
        elif name == "position_ids" or (
            values.ndim == 4 and name == "attention_mask"
        ):  # models look at these themselves
            continue
        elif values.ndim != 2 or values.shape != ids.shape or not values.numel():
            beside = "" if name == "input_ids" else f", and input_ids {list(ids.shape)}"
            yield f"{name} are {list(values.shape)}{beside}"


@dataclass(frozen=True)
class _Call:
    """What a head is given for a batch.

    Attributes:
        batch: whole.
        layout: the batch's.
        run_on: of the batch, what the model is run on.
        loss: any token loss.
        reference: as in :meth:`BatchObjective.output`.
        options: likewise.
        earlier: log-prob of each target under the model as it was, at the place of its logits, where the loss reads it.
    """

    batch: dict[str, Any]
    layout: BatchLayout
    run_on: dict[str, Any]
    loss: TokenLoss
    reference: ReferenceModel | None
    options: dict[str, Any]
    earlier: Tensor | None = None

    def targets(self, num_classes: int) -> Tensor:
        """Each token's target, ``[B, T]``, at the place of its logits; what stands where there is none is a class, too.

        Raises:
            InputError: one is no class.
        """
        layout = self.layout
        if layout.smallest_target < 0 or layout.largest_target >= num_classes:
            wrong = layout.smallest_target if layout.smallest_target < 0 else layout.largest_target
            raise InputError(
                f"labels: {wrong} is not a class index: it must lie in [0, {num_classes}), the model's vocabulary, or "
                f"be {IGNORE_INDEX} where nothing is learnt"
            )
        return shifted(self.batch["labels"]).clamp(0, num_classes - 1)

    def token_weight(self) -> Tensor | None:
        """Factor of each token's loss, ``[B, T]``, likewise."""
        return shifted(self.batch["token_weight"]) if "token_weight" in self.batch else None

    def inputs(self) -> dict[str, Any]:
        """What the loss reads of each token beside the model's own statistics, ``[B, T]``, likewise.

        Raises:
            InputError: the batch lacks it.
        """
        needs = names_of(self.loss.needs)
        inputs: dict[str, Any] = {}
        if "sequence_index" in needs:
            inputs["sequence_index"] = self.layout.sequence_index().view(self.layout.shape)
        if "reference_log_prob" in needs and self.earlier is not None:
            inputs["reference_log_prob"] = self.earlier
        elif "reference_log_prob" in needs:
            if "reference_log_prob" not in self.batch:
                raise InputError(
                    f"{type(self.loss).__name__} needs reference_log_prob of every target, which these rows lack: "
                    "`python -m dft_lightning score` writes rows that have it"
                )
            inputs["reference_log_prob"] = shifted(self.batch["reference_log_prob"])
        return inputs


Run = Callable[[_Call], tuple[TokenOutput, Any]]


def _log_probs_of(earlier: EarlierModel, model: nn.Module, call: _Call, run: Run) -> Tensor:
    """Log-prob of each target under the model as it was, ``[B, T]`` at the place of its logits."""
    with earlier.in_place_of(model):
        output, _ = run(dataclasses.replace(call, loss=CrossEntropyLoss(), reference=None, options={}))
    found = output.log_prob.new_zeros(math.prod(call.layout.shape))
    return found.index_copy(0, call.layout.target_index, output.log_prob).view(call.layout.shape)


def _fused(model: nn.Module, call: _Call, head: LanguageModelHead) -> tuple[TokenOutput, Any]:
    inputs, weight = call.inputs(), call.token_weight()
    beside = None if call.reference is None else call.reference.head(model, call.batch)
    with knowing_documents(call.batch):
        hidden, model_output = run_without_head(model, head, **model_inputs(model, call.run_on))
    output = linear_token_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        targets=call.targets(len(head.layer.weight)).flatten(),
        target_index=call.layout.target_index,
        loss=call.loss,
        token_inputs={name: value.flatten() for name, value in inputs.items()},
        reference=beside,
        token_weight=None if weight is None else weight.flatten(),
        **head.options,
        **call.options,
    )
    return output, model_output


def _full(model: nn.Module, call: _Call, forward: Callable[..., Tensor] | None) -> tuple[TokenOutput, Any]:
    """With a ``forward`` of the module's own, its logits; otherwise the model's."""
    inputs = call.inputs()
    beside = None if call.reference is None else call.reference.logits(model, call.batch)
    with knowing_documents(call.batch):
        logits, model_output = _logits(model, call.run_on, forward)
    output = logits_token_loss(
        logits,
        call.targets(logits.shape[-1]),
        call.loss,
        target_index=call.layout.target_index,
        reference_logits=beside,
        token_weight=call.token_weight(),
        **inputs,
        **call.options,
    )
    return output, model_output


def _logits(model: nn.Module, batch: dict[str, Any], forward: Callable[..., Tensor] | None) -> tuple[Tensor, Any]:
    """Logits ``[B, T, V]`` and the model's output, which has more."""
    if forward is None:
        output = model(**model_inputs(model, batch))
        return output.logits, output
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda model, args, output: outputs.append(output))
    try:
        positions = {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}
        logits = forward(batch["input_ids"], batch.get("attention_mask"), **positions)
    finally:
        handle.remove()
    return logits, outputs[-1] if outputs else None


def check_top_k(loss: TokenLoss, vocabulary: int) -> None:
    """Raise ``InputError`` where a loss takes more of the likeliest tokens than there are."""
    for need in normalise_needs(loss.needs):
        if need.params.get("k", 0) > vocabulary:
            raise InputError(
                f"model.loss: {type(loss).__name__} takes the {need.params['k']} likeliest tokens, and the model knows "
                f"{vocabulary} in all: set a smaller top_k"
            )


_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def set_auxiliary_loss(model: nn.Module, coefficient: float | None) -> None:
    """Put a model's auxiliary loss into the objective with a coefficient, or take it out with 0; ``None`` leaves it.

    Raises:
        InputError: the model has no such loss.
    """
    if coefficient is None:
        return
    config, holders = text_config(model), _holders(model)
    if not hasattr(config, "output_router_logits") or not holders:
        raise InputError(
            f"model.step.router_aux_loss_coef: {type(model).__name__} has no auxiliary loss of a router in "
            "transformers: leave it out"
        )
    config.output_router_logits = coefficient > 0
    for holder, name in holders:
        setattr(holder, name, float(coefficient))


def auxiliary_loss(model: nn.Module, output: Any, required: bool = False) -> Tensor | None:
    """The load-balancing loss in a model's output times its coefficient, ``None`` where it computes none.

    Raises:
        InputError: it is required and there is none, or the model has such a loss but no coefficient that is known.
    """
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):  # models with the loss switched off leave None or 0
        if required:
            raise InputError(
                f"model.step.router_aux_loss_coef: {type(model).__name__} computes no auxiliary loss: leave it out"
            )
        return None
    for holder, name in _holders(model):
        return loss * float(getattr(holder, name))
    raise InputError(f"model: {type(model).__name__} returns aux_loss, but its config has no router_aux_loss_coef")


def auxiliary_line(model: nn.Module) -> str | None:
    """What to say of the auxiliary loss when a run starts; ``None`` for models without one."""
    config, holders = text_config(model), _holders(model)
    if not hasattr(config, "output_router_logits") or not holders:
        return None
    coefficient = getattr(*holders[0])
    if config.output_router_logits:
        return f"auxiliary loss of the experts' router: in the objective, with coefficient {coefficient:g}"
    return (
        "auxiliary loss of the experts' router: not in the objective (output_router_logits: false in its config); "
        f"model.step.router_aux_loss_coef: {coefficient:g} puts it in with the model's own coefficient"
    )


def _holders(model: nn.Module) -> list[tuple[Any, str]]:
    """What has the coefficient: the model, which copies it when it is made, before its config."""
    return [
        (holder, name)
        for holder in (model, text_config(model))
        for name in _COEFFICIENTS
        if isinstance(getattr(holder, name, None), (int, float))
    ]
