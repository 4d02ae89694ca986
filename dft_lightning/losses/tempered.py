"""Losses with a part for every class of the vocabulary, by a tempered or a mixed distribution."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

from torch import Tensor

from dft_lightning.errors import check_one_of
from dft_lightning.losses.base import IGNORE_INDEX, TokenLoss
from dft_lightning.losses.statistics import Statistic, TokenStats

GEMForm = Literal["linear", "logsigmoid"]
_GEM_SLOPE = 0.01


class GEMLoss(TokenLoss):
    """``-sum_v q_v h_v (log p - log p_v)`` with ``q = sg softmax(z / beta)``: the target against its sharpened rivals.

    With ``form="linear"``, ``h = 1``, the gradient by the logits is ``q - onehot``: cross-entropy's with a distribution
    that is sharper than the model's, so that rivals far below are left alone and the model stays diverse.
    ``form="logsigmoid"`` has ``h_v = sg sigmoid(0.01 (z_v - z_y))``, which is near 1/2 for every class.

    Source: GEM, arXiv 2408.16673, as in the authors' code (liziniu/GEM): beta 0.7; its command has ``linear`` as the
    default, its published scripts ``logsigmoid``, its Triton kernel ``linear`` alone. The loss may be negative.

    Args:
        beta: temperature of ``q``, positive; 1 has cross-entropy's gradient.
        form: ``"linear"`` or ``"logsigmoid"``.

    Raises:
        ValueError: ``beta`` not positive or not finite, unknown form or reduction.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 2.0, 0.5, -1.0]])
        >>> GEMLoss()(logits, torch.tensor([1]))
        tensor(-0.3333)
    """

    takes_negative_weights = False  # the rivals would be driven apart without end

    def __init__(
        self,
        beta: float = 0.7,
        form: GEMForm = "linear",
        *,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
    ) -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        if not (math.isfinite(beta) and beta > 0):
            raise ValueError(f"beta must be finite and positive (1 has cross-entropy's gradient), got {beta}")
        check_one_of("form", form, get_args(GEMForm))
        self.beta = beta
        self.form = form

    @property
    def needs(self) -> Iterable[Statistic | str]:
        slope = None if self.form == "linear" else _GEM_SLOPE
        params = {"power": 1 / self.beta, "reference_power": 0.0, "slope": slope}
        rivals = Statistic("tempered_log_prob", **params)
        return (rivals,) if slope is None else (rivals, Statistic("tempered_share", **params))

    def token_loss(self, stats: TokenStats) -> Tensor:
        assert stats.tempered_log_prob is not None
        if self.form == "linear":
            return stats.tempered_log_prob - stats.log_prob
        assert stats.tempered_share is not None
        return stats.tempered_log_prob - stats.tempered_share.detach() * stats.log_prob


class TargetSFTLoss(TokenLoss):
    """``-sg(p) log p - sg(1 - p) sum_v t_v log p_v``: the target by its own probability, a teacher for the rest.

    ``t`` is proportional to ``sg(p)**(1 - eta) teacher**eta`` over the whole vocabulary, the token included, with the
    probabilities of ``model.reference_model`` as the teacher's (where none is named, those of the model at the start).
    The gradient by the logits is ``p_v - p onehot_v - (1 - p) t_v``.

    Source: Target-SFT, arXiv 2606.11189, and the authors' page; their code could not be read, and no default of ``eta``
    was found. At ``eta = 0`` the gradient is DFT's and no teacher is needed; the loss has ``(1 - p)`` times the entropy
    in it. A class that model or teacher bans has no part in ``t``, unless its own power is 0; the log-probability of
    one that the model bans is that of the dtype's smallest number.

    Args:
        eta: share of the teacher, in ``[0, 1]``.

    Raises:
        ValueError: ``eta`` out of range, unknown reduction.

    Example:
        >>> import torch
        >>> logits, teacher = torch.tensor([[1.0, 2.0, 0.5, -1.0]]), torch.tensor([[0.8, 1.5, 1.0, -0.5]])
        >>> TargetSFTLoss(eta=0.5)(logits, torch.tensor([1]), reference_logits=teacher)
        tensor(0.7501)
    """

    takes_negative_weights = False  # the cross-entropy to the teacher would be driven up without end

    def __init__(self, eta: float, *, ignore_index: int = IGNORE_INDEX, reduction: str = "mean") -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is the teacher's share and must lie in [0, 1], got {eta}")
        self.eta = float(eta)

    @property
    def needs(self) -> Iterable[Statistic | str]:
        return (Statistic("tempered_log_prob", power=1 - self.eta, reference_power=self.eta, slope=None),)

    def token_loss(self, stats: TokenStats) -> Tensor:
        assert stats.tempered_log_prob is not None
        log_prob = stats.log_prob.detach()
        p = log_prob.exp()
        own = -p * stats.log_prob.masked_fill(p == 0, 0.0)
        return own + log_prob.expm1() * stats.tempered_log_prob


class SEDSFTLoss(TokenLoss):
    """``-log p``, and ``weight (p - 1/2)**2`` where the ``top_k`` likeliest tokens have less than ``threshold``.

    Where the model spreads its probability, the target is held near one half, so that others keep some.

    Source: SED-SFT, as in the authors' code (pppa2019/SED-SFT), which finds the threshold before training, from the
    positions of a hundred rows, by a share of them (0.7 in their script) that is to lie above it. Their script takes it
    from the 10 likeliest tokens and compares the 2 likeliest with it; here both are ``top_k``.

    Args:
        threshold: probability of the likeliest tokens together, in ``(0, 1]``.
        weight: of the square, 0 or more; 0 is cross-entropy.
        top_k: how many tokens are the likeliest, 1 or more.

    Raises:
        ValueError: an option out of range, unknown reduction; when called, a ``top_k`` larger than the vocabulary.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])  # the two likeliest have 1/2
        >>> SEDSFTLoss(threshold=0.6, top_k=2)(logits, torch.tensor([0]))  # log(4) + 1/16
        tensor(1.4488)
    """

    takes_negative_weights = False  # the square would push to certainty, one way or the other

    def __init__(
        self,
        threshold: float,
        weight: float = 1.0,
        top_k: int = 10,
        *,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
    ) -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is a probability, more than 0 and at most 1, got {threshold}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight must be finite and not negative (0 is cross-entropy), got {weight}")
        if not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k must be a whole number, 1 or more, got {top_k!r}")
        self.threshold = threshold
        self.weight = weight
        self.top_k = top_k

    @property
    def needs(self) -> Iterable[Statistic | str]:
        return (Statistic("top_k_mass", k=self.top_k),)

    def token_loss(self, stats: TokenStats) -> Tensor:
        assert stats.top_k_mass is not None
        spread = stats.top_k_mass.detach() < self.threshold
        return -stats.log_prob + self.weight * (stats.log_prob.exp() - 0.5).square() * spread
