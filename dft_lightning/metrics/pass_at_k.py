"""pass@k from n samples."""

from __future__ import annotations

from math import comb


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that at least one of ``k`` samples is right, estimated without bias from ``num_samples``.

    ``1 - C(n - c, k) / C(n, k)``: the share of the subsets of ``k`` samples that hold a right one.

    Source: Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, equation 1.

    Args:
        num_samples: samples of a problem.
        num_correct: how many of them are right.
        k: at most ``num_samples``.

    Raises:
        ValueError: unless ``1 <= k <= num_samples`` and ``0 <= num_correct <= num_samples``.

    Example:
        >>> [pass_at_k(4, 1, k) for k in (1, 2, 4)]
        [0.25, 0.5, 1.0]
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"need 1 <= k <= num_samples and 0 <= num_correct <= num_samples, got k={k} of {num_samples} "
            f"with {num_correct} right"
        )
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def reported_k(num_samples: int) -> list[int]:
    """The values of k worth reporting beside avg@n (which is pass@1): powers of two from 2, and ``num_samples``."""
    powers = [2**i for i in range(1, num_samples.bit_length())]
    return sorted({k for k in (*powers, num_samples) if 2 <= k <= num_samples})
