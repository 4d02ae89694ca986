"""Losses against a reference model: importance weights, a proximal ratio, an anchor, a prior."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from dft_lightning.errors import check_one_of
from dft_lightning.losses.base import IGNORE_INDEX, TokenLoss
from dft_lightning.losses.cross_entropy import DFTLoss
from dft_lightning.losses.statistics import Statistic, TokenStats
from dft_lightning.losses.weighted import sequence_mean, weighted_log_prob

Level = Literal["token", "sequence"]


class ImportanceWeightedLoss(TokenLoss):
    """``-sg(clip(exp(temperature (l - l_ref)))) l``: tokens count by how much likelier they are than under a reference.

    ``level="token"`` takes each token's own difference ``l - l_ref``; ``level="sequence"`` gives every token the mean
    of its sequence's, and so needs whole sequences.

    Source: "Supervised Fine Tuning on Curated Data is Reinforcement Learning (and can be improved)", arXiv 2507.12856.
    The authors' trainer takes the mean over the sequence (``level="sequence"``) with temperature 1 and the ratio
    clipped to [0, 16]; its branch for tokens clips to [0.2, 1.8].

    Args:
        level: ``"token"`` or ``"sequence"``.
        clip: lower and upper bound of the weight; ``None`` for none.
        temperature: factor of the difference, finite.

    Raises:
        ValueError: unknown level, bounds unless ``0 <= lower <= upper``, a temperature that is not finite, unknown
            reduction.

    Example:
        >>> loss = ImportanceWeightedLoss(level="token", clip=(0.2, 1.8))
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> loss(logits, torch.tensor([1]), reference_log_prob=torch.tensor([-0.8]))  # (1/2) / exp(-0.8) * log 2
        tensor(0.7713)
    """

    def __init__(
        self,
        level: Level = "sequence",
        clip: tuple[float, float] | None = (0.0, 16.0),
        temperature: float = 1.0,
        *,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
    ) -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        check_one_of("level", level, get_args(Level))
        if clip is not None and not (len(clip) == 2 and 0 <= clip[0] <= clip[1]):
            raise ValueError(f"clip must be two numbers, 0 <= lower <= upper, or None, got {clip}")
        if not math.isfinite(temperature):
            raise ValueError(f"temperature must be finite, got {temperature}")
        self.level = level
        self.clip = None if clip is None else (float(clip[0]), float(clip[1]))
        self.temperature = temperature
        self.pointwise = level == "token"

    @property
    def needs(self) -> Iterable[Statistic | str]:
        return ("reference_log_prob",) if self.pointwise else ("reference_log_prob", "sequence_index")

    def token_loss(self, stats: TokenStats) -> Tensor:
        difference = stats.log_prob.detach() - _reference_log_prob(stats)
        if not self.pointwise:
            assert stats.sequence_index is not None
            difference = sequence_mean(difference, stats.sequence_index)
        # Within the dtype's range: a weight of inf would be nan at p = 1.
        exponent = (self.temperature * difference).clamp(max=math.log(torch.finfo(difference.dtype).max) - 1)
        weight = exponent.exp()
        if self.clip is not None:
            weight = weight.clamp(*self.clip)
        return weighted_log_prob(weight, stats.log_prob)


class ProximalLoss(TokenLoss):
    """``-min(r, clip(r, 1 - epsilon, 1 + epsilon))`` with ``r = exp(l - l_old)``: no token is pushed up for ever.

    A token whose probability has grown by the factor ``1 + epsilon`` since the reference has no gradient any more. With
    an advantage of 1 the lower bound never acts, so that this is ``-min(r, 1 + epsilon)``. At ``r = 1`` the gradient is
    cross-entropy's, and the weight ``r`` below.

    Source: PSFT, "Proximal Supervised Fine-Tuning", arXiv 2508.17784; the authors' script clips at 1.28 (epsilon 0.28
    above, 0.2 below) and computes the old log-probabilities anew every 8 optimizer steps, of the model as it is then
    (``refresh_every=8``). They are of a model without dropout.

    Args:
        epsilon: how much a token's probability may grow, as a share; more than 0.
        refresh_every: in ``CausalLMModule`` the reference is the model itself, as it was at the last optimizer step
            that is a multiple of this number, counted from 0. It takes a copy of what is trained, and a second forward
            of each batch. Validation compares with the same model: its loss says how far the steps since have come,
            and is -1 where there are none. ``None`` takes the reference log-probabilities of the data, fixed for a run.

    Raises:
        ValueError: ``epsilon`` not positive or not finite, ``refresh_every`` less than 1, unknown reduction.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> ProximalLoss(epsilon=0.2)(logits, torch.tensor([1]), reference_log_prob=torch.tensor([0.4]).log())
        tensor(-1.2000)
    """

    takes_negative_weights = False  # the bound would hold back where a token is to be pushed down

    def __init__(
        self,
        epsilon: float = 0.28,
        refresh_every: int | None = None,
        *,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
    ) -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        if not (math.isfinite(epsilon) and epsilon > 0):
            raise ValueError(f"epsilon must be finite and positive, got {epsilon}")
        if refresh_every is not None and not (isinstance(refresh_every, int) and refresh_every >= 1):
            raise ValueError(f"refresh_every is a number of optimizer steps, 1 or more, or None, got {refresh_every!r}")
        self.epsilon = epsilon
        self.refresh_every = refresh_every

    @property
    def needs(self) -> Iterable[Statistic | str]:
        return ("reference_log_prob",)

    def token_loss(self, stats: TokenStats) -> Tensor:
        # Clipped before the exponential, which would overflow where the reference finds a token next to impossible.
        return -(stats.log_prob - _reference_log_prob(stats)).clamp(max=math.log1p(self.epsilon)).exp()


class AnchoredLoss(TokenLoss):
    """DFT plus ``weight * KL(reference || model)`` over the vocabulary: sharpening that stays near where it began.

    Source: ASFT, "Anchored Supervised Fine-Tuning", arXiv 2509.23753. The authors' code takes this direction of the
    divergence, over the whole vocabulary at the target tokens, with the weight 0.1.

    Args:
        weight: of the divergence, 0 or more; 0 is DFT.

    Raises:
        ValueError: ``weight`` negative or not finite, unknown reduction.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> AnchoredLoss(weight=0.1)(logits, torch.tensor([1]), reference_logits=torch.tensor([[2.0, 0.0]]))
        tensor(0.3794)
    """

    takes_negative_weights = False  # the divergence would be driven up without end

    def __init__(self, weight: float = 0.1, *, ignore_index: int = IGNORE_INDEX, reduction: str = "mean") -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight must be finite and not negative (0 is DFT), got {weight}")
        self.weight = weight
        self._dft = DFTLoss()

    @property
    def needs(self) -> Iterable[Statistic | str]:
        return ("reference_kl",) if self.weight else ()

    def token_loss(self, stats: TokenStats) -> Tensor:
        loss = self._dft.token_loss(stats)
        if not self.weight:
            return loss
        assert stats.reference_kl is not None
        return loss + self.weight * stats.reference_kl


Direction = Literal["forward", "reverse"]


class ReferenceKLLoss(TokenLoss):
    """The divergence from a reference model over the vocabulary, alone: ``KL(reference || model)`` or the reverse.

    For a mixture: with cross-entropy it is SFT with an anchor (``sft+kl`` of ASFT, weight 0.1), and with a teacher as
    ``model.reference_model`` distillation on the data's own tokens. ``direction="forward"`` covers what the reference
    finds likely, ``"reverse"`` leaves what it finds unlikely.

    Source: ASFT's code, arXiv 2509.23753, for the forward direction, averaged over the target tokens as here. The
    reverse takes a class that the reference bans for one of the smallest probability that the dtype has, and the fused
    head one that is less likely than that.

    Args:
        direction: ``"forward"``, ``sum r (log r - log p)``, or ``"reverse"``, ``sum p (log p - log r)``.

    Raises:
        ValueError: unknown direction or reduction.

    Example:
        >>> from dft_lightning.losses import CrossEntropyLoss, MixtureLoss
        >>> loss = MixtureLoss([CrossEntropyLoss(), ReferenceKLLoss()], weights=[1.0, 0.1])
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> loss(logits, torch.tensor([1]), reference_logits=torch.tensor([[2.0, 0.0]]))  # log(2) + 0.0327
        tensor(0.7259)
    """

    takes_negative_weights = False  # the divergence would be driven up without end

    def __init__(
        self, direction: Direction = "forward", *, ignore_index: int = IGNORE_INDEX, reduction: str = "mean"
    ) -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        check_one_of("direction", direction, get_args(Direction))
        self.direction = direction

    @property
    def needs(self) -> Iterable[Statistic | str]:
        return ("reference_kl",) if self.direction == "forward" else ("reference_reverse_kl",)

    def token_loss(self, stats: TokenStats) -> Tensor:
        divergence = stats.reference_kl if self.direction == "forward" else stats.reference_reverse_kl
        assert divergence is not None
        return divergence


Form = Literal["prob", "mass"]


class PriorWeightedLoss(TokenLoss):
    """``-m log p`` with a weight from the frozen reference: the target's probability, or whether it is a likely one.

    ``form="prob"`` takes ``m = r``, DFT with the reference's probability. ``form="mass"`` takes ``m = 1`` where the
    reference's probability of the target and of all less likely tokens is together at least ``threshold``, and 0
    elsewhere; tokens exactly as likely as the target do not count.

    Source: PriFT, arXiv 2606.09396, as in the authors' code (wang-kee/PriFT), where ``u >= 0.5`` and the sum is divided
    by the number of target tokens. Their README counts tokens as likely as the target, their code does not.

    Args:
        form: ``"prob"``, which needs scored data, or ``"mass"``, which needs a reference model.
        threshold: of the mass, in ``(0, 1]``.

    Raises:
        ValueError: unknown form or reduction, a threshold out of range.

    Example:
        >>> logits, targets = torch.tensor([[0.0, 0.0]]), torch.tensor([1])
        >>> PriorWeightedLoss()(logits, targets, reference_log_prob=torch.tensor([0.25]).log())  # log(2) / 4
        tensor(0.1733)
        >>> PriorWeightedLoss(form="mass")(logits, targets, reference_logits=torch.tensor([[0.0, 2.0]]))
        tensor(0.6931)
    """

    def __init__(
        self, form: Form = "prob", threshold: float = 0.5, *, ignore_index: int = IGNORE_INDEX, reduction: str = "mean"
    ) -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        check_one_of("form", form, get_args(Form))
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is a probability, more than 0 and at most 1, got {threshold}")
        self.form = form
        self.threshold = threshold

    @property
    def needs(self) -> Iterable[Statistic | str]:
        return ("reference_log_prob",) if self.form == "prob" else ("reference_mass_below",)

    def token_loss(self, stats: TokenStats) -> Tensor:
        if self.form == "prob":
            return weighted_log_prob(_reference_log_prob(stats).exp(), stats.log_prob)
        assert stats.reference_mass_below is not None
        likely = stats.reference_mass_below >= self.threshold
        return weighted_log_prob(likely.to(stats.log_prob.dtype), stats.log_prob)


def _reference_log_prob(stats: TokenStats) -> Tensor:
    assert stats.reference_log_prob is not None
    return stats.reference_log_prob.to(stats.log_prob.dtype)
