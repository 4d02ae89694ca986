"""Counts of a split's tokenised rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dft_lightning.losses.base import IGNORE_INDEX
from dft_lightning.models.loading import number_of_positions

if TYPE_CHECKING:
    from dft_lightning.data import InstructionDataModule

Counts = np.ndarray[Any, np.dtype[np.int64]]
_ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class SourceSummary:
    """Rows of a source.

    Attributes:
        name: of the source.
        rows: that are trained on.
        tokens: of them.
        targets: tokens that are learnt.
        weight: sum of the targets' weights.
    """

    name: str
    rows: int
    tokens: int
    targets: int
    weight: float


@dataclass(frozen=True)
class SplitSummary:
    """What a split is made of.

    Attributes:
        sources: one, or the parts of a mixture.
        lengths: tokens of each row, ``[rows]``.
        positions: that the model has; ``None`` where its config has no number.
    """

    sources: list[SourceSummary]
    lengths: Counts
    positions: int | None = None

    @property
    def total(self) -> SourceSummary:
        """All sources together."""
        parts = [(s.rows, s.tokens, s.targets, s.weight) for s in self.sources]
        rows, tokens, targets, weight = (sum(column) for column in zip(*parts, strict=True))
        return SourceSummary("all", int(rows), int(tokens), int(targets), weight)

    def padding(self, batch_size: int, step: int) -> float:
        """The share of padding in batches of rows in their own order, padded to the longest.

        Args:
            batch_size: rows of a batch.
            step: rows of an optimizer step, a multiple of it, in which rows of like lengths come together.
        """
        size = self.lengths.size // step * step
        if not size:
            return 1 - float(self.lengths.mean() / self.lengths.max())
        steps = np.sort(self.lengths[:size].reshape(-1, step), axis=1)
        batches = steps.reshape(-1, batch_size)
        return 1 - float(batches.sum() / (batches.max(axis=1) * batch_size).sum())


def summarise(data: InstructionDataModule, split: str) -> SplitSummary:
    """Count a loaded split."""
    names = data.splits.sources_of(split) or [split]
    sums = np.zeros((len(names), 3))
    rows = np.zeros(len(names), np.int64)
    table = data.splits.tokenized(split)
    for start in range(0, len(table), _ROWS_AT_ONCE):
        stretch = table[start : start + _ROWS_AT_ONCE]
        for ids, labels, weights, part in zip(*(stretch[name] for name in _COLUMNS), strict=True):
            targets = sum(label != IGNORE_INDEX for label in labels)
            rows[part] += 1
            sums[part] += (len(ids), targets, targets if weights is None else sum(weights))
    sources = [
        SourceSummary(name, int(number), int(tokens), int(targets), float(weight))
        for name, number, (tokens, targets, weight) in zip(names, rows, sums, strict=True)
    ]
    loading = data.model_hparams.get("loading") or {}
    options = {name: loading[name] for name in ("revision", "trust_remote_code") if name in loading}
    model = data.model_hparams.get("model")
    positions = None if model is None else number_of_positions(model, **options)
    return SplitSummary(sources, data.splits.lengths(split).numpy().astype(np.int64), positions)


_COLUMNS = ("input_ids", "labels", "weights", "part")
