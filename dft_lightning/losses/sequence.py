"""Losses that weight a token by its whole answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from dft_lightning.errors import check_one_of
from dft_lightning.losses.base import IGNORE_INDEX, TokenLoss
from dft_lightning.losses.statistics import Statistic, TokenStats
from dft_lightning.losses.weighted import weighted_log_prob

Mean = Literal["product", "geometric"]


def sequence_sum(values: Tensor, sequence_index: Tensor) -> Tensor:
    """For each token the sum over its sequence; ``[n]`` and ``[n]`` to ``[n]``."""
    place = torch.unique(sequence_index, return_inverse=True)[1]
    return torch.zeros_like(values).index_add(0, place, values)[place]


def sequence_mean(values: Tensor, sequence_index: Tensor) -> Tensor:
    """For each token the mean over its sequence; ``[n]`` and ``[n]`` to ``[n]``."""
    return sequence_sum(values, sequence_index) / sequence_sum(torch.ones_like(values), sequence_index)


class SequenceDFTLoss(TokenLoss):
    """``-sg(P) log p`` with ``P`` the probability of the whole answer: all targets of the token's sequence.

    ``mean="product"`` takes the product of the targets' probabilities, which for long answers is next to nothing;
    ``mean="geometric"`` their geometric mean.

    Source: the ablation of the DFT paper, arXiv 2508.05629, where both do worse than the weight by token. It is here to
    be compared with.

    Args:
        mean: ``"product"`` or ``"geometric"``.
        ignore_index: see :class:`TokenLoss`.
        reduction: see :class:`TokenLoss`.

    Raises:
        ValueError: unknown mean or reduction.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])  # one answer of two tokens
        >>> SequenceDFTLoss(mean="product")(logits, torch.tensor([[1, 0]]))  # log(2) / 4
        tensor(0.1733)
        >>> SequenceDFTLoss(mean="geometric")(logits, torch.tensor([[1, 0]]))  # log(2) / 2
        tensor(0.3466)
    """

    pointwise = False

    def __init__(self, mean: Mean = "product", *, ignore_index: int = IGNORE_INDEX, reduction: str = "mean") -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        check_one_of("mean", mean, get_args(Mean))
        self.mean = mean

    @property
    def needs(self) -> Iterable[Statistic | str]:
        return ("sequence_index",)

    def token_loss(self, stats: TokenStats) -> Tensor:
        assert stats.sequence_index is not None
        over = sequence_sum if self.mean == "product" else sequence_mean
        return weighted_log_prob(over(stats.log_prob.detach(), stats.sequence_index).exp(), stats.log_prob)
