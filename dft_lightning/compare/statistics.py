"""Intervals: over seeds by Student's t, between losses by bootstrap over problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Values = np.ndarray[Any, np.dtype[np.float64]]
LEVEL = 0.95
# Of fewer problems a bootstrap's interval is far too narrow: where all agree it has no width at all.
FEWEST_PROBLEMS = 20


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval.

    Attributes:
        mean: the estimate.
        low: lower end; ``None`` where one value alone says nothing of its spread.
        high: upper end; ``None`` where there is no lower one.
        count: how many values it is of.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    def excludes_zero(self) -> bool:
        """Whether there is an interval and 0 lies outside."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean over seeds, with the 95% interval of Student's t, ``mean +- t s / sqrt(n)``.

    Source: Student, "The Probable Error of a Mean", Biometrika 6 (1908).

    Example:
        >>> mean_interval([1.0, 2.0, 3.0])  # t = 4.3027 at two degrees of freedom, s = 1
        Interval(mean=2.0, low=-0.484..., high=4.484..., count=3)
        >>> mean_interval([1.0])
        Interval(mean=1.0, low=None, high=None, count=1)
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(mean, None, None, count)
    deviation = float(np.std(np.asarray(values, dtype=np.float64), ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def paired_bootstrap(a: Values, b: Values, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean of ``a - b`` over problems, with the 95% percentile interval of resampled problems.

    Problems are drawn with replacement, each with what both losses scored on it. There is no interval for fewer than 20
    problems.

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
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"need the scores of the same problems, got shapes {a.shape} and {b.shape}")
    difference = a - b
    if len(a) < FEWEST_PROBLEMS:
        return Interval(float(difference.mean()), None, None, len(a))
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 1000):  # a thousand at a time: memory stays small for large tests
        count = min(1000, resamples - start)
        means[start : start + count] = difference[generator.integers(0, len(a), (count, len(a)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(difference.mean()), float(low), float(high), len(a))
