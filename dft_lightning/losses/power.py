"""Losses between cross-entropy and one minus the probability: ``(1 - p**q) / q``."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from dft_lightning.losses.base import IGNORE_INDEX, TokenLoss
from dft_lightning.losses.statistics import Statistic, TokenStats


class PowerLoss(TokenLoss):
    """``(1 - p**q) / q`` of each target token; its gradient is that of ``-sg(p**q) log p``.

    ``q`` goes from cross-entropy (0, its limit) to the gradient of DFT (1), and beyond: the larger, the less is learnt
    of what the model finds unlikely. The loss lies in ``[0, 1 / q]``. For soft targets ``p`` is ``exp(sum q log p)``,
    where DFT's weight is ``sum q p``.

    Source: "Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning", arXiv 2510.00526, the
    family ``(1 - p**alpha) / alpha``; their code has no stop-gradient in it, and neither has this.

    Args:
        q: the exponent, 0 or more.

    Raises:
        ValueError: ``q`` negative or not finite, unknown reduction.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
        >>> PowerLoss(q=0.5)(logits, torch.tensor([2]))  # (1 - 1/2) / 0.5
        tensor(1.)
    """

    def __init__(self, q: float = 1.0, *, ignore_index: int = IGNORE_INDEX, reduction: str = "mean") -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        if not (math.isfinite(q) and q >= 0):
            raise ValueError(f"q must be finite and not negative (0 is cross-entropy, 1 has DFT's gradient), got {q}")
        self.q = q

    def token_loss(self, stats: TokenStats) -> Tensor:
        if self.q == 0:
            return -stats.log_prob
        # expm1 keeps the digits of 1 - p**q near p = 1 and for small q.
        return -torch.expm1(self.q * stats.log_prob) / self.q


class DEFTLoss(TokenLoss):
    """``(1 - p**a) / a`` with ``a = sg(sum_v p_v**2)``: the power is how sure the model is of anything.

    Where the model is certain, ``a`` is 1 and the gradient DFT's, ``-p``; where it spreads over many tokens, ``a``
    tends to 0 and the loss to cross-entropy. The gradient is that of ``-sg(p**a) log p``.

    Source: DEFT, arXiv 2602.11424, the exponent by the collision probability of the model's distribution (the
    exponential of minus its Renyi entropy of order 2).

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])  # a = 1/4
        >>> DEFTLoss()(logits, torch.tensor([2]))  # 4 (1 - (1/4)**(1/4))
        tensor(1.1716)
    """

    @property
    def needs(self) -> Iterable[Statistic | str]:
        return ("sum_squared_prob",)

    def token_loss(self, stats: TokenStats) -> Tensor:
        assert stats.sum_squared_prob is not None
        power = stats.sum_squared_prob.detach()
        return -torch.expm1(power * stats.log_prob) / power
