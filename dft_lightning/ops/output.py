"""What a head returns for a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dft_lightning.losses.statistics import TokenStats


@dataclass(frozen=True, kw_only=True)
class TokenOutput(TokenStats):
    """The loss of ``n`` target tokens and what is known of each: the fields of :class:`TokenStats`, and these.

    All but ``loss`` are detached; per-token tensors have shape ``[n]`` and are float32, or float64 where the logits
    are. A statistic that neither the loss nor the caller asked for is ``None``.

    Attributes:
        loss: scalar sum over the targets, over the normaliser where there is one; differentiable, and 0 with a path
            to the inputs where ``n`` is 0.
        loss_sum: the sum itself, detached; taken from ``loss`` where it is not given.
        weight: ``-dL/dl`` of each target for ``L`` the sum: 1 for cross-entropy, ``p`` for DFT.
        correct: whether the target is the likeliest token (bool; of equally likely ones, the first).
    """

    loss: Tensor
    weight: Tensor
    correct: Tensor
    loss_sum: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_sum is None:
            object.__setattr__(self, "loss_sum", self.loss.detach())


def connected(loss_sum: Tensor, log_prob: Tensor) -> Tensor:
    """A loss that reads nothing (a constant) still gets a path to the inputs, which data parallelism waits for."""
    if loss_sum.requires_grad or not log_prob.requires_grad:
        return loss_sum
    return loss_sum + (0 * log_prob).nan_to_num().sum()


def detached(stats: TokenStats) -> dict[str, Any]:
    """The fields of hard-target statistics without their graph."""
    values = {name: value.detach() if isinstance(value, Tensor) else value for name, value in vars(stats).items()}
    del values["log_expected_prob"]  # the same as log_prob
    return values
