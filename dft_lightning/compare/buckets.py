"""Targets by their probability before training."""

from __future__ import annotations

import numpy as np

from dft_lightning.compare.records import Record
from dft_lightning.compare.statistics import Values

BUCKETS = ((0.0, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 1.0))


def bucket_means(record: Record) -> tuple[list[int], Values, Values]:
    """Number of targets, mean probability before and mean probability after, for each of ``BUCKETS``.

    A bucket has its lower end and not its upper one; the last has both. The mean of none is nan.
    """
    before, after = record.probabilities["before"], record.probabilities["after"]
    inner_edges = [high for _, high in BUCKETS[:-1]]
    places = np.searchsorted(inner_edges, before, side="right")
    members = [places == i for i in range(len(BUCKETS))]
    counts = [int(member.sum()) for member in members]
    means = [np.array([v[m].mean() if m.any() else np.nan for m in members]) for v in (before, after)]
    return counts, means[0], means[1]
