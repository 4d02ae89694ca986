"""The mathematics of one row of logits: which statistics there are, and what each adds to the row's gradient.

A row has logits ``z``, a target ``y``, ``log p = z - logsumexp(z)``. What the kernels gather from a row, in one pass,
are its *moments*; statistics are made of moments. With ``u`` the derivative of the loss by a statistic, every
statistic adds to the coefficients of

    dL/dz_v = at_target * (1[v = y] - p_v) + constant + p_v * (linear + log_linear * log p_v + quadratic * p_v)
              - reference * r_v
              + 1[v = y] * own + 1[v != y] * (p_v * (others + log_ratio * (log p_v - log r_v)) + tempered * q_v h_v)

with ``r`` the probabilities of a reference model and ``q h`` the weights of ``tempered_log_prob``. What stands in the
last row is apart at the target, where terms of both kinds would lose their digits against each other near p = 1. One
statistic is one entry of :data:`ENTRIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from dft_lightning.losses.statistics import Statistic


@dataclass(frozen=True)
class LogitTransform:
    """What some models do to the product: ``scale * softcap * tanh(z / softcap)``; without a softcap ``scale * z``.

    Attributes:
        scale: Cohere's ``logit_scale``, one over Granite's ``logits_scaling``.
        softcap: Gemma-2's ``final_logit_softcapping``.

    Raises:
        TypeError: the scale is a tensor, whose gradient would be lost.
        ValueError: a scale of 0, a softcap that is not positive.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("logit_scale", self.scale), ("logit_softcap", self.softcap)):
            if isinstance(value, Tensor):
                raise TypeError(f"{name} must be a number, got a tensor: multiply hidden by a trained scale instead")
        if self.scale == 0:
            raise ValueError("logit_scale must not be 0")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"logit_softcap must be positive, or None for no cap, got {self.softcap}")

    def apply_(self, z: Tensor) -> Tensor:
        """Transform in place."""
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z if self.scale == 1.0 else z.mul_(self.scale)

    def cap_derivative(self, transformed: Tensor, *, out: Tensor) -> None:
        """Derivative of the softcap from transformed logits: ``1 - tanh**2``."""
        assert self.softcap is not None
        torch.mul(transformed, 1 / (self.scale * self.softcap), out=out)
        out.square_().neg_().add_(1.0).clamp_(min=0.0)  # logits from rounded exponentials may exceed the cap


class SoftmaxRows(NamedTuple):
    """What is kept of a chunk's logits: ``e**z`` in their dtype, up to a factor of each row in float32.

    Rounding a logit near 30 to bfloat16 moves it by up to 0.06, and its probability by as many parts; rounding ``e**z``
    moves the probability by 0.002 of itself.

    Attributes:
        values: ``[c, V]``; class ``v`` has the probability ``values_v * e**log_factor``. A target's own place holds 0;
            its probability, which may be near 1, is known by the moment ``log_prob``. A reference model's rows have no
            target set apart.
        log_factor: ``[c]``.
        total: ``[c]``, the sum of a row's values: ``(1 - p_y) e**-log_factor``.
    """

    values: Tensor
    log_factor: Tensor
    total: Tensor


class Moments(SimpleNamespace):
    """What is gathered from ``n`` rows; each ``[n]``, ``None`` where no wanted statistic is made of it.

    What somebody's own statistics give stands beside, as ``own NAME``.

    Attributes:
        log_prob: of the target, with all digits near p = 1.
        log_normalizer: ``logsumexp(z)``.
        correct: whether the target is the first largest logit.
        sum_logits: ``sum z``.
        sum_p_log_p: ``sum p log p`` over all classes but the target.
        sum_p_squared: ``sum p**2`` over all classes but the target.
        top_k_entropy: entropy of the k likeliest classes among themselves.
        top_k_mass: their probability.
        reference_kl: ``sum r (log r - log p)``.
        reference_mass_below: see :class:`TokenStats`.
        log_ratio_of_others: ``sum p (log p - log r)`` over all classes but the target.
        log_ratio_of_target: ``l - log r`` of the target.
        tempered_log_prob: ``sum q h log p``.
        tempered_share: ``sum q h``.
        tempered_others: ``sum q h`` over all classes but the target.
        log_tempered: logarithm of what ``p**power r**reference_power`` is divided by for ``q``.
    """

    log_prob: Tensor
    log_normalizer: Tensor
    correct: Tensor
    sum_logits: Tensor | None = None
    sum_p_log_p: Tensor | None = None
    sum_p_squared: Tensor | None = None
    top_k_entropy: Tensor | None = None
    top_k_mass: Tensor | None = None
    reference_kl: Tensor | None = None
    reference_mass_below: Tensor | None = None
    log_ratio_of_others: Tensor | None = None
    log_ratio_of_target: Tensor | None = None
    tempered_log_prob: Tensor | None = None
    tempered_share: Tensor | None = None
    tempered_others: Tensor | None = None
    log_tempered: Tensor | None = None


class Tempering(NamedTuple):
    """Which classes have how much of ``tempered_log_prob``; see :class:`TokenStats`.

    Attributes:
        power: of the model's probabilities.
        reference_power: of the reference's.
        slope: of the sigmoid, or ``None`` for 1 in its place.
    """

    power: float
    reference_power: float
    slope: float | None


def tempering_of(statistics: Mapping[str, Statistic]) -> Tempering | None:
    """That of the statistics that are made of it.

    Raises:
        ValueError: they have different ones.
    """
    found = {Tempering(**statistics[name].params) for name in _TEMPERED if name in statistics}
    if len(found) > 1:
        raise ValueError(f"one call has one tempered distribution, and these differ: {[*statistics.values()]}")
    return next(iter(found), None)


_TEMPERED = ("tempered_log_prob", "tempered_share")


@dataclass
class Coefficients:
    """Of the gradient above; each ``[n]``, ``None`` for zero; and which classes ``tempered`` counts."""

    at_target: Tensor
    constant: Tensor | None = None
    linear: Tensor | None = None
    log_linear: Tensor | None = None
    quadratic: Tensor | None = None
    reference: Tensor | None = None
    own: Tensor | None = None
    others: Tensor | None = None
    log_ratio: Tensor | None = None
    tempered: Tensor | None = None
    tempering: Tempering | None = None

    def scaled(self, factor: Tensor | float) -> Coefficients:
        """All of them times a factor."""
        found = {name: c * factor for name, c in vars(self).items() if isinstance(c, Tensor)}
        return Coefficients(**found, tempering=self.tempering)

    def largest_gradient(self, log_prob: Tensor) -> Tensor:
        """``[n]``, what no element of a row's gradient exceeds in size: of the target's own and the others' bound.

        Off the target, ``p`` is at most ``q = 1 - p_y``.
        """
        # Coefficients times what this leaves room for stay finite in float32.
        q = (-torch.expm1(log_prob)).clamp(min=2.0**-40)
        likeliest = q.clamp(max=1 / math.e)  # where -p log p is largest
        others = self.at_target.abs() * q
        for coefficient, size in (
            (self.constant, 1.0),
            (self.linear, q),
            (self.log_linear, -likeliest * likeliest.log()),
            (self.quadratic, q.square()),
            (self.others, q),
            (self.log_ratio, 1 / math.e + q * _LARGEST_LOG),
            (self.tempered, 1.0),
        ):
            if coefficient is not None:
                others = others + coefficient.abs() * size
        largest = torch.maximum(self.target_gradient(log_prob).abs(), others)
        return largest if self.reference is None else largest + self.reference.abs()

    @property
    def only_at_target(self) -> bool:
        """Whether the gradient is ``at_target * (1[v = y] - p_v)``, as of every loss of ``log_prob`` alone."""
        return not any(isinstance(value, Tensor) for name, value in vars(self).items() if name != "at_target")

    @property
    def in_kernels(self) -> bool:
        """Whether every device's own kernels make such a gradient."""
        return self.log_ratio is None and self.tempered is None

    def off_target_linear(self) -> Tensor:
        """What multiplies ``p_v`` away from the target."""
        linear = -self.at_target if self.linear is None else self.linear - self.at_target
        return linear if self.others is None else linear + self.others

    def target_gradient(self, log_prob: Tensor) -> Tensor:
        """``dL/dz_y`` but for the reference's part, with all its digits where ``p_y`` is near 1."""
        p = log_prob.exp()
        gradient = self.at_target * -torch.expm1(log_prob)
        if self.constant is not None:
            gradient = gradient + self.constant
        if self.linear is not None:
            gradient = gradient + self.linear * p
        if self.log_linear is not None:
            gradient = gradient + self.log_linear * _times_log(p, log_prob)
        if self.quadratic is not None:
            gradient = gradient + self.quadratic * p.square()
        return gradient if self.own is None else gradient + self.own


# What no logarithm of a reference's probability exceeds in size in half precision.
_LARGEST_LOG = 88.0


def _times_log(p: Tensor, log_p: Tensor) -> Tensor:
    """``p log p``, 0 at p = 0."""
    return p * log_p.masked_fill(p == 0, 0.0)


class Entry(NamedTuple):
    """One statistic.

    Attributes:
        moment: the moment it is made of, beyond those that are always there.
        value: its value from that moment, all moments, and the size of the vocabulary.
        gradient: what it adds to the coefficients, from ``u``, the statistic's value, all moments and the size of the
            vocabulary. ``None`` for a statistic that is a constant.
        gathered: where the moment comes from: ``"kernel"``, the row kernels in their one pass; ``"logits"``, a block's
            logits; ``"rows"``, what is kept of a chunk's.
        beside: further moments that the value is made of.
    """

    moment: str
    value: Callable[[Tensor, Moments, int], Tensor]
    gradient: Callable[[Tensor, Tensor, Moments, int], dict[str, Tensor]] | None
    gathered: str = "kernel"
    beside: tuple[str, ...] = ()


def _reverse_kl(others: Tensor, moments: Moments, _: int) -> Tensor:
    return others + _times_ratio(moments.log_prob.exp(), moments)


def _times_ratio(factor: Tensor, moments: Moments) -> Tensor:
    """Times ``l - log r`` of the target, 0 where the model bans it."""
    assert moments.log_ratio_of_target is not None
    return factor * moments.log_ratio_of_target.masked_fill(moments.log_prob == -math.inf, 0.0)


def _reverse_kl_gradient(u: Tensor, value: Tensor, moments: Moments, _: int) -> dict[str, Tensor]:
    p, rest = moments.log_prob.exp(), -torch.expm1(moments.log_prob)
    assert moments.log_ratio_of_others is not None
    own = u * p * (_times_ratio(rest, moments) - moments.log_ratio_of_others)
    return {"log_ratio": u, "others": -u * value, "own": own}


def _tempered_gradient(u: Tensor, value: Tensor, moments: Moments, _: int) -> dict[str, Tensor]:
    assert moments.tempered_share is not None
    assert moments.tempered_others is not None
    own = u * (moments.tempered_share * -torch.expm1(moments.log_prob) - moments.tempered_others)
    return {"tempered": u, "others": -u * moments.tempered_share, "own": own}


def _constant(moment: str, gathered: str) -> Entry:
    return Entry(moment, lambda value, *_: value, None, gathered)


ENTRIES: dict[str, Entry] = {
    "mean_log_prob": Entry(
        "sum_logits",
        lambda total, moments, vocabulary: total / vocabulary - moments.log_normalizer,
        lambda u, value, _, vocabulary: {"constant": u / vocabulary, "linear": -u},
    ),
    "entropy": Entry(
        "sum_p_log_p",
        lambda total, moments, _: -(total + _times_log(moments.log_prob.exp(), moments.log_prob)),
        lambda u, value, *_: {"linear": -u * value, "log_linear": -u},
    ),
    "sum_squared_prob": Entry(
        "sum_p_squared",
        lambda total, moments, _: total + (2 * moments.log_prob).exp(),
        lambda u, value, *_: {"linear": -2 * u * value, "quadratic": 2 * u},
    ),
    "top_k_entropy": _constant("top_k_entropy", "logits"),
    "top_k_mass": _constant("top_k_mass", "rows"),
    "tempered_log_prob": Entry("tempered_log_prob", lambda value, *_: value, _tempered_gradient, "rows"),
    "tempered_share": _constant("tempered_share", "rows"),
    "reference_kl": Entry(
        "reference_kl",
        lambda divergence, *_: divergence,
        lambda u, value, *_: {"linear": u, "reference": u},
        "logits",
    ),
    "reference_reverse_kl": Entry(
        "log_ratio_of_others", _reverse_kl, _reverse_kl_gradient, "rows", beside=("log_ratio_of_target",)
    ),
    "reference_mass_below": _constant("reference_mass_below", "logits"),
}


def entry_of(statistic: Statistic) -> Entry:
    """That of a statistic, which may be somebody's own."""
    return _constant(f"own {statistic.name}", "logits") if statistic.function else ENTRIES[statistic.name]


def moment_names(statistics: Mapping[str, Statistic]) -> list[str]:
    """The moments that are always there, and those that statistics are made of."""
    names = ["log_prob", "log_normalizer", "correct"]
    for entry in map(entry_of, statistics.values()):
        names += [entry.moment, *entry.beside]
    return names


def statistics_of(moments: Moments, statistics: Mapping[str, Statistic], vocabulary: int) -> dict[str, Tensor]:
    """``log_prob`` and the statistics, each ``[n]``."""
    values = {"log_prob": moments.log_prob}
    for name, statistic in statistics.items():
        entry = entry_of(statistic)
        values[name] = entry.value(getattr(moments, entry.moment), moments, vocabulary)
    return values


def needed_for_gradient(statistics: Mapping[str, Statistic]) -> dict[str, Statistic]:
    """Those whose gradient takes more than their values: the moments that are made of what is kept."""
    entries = {name: entry_of(statistic) for name, statistic in statistics.items()}
    return {
        name: statistics[name]
        for name, entry in entries.items()
        if entry.gathered == "rows" and entry.gradient is not None
    }


def reaches_far(statistic: Statistic) -> bool:
    """Whether classes count that have next to nothing of the probability, which some dtypes do not keep."""
    if statistic.name in _TEMPERED:
        return statistic.params["power"] < 1 or bool(statistic.params["reference_power"])
    return statistic.name == "reference_reverse_kl"


def coefficients_of(
    slopes: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    moments: Moments,
    tempering: Tempering | None,
    vocabulary: int,
) -> Coefficients:
    """Coefficients of the rows' gradient.

    Args:
        slopes: derivative of the loss by each statistic, ``log_prob`` always among them.
        values: the statistics themselves.
        moments: of the rows.
        tempering: of the statistics, where some are made of one.
        vocabulary: number of classes.
    """
    total = {"at_target": slopes["log_prob"]}
    for name, slope in slopes.items():
        if name == "log_prob":
            continue
        gradient = ENTRIES[name].gradient
        assert gradient is not None, f"{name} is a constant"
        for coefficient, value in gradient(slope, values[name], moments, vocabulary).items():
            total[coefficient] = total[coefficient] + value if coefficient in total else value
    return Coefficients(**total, tempering=tempering)
