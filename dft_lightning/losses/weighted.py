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


class InfoSFTLoss(TokenLoss):
    """``-sg(p max(0, 1 - logit(p) / logit(peak))) log p``: what the model half knows, and nothing of what it knows.

    ``logit(p) = log p - log(1 - p)``. The weight is ``p`` at 1/2 and more than ``p`` below, 0.508 at the most (near
    0.57), and 0 from ``peak`` on.

    Source: InfoSFT, arXiv 2605.14967, as in the authors' code (Helloworld10011/InfoSFT), whose command has 0.93. There
    the sum is divided by the number of target tokens, as here, and not by the weights.

    Args:
        peak: the probability from which on nothing is learnt; more than 1/2 and less than 1.

    Raises:
        ValueError: ``peak`` out of range, unknown reduction.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> InfoSFTLoss()(logits, torch.tensor([1]))  # log(2) / 2
        tensor(0.3466)
    """

    def __init__(self, peak: float = 0.93, *, ignore_index: int = IGNORE_INDEX, reduction: str = "mean") -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        if not 0.5 < peak < 1:
            raise ValueError(f"peak is a probability between 1/2 and 1, got {peak}")
        self.peak = peak

    def token_loss(self, stats: TokenStats) -> Tensor:
        log_prob = stats.log_prob.detach()
        p, logit = log_prob.exp(), log_prob - (-torch.expm1(log_prob)).log()
        weight = p * (1 - logit / math.log(self.peak / (1 - self.peak))).clamp(min=0)
        return weighted_log_prob(weight.masked_fill(p == 0, 0.0), stats.log_prob)


class TrustRegionLoss(TokenLoss):
    """``-p / sg(max(p, floor))``: cross-entropy's gradient where ``p >= floor``, DFT's over ``floor`` below.

    The gradient is that of ``-sg(min(1, p / floor)) log p``. The loss is -1 from the floor on and not in nats: watch
    ``nll``.

    Source: TrSFT of TRAPO, arXiv 2512.17636, as in the authors' code (Su-my/TRAPO, ``clip_low``), where the floor of
    0.1 is fixed. Their script divides by the padded length and adds an entropy bonus; here the divisor is the target
    tokens.

    Args:
        floor: a probability, more than 0 and at most 1; 1 has DFT's gradient.

    Raises:
        ValueError: ``floor`` out of range, unknown reduction.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
        >>> TrustRegionLoss(reduction="none")(logits, torch.tensor([1, 0]))  # p = 0.5 and 0.047
        tensor([-1.0000, -0.4743])
    """

    def __init__(self, floor: float = 0.1, *, ignore_index: int = IGNORE_INDEX, reduction: str = "mean") -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        if not 0 < floor <= 1:
            raise ValueError(f"floor is a probability, more than 0 and at most 1, got {floor}")
        self.floor = floor

    def token_loss(self, stats: TokenStats) -> Tensor:
        p = stats.log_prob.exp()
        return -p / p.detach().clamp(min=self.floor)


class RectifiedLoss(TokenLoss):
    """``-sg(w) log p``, ``w = 1`` where ``p > threshold`` and ``w = p`` elsewhere: what is unlikely is hardly learnt.

    Source: GFT, arXiv 2604.14258, as in the authors' code (ZJU-OmniAI/GFT); its function has 0.5, its script sets 0.1.
    There the loss is multiplied by a row's advantage, its reward less the mean of its group over the group's standard
    deviation: give it as the row's ``advantage``. A negative one unlearns the token, with the weight ``p`` below the
    threshold, so that what is next to impossible is left alone.

    Args:
        threshold: a probability, in ``[0, 1]``; 0 is cross-entropy, 1 DFT.

    Raises:
        ValueError: the threshold is no probability, unknown reduction.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
        >>> RectifiedLoss(threshold=0.4, reduction="none")(logits, torch.tensor([1, 0]))  # p = 0.5 and 0.27
        tensor([0.6931, 0.3532])
    """

    def __init__(self, threshold: float = 0.5, *, ignore_index: int = IGNORE_INDEX, reduction: str = "mean") -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is a probability and must lie in [0, 1], got {threshold}")
        self.threshold = threshold

    def token_loss(self, stats: TokenStats) -> Tensor:
        p = stats.log_prob.detach().exp()
        return weighted_log_prob(torch.where(p > self.threshold, 1.0, p), stats.log_prob)


class EAFTLoss(TokenLoss):
    """``-sg((H_k / ln k)**alpha) log p``: little is learnt where the model is certain, right or wrong.

    ``H_k`` is the entropy of the ``k`` likeliest tokens among themselves, so that the weight lies in ``[0, 1]``.

    Source: "Entropy-Adaptive Fine-Tuning", arXiv 2601.02151. Implementations differ in the divisor: the authors' code,
    which are forks of LLaMA-Factory and ms-swift, and LLaMA-Factory divide by 3.0 (for ln 20 = 2.996: a weight 0.14%
    smaller); Axolotl divides by nothing, three times as large a loss. This one divides by ln k, the paper's own.

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
