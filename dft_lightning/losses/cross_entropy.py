"""Cross-entropy: what supervised fine-tuning usually minimises."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dft_lightning.losses.base import TokenLoss
from dft_lightning.losses.statistics import Statistic, TokenStats


class CrossEntropyLoss(TokenLoss):
    """``-log p`` of each target token, with optional label smoothing as in :class:`torch.nn.CrossEntropyLoss`.

    With smoothing ``e``: ``-(1 - e) log p - e * mean over the vocabulary of log p``.

    Args:
        label_smoothing: in ``[0, 1]``.
        ignore_index: see :class:`TokenLoss`.
        reduction: see :class:`TokenLoss`.

    Raises:
        ValueError: ``label_smoothing`` outside ``[0, 1]``, or an unknown reduction.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
        >>> CrossEntropyLoss()(logits, torch.tensor([2]))  # log 4
        tensor(1.3863)
    """

    def __init__(self, label_smoothing: float = 0.0, *, ignore_index: int = -100, reduction: str = "mean") -> None:
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
