"""Cross-entropy with a weight that the model's own certainty gives: of the token, its distribution or its sequence."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dft_lightning.errors import check_one_of
from dft_lightning.losses.base import IGNORE_INDEX, TokenLoss
from dft_lightning.losses.statistics import Statistic, TokenStats


def weighted_log_prob(weight: Tensor, log_prob: Tensor) -> Tensor:
    """``-sg(weight) log p``, 0 where the weight is 0 and ``log p`` is ``-inf``."""
    weight = weight.detach()
    return -weight * log_prob.masked_fill((weight == 0) & (log_prob == float("-inf")), 0.0)


Mean = Literal["product", "geometric"]


def sequence_sum(values: Tensor, sequence_index: Tensor) -> Tensor:
    """For each token the sum over its sequence; ``[n]`` and ``[n]`` to ``[n]``."""
    place = _numbered(sequence_index)
    return torch.zeros_like(values).index_add(0, place, values)[place]


def _numbered(sequence_index: Tensor) -> Tensor:
    """Sequences numbered from 0 up, as ``torch.unique`` does, which waits for the device to know how many there are."""
    ordered, order = sequence_index.sort()
    number = nn.functional.pad((ordered[1:] != ordered[:-1]).cumsum(0), (1, 0))
    return torch.empty_like(order).scatter_(0, order, number[: len(order)])


def sequence_mean(values: Tensor, sequence_index: Tensor) -> Tensor:
    """For each token the mean over its sequence; ``[n]`` and ``[n]`` to ``[n]``."""
    return sequence_sum(values, sequence_index) / sequence_sum(torch.ones_like(values), sequence_index)


class ChordPhiLoss(TokenLoss):
    """``-sg(p (1 - p)) log p`` of each target token: most is learnt of what the model is undecided about, ``p = 1/2``.

    Source: CHORD, "On-Policy RL Meets Off-Policy Experts", arXiv 2508.11408, the token weight phi; there it is mixed
    with a reinforcement-learning objective, here it stands alone.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> ChordPhiLoss()(logits, torch.tensor([1]))  # log(2) / 4
        tensor(0.1733)
    """

    def token_loss(self, stats: TokenStats) -> Tensor:
        # expm1 keeps the digits of 1 - p near p = 1.
        return weighted_log_prob(stats.log_prob.exp() * -torch.expm1(stats.log_prob), stats.log_prob)


class EAFTLoss(TokenLoss):
    """``-sg((H_k / ln k)**alpha) log p``: little is learnt where the model is certain, right or wrong.

    ``H_k`` is the entropy of the ``k`` likeliest tokens among themselves, so that the weight lies in ``[0, 1]``.

    Source: "Entropy-Adaptive Fine-Tuning", arXiv 2601.02151. Implementations differ in the divisor: the authors' code,
    LLaMA-Factory and ms-swift divide by 3.0 (for ln 20 = 2.996: a weight 0.14% smaller); Axolotl divided by nothing at
    first, three times as large a loss, and by ln k since. This one divides by ln k, the paper's own.

    Args:
        alpha: exponent of the weight, 0 or more; 0 is cross-entropy.
        top_k: ``k``, 2 or more; ``None`` takes the entropy of the whole vocabulary, over its logarithm.

    Raises:
        ValueError: ``alpha`` negative or not finite, ``top_k`` less than 2, unknown reduction; when called, a ``top_k``
            larger than the vocabulary.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, -30.0, -30.0]])
        >>> EAFTLoss(top_k=4)(logits, torch.tensor([0]))  # (log 2 / log 4) log 2
        tensor(0.3466)
    """

    def __init__(
        self, alpha: float = 1.0, top_k: int | None = 20, *, ignore_index: int = IGNORE_INDEX, reduction: str = "mean"
    ) -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        if not (math.isfinite(alpha) and alpha >= 0):
            raise ValueError(f"alpha must be finite and not negative (0 is cross-entropy), got {alpha}")
        if top_k is not None and top_k < 2:
            raise ValueError(f"top_k must be 2 or more, or None for the whole vocabulary, got {top_k}")
        self.alpha = alpha
        self.top_k = top_k

    @property
    def needs(self) -> Iterable[Statistic | str]:
        return ("entropy",) if self.top_k is None else (Statistic("top_k_entropy", k=self.top_k),)

    def token_loss(self, stats: TokenStats) -> Tensor:
        entropy = stats.entropy if self.top_k is None else stats.top_k_entropy
        classes = stats.vocab_size if self.top_k is None else self.top_k
        assert entropy is not None
        if classes < 1:
            raise ValueError("EAFTLoss(top_k=None) divides by the logarithm of stats.vocab_size, which is not given")
        if classes == 1:
            return 0 * stats.log_prob  # always certain
        # Rounding can put the entropy of certainty below 0.
        share = (entropy.detach() / math.log(classes)).clamp(min=0)
        return weighted_log_prob(share.pow(self.alpha), stats.log_prob)


class SequenceDFTLoss(TokenLoss):
    """``-sg(P) log p`` with ``P`` the probability of the whole answer: all targets of the token's sequence.

    ``mean="product"`` takes the product of the targets' probabilities, which for long answers is next to nothing;
    ``mean="geometric"`` their geometric mean.

    Source: the ablation of the DFT paper, arXiv 2508.05629, where both do worse than the weight by token. It is here to
    be compared with.

    Args:
        mean: ``"product"`` or ``"geometric"``.

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
