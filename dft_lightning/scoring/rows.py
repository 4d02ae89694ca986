"""The rows of a split as they are scored: read and tokenised, stretch by stretch, and what is written of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from dft_lightning.data.batches.packing import cut
from dft_lightning.data.rows.checks import BadRow
from dft_lightning.data.rows.forms import Conversation, UnknownForm
from dft_lightning.data.rows.reading import Problems, RowReader
from dft_lightning.data.rows.references import FINGERPRINT, LOG_PROB, fingerprint_of
from dft_lightning.data.rows.values import BrokenRow, BrokenText, load_json
from dft_lightning.data.text.tokens import EncodedRow
from dft_lightning.errors import InputError, shortened
from dft_lightning.losses.base import IGNORE_INDEX

if TYPE_CHECKING:
    from dft_lightning.data import InstructionDataModule

_NO_JSON = (TypeError, ValueError, RecursionError, BrokenText)
_ROWS_AT_ONCE = 1024  # among which batches are of about one length


@dataclass(frozen=True)
class SourceRow:
    """A row of a source and its tokens.

    Attributes:
        number: as the source counts.
        values: its columns, as JSON has them.
        tokens: those that are scored.
        fingerprint: of all of them.
        pieces: ``start`` and ``stop`` of the tokens that go through the model by themselves; none without a target.
    """

    number: int | str
    values: dict[str, Any]
    tokens: EncodedRow
    fingerprint: str
    pieces: list[tuple[int, int]]


class SplitRows:
    """A split's own rows, in their order, as often as they are asked for.

    Args:
        data: with a tokenizer.
        split: which of its sources.

    Attributes:
        problems: the bad rows of the last pass.
        total: rows that :meth:`check` has found, bad ones included.
        pieces: how many of each stretch go through the model.
        left_out: columns whose values JSON has no form for.
    """

    def __init__(self, data: InstructionDataModule, split: str) -> None:
        self.split = split
        self.on_bad_rows = data.rows.on_bad_rows
        self._data = data
        self.source = data.splits.reader(split).source
        if self.source.parts:
            raise InputError(
                f"data.{split}: a mixture's rows cannot be scored together: score each of its sources by "
                f"--data.{split} and an --output of its own, and give MixedRows what was written"
            )
        self.problems = Problems(self.source.name)
        self.left_out: set[str] = set()
        self.total = 0
        self.pieces: list[int] = []

    def check(self) -> None:
        """Read all rows once, before a model is loaded.

        Raises:
            InputError: bad rows that are not to be skipped, or none with a target.
        """
        rows, self.pieces = 0, []
        for stretch in self.stretches():
            rows += len(stretch)
            self.pieces.append(sum(len(row.pieces) for row in stretch))
        self.total = total = rows + self.problems.count
        if self.problems.count and (self.on_bad_rows == "raise" or not rows):
            raise InputError(self.problems.report(total))
        if not any(self.pieces):
            raise InputError(f"data.{self.split}: {self.source.name}: no row" + (" has a target" if total else "s"))

    def stretches(self) -> Iterator[list[SourceRow]]:
        """The good rows, some at a time."""
        self.problems = Problems(self.source.name)
        reader, again = self._data.splits.reader(self.split), self._data.splits.reader(self.split)
        source = self.source.rows()
        while stretch := list(islice(source, _ROWS_AT_ONCE)):
            found = [self._read(number, row, reader, again) for number, row in stretch]
            yield self._encode([each for each in found if each is not None])

    def _read(
        self, number: int | str, row: dict[str, Any] | BrokenRow, reader: RowReader, again: RowReader
    ) -> tuple[int | str, dict[str, Any], Conversation] | None:
        """A row and what it says; ``None`` for a bad one."""
        if isinstance(row, dict):
            row = {name: value for name, value in row.items() if name not in (LOG_PROB, FINGERPRINT)}
        conversation = reader.convert(0, row)
        if isinstance(conversation, UnknownForm) and self.on_bad_rows == "raise":
            raise InputError(shortened(f"{self.source.name}: row {number}: {conversation}"))
        if isinstance(conversation, BadRow) or isinstance(row, BrokenRow):
            self.problems.add(number, conversation)
            return None
        values = self._as_json(row)
        if again.convert(0, values) != conversation:
            raise InputError(
                f"{self.source.name}: row {number}: has values that a .jsonl file does not hold, and that the row's "
                "form reads: make texts, numbers and lists of them first"
            )
        return number, values, conversation

    def _as_json(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row as it will be read back, without the columns that cannot be written."""
        try:
            found: dict[str, Any] = load_json(json.dumps(row))
            return found
        except _NO_JSON:
            kept = {}
            for name, value in row.items():
                try:
                    kept[name] = load_json(json.dumps(value))
                except _NO_JSON:
                    self.left_out.add(str(name))
            return kept

    def _encode(self, found: list[tuple[int | str, dict[str, Any], Conversation]]) -> list[SourceRow]:
        encoder = self._data.splits.encoder(self.split)
        rows = []
        whole = encoder.encode_whole([conversation for _, _, conversation in found])
        for (number, values, _), made in zip(found, whole, strict=True):
            if isinstance(made, InputError):
                self.problems.add(number, made)
                continue
            if len(made) > 1:
                raise InputError(
                    f"{self.source.name}: row {number}: {len(made)} rows are made of it, one of each turn, and "
                    f"{LOG_PROB} is of one: set data.text.train_turns: last"
                )
            (tokens,) = made
            fingerprint = fingerprint_of(tokens.input_ids, tokens.labels, encoder.piece_length)
            kept = tokens.cut(encoder.max_length)
            rows.append(SourceRow(number, values, kept, fingerprint, _pieces(kept, encoder.piece_length)))
        return rows


def _pieces(row: EncodedRow, piece_length: int | None) -> list[tuple[int, int]]:
    """What goes through the model: as a batch would have it, and nothing that has no target."""
    if not row.has_target:
        return []
    size = len(row.input_ids)
    pieces = cut([size], piece_length or size, lambda _: row.labels != IGNORE_INDEX)
    return list(zip(pieces.start.tolist(), pieces.stop.tolist(), strict=True))
