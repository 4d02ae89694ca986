"""Losses made of losses: a weighted sum, a schedule, one side of a threshold, weights taken from a reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dft_lightning.losses.base import IGNORE_INDEX, TokenLoss, loss_and_slopes, stats_for
from dft_lightning.losses.cross_entropy import CrossEntropyLoss
from dft_lightning.losses.statistics import Statistic, TokenStats, names_of, normalise_needs
from dft_lightning.losses.weighted import weighted_log_prob


class _CombinedLoss(TokenLoss):
    """Needs what its parts need, and may be computed in one pass where every part may."""

    def __init__(self, parts: Sequence[TokenLoss], *, ignore_index: int, reduction: str) -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        for part in parts:
            if not isinstance(part, TokenLoss):
                raise TypeError(f"{type(self).__name__} is made of token losses, got {type(part).__name__}: {part!r}")
            if (part.ignore_index, part.reduction) != (IGNORE_INDEX, "mean"):
                raise ValueError(
                    f"set ignore_index and reduction of {type(self).__name__}, not of the {type(part).__name__} in it"
                )
        self.parts = nn.ModuleList(parts)
        self.pointwise = all(part.pointwise for part in parts)
        self.uses_step = any(part.uses_step for part in parts)
        self.takes_negative_weights = all(part.takes_negative_weights for part in parts)
        self.refresh_every = self._refreshed(parts)
        self._needs = _union(parts, type(self).__name__)

    def _refreshed(self, parts: Sequence[TokenLoss]) -> int | None:
        """Of the parts that read reference log-probs, which have one place in ``TokenStats``."""
        found = {part.refresh_every for part in parts if "reference_log_prob" in names_of(part.needs)} or {None}
        if len(found) > 1:
            raise ValueError(
                f"{type(self).__name__}: its losses want reference log-probs of different models, by refresh_every: "
                f"{', '.join(sorted(map(str, found)))}; they must agree"
            )
        return found.pop()

    @property
    def needs(self) -> Iterable[Statistic | str]:
        return self._needs

    @property
    def _losses(self) -> list[TokenLoss]:
        return cast(list[TokenLoss], list(self.parts))


def _union(parts: Sequence[TokenLoss], where: str) -> tuple[Statistic, ...]:
    """What the parts need together; two forms of one statistic would have one place in ``TokenStats``."""
    found: dict[str, Statistic] = {}
    for need in (need for part in parts for need in normalise_needs(part.needs)):
        if found.setdefault(need.name, need) != need:
            raise ValueError(f"{where}: one loss needs {found[need.name]!r} and another {need!r}; they must agree")
    return tuple(found.values())


class MixtureLoss(_CombinedLoss):
    """Weighted sum of token losses, ``sum_i w_i L_i``, for each token.

    With ``losses`` cross-entropy and DFT and weights ``[1 - a, a]`` a token has the gradient weight ``1 - a + a p``:
    what the model finds unlikely is learnt from, but less.

    Args:
        losses: the parts, at least one.
        weights: a factor for each, finite and not negative; ``None`` for their mean.

    Raises:
        ValueError: weights that do not fit the losses, are negative or all 0; parts that need different forms of one
            statistic, or have an ``ignore_index`` or ``reduction`` of their own.
        TypeError: a part is no token loss.

    Example:
        >>> import torch
        >>> from dft_lightning.losses import CrossEntropyLoss, DFTLoss
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
        >>> MixtureLoss([CrossEntropyLoss(), DFTLoss()], weights=[0.5, 0.5])(logits, torch.tensor([2]))
        tensor(0.8664)
    """

    def __init__(
        self,
        losses: list[TokenLoss],
        weights: list[float] | None = None,
        *,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
    ) -> None:
        if not losses:
            raise ValueError("MixtureLoss needs at least one loss")
        super().__init__(losses, ignore_index=ignore_index, reduction=reduction)
        weights = [1 / len(losses)] * len(losses) if weights is None else list(weights)
        if len(weights) != len(losses):
            raise ValueError(f"weights must have one number for each of {len(losses)} losses, got {weights}")
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise ValueError(f"weights must be finite, not negative and not all 0, got {weights}")
        self.weights = weights

    def token_loss(self, stats: TokenStats) -> Tensor:
        # A part of weight 0 is left out: its loss may be infinite where the others' are not.
        kept = [(part, weight) for part, weight in zip(self._losses, self.weights, strict=True) if weight]
        return torch.stack([weight * part.token_loss(stats_for(part, stats)) for part, weight in kept]).sum(0)


class ScheduledLoss(_CombinedLoss):
    """From one token loss to another over optimizer steps: ``(1 - a) start + a end``.

    ``a`` is 0 until ``begin_step``, 1 from ``end_step``, and rises linearly between them; equal steps switch at once.
    A new skill can begin with cross-entropy, which learns it, and end with DFT, which sharpens it.

    The step is that of the optimizer, counted from 0. ``CausalLMModule`` gives it, and a checkpoint keeps it;
    as a criterion on logits the loss takes it by name: ``loss(logits, targets, step=step)``.

    Args:
        start: the loss at the beginning.
        end: the loss at the end.
        end_step: the first step on ``end`` alone.
        begin_step: the last step on ``start`` alone, where the two differ.

    Raises:
        ValueError: unless ``0 <= begin_step <= end_step``; parts as for :class:`MixtureLoss`.
        TypeError: a part is no token loss.

    Example:
        >>> import torch
        >>> from dft_lightning.losses import CrossEntropyLoss, DFTLoss
        >>> loss = ScheduledLoss(CrossEntropyLoss(), DFTLoss(), begin_step=100, end_step=200)
        >>> logits, targets = torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([2])
        >>> [round(loss(logits, targets, step=step).item(), 4) for step in (0, 100, 150, 200, 1000)]
        [1.3863, 1.3863, 0.8664, 0.3466, 0.3466]
    """

    def __init__(
        self,
        start: TokenLoss,
        end: TokenLoss,
        end_step: int,
        begin_step: int = 0,
        *,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
    ) -> None:
        super().__init__([start, end], ignore_index=ignore_index, reduction=reduction)
        if not 0 <= begin_step <= end_step:
            raise ValueError(f"need 0 <= begin_step <= end_step, got {begin_step} and {end_step}")
        self.begin_step = begin_step
        self.end_step = end_step
        self.uses_step = True

    def share_of_end(self, step: int) -> float:
        """``a`` at an optimizer step, in ``[0, 1]``."""
        if step >= self.end_step:
            return 1.0
        if step <= self.begin_step:
            return 0.0
        return (step - self.begin_step) / (self.end_step - self.begin_step)

    def token_loss(self, stats: TokenStats) -> Tensor:
        share = self.share_of_end(stats.step)
        start, end = self._losses
        if share in (0.0, 1.0):  # and not 0 times the other: its loss may be infinite
            part = end if share else start
            return part.token_loss(stats_for(part, stats))
        return (1 - share) * start.token_loss(stats_for(start, stats)) + share * end.token_loss(stats_for(end, stats))


class ThresholdLoss(_CombinedLoss):
    """Another loss where ``p >= threshold`` (or, with ``above=False``, where ``p < threshold``), and 0 elsewhere.

    The divisor is still the number of all target tokens; ``model.step.renormalize`` divides by the weights of those
    that are kept.

    Source: ProFit, arXiv 2601.09195 (cross-entropy at and above the threshold, divided by all targets, as here), and
    the thresholded objectives of "Beyond Log Likelihood", arXiv 2510.00526 (``1 - p`` on either side:
    ``base=PowerLoss(1.0)``). The authors' code of the latter divides by the tokens kept in a micro-batch, so that its
    result depends on how a step is split.

    Args:
        threshold: a probability, in ``[0, 1]``; ProFit's scripts have 0.1.
        above: keep the tokens at and above the threshold; otherwise those below.
        base: the loss of the tokens kept; ``None`` for cross-entropy.

    Raises:
        ValueError: the threshold is no probability, or 0 with ``above=False``; a base with an ``ignore_index`` or
            ``reduction`` of its own.
        TypeError: the base is no token loss.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
        >>> ThresholdLoss(threshold=0.3, reduction="none")(logits, torch.tensor([0, 0]))  # p = 0.5 and 0.12
        tensor([0.6931, 0.0000])
    """

    def __init__(
        self,
        threshold: float = 0.1,
        above: bool = True,
        base: TokenLoss | None = None,
        *,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
    ) -> None:
        base = CrossEntropyLoss() if base is None else base
        super().__init__([base], ignore_index=ignore_index, reduction=reduction)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is a probability and must lie in [0, 1], got {threshold}")
        if threshold == 0 and not above:
            raise ValueError("no token is below a threshold of 0: nothing would be learnt")
        self.threshold = threshold
        self.above = above

    def token_loss(self, stats: TokenStats) -> Tensor:
        kept = (stats.log_prob.detach().exp() >= self.threshold) == self.above
        base = self._losses[0]
        return torch.where(kept, base.token_loss(stats_for(base, stats)), 0.0)


class FromReference(_CombinedLoss):
    """``-sg(w(r)) log p``: a loss's weight, ``-dL/dl``, taken at the reference's probability of the target.

    A weight that the model gives itself moves with what it learns; the reference's stays. ``FromReference(DFTLoss())``
    is ``PriorWeightedLoss()``.

    Source: the finding of PriFT, arXiv 2606.09396, that rules which weigh tokens do better by the pretrained model's
    probabilities; its code has DFT's weight alone.

    Args:
        loss: a pointwise loss that reads nothing but the target's log-probability.

    Raises:
        ValueError: a loss that reads more; one with an ``ignore_index`` or ``reduction`` of its own.
        TypeError: it is no token loss.

    Example:
        >>> from dft_lightning.losses import DFTLoss
        >>> logits, targets = torch.tensor([[0.0, 0.0]]), torch.tensor([1])
        >>> FromReference(DFTLoss())(logits, targets, reference_log_prob=torch.tensor([0.25]).log())  # log(2) / 4
        tensor(0.1733)
    """

    def __init__(self, loss: TokenLoss, *, ignore_index: int = IGNORE_INDEX, reduction: str = "mean") -> None:
        super().__init__([loss], ignore_index=ignore_index, reduction=reduction)
        reads = sorted(names_of(loss.needs))
        if reads or not loss.pointwise:
            what = f"reads {', '.join(reads)}" if reads else "is not pointwise"
            raise ValueError(
                f"FromReference takes the weight at the reference's probability of a target, and {type(loss).__name__} "
                f"{what}: give a loss of log_prob alone"
            )

    @property
    def needs(self) -> Iterable[Statistic | str]:
        return ("reference_log_prob",)

    def token_loss(self, stats: TokenStats) -> Tensor:
        assert stats.reference_log_prob is not None
        reference = stats.reference_log_prob.to(stats.log_prob.dtype)
        step = stats.step if self.uses_step else 0
        at_reference = TokenStats(log_prob=reference, step=step, vocab_size=stats.vocab_size)
        return weighted_log_prob(-loss_and_slopes(self._losses[0], at_reference)[1]["log_prob"], stats.log_prob)
