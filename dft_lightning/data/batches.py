"""Tokenised rows to padded batches, in an order that does not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from dft_lightning.data.tokens import IGNORE_INDEX

PADDING_ROW = -1


class TokenizedRows(Dataset[dict[str, Any]]):
    """Rows by index, and at index -1 a row without targets that evens out the ranks."""

    def __init__(self, rows: Sequence[dict[str, Any]], pad_token_id: int) -> None:
        self.rows = rows
        self.pad_token_id = pad_token_id

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index != PADDING_ROW:
            return {**self.rows[index], "index": index}
        token = [self.pad_token_id]
        return {
            "input_ids": token * 2,
            "labels": [IGNORE_INDEX] * 2,
            "index": PADDING_ROW,
            "prompt": "",
            "prompt_ids": token,
            "reference": None,
        }


class RowSampler(DistributedSampler[Any]):
    """Shares rows out among ranks so that a global step sees the same rows on any number of ranks.

    Where the rows do not divide evenly, ranks are filled up with rows that have no target. torch's sampler repeats
    rows instead, which counts them twice in an epoch's gradients and metrics. It is a ``DistributedSampler`` so that
    Lightning leaves it alone and sets its epoch.

    Args:
        dataset: the rows.
        num_replicas: number of ranks.
        rank: this rank.
        shuffle: a new order in each epoch, by ``seed`` and epoch alone.
        seed: of the order.
    """

    def __init__(
        self, dataset: Dataset[Any], num_replicas: int = 1, rank: int = 0, shuffle: bool = False, seed: int = 0
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)

    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)  # type: ignore[arg-type]
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(size, generator=generator).tolist()
        else:
            order = list(range(size))
        order += [PADDING_ROW] * (self.total_size - size)
        return iter(order[self.rank :: self.num_replicas])


class Collator:
    """Pads rows on the right to the longest of the batch, or joins them, and pads prompts on the left.

    Args:
        pad_token_id: fills ``input_ids``; labels are filled with -100.
        pad_to_multiple_of: lengths are rounded up to a multiple of this.
        with_prompts: add what generation and scoring need.
        padding_free: make one row ``[1, T]`` of all, with ``position_ids`` that start anew at each.
    """

    def __init__(
        self,
        pad_token_id: int,
        pad_to_multiple_of: int = 1,
        with_prompts: bool = False,
        padding_free: bool = False,
    ) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.with_prompts = with_prompts
        self.padding_free = padding_free

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self._joined(rows) if self.padding_free else self._padded(rows)
        if self.with_prompts:
            prompts = [row["prompt_ids"] for row in rows]
            batch["prompt_input_ids"] = self._pad(prompts, self.pad_token_id, left=True)
            batch["prompt_attention_mask"] = self._pad([[1] * len(ids) for ids in prompts], 0, left=True)
            batch["index"] = torch.tensor([row["index"] for row in rows])
            batch["prompt"] = [row["prompt"] for row in rows]
            batch["reference"] = [row["reference"] for row in rows]
        return batch

    def _padded(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        input_ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": self._pad(input_ids, self.pad_token_id),
            "attention_mask": self._pad([[1] * len(ids) for ids in input_ids], 0),
            "labels": self._pad([row["labels"] for row in rows], IGNORE_INDEX),
        }

    def _joined(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        # The first token of a row is no target: it would be predicted from the row before.
        columns = {
            "input_ids": [row["input_ids"] for row in rows],
            "labels": [[IGNORE_INDEX, *row["labels"][1:]] for row in rows],
            "position_ids": [range(len(row["input_ids"])) for row in rows],
        }
        return {name: torch.tensor([list(chain.from_iterable(parts))]) for name, parts in columns.items()}

    def _pad(self, sequences: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
        multiple = self.pad_to_multiple_of
        length = -(-max(map(len, sequences)) // multiple) * multiple
        padded = torch.full((len(sequences), length), value, dtype=torch.int64)
        for row, sequence in zip(padded, sequences, strict=True):
            place = row[length - len(sequence) :] if left else row[: len(sequence)]
            place.copy_(torch.as_tensor(sequence))
        return padded
