"""Focal loss: cross-entropy weighted towards tokens the model finds unlikely."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dft_lightning.losses.base import IGNORE_INDEX, TokenLoss
from dft_lightning.losses.statistics import TokenStats


class FocalLoss(TokenLoss):
    """``-alpha (1 - p)**gamma log p`` of each target token.

    For soft targets ``q`` the weight is ``alpha (1 - sum q p)**gamma`` and the loss ``-weight * sum q log p``.
    The gradient is finite for every ``gamma``, at p = 1 as well.

    Source: Lin et al., "Focal Loss for Dense Object Detection", arXiv 1708.02002, equations 4 and 5.

    Args:
        gamma: focusing parameter, 0 or more; 0 is cross-entropy.
        alpha: constant factor, more than 0.
        detach_weight: take the weight as a constant, without its own gradient.

    Raises:
        ValueError: ``gamma`` negative or not finite, ``alpha`` not positive or not finite, unknown reduction.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
        >>> FocalLoss(gamma=2.0)(logits, torch.tensor([2]))  # (3/4)**2 * log 4
        tensor(0.7798)
    """

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float = 1.0,
        detach_weight: bool = False,
        *,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
    ) -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        if not (math.isfinite(gamma) and gamma >= 0):
            raise ValueError(f"gamma must be finite and not negative, got {gamma}")
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha must be finite and positive, got {alpha}")
        self.gamma = gamma
        self.alpha = alpha
        self.detach_weight = detach_weight

    def token_loss(self, stats: TokenStats) -> Tensor:
        if self.gamma == 0:
            return -self.alpha * stats.log_prob
        assert stats.log_expected_prob is not None
        # Where p = 0 the weight is alpha, a constant; its gradient would be 0 * inf.
        log_p = stats.log_expected_prob
        log_p = log_p.masked_fill(log_p == float("-inf"), torch.finfo(log_p.dtype).min)
        # expm1 keeps the digits of 1 - p where p is near 1. Rounding can put log sum q p above 0, never by more.
        one_minus_p = -torch.expm1(log_p.clamp(max=0))
        # At p = 1 the loss and its gradient tend to 0, but d/dp of (1-p)**gamma is infinite for gamma < 1 and
        # autograd would make inf * 0. The threshold keeps (1-p)**(gamma-1) within the dtype's range.
        certain = one_minus_p < torch.finfo(one_minus_p.dtype).tiny
        weight = self.alpha * one_minus_p.masked_fill(certain, 1.0).pow(self.gamma)
        weight = weight.masked_fill(certain, 0.0)
        return -(weight.detach() if self.detach_weight else weight) * stats.log_prob


def focal_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    gamma: float = 2.0,
    alpha: float = 1.0,
    detach_weight: bool = False,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
) -> Tensor:
    """Focal loss ``-alpha (1 - p)**gamma log p``; see :class:`~dft_lightning.losses.FocalLoss`.

    Args:
        logits: ``[..., V]``, classes last.
        targets: ``[...]`` class indices or ``[..., V]`` soft targets.
        gamma: focusing parameter; 0 is cross-entropy.
        alpha: constant factor.
        detach_weight: take the weight as a constant.
        ignore_index: the class index to leave out.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: as :func:`~dft_lightning.losses.dft_cross_entropy`, and for ``gamma`` or ``alpha`` out of range.

    Example:
        >>> import torch
        >>> focal_cross_entropy(torch.zeros(1, 4), torch.tensor([1]), gamma=2.0)
        tensor(0.7798)
    """
    loss = FocalLoss(gamma, alpha, detach_weight, ignore_index=ignore_index, reduction=reduction)
    result: Tensor = loss(logits, targets)
    return result
