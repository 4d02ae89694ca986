"""Batches of the rows to score, and where their log-probs go."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import IterableDataset

from dft_lightning.data.batches.collating import Collator
from dft_lightning.data.rows.references import FINGERPRINT, LOG_PROB
from dft_lightning.errors import InputError
from dft_lightning.losses.base import IGNORE_INDEX
from dft_lightning.modules import CausalLMModule
from dft_lightning.scoring.rows import SourceRow, SplitRows

FILE = "rows.jsonl"
Key = tuple[int, int]  # the split's place and the row's


def target_log_probs(module: CausalLMModule, batch: dict[str, Any], batch_idx: int) -> list[Any]:
    """The log-probs of each row's targets, in order, ``[n]``, float32."""
    output = module.token_output({name: value for name, value in batch.items() if name != "pieces"})
    counts = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(dim=1).tolist()
    return [part.numpy() for part in torch.split(output.log_prob.float().cpu(), counts)]


@dataclass
class _Waiting:
    """A row whose pieces are not all scored yet."""

    row: SourceRow
    parts: list[Any]


class ScoringBatches(IterableDataset[list[dict[str, Any]]]):
    """Batches of the pieces of rows, longest first within some rows; each row waits here until all are scored.

    They come in turns, a batch for each rank, and are the same on any number of ranks.

    Args:
        splits: the rows, checked.
        collator: to batches.
        batch_size: pieces of a batch.
        ranks: batches of a turn.

    Attributes:
        waiting: rows in their order, by split and number in the order.
    """

    def __init__(self, splits: list[SplitRows], collator: Collator, batch_size: int, ranks: int = 1) -> None:
        super().__init__()
        self.splits = splits
        self.collator = collator
        self.batch_size = batch_size
        self.ranks = ranks
        self.waiting: dict[Key, _Waiting] = {}

    def __len__(self) -> int:
        return -(-sum(-(-pieces // self.batch_size) for split in self.splits for pieces in split.pieces) // self.ranks)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        batches = self._all()
        while turn := list(itertools.islice(batches, self.ranks)):
            yield turn

    def _all(self) -> Iterator[dict[str, Any]]:
        for place, split in enumerate(self.splits):
            count = 0
            for stretch in split.stretches():
                keyed = {(place, count + i): row for i, row in enumerate(stretch)}
                count += len(stretch)
                self.waiting |= {key: _Waiting(row, [None] * len(row.pieces)) for key, row in keyed.items()}
                yield from self._batches(keyed)

    def _batches(self, rows: dict[Key, SourceRow]) -> Iterator[dict[str, Any]]:
        found = [(key, i, start, stop) for key, row in rows.items() for i, (start, stop) in enumerate(row.pieces)]
        found.sort(key=lambda piece: piece[2] - piece[3])
        for first in range(0, len(found), self.batch_size):
            chosen = found[first : first + self.batch_size]
            batch = self.collator(
                [
                    {"input_ids": row.input_ids[start:stop], "labels": row.labels[start:stop]}
                    for row, start, stop in ((rows[key].tokens, start, stop) for key, _, start, stop in chosen)
                ]
            )
            yield {**batch, "pieces": [[*key, i] for key, i, _, _ in chosen]}


class ScoredWriter(Callback):
    """Writes rows in their order as soon as all before them are scored.

    Args:
        batches: where rows wait.
        folder: of a folder for each split; ``None`` on ranks that write nothing.
    """

    def __init__(self, batches: ScoringBatches, folder: Path | None) -> None:
        self.batches = batches
        self.folder = folder
        self.rows = [0] * len(batches.splits)
        self.targets = [0] * len(batches.splits)
        self._files: list[TextIO] = []

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.folder is None:
            return
        for split in self.batches.splits:
            (self.folder / split.split).mkdir()
            self._files.append((self.folder / split.split / FILE).open("w", encoding="utf-8"))

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for each, log_probs in zip(batch, outputs, strict=True):
            for (place, number, piece), log_prob in zip(each["pieces"], log_probs, strict=True):
                self.batches.waiting[place, number].parts[piece] = log_prob
        self._write()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write()
        assert not self.batches.waiting
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        while self._files:
            self._files.pop().close()

    def _write(self) -> None:
        """What is scored, up to the first row that is not."""
        waiting = self.batches.waiting
        while waiting:
            key = next(iter(waiting))
            if any(part is None for part in waiting[key].parts):
                return
            self._write_row(key[0], waiting.pop(key))

    def _write_row(self, place: int, found: _Waiting) -> None:
        log_prob = np.concatenate([np.zeros(0, np.float32), *found.parts])
        wrong = np.flatnonzero(~np.isfinite(log_prob))
        if wrong.size:
            raise InputError(
                f"{self.batches.splits[place].source.name}: row {found.row.number}: the model's log-prob of target "
                f"{wrong[0] + 1} is {log_prob[wrong[0]]}: a model or a precision that overflows is no reference"
            )
        # The shortest digits that are the same number in float32, where those of a Python float are of float64.
        values = {LOG_PROB: [float(str(value)) for value in log_prob], FINGERPRINT: found.row.fingerprint}
        if self._files:
            self._files[place].write(json.dumps({**found.row.values, **values}) + "\n")
        self.rows[place] += 1
        self.targets[place] += len(log_prob)
