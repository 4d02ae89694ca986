"""Intervals and pass@k against independent references."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from dft_lightning.compare.statistics import (
    holm,
    mean_interval,
    paired_bootstrap,
    share_interval,
    sign_flip_test,
)
from dft_lightning.metrics import pass_at_k, reported_k


def test_interval_over_seeds():
    """The textbook's: t for 2 degrees of freedom is 4.30265, s of 1, 2, 3 is 1."""
    interval = mean_interval([3.0, 1.0, 2.0])
    half = 4.302652729911275 / 3**0.5
    assert (interval.mean, interval.low, interval.high) == pytest.approx((2.0, 2 - half, 2 + half), abs=1e-8)
    values = np.random.default_rng(0).normal(size=7)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = mean_interval(values.tolist())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_one_value_and_two_have_no_interval():
    for values in ([0.25], [0.25, 0.25]):
        interval = mean_interval(values)
        assert (interval.mean, interval.low, interval.high, interval.count) == (0.25, None, None, len(values))
        assert not interval.excludes_zero()


@pytest.mark.parametrize("right", [0, 1, 77, 199, 200])
def test_interval_of_a_share(right):
    """Wilson's, as scipy has it for right and wrong answers; within [0, 1], and of some width at its ends."""
    found = share_interval(np.array([1.0] * right + [0.0] * (200 - right)))
    expected = stats.binomtest(right, 200).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= found.low < found.high <= 1
    assert share_interval(np.ones(19)).low is None


def test_sign_flips_against_scipy():
    generator = np.random.default_rng(5)
    for gain in (0.0, 0.1, 0.3):
        a, b = generator.integers(0, 5, 60) / 4 + gain, generator.integers(0, 5, 60) / 4
        expected = stats.permutation_test(
            (a - b,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=20_000,
            vectorized=True, rng=np.random.default_rng(6),
        ).pvalue  # fmt: skip
        assert sign_flip_test(a, b) == pytest.approx(expected, abs=0.015)


def test_sign_flips_by_hand():
    """Ten differences of one: of 1024 flips two are as far from 0. Where nothing differs, p is 1."""
    assert sign_flip_test(np.ones(10), np.zeros(10), flips=200_000) == pytest.approx(2 / 1024, abs=4e-4)
    mixed = np.array([1.0] * 7 + [-1.0] * 3)
    expected = stats.binomtest(7, 10).pvalue
    assert sign_flip_test(mixed, np.zeros(10), flips=200_000) == pytest.approx(expected, abs=4e-3)
    assert sign_flip_test(np.ones(30), np.ones(30)) == 1.0
    with pytest.raises(ValueError, match="the same problems"):
        sign_flip_test(np.ones(3), np.ones(4))


def test_sign_flips_err_as_often_as_they_say():
    """Of 400 pairs that do not differ, about 5% have p below 0.05; four standard errors are 17."""
    generator = np.random.default_rng(7)
    pairs = [(generator.integers(0, 2, 50) / 1.0, generator.integers(0, 2, 50) / 1.0) for _ in range(400)]
    assert sum(sign_flip_test(a, b, flips=1000, seed=i) < 0.05 for i, (a, b) in enumerate(pairs)) <= 20 + 17


def test_holm_by_hand():
    """The smallest counts as often as there are pairs, the next once less; none is below one before it."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.04, 0.001, 0.5]) == pytest.approx([0.08, 0.003, 0.5])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_interval_covers_what_it_should():
    """Of 400 means of three normal numbers, 95% of the intervals hold the true mean: 380 +- 4 standard errors."""
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        interval = mean_interval(generator.normal(5.0, 2.0, 3).tolist())
        hits += interval.low <= 5.0 <= interval.high
    assert 380 - 18 <= hits <= 380 + 18


def test_bootstrap_against_scipy():
    generator = np.random.default_rng(2)
    a, b = generator.integers(0, 5, 120) / 4, generator.integers(0, 5, 120) / 4
    found = paired_bootstrap(a, b)
    reference = stats.bootstrap(
        (a, b),
        lambda x, y, axis: (x - y).mean(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        random_state=np.random.default_rng(3),
    ).confidence_interval
    assert found.mean == pytest.approx((a - b).mean(), abs=1e-12)
    # Two runs of 10,000 resamples: a quantile's own error is near 0.002 here.
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.008)


def test_pairs_are_kept_together():
    """Scores that differ from problem to problem, but by a constant from each other: no doubt about the difference."""
    scores = np.random.default_rng(4).random(50)
    interval = paired_bootstrap(scores + 0.25, scores)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.25, 0.25, 0.25), abs=1e-12)
    assert interval.excludes_zero()


def test_bootstrap_of_a_coin():
    """Twenty differences of one either way: the mean of a resample is 2 B / 20 - 1, B binomial with p = 1/2."""
    ones = np.tile([1.0, 0.0], 10)
    interval = paired_bootstrap(ones, 1 - ones)
    low, high = stats.binom.ppf([0.025, 0.975], 20, 0.5) / 10 - 1
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.0, low, high))
    assert not interval.excludes_zero()


def test_few_problems_have_no_interval():
    interval = paired_bootstrap(np.ones(19), np.zeros(19))
    assert (interval.mean, interval.low, interval.high) == (1.0, None, None)
    assert not interval.excludes_zero()
    assert paired_bootstrap(np.ones(20), np.zeros(20)).excludes_zero()


def test_what_no_problem_tells_apart_has_no_interval():
    """No resample of it has another difference: 0 to 0 would be taken for certainty."""
    interval = paired_bootstrap(np.ones(200), np.ones(200))
    assert (interval.mean, interval.low, interval.high) == (0.0, None, None)


def test_bootstrap_refuses_other_problems():
    with pytest.raises(ValueError, match="scores of the same problems"):
        paired_bootstrap(np.zeros(3), np.zeros(4))


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets(samples):
    """Every subset of k of the samples, counted."""
    for right in range(samples + 1):
        outcomes = [1] * right + [0] * (samples - right)
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(outcomes, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(samples, right, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 2, 0), (4, 2, 5), (4, 5, 2), (4, -1, 2)])
def test_pass_at_k_refuses(samples, right, k):
    with pytest.raises(ValueError, match="k <= num_samples"):
        pass_at_k(samples, right, k)


def test_reported_k():
    assert [reported_k(n) for n in (1, 2, 4, 6, 16)] == [[], [2], [2, 4], [2, 4, 6], [2, 4, 8, 16]]
