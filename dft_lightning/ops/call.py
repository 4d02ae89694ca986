"""What a call of a head is given, checked, and what it returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dft_lightning.losses.base import check_class_indices
from dft_lightning.losses.statistics import NO_STATISTICS, Statistic, TokenStats
from dft_lightning.ops.row_math import LogitTransform, Tempering

# What a head always computes.
ALWAYS = ("log_prob", "log_expected_prob")


@dataclass(frozen=True)
class HeadSettings:
    """Options of a linear head.

    Attributes:
        transform: what the model does to the product.
        statistics: what to compute, by name, in the order of the names.
        dtype: of the matrix products.
        chunk_bytes: size of what is kept of a chunk's logits, ``None`` for what suits the device.
        reference_transform: what a reference model does to its product, where a statistic needs its logits.
        tempering: of the statistics that are made of a tempered distribution.
        gradient_threshold: see :func:`~dft_lightning.ops.linear_token_loss`.
    """

    transform: LogitTransform
    statistics: Mapping[str, Statistic]
    dtype: torch.dtype
    chunk_bytes: int | None
    reference_transform: LogitTransform | None
    tempering: Tempering | None = None
    gradient_threshold: float = 0.0


@dataclass(frozen=True)
class ReferenceHead:
    """A reference model's last hidden states and head; constants, into which no gradient flows.

    Attributes:
        hidden: ``[n, H']``, aligned with the model's own; its width may be another.
        weight: ``[V, H']``, over the model's own vocabulary, of any floating dtype.
        bias: ``[V]``.
        logit_scale: factor of the logits.
        logit_softcap: cap of the logits before the scale.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None


@dataclass(frozen=True)
class TargetTokens:
    """The ``n`` tokens that have a target.

    Attributes:
        hidden: ``[n, H]``.
        targets: ``[n]``, contiguous, each in ``[0, V)``.
        inputs: ``[n]`` statistics that the loss was given from outside, by name.
        weight: ``[n]`` factors of the losses, or ``None``.
        reference: a reference model's head for the same tokens, or ``None``.
    """

    hidden: Tensor
    targets: Tensor
    inputs: dict[str, Tensor]
    weight: Tensor | None
    reference: ReferenceHead | None


def target_tokens(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reference: ReferenceHead | None,
    token_inputs: Mapping[str, Tensor] | None = None,
    token_weight: Tensor | None = None,
    target_index: Tensor | None = None,
) -> TargetTokens:
    """Check what a head is given, and drop the tokens without a target.

    With ``target_index``, the positions of those that have one, no target is looked at.

    Raises:
        TypeError, ValueError: as :func:`~dft_lightning.ops.linear_token_loss`.
    """
    inputs = {name: value for name, value in (token_inputs or {}).items() if value is not None}
    _check_shapes(hidden, weight, targets, bias, {**inputs, "token_weight": token_weight})
    if reference is not None:
        _check_reference(reference, len(hidden), len(weight))
    targets = targets.long()
    if target_index is None:
        check_class_indices(targets, weight.shape[0], ignore_index)
        kept = (targets != ignore_index).nonzero().squeeze(-1)
    else:
        kept = target_index
    if kept.numel() < targets.numel():
        hidden, targets = hidden.index_select(0, kept), targets.index_select(0, kept)
        inputs = {name: value.index_select(0, kept) for name, value in inputs.items()}
        token_weight = None if token_weight is None else token_weight.index_select(0, kept)
        reference = reference and replace(reference, hidden=reference.hidden.index_select(0, kept))
    return TargetTokens(hidden, targets.contiguous(), inputs, token_weight, reference)


def _check_shapes(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, per_token: Mapping[str, Tensor | None]
) -> None:
    shapes = f"got hidden {list(hidden.shape)}, weight {list(weight.shape)}, targets {list(targets.shape)}"
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [n, H] and weight [V, H], {shapes}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [n], one class index per hidden state, {shapes}")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integers, got {targets.dtype}; soft targets need the logits: loss(logits, q)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V], got {list(bias.shape)}, {shapes}")
    known = {field.name for field in fields(TokenStats)} - {*NO_STATISTICS, *ALWAYS}
    for name, value in per_token.items():
        if value is None:
            continue
        if name not in known and name != "token_weight":
            raise ValueError(f"token_inputs has {name!r}, which is none of {', '.join(sorted(known))}")
        if value.shape != targets.shape:
            raise ValueError(f"{name} must be [n], got {list(value.shape)}, {shapes}")
        if value.requires_grad:
            raise ValueError(f"no gradient flows into {name}: pass {name}.detach()")


def _check_reference(reference: ReferenceHead, num_tokens: int, vocabulary: int) -> None:
    hidden, weight = reference.hidden, reference.weight
    if not hidden.ndim == weight.ndim == 2 or hidden.shape[1] != weight.shape[1] or len(hidden) != num_tokens:
        raise ValueError(
            f"reference must have hidden [n, H] for the {num_tokens} tokens, weight [V, H]: got hidden "
            f"{list(hidden.shape)} and weight {list(weight.shape)}"
        )
    if len(weight) != vocabulary:
        raise ValueError(
            f"the reference model's vocabulary has {len(weight)} tokens and the model's {vocabulary}: a divergence "
            "needs the same"
        )
    if hidden.requires_grad:
        raise ValueError("no gradient flows into the reference: run it under torch.no_grad()")


def inverse_normalizer(normalizer: Tensor | float | None, num_tokens: int, dtype: torch.dtype) -> Tensor | float:
    """One over what a summed loss is divided by: a number, or a scalar tensor of ``dtype`` that is not waited for.

    Without tokens it is 1, whatever the normaliser: the sum is 0, and 0 over a count of 0 would be nan.

    Raises:
        ValueError: a number that is 0, infinite or nan; a tensor of more than one element, or with a gradient, which
            would be lost.
    """
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must be a number or a scalar tensor, got shape {list(normalizer.shape)}")
        if normalizer.requires_grad:
            raise ValueError("no gradient flows into normalizer: pass normalizer.detach()")
    elif normalizer is not None and num_tokens > 0 and not 0 < abs(normalizer) < math.inf:
        raise ValueError(f"normalizer is {normalizer}, with {num_tokens} target tokens")
    if normalizer is None or num_tokens == 0:
        return 1.0
    return 1.0 / (normalizer.reshape(()).to(dtype) if isinstance(normalizer, Tensor) else float(normalizer))


@dataclass(frozen=True, kw_only=True)
class TokenOutput(TokenStats):
    """The loss of ``n`` target tokens and what is known of each: the fields of :class:`TokenStats`, and these.

    All but ``loss`` are detached; per-token tensors have shape ``[n]`` and are float32, or float64 where the logits
    are. A statistic that neither the loss nor the caller asked for is ``None``.

    Attributes:
        loss: scalar sum over the targets, over the normaliser where there is one; differentiable, and 0 with a path
            to the inputs where ``n`` is 0.
        loss_sum: the sum itself, detached; taken from ``loss`` where it is not given.
        dropped: what a ``gradient_threshold`` left out of each token's gradient: the sum of ``|dL/dz_v|`` over the
            classes ``v`` that were, for ``L`` the token's loss and ``z`` the product before cap and scale; ``None``
            where there was no threshold or no gradient.
        weight: ``-dL/dl`` of each target for ``L`` the sum: 1 for cross-entropy, ``p`` for DFT.
        correct: whether the target is the likeliest token (bool; of equally likely ones, the first).
    """

    loss: Tensor
    weight: Tensor
    correct: Tensor
    loss_sum: Tensor = None  # type: ignore[assignment]
    dropped: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_sum is None:
            object.__setattr__(self, "loss_sum", self.loss.detach())


def reduced(
    losses: Tensor, stats: TokenStats, normalizer: Tensor | float | None, weight: Tensor, correct: Tensor, **more: Any
) -> TokenOutput:
    """The output of losses ``[n]`` that still have their graph, of hard-target statistics that have theirs."""
    total = losses.sum()
    if stats.log_prob.requires_grad and not total.requires_grad:
        # A loss that reads nothing (a constant) still gets a path to the inputs, which data parallelism waits for.
        total = total + (0 * stats.log_prob).nan_to_num().sum()
    values = {name: value.detach() if isinstance(value, Tensor) else value for name, value in vars(stats).items()}
    del values["log_expected_prob"]  # the same as log_prob
    return TokenOutput(
        **{**values, **more},
        loss=total * inverse_normalizer(normalizer, len(losses), losses.dtype),
        loss_sum=total.detach(),
        weight=weight,
        correct=correct,
    )
