"""The mathematics of one row of logits: which statistics there are, and what each adds to the row's gradient.

A row has logits ``z``, a target ``y``, ``log p = z - logsumexp(z)``. What the kernels gather from a row, in one pass,
are its *moments*; statistics are made of moments. With ``u`` the derivative of the loss by a statistic, every
statistic adds to the coefficients of

    dL/dz_v = at_target * (1[v = y] - p_v) + constant + p_v * (linear + log_linear * log p_v + quadratic * p_v)
              - reference * r_v

with ``r`` the probabilities of a reference model. One statistic is one entry of :data:`ENTRIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """What is gathered from ``n`` rows; each ``[n]``, ``None`` where no wanted statistic is made of it.

    Attributes:
        log_prob: of the target, with all digits near p = 1.
        log_normalizer: ``logsumexp(z)``.
        correct: whether the target is the first largest logit.
        sum_logits: ``sum z``.
        sum_p_log_p: ``sum p log p`` over all classes but the target.
        sum_p_squared: ``sum p**2`` over all classes but the target.
        top_k_entropy: entropy of the k likeliest classes among themselves.
        reference_kl: ``sum r (log r - log p)``.
        reference_log_normalizer: ``logsumexp`` of the reference's logits, with ``reference_kl``.
    """

    log_prob: Tensor
    log_normalizer: Tensor
    correct: Tensor
    sum_logits: Tensor | None = None
    sum_p_log_p: Tensor | None = None
    sum_p_squared: Tensor | None = None
    top_k_entropy: Tensor | None = None
    reference_kl: Tensor | None = None
    reference_log_normalizer: Tensor | None = None


@dataclass
class Coefficients:
    """Of the gradient above; each ``[n]``, ``None`` for zero."""

    at_target: Tensor
    constant: Tensor | None = None
    linear: Tensor | None = None
    log_linear: Tensor | None = None
    quadratic: Tensor | None = None
    reference: Tensor | None = None

    def add(self, name: str, value: Tensor) -> None:
        """Add to one coefficient."""
        present = getattr(self, name)
        setattr(self, name, value if present is None else present + value)

    def scaled(self, factor: Tensor | float) -> Coefficients:
        """All of them times a factor."""
        scaled = {name: c * factor for name, c in vars(self).items() if c is not None}
        return Coefficients(**scaled)

    def off_target_linear(self) -> Tensor:
        """What multiplies ``p_v`` away from the target."""
        return -self.at_target if self.linear is None else self.linear - self.at_target

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
        return gradient


def _times_log(p: Tensor, log_p: Tensor) -> Tensor:
    """``p log p``, 0 at p = 0."""
    return p * log_p.masked_fill(p == 0, 0.0)


@dataclass(frozen=True)
class Entry:
    """One statistic.

    Attributes:
        moment: the moment it is made of, beyond those that are always there.
        value: its value from the moments and the size of the vocabulary.
        add_gradient: adds ``u`` times its derivative to the coefficients; gets the statistic's value and the size of
            the vocabulary. ``None`` for a statistic that is a constant.
        in_kernel: whether the row kernels gather the moment in their one pass.
    """

    moment: str
    value: Callable[[Moments, int], Tensor]
    add_gradient: Callable[[Coefficients, Tensor, Tensor, int], None] | None
    in_kernel: bool = True


def _mean_log_prob(moments: Moments, vocabulary: int) -> Tensor:
    assert moments.sum_logits is not None
    return moments.sum_logits / vocabulary - moments.log_normalizer


def _add_mean_log_prob(total: Coefficients, u: Tensor, value: Tensor, vocabulary: int) -> None:
    total.add("constant", u / vocabulary)
    total.add("linear", -u)


def _entropy(moments: Moments, vocabulary: int) -> Tensor:
    assert moments.sum_p_log_p is not None
    return -(moments.sum_p_log_p + _times_log(moments.log_prob.exp(), moments.log_prob))


def _add_entropy(total: Coefficients, u: Tensor, value: Tensor, vocabulary: int) -> None:
    total.add("linear", -u * value)
    total.add("log_linear", -u)


def _sum_squared_prob(moments: Moments, vocabulary: int) -> Tensor:
    assert moments.sum_p_squared is not None
    return moments.sum_p_squared + (2 * moments.log_prob).exp()


def _add_sum_squared_prob(total: Coefficients, u: Tensor, value: Tensor, vocabulary: int) -> None:
    total.add("linear", -2 * u * value)
    total.add("quadratic", 2 * u)


def _top_k_entropy(moments: Moments, vocabulary: int) -> Tensor:
    assert moments.top_k_entropy is not None
    return moments.top_k_entropy


def _reference_kl(moments: Moments, vocabulary: int) -> Tensor:
    assert moments.reference_kl is not None
    return moments.reference_kl


def _add_reference_kl(total: Coefficients, u: Tensor, value: Tensor, vocabulary: int) -> None:
    total.add("linear", u)
    total.add("reference", u)


ENTRIES: dict[str, Entry] = {
    "mean_log_prob": Entry("sum_logits", _mean_log_prob, _add_mean_log_prob),
    "entropy": Entry("sum_p_log_p", _entropy, _add_entropy),
    "sum_squared_prob": Entry("sum_p_squared", _sum_squared_prob, _add_sum_squared_prob),
    "top_k_entropy": Entry("top_k_entropy", _top_k_entropy, None, in_kernel=False),
    "reference_kl": Entry("reference_kl", _reference_kl, _add_reference_kl, in_kernel=False),
}


def moments_of(names: Iterable[str]) -> list[str]:
    """The moments that the named statistics are made of, sorted."""
    return sorted({ENTRIES[name].moment for name in names})


def kernel_moments_of(names: Iterable[str]) -> frozenset[str]:
    """Those of them that the row kernels gather."""
    return frozenset(ENTRIES[name].moment for name in names if ENTRIES[name].in_kernel)


def statistics_of(moments: Moments, names: Iterable[str], vocabulary: int) -> dict[str, Tensor]:
    """``log_prob`` and the named statistics, each ``[n]``."""
    return {
        "log_prob": moments.log_prob,
        **{name: ENTRIES[name].value(moments, vocabulary) for name in sorted(names)},
    }


def coefficients_of(slopes: Mapping[str, Tensor], values: Mapping[str, Tensor], vocabulary: int) -> Coefficients:
    """Coefficients of the rows' gradient.

    Args:
        slopes: derivative of the loss by each statistic, ``log_prob`` always among them.
        values: the statistics themselves.
        vocabulary: number of classes.
    """
    total = Coefficients(slopes["log_prob"])
    for name, slope in slopes.items():
        if name == "log_prob":
            continue
        add_gradient = ENTRIES[name].add_gradient
        assert add_gradient is not None, f"{name} is a constant"
        add_gradient(total, slope, values[name], vocabulary)
    return total
