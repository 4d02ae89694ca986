"""From logits to the summed token loss and the statistics that telemetry reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dft_lightning.losses.base import TokenLoss, token_loss_and_weight
from dft_lightning.losses.statistics import normalise_needs, statistics_from_logits


@dataclass(frozen=True)
class TokenOutput:
    """The loss of ``n`` target tokens and what is known of each. All but ``loss`` are detached, shape ``[n]``.

    Attributes:
        loss: scalar sum over the targets, differentiable; 0 with a path to the logits where ``n`` is 0.
        log_prob: log-probability of each target, float32 or float64.
        weight: ``-dL/dl`` of each target: 1 for cross-entropy, ``p`` for DFT.
        correct: whether the target is the likeliest token (bool).
        entropy: of the predicted distribution in nats, or ``None`` where not asked for.
    """

    loss: Tensor
    log_prob: Tensor
    weight: Tensor
    correct: Tensor
    entropy: Tensor | None = None


def logits_token_loss(
    logits: Tensor,
    targets: Tensor,
    loss: TokenLoss,
    *,
    ignore_index: int = -100,
    step: int = 0,
    with_entropy: bool = False,
) -> TokenOutput:
    """Sum a token loss over the targets of a batch, with per-token statistics from the same pass.

    Args:
        logits: ``[B, T, V]``; half precision is raised to float32 on the kept rows alone.
        targets: ``[B, T]`` class indices, aligned with ``logits`` (already shifted). Rows with ``ignore_index``
            are dropped first: they cost nothing, and their gradient is exactly zero.
        loss: any token loss.
        ignore_index: the target that is left out.
        step: the optimizer step, for losses with a schedule.
        with_entropy: compute the entropy even if the loss does not need it.
    """
    kept = targets != ignore_index
    kept_logits, kept_targets = logits[kept], targets[kept]
    needs = normalise_needs(loss.needs)
    sequence_index = kept.nonzero()[:, 0] if any(need.name == "sequence_index" for need in needs) else None
    stats = statistics_from_logits(kept_logits, kept_targets, needs, sequence_index=sequence_index, step=step)
    losses, weight = token_loss_and_weight(loss, stats)
    with torch.no_grad():
        correct = kept_logits.argmax(-1) == kept_targets
        entropy = stats.entropy
        if entropy is None and with_entropy:
            entropy = statistics_from_logits(kept_logits, kept_targets, ["entropy"]).entropy
    return TokenOutput(
        loss=losses.sum(),
        log_prob=stats.log_prob.detach(),
        weight=weight,
        correct=correct,
        entropy=None if entropy is None else entropy.detach(),
    )
