"""Tokenised rows to padded, joined or packed batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dft_lightning.data.batches.packing import Packs
from dft_lightning.losses.base import IGNORE_INDEX
from dft_lightning.models.layout import KEY, BatchLayout

PADDING_ROW = -1
Item = dict[str, Any]


class ItemRows(Dataset[Item]):
    """Rows by index, or several by a list, and at index -1 a row without targets that evens out the ranks.

    Args:
        rows: tokenised rows.
        pad_token_id: for the row without targets.
        referenced: whether rows have reference log-probs, which that one has to have then.
    """

    def __init__(self, rows: Sequence[Item], pad_token_id: int, referenced: bool = False) -> None:
        self.rows = rows
        self.padding_row = padding_row(pad_token_id, referenced)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | list[int]) -> Any:
        if isinstance(index, list):  # a micro-batch
            return [self[each] for each in index]
        if index != PADDING_ROW:
            return {**self.rows[index], "index": index}
        return self.padding_row


class PackedRows(Dataset[Item]):
    """Packs by index: the ``documents`` of each; at index -1 one without targets that evens out the ranks.

    Args:
        rows: tokenised rows, a dataset that takes lists of indices.
        packs: which of them come together.
        pad_token_id: for the row without targets.
        referenced: whether rows have reference log-probs, which that one has to have then.
    """

    def __init__(self, rows: Any, packs: Packs, pad_token_id: int, referenced: bool = False) -> None:
        self.rows = rows.select_columns(list(_COLUMNS))
        self.packs = packs
        self.padding_row = padding_row(pad_token_id, referenced)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Item:
        if index == PADDING_ROW:
            return {"documents": [self.padding_row]}
        pieces = list(self.packs[index])
        found = self.rows[[row for row, _, _ in pieces]]
        rows = ({name: values[i] for name, values in found.items()} for i in range(len(pieces)))
        return {"documents": [piece_of(row, *piece[1:]) for row, piece in zip(rows, pieces, strict=True)]}


_COLUMNS = ("input_ids", "labels", "weights", "reference_log_prob", "part")


def piece_of(row: Item, start: int, stop: int) -> Item:
    """What a batch takes of a tokenised row, of its tokens ``start`` to ``stop``."""
    weights, reference = row["weights"], row.get("reference_log_prob")
    return {
        "input_ids": row["input_ids"][start:stop],
        "labels": row["labels"][start:stop],
        "weights": None if weights is None else weights[start:stop],
        "reference_log_prob": None if reference is None else reference[start:stop],
        "part": row["part"],
    }


def padding_row(token: int, referenced: bool = False) -> Item:
    """A row without targets."""
    return {
        "input_ids": [token] * 2,
        "labels": [IGNORE_INDEX] * 2,
        "reference_log_prob": [0.0] * 2 if referenced else None,
        "index": PADDING_ROW,
        "prompt": "",
        "prompt_ids": [token],
        "answer": None,
    }


class Collator:
    """Pads rows on the right to the longest of the batch, or joins them, and pads prompts on the left.

    Items are rows, or packs of ``documents``. A batch's ``layout`` is what the host knows of it. Where a row has
    weights, the batch has ``token_weight``; where rows have reference log-probs, ``reference_log_prob`` ``[B, T]``,
    float32, aligned with the labels and 0 where there is no target; where the rows are of a mixture, ``source``, the
    index of each token's source.

    Args:
        pad_token_id: fills ``input_ids``; labels are filled with -100.
        pad_to_multiple_of: lengths are rounded up to a multiple of this.
        with_prompts: add what generation and scoring need.
        padding_free: make one row ``[1, T]`` of all, with ``position_ids`` that start anew at each.
        sources: add ``source``: by the part of a mixture that a row is of.
    """

    def __init__(
        self,
        pad_token_id: int,
        pad_to_multiple_of: int = 1,
        with_prompts: bool = False,
        padding_free: bool = False,
        sources: list[int] | None = None,
    ) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.with_prompts = with_prompts
        self.padding_free = padding_free
        self.sources = sources

    def __call__(self, items: list[Item]) -> dict[str, Any]:
        if self.padding_free:
            batch = self._joined([{"documents": [row for item in items for row in item.get("documents", [item])]}])
        elif "documents" in items[0]:
            batch = self._joined(items)
        else:
            batch = self._padded(items)
        if self.with_prompts:
            prompts = [row["prompt_ids"] for row in items]
            batch["prompt_input_ids"] = self._pad(prompts, self.pad_token_id, left=True)
            batch["prompt_attention_mask"] = self._pad([[1] * len(ids) for ids in prompts], 0, left=True)
            batch["index"] = torch.tensor([row["index"] for row in items])
            batch["prompt"] = [row["prompt"] for row in items]
            batch["answer"] = [row["answer"] for row in items]
        return batch

    def _padded(self, rows: list[Item]) -> dict[str, Any]:
        columns = [self._columns(row) for row in rows]
        for column in columns:
            del column["position_ids"]
            column["attention_mask"] = np.ones(len(column["input_ids"]), np.int64)
        batch = self._stack(columns, rows)
        batch[KEY] = BatchLayout(batch["labels"], batch["attention_mask"])
        return batch

    def _joined(self, items: list[Item]) -> dict[str, Any]:
        """A row of whole documents for each item; what fills it up are documents of one token, at position 0."""
        rows = []
        for item in items:
            documents = [self._columns(row) for row in item["documents"]]
            rows.append({name: np.concatenate([column[name] for column in documents]) for name in documents[0]})
        batch = self._stack(rows, [row for item in items for row in item["documents"]])
        tokens = sum(len(row["input_ids"]) for row in rows)
        batch[KEY] = BatchLayout(batch["labels"], position_ids=batch["position_ids"], num_tokens=tokens)
        return batch

    def _columns(self, row: Item) -> dict[str, Any]:
        size = len(row["input_ids"])
        labels = np.array(row["labels"], np.int64)
        labels[:1] = IGNORE_INDEX  # the first token of a row is no target: it would be predicted from the row before
        weights, log_prob = row.get("weights"), row.get("reference_log_prob")
        reference = np.zeros(size, np.float32) if log_prob is None else np.array(log_prob, np.float32)
        reference[:1] = 0  # of a piece's first token, which is a target of the piece before it
        columns = {
            "input_ids": np.asarray(row["input_ids"], np.int64),
            "labels": labels,
            "position_ids": np.arange(size),
            "token_weight": np.ones(size, np.float32) if weights is None else np.asarray(weights, np.float32),
            "reference_log_prob": reference,
        }
        if self.sources is not None:
            columns["source"] = np.full(size, self.sources[row.get("part", 0)], np.int64)
        return columns

    def _stack(self, rows: list[dict[str, Any]], given: list[Item]) -> dict[str, Any]:
        """Columns as tensors, without those of values that no row is given."""
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}
        optional = {"token_weight": "weights", "reference_log_prob": "reference_log_prob"}
        left_out = {name for name, key in optional.items() if all(row.get(key) is None for row in given)}
        names = [name for name in rows[0] if name not in left_out]
        return {name: self._pad([row[name] for row in rows], fill.get(name, 0)) for name in names}

    def _pad(self, sequences: Sequence[Any], value: int, left: bool = False) -> Tensor:
        multiple = self.pad_to_multiple_of
        length = -(-max(map(len, sequences)) // multiple) * multiple
        dtype = torch.float32 if getattr(sequences[0], "dtype", None) == np.float32 else torch.int64
        padded = torch.full((len(sequences), length), value, dtype=dtype)
        for row, sequence in zip(padded, sequences, strict=True):
            place = row[length - len(sequence) :] if left else row[: len(sequence)]
            place.copy_(torch.as_tensor(sequence))
        return padded
