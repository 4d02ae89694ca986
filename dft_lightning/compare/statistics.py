"""What test problems say of a loss and of two losses, and what seeds say beside it.

Intervals and tests are over problems, for the seeds that ran. What another seed would give is another question, which
few seeds do not answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Values = np.ndarray[Any, np.dtype[np.float64]]
LEVEL = 0.95
# Of fewer problems a bootstrap's interval is far too narrow.
FEWEST_PROBLEMS = 20
# Of fewer seeds nothing is said of others: two have an interval six times as wide as three.
FEWEST_SEEDS = 3


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval.

    Attributes:
        mean: the estimate.
        low: lower end; ``None`` where the values say nothing of their spread.
        high: upper end; ``None`` where ``low`` is.
        count: how many values it is of.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    def excludes_zero(self) -> bool:
        """Whether there is an interval and 0 lies outside."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_interval(values: Sequence[float], furthest: float = math.inf) -> Interval:
    """Mean over seeds, with the 95% interval of Student's t, ``mean +- t s / sqrt(n)``, of three or more.

    For differences, which may lie on either side of 0. There is none where all are alike: few seeds that agree to the
    last problem do not say that every other would.

    Source: Student, "The Probable Error of a Mean", Biometrika 6 (1908).

    Args:
        values: one of each seed.
        furthest: from 0 that there can be, 1 for differences of shares.

    Example:
        >>> mean_interval([1.0, 2.0, 3.0])  # t = 4.3027 at two degrees of freedom, s = 1
        Interval(mean=2.0, low=-0.484..., high=4.484..., count=3)
        >>> mean_interval([1.0, 2.0])
        Interval(mean=1.5, low=None, high=None, count=2)
        >>> mean_interval([0.5, 0.9, 0.7], furthest=1.0)
        Interval(mean=0.7..., low=0.203..., high=1.0, count=3)
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < FEWEST_SEEDS:
        return Interval(mean, None, None, count)
    deviation = float(np.std(np.asarray(values, dtype=np.float64), ddof=1))
    if deviation < 1e-12:
        return Interval(mean, None, None, count)
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * deviation / math.sqrt(count)
    return Interval(mean, max(mean - half, -furthest), min(mean + half, furthest), count)


def share_interval(scores: Values) -> Interval:
    """Mean of shares over problems, with Wilson's 95% interval, which lies in [0, 1] and is never of no width.

    Where a problem's score is itself a mean (of samples, of seeds) its spread is less than that of a right or wrong
    answer, and the interval wider than it need be. There is none for fewer than 20 problems.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927).

    Args:
        scores: ``[problems]``, each in [0, 1].

    Example:
        >>> share_interval(np.ones(200))
        Interval(mean=1.0, low=0.981..., high=1.0, count=200)
    """
    count, mean = len(scores), float(scores.mean())
    if count < FEWEST_PROBLEMS:
        return Interval(mean, None, None, count)
    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return Interval(mean, max(0.0, centre - half), min(1.0, centre + half), count)


def paired_bootstrap(a: Values, b: Values, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean of ``a - b`` over problems, with the 95% percentile interval of resampled problems.

    Problems are drawn with replacement, each with what both losses scored on it. There is no interval for fewer than 20
    problems, nor where the two scored alike on every one, of which no resample knows anything else.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13; paired over test items as in
    Koehn, "Statistical Significance Tests for Machine Translation Evaluation" (2004).

    Args:
        a: ``[problems]``, scores of one loss.
        b: ``[problems]``, scores of the other on the same problems.
        resamples: how many.
        seed: of the drawing.

    Raises:
        ValueError: they are not of the same problems.
    """
    difference = _difference(a, b)
    if len(a) < FEWEST_PROBLEMS or not difference.any():
        return Interval(float(difference.mean()), None, None, len(a))
    generator = np.random.default_rng(seed)
    means = _drawn(resamples, lambda count: difference[generator.integers(0, len(a), (count, len(a)))].mean(axis=1))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(difference.mean()), float(low), float(high), len(a))


def _drawn(total: int, draw: Callable[[int], Values]) -> Values:
    """A number from each of many drawings, a thousand at a time: memory stays small for large tests."""
    return np.concatenate([draw(min(1000, total - start)) for start in range(0, total, 1000)])


def _difference(a: Values, b: Values) -> Values:
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"need the scores of the same problems, got shapes {a.shape} and {b.shape}")
    return a - b


def sign_flip_test(a: Values, b: Values, flips: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value of a difference between two losses on the same problems.

    If neither were better, a problem's difference would as well have the other sign: the p-value is the share of random
    flips of signs whose mean is at least as far from 0, the observed one counted among them. Problems that both scored
    alike on say nothing.

    Source: Fisher, "The Design of Experiments" (1935), section 21; with random flips, Dwass, "Modified Randomization
    Tests for Nonparametric Hypotheses" (1957).

    Args:
        a: ``[problems]``, scores of one loss.
        b: ``[problems]``, scores of the other on the same problems.
        flips: how many.
        seed: of the flips.

    Raises:
        ValueError: they are not of the same problems.

    Example:
        >>> sign_flip_test(np.ones(4), np.zeros(4))  # 2 of 16 flips are as far, by so many random ones
        0.12...
    """
    difference = _difference(a, b)
    difference = difference[difference != 0]
    if not len(difference):
        return 1.0
    generator = np.random.default_rng(seed)
    sums = _drawn(flips, lambda count: (2.0 * generator.integers(0, 2, (count, len(difference))) - 1.0) @ difference)
    # Sums of equal shares in another order differ in the last digit.
    reached = int((np.abs(sums) >= abs(float(difference.sum())) * (1 - 1e-9)).sum())
    return (1 + reached) / (1 + flips)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of a family of comparisons, adjusted so that 5% is the chance of any false one among them.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scand. J. Statist. 6 (1979).

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted
