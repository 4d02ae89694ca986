"""Cross-entropy, which supervised fine-tuning usually minimises, and DFT, which weights it by the probability."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dft_lightning.losses.base import IGNORE_INDEX, TokenLoss
from dft_lightning.losses.statistics import Statistic, TokenStats


class CrossEntropyLoss(TokenLoss):
    """``-log p`` of each target token, with optional label smoothing as in :class:`torch.nn.CrossEntropyLoss`.

    With smoothing ``e``: ``-(1 - e) log p - e * mean over the vocabulary of log p``.

    Args:
        label_smoothing: in ``[0, 1]``.

    Raises:
        ValueError: ``label_smoothing`` outside ``[0, 1]``, or an unknown reduction.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
        >>> CrossEntropyLoss()(logits, torch.tensor([2]))  # log 4
        tensor(1.3863)
    """

    def __init__(
        self, label_smoothing: float = 0.0, *, ignore_index: int = IGNORE_INDEX, reduction: str = "mean"
    ) -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
        self.label_smoothing = label_smoothing

    @property
    def needs(self) -> Iterable[Statistic | str]:
        return ("mean_log_prob",) if self.label_smoothing > 0 else ()

    def token_loss(self, stats: TokenStats) -> Tensor:
        if self.label_smoothing == 0:
            return -stats.log_prob
        assert stats.mean_log_prob is not None
        return -(1 - self.label_smoothing) * stats.log_prob - self.label_smoothing * stats.mean_log_prob


class DFTLoss(TokenLoss):
    """``-sg(p) log p`` of each target token, ``sg`` the stop-gradient; its gradient is that of ``-p``.

    For soft targets ``q`` the weight is ``sg(sum q p)`` and the loss ``-weight * sum q log p``.

    Source: "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification",
    arXiv 2508.05629, the token-level objective.

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


def dft_cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX, reduction: str = "mean"
) -> Tensor:
    """Dynamic Fine-Tuning loss ``-sg(p) log p``; see :class:`~dft_lightning.losses.DFTLoss`.

    Args:
        logits: ``[..., V]``, classes last.
        targets: ``[...]`` class indices or ``[..., V]`` soft targets.
        ignore_index: the class index to leave out.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: shapes that do not match, a class index out of range, an unknown reduction.

    Example:
        >>> import torch
        >>> dft_cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]), reduction="none")
        tensor([0.3466, 0.0000])
    """
    result: Tensor = DFTLoss(ignore_index=ignore_index, reduction=reduction)(logits, targets)
    return result
