"""The tokens of a batch that have a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dft_lightning.losses.checks import check_class_indices
from dft_lightning.losses.statistics import TokenStats
from dft_lightning.ops.reference import ReferenceHead

# What a head always computes.
ALWAYS = ("log_prob", "log_expected_prob")


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
    reference: ReferenceHead | None = None

    def stats(self, values: Mapping[str, Tensor], step: int, vocab_size: int, rows: slice) -> TokenStats:
        """What a loss reads about some of the tokens: computed values, and what was given."""
        given = {name: value[rows] for name, value in self.inputs.items()}
        return TokenStats(step=step, vocab_size=vocab_size, **values, **given)


def target_tokens(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    token_inputs: Mapping[str, Tensor] | None,
    token_weight: Tensor | None,
    reference: ReferenceHead | None = None,
) -> TargetTokens:
    """Check what a head is given, and drop the tokens without a target.

    Raises:
        TypeError, ValueError: as :func:`~dft_lightning.ops.linear_token_loss`.
    """
    inputs = {name: value for name, value in (token_inputs or {}).items() if value is not None}
    _check_shapes(hidden, weight, targets, bias, {**inputs, "token_weight": token_weight})
    if reference is not None:
        reference.check(len(hidden), weight)
    targets = targets.long()
    check_class_indices(targets, weight.shape[0], ignore_index)
    kept = (targets != ignore_index).nonzero().squeeze(-1)
    if kept.numel() < targets.numel():
        hidden, targets = hidden.index_select(0, kept), targets.index_select(0, kept)
        inputs = {name: value.index_select(0, kept) for name, value in inputs.items()}
        token_weight = None if token_weight is None else token_weight.index_select(0, kept)
        reference = None if reference is None else reference.of(kept)
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
    known = {field.name for field in fields(TokenStats)} - {"step", "vocab_size", *ALWAYS}
    for name, value in per_token.items():
        if value is None:
            continue
        if name not in known and name != "token_weight":
            raise ValueError(f"token_inputs has {name!r}, which is none of {', '.join(sorted(known))}")
        if value.shape != targets.shape:
            raise ValueError(f"{name} must be [n], got {list(value.shape)}, {shapes}")
        if value.requires_grad:
            raise ValueError(f"no gradient flows into {name}: pass {name}.detach()")
