"""Dynamic Fine-Tuning: cross-entropy weighted by the token's own probability."""

from __future__ import annotations

from torch import Tensor

from dft_lightning.losses.base import TokenLoss
from dft_lightning.losses.statistics import TokenStats


class DFTLoss(TokenLoss):
    """``-sg(p) log p`` of each target token, ``sg`` the stop-gradient; its gradient is that of ``-p``.

    For soft targets ``q`` the weight is ``sg(sum q p)`` and the loss ``-weight * sum q log p``.

    Source: "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification",
    arXiv 2508.05629, the token-level objective.

    Args:
        ignore_index: see :class:`TokenLoss`.
        reduction: see :class:`TokenLoss`.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
        >>> DFTLoss()(logits, torch.tensor([2]))  # log(4) / 4
        tensor(0.3466)
    """

    def token_loss(self, stats: TokenStats) -> Tensor:
        assert stats.log_expected_prob is not None
        # p log p tends to 0 with p; a target whose logit is -inf would give 0 * -inf.
        log_prob = stats.log_prob.masked_fill(stats.log_prob == float("-inf"), 0.0)
        return -stats.log_expected_prob.detach().exp() * log_prob
