"""From logits to the summed token loss and the statistics that telemetry reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dft_lightning.losses.base import (
    IGNORE_INDEX,
    TokenLoss,
    check_class_indices,
    required_step,
    token_loss_and_weight,
)
from dft_lightning.losses.from_logits import statistics_from_logits
from dft_lightning.losses.statistics import Statistic, normalise_needs
from dft_lightning.ops.call import TokenOutput, reduced


def logits_token_loss(
    logits: Tensor,
    targets: Tensor,
    loss: TokenLoss,
    *,
    ignore_index: int = IGNORE_INDEX,
    target_index: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    sequence_index: Tensor | None = None,
    reference_log_prob: Tensor | None = None,
    reference_logits: Tensor | None = None,
    token_weight: Tensor | None = None,
    statistics: Iterable[Statistic | str] = (),
    step: int | None = None,
) -> TokenOutput:
    """Sum a token loss over the targets of a batch, with per-token statistics from the same pass.

    Args:
        logits: ``[B, T, V]``; half precision is raised to float32 on the kept rows alone.
        targets: ``[B, T]`` class indices, aligned with ``logits`` (already shifted). Rows with ``ignore_index``
            are dropped first: they cost nothing, and their gradient is exactly zero.
        loss: any token loss.
        ignore_index: the target that is left out.
        target_index: ``[m]``, the positions of the targets in the flattened ``targets``, in order; see
            :func:`~dft_lightning.ops.linear_token_loss`.
        normalizer: what the sum is divided by.
        sequence_index: ``[B, T]``, the sequence of each token; ``None`` makes one of each row.
        reference_log_prob: ``[B, T]`` of the targets under a reference model, for losses that need it; a constant.
        reference_logits: ``[B, T, V]`` of a reference model, for losses that need ``reference_kl``; a constant.
        token_weight: ``[B, T]`` factors of the tokens' losses. They count in the statistic ``weight``, not in the
            normaliser.
        statistics: what to compute beyond ``loss.needs``, such as ``"entropy"``.
        step: the optimizer step, which losses with a schedule need.
    """
    step = required_step(loss, step)
    if target_index is None:
        check_class_indices(targets, logits.shape[-1], ignore_index)
        target_index = (targets.flatten() != ignore_index).nonzero().squeeze(-1)
    place = _place(target_index, targets.shape)
    kept_logits, kept_targets = logits[place], targets[place]
    needs = normalise_needs(loss.needs)
    extra = [statistic for statistic in normalise_needs(statistics) if statistic not in needs]
    for statistic in extra:
        if other := [need for need in needs if need.name == statistic.name]:
            raise ValueError(f"one call computes {other[0]!r} or {statistic!r}, not both")
    sequences = None
    if any(need.name == "sequence_index" for need in (*needs, *extra)):
        sequences = place[0] if sequence_index is None else sequence_index[place]
    given: dict[str, Any] = {
        "sequence_index": sequences,
        "reference_log_prob": None if reference_log_prob is None else reference_log_prob[place],
        "reference_logits": None if reference_logits is None else reference_logits[place],
    }
    stats = statistics_from_logits(kept_logits, kept_targets, needs, step=step, **given)
    losses, weight = token_loss_and_weight(loss, stats, None if token_weight is None else token_weight[place])
    values: dict[str, Any] = {}
    with torch.no_grad():
        correct = kept_logits.argmax(-1) == kept_targets
        if extra:
            found = statistics_from_logits(kept_logits, kept_targets, extra, **given)
            values = {statistic.name: getattr(found, statistic.name) for statistic in extra}
    return reduced(losses, stats, normalizer, weight=weight, correct=correct, **values)


def _place(index: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """Positions in a flattened tensor as those of each dimension: a slice of logits is not copied to be flattened."""
    place: list[Tensor] = []
    for size in reversed(shape[1:]):
        place.insert(0, index % size)
        index = index // size
    return (index, *place)
