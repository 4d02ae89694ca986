"""A token loss through the fused head in a training loop of somebody else's."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from dft_lightning.errors import InputError, one_line
from dft_lightning.losses.base import (
    IGNORE_INDEX,
    TokenLoss,
    require_default_forward_options,
    required_step,
    sequence_index_of,
)
from dft_lightning.losses.statistics import Statistic, names_of, reference_need
from dft_lightning.models.head import WAY_OUT, LanguageModelHead, check_head, ends_of, find_head, forward_replaced
from dft_lightning.models.layout import shifted
from dft_lightning.ops import TokenOutput, linear_token_loss

INSTEAD = "train on logits, with the loss as a criterion or compute_loss_func, or by CausalLMModule"
PER_TOKEN = ("token_weight", "reference_log_prob")
_checked: WeakSet[nn.Module] = WeakSet()


def fused_causal_lm_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    loss: TokenLoss,
    num_items: Tensor | float | None = None,
    *,
    statistics: Iterable[Statistic | str] = (),
    step: int | None = None,
) -> TokenOutput:
    """The token loss of a batch under a causal language model of transformers, without its logits.

    The model is called as it is, with ``labels``, so that what is around it has its turn: DDP, Accelerate's or Fabric's
    precision, an adapter of peft, gradient checkpointing. Inside, its output layer hands on the last hidden states,
    and in the place of its loss function the fused head computes the loss, under the model's own autocast. The
    auxiliary loss of a router, where the model adds one, is added once for each target and so divided as the loss is.

    The output layer is held against the model's own logits at the first call for a model.

    Args:
        model: of transformers, or what wraps one and hands its arguments on.
        batch: ``input_ids`` ``[B, T]``, ``labels`` ``[B, T]``, aligned with them and -100 where nothing is learnt (they
            are shifted here), and whatever else the model takes; a document's first label is -100 where several are
            in a row. ``token_weight`` and ``reference_log_prob``, ``[B, T]`` and aligned with the labels, are the
            loss's.
        loss: any token loss that needs no second model.
        num_items: what the summed loss is divided by, for a step of several micro-batches or processes the targets of
            all of them. ``None`` takes the targets of this batch.
        statistics: what to compute beyond ``loss.needs``, such as ``"entropy"``.
        step: the optimizer step, for losses with a schedule.

    Returns:
        A :class:`~dft_lightning.ops.TokenOutput` over the targets, ``loss`` to be differentiated.

    Raises:
        InputError: the model, its head or the loss is none for this.
        ValueError: a label out of range, no step for a loss with a schedule.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from dft_lightning import DFTLoss
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                    num_attention_heads=2)
        >>> model = LlamaForCausalLM(tiny)
        >>> ids = torch.arange(12).view(2, 6)
        >>> output = fused_causal_lm_loss(model, {"input_ids": ids, "labels": ids}, DFTLoss())
        >>> output.loss.backward()
        >>> output.log_prob.shape
        torch.Size([10])
    """
    check_loss(loss, "fused_causal_lm_loss")
    step = required_step(loss, step)
    if not isinstance(batch.get("labels"), Tensor):
        raise InputError("fused_causal_lm_loss: the batch has no labels, or they are no tensor")
    if isinstance(num_items, (int, float)) and num_items < 0:
        raise ValueError(f"num_items is what the sum is divided by and must not be negative, got {num_items}")
    inner = language_model_in(model)
    given = {name: batch[name] for name in PER_TOKEN if batch.get(name) is not None}
    options = {"step": step, "statistics": tuple(statistics)}
    inside = _Inside(_head_of(inner), loss, given, batch.get("position_ids"), num_items, options)
    inputs = {name: value for name, value in batch.items() if name not in PER_TOKEN}
    if "use_cache" in inspect.signature(type(inner).forward).parameters:
        inputs.setdefault("use_cache", False)
    by_itself = (
        f"{type(inner).__name__} computes its loss by itself, and does not hand its logits to its loss_function, where "
        f"the fused head would compute it: {INSTEAD}"
    )
    with inside.in_place_of_the_loss(inner):
        try:
            returned = model(**inputs)
        except Exception as error:
            if isinstance(error, (InputError, torch.OutOfMemoryError)) or not inside.is_behind_the_head:
                raise
            raise InputError(f"{by_itself} ({one_line(error)})") from error
    if inside.output is None:
        raise InputError(by_itself)
    output, total = inside.output, returned["loss"] if isinstance(returned, Mapping) else returned[0]
    if isinstance(getattr(returned, "aux_loss", None), Tensor):
        # Counts once a target, whatever a step is cut into.
        share, added = inside.share(), total.detach() - output.loss.detach()
        total = share * total + (1 - share) * output.loss
        output = dataclasses.replace(output, loss_sum=output.loss_sum + added * len(output.log_prob))
    return dataclasses.replace(output, loss=total)


def check_loss(loss: TokenLoss, where: str) -> None:
    """Raise where a loss reads what a loop of somebody else's cannot give, or has options that are the loop's."""
    if not isinstance(loss, TokenLoss):
        raise InputError(f"{where}: the loss must be a TokenLoss, such as DFTLoss(), got {loss!r}")
    require_default_forward_options(loss, where)
    name, way_out = type(loss).__name__, "train by CausalLMModule, which runs it"
    if (need := reference_need(loss.needs)) is not None:
        raise InputError(f"{where}: {name} needs {need.name}, of a second model: {way_out}")
    if loss.refresh_every is not None:
        raise InputError(f"{where}: {name} with refresh_every needs an earlier model: {way_out}")


def language_model_in(model: nn.Module) -> nn.Module:
    """The causal language model within its wrappers.

    Raises:
        InputError: there is none, or a wrapper is none whose model can be reached.
    """
    from transformers import PreTrainedModel
    from transformers.loss.loss_utils import ForCausalLMLoss

    wrappers = [type(each).__name__ for each in model.modules()]
    for wrapper in ("DataParallel", "OptimizedModule", "FullyShardedDataParallel"):
        if wrapper in wrappers:
            raise InputError(f"fused_causal_lm_loss: the model is wrapped by {wrapper}, which it cannot go through")
    if any(getattr(getattr(each, "active_peft_config", None), "is_prompt_learning", False) for each in model.modules()):
        raise InputError("fused_causal_lm_loss: peft's prompt learning lengthens the rows, and labels by token are not")
    for each in model.modules():
        if isinstance(each, PreTrainedModel) and ends_of(each)[1] is not None:
            if each.loss_function is not ForCausalLMLoss or getattr(each.config, "is_encoder_decoder", False):
                raise InputError(
                    f"fused_causal_lm_loss: {type(each).__name__} has another loss than that of causal language "
                    f"models, whose labels are the next tokens: {INSTEAD}"
                )
            return each
    raise InputError(
        f"fused_causal_lm_loss: there is no causal language model of transformers in {type(model).__name__}"
    )


def _head_of(model: nn.Module) -> LanguageModelHead:
    """The model's head, held against its own logits once."""
    try:
        head = find_head(model)
        if hasattr(head.layer.weight, "ds_id"):
            raise InputError(f"model: DeepSpeed has taken the output layer's weight apart (ZeRO-3); {WAY_OUT}")
        if model not in _checked:
            with _of_its_class(model):
                check_head(model, head)
            _checked.add(model)
    except InputError as error:
        raise InputError(str(error).replace(WAY_OUT, INSTEAD)) from error
    return head


@contextmanager
def _of_its_class(model: nn.Module) -> Iterator[None]:
    """Without what others have put in the place of its ``forward``, such as a precision."""
    own = model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if own is not None:
            model.__dict__["forward"] = own


class _Inside:
    """What stands in the place of a model's output layer and loss function for one call."""

    def __init__(
        self,
        head: LanguageModelHead,
        loss: TokenLoss,
        per_token: dict[str, Tensor],
        position_ids: Tensor | None,
        num_items: Tensor | float | None,
        options: dict[str, Any],
    ) -> None:
        self._head, self._loss, self._per_token, self._positions = head, loss, per_token, position_ids
        self._num_items, self._options = num_items, options
        self._hidden: Tensor | None = None
        self.output: TokenOutput | None = None

    @contextmanager
    def in_place_of_the_loss(self, model: nn.Module) -> Iterator[None]:
        """Around the call."""
        layer, own = self._head.layer, model.loss_function
        with forward_replaced(layer, self._take):
            try:
                model.loss_function = self._compute  # type: ignore[assignment]
                yield
            finally:
                model.loss_function = own

    def _take(self, hidden: Tensor) -> Tensor:
        if self._hidden is not None or hidden.ndim != 3:
            raise InputError(
                "fused_causal_lm_loss: the model calls its output layer more than once, or not on hidden states "
                f"[B, T, H]: {INSTEAD}"
            )
        self._hidden = hidden
        return hidden.detach()[..., :1]  # what the model does to its logits costs next to nothing on these

    @property
    def is_behind_the_head(self) -> bool:
        """Whether the output layer has been called, and the loss function has not."""
        return self._hidden is not None and self.output is None

    def _compute(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("shift_labels") is not None:
            raise InputError(f"fused_causal_lm_loss: shift_labels, which are shifted already, are not taken: {INSTEAD}")
        if logits.requires_grad:
            raise InputError(f"the model has something to train between its output layer and its logits: {INSTEAD}")
        hidden = self._hidden
        if hidden is None or labels.shape != hidden.shape[:2]:
            got = None if hidden is None else list(hidden.shape[:2])
            raise InputError(
                f"fused_causal_lm_loss: labels are {list(labels.shape)} and hidden states {got}: each token needs both"
            )
        targets = shifted(labels, IGNORE_INDEX).to(hidden.device).flatten()
        count = (targets != IGNORE_INDEX).sum() if self._num_items is None else self._num_items
        self.output = linear_token_loss(
            hidden.reshape(-1, hidden.shape[-1]),
            targets=targets,
            loss=self._loss,
            normalizer=at_least_one(count, hidden.device),
            token_inputs=self._inputs(labels),
            token_weight=self._of_tokens("token_weight", labels),
            **self._head.options,
            **self._options,
        )
        return self.output.loss.clone()  # models add to it in place

    def share(self) -> Tensor | float:
        """Of what the loss is divided by, the targets of this batch."""
        assert self.output is not None
        if self._num_items is None:
            return 1.0
        return len(self.output.log_prob) / at_least_one(self._num_items, self.output.log_prob.device)

    def _inputs(self, labels: Tensor) -> dict[str, Tensor]:
        needs, found = names_of(self._loss.needs), {}
        if "sequence_index" in needs:
            found["sequence_index"] = _sequences(labels, self._positions)
        if "reference_log_prob" in needs:
            values = self._of_tokens("reference_log_prob", labels)
            if values is None:
                raise InputError(
                    f"{type(self._loss).__name__} needs reference_log_prob of every target, which the batch lacks: "
                    "give it as [B, T], aligned with the labels, and keep collators and trainers from dropping it"
                )
            found["reference_log_prob"] = values
        return found

    def _of_tokens(self, name: str, labels: Tensor) -> Tensor | None:
        values = self._per_token.get(name)
        if values is None:
            return None
        if values.shape != labels.shape:
            raise InputError(f"{name} is {list(values.shape)}, and labels are {list(labels.shape)}")
        return shifted(values, 0).flatten().to(labels.device)


def _sequences(labels: Tensor, positions: Tensor | None) -> Tensor:
    """The number of each token's row, or of its document where positions start anew within rows; ``[B * T]``.

    Unlike a batch's layout, which takes rows that begin at position 0, it parts rows whatever position they begin at.
    """
    rows = sequence_index_of(labels.shape, labels.device)
    if positions is None or positions.shape != labels.shape:
        return rows
    starts = positions.diff(prepend=positions[:, :1] - 1, dim=-1) != 1
    return (starts.flatten().cumsum(0) + rows).to(labels.device)


def at_least_one(count: Tensor | float, device: torch.device) -> Tensor | float:
    """What a sum over targets is divided by: their number, or 1 where there are none."""
    if isinstance(count, Tensor):
        count = count.detach().to(device)
        return torch.where(count == 0, torch.ones_like(count), count)
    return count or 1
