"""A source's rows as conversations, kept on disk, and the account of the bad ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.data.files import BrokenRow
from dft_lightning.data.forms import (
    Conversation,
    LastTurn,
    RowColumns,
    UnknownForm,
    convert_row,
    recognise_form,
    weight_column,
)
from dft_lightning.data.sources import Row, RowSource
from dft_lightning.data.turns import BadRow, Message
from dft_lightning.errors import InputError, shortened

if TYPE_CHECKING:
    from datasets import Dataset

OnBadRows = Literal["raise", "skip"]
MAX_SHOWN = 10
_WRITTEN_AT_ONCE = 1000


@dataclasses.dataclass
class Problems:
    """Bad rows of a source: how many, and the first ten.

    Attributes:
        name: of the source.
        shown: the first ones, each with its row.
        count: of all.
    """

    name: str
    shown: list[str] = dataclasses.field(default_factory=list)
    count: int = 0

    def add(self, number: int | str, problem: object) -> None:
        """Count a bad row."""
        self.extend([shortened(f"row {number}: {problem}")])

    def extend(self, problems: Sequence[str], count: int | None = None) -> None:
        """Count bad rows, of which the first are given."""
        self.count += len(problems) if count is None else count
        self.shown += problems[: MAX_SHOWN - len(self.shown)]

    def report(self, total: int) -> str:
        """All of it, of ``total`` rows."""
        lines = [f"{self.name}: {self.count} of {total} rows are bad", *(f"  {problem}" for problem in self.shown)]
        if self.count > len(self.shown):
            lines.append(f"  ... and {self.count - len(self.shown)} more")
        return "\n".join(lines)


class Conversations:
    """Rows as conversations, in a table on disk of ``conversation`` (JSON), ``number`` and ``part``.

    Attributes:
        name: of the source.
        parts: what the source is mixed from, by index in the column ``part``; empty for a single one.
        digest: of all the content.
        problems: the rows that were skipped.
    """

    def __init__(
        self, name: str, parts: list[str], table: Dataset, digest: str, problems: Problems, folder: Any
    ) -> None:
        self.name = name
        self.parts = parts
        self.table = table
        self.digest = digest
        self.problems = problems
        self._folder = folder  # on disk as long as this is here

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Conversation]:
        return map(load_conversation, self.table["conversation"])

    @property
    def messages(self) -> list[list[Message]]:
        """The messages of each row."""
        return [conversation.messages for conversation in self]

    @property
    def numbers(self) -> list[int | str]:
        """Of each row, as the source counts."""
        return [json.loads(number) for number in self.table["number"]]

    def select(self, chosen: Sequence[int], problems: Problems | None = None) -> Conversations:
        """Some of the rows, by position, and the skipped ones that are counted with them."""
        digest = hashlib.sha256(f"{self.digest}{list(chosen)}".encode()).hexdigest()
        return Conversations(
            self.name, self.parts, self.table.select(chosen), digest, problems or Problems(self.name), self._folder
        )

    def divide(self, validation_fraction: float, seed: int) -> tuple[Conversations, Conversations]:
        """Training and validation rows, each in their order; the skipped ones count as training rows.

        Raises:
            InputError: one of them would have none.
        """
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        size = round(len(order) * validation_fraction)
        if not 0 < size < len(order):
            raise InputError(
                f"data.validation_fraction {validation_fraction} of {len(order)} rows leaves "
                f"{size} for validation and {len(order) - size} for training"
            )
        return self.select(sorted(order[size:]), self.problems), self.select(sorted(order[:size]))


def load_conversation(text: str) -> Conversation:
    """A conversation from its JSON."""
    return Conversation(**json.loads(text))


def read_messages(
    source: RowSource, columns: RowColumns, *, last_turn: LastTurn = "any", on_bad_rows: OnBadRows = "raise"
) -> Conversations:
    """Read a whole source as conversations. Memory does not grow with it.

    Args:
        source: where rows come from.
        columns: how they are read.
        last_turn: ``"any"`` needs an assistant turn somewhere (to learn), ``"assistant"`` needs it last (to score),
            ``"optional"`` needs none (to predict).
        on_bad_rows: ``"raise"``, or ``"skip"`` to leave them out and count them.

    Raises:
        InputError: no rows, or bad ones: names the source, row and column of up to ten, and how many there are.
    """
    problems = Problems(source.name)
    writer = _Spool(len(source.parts))
    reader = RowReader(source, columns, last_turn)
    for part, number, found in reader.read():
        if isinstance(found, UnknownForm) and on_bad_rows == "raise":
            raise InputError(shortened(f"{source.name}: row {number}: {found}"))  # as all the others will be
        if isinstance(found, BadRow):
            problems.add(number, found)
        else:
            writer.write(found, number, part)
    total = writer.count + problems.count
    if problems.count and (on_bad_rows == "raise" or not writer.count):
        raise InputError(problems.report(total))
    if not total:
        raise InputError(f"{source.name}: no rows")
    if reader.weighted_by is not None:
        rank_zero_info(weighting(source.name, reader.weighted_by))
    return Conversations(source.name, source.parts, writer.table(), writer.digest(), problems, writer.folder)


def weighting(name: str, column: str) -> str:
    """What is said, once, of rows whose weight was recognised and not asked for."""
    return f"{name}: the column {column} weights the rows' losses (another by data.weight_column)"


class RowReader:
    """Rows of a source as conversations, one at a time; each part of a mixture has its own form.

    Attributes:
        weighted_by: ``reward`` or ``advantage``, where a row was found to have it and no ``weight_column`` is named.
    """

    def __init__(self, source: RowSource, columns: RowColumns, last_turn: LastTurn) -> None:
        self.source = source
        self.columns = columns
        self.last_turn = last_turn
        self.weighted_by: str | None = None
        self._forms: dict[int, Any] = {}

    def read(self) -> Iterator[tuple[int, int | str, Conversation | BadRow]]:
        """Part, number, and what the row says or what is wrong with it."""
        return ((part, number, self.convert(part, row)) for part, number, row in self.source.rows_of_parts())

    def convert(self, part: int, row: Row) -> Conversation | BadRow:
        """What a row of a part says, or what is wrong with it."""
        if isinstance(row, BrokenRow):
            return BadRow(row.reason)
        try:
            if part not in self._forms:
                self._forms[part] = recognise_form(row, self.columns, self.last_turn != "optional")
            if self.weighted_by is None and self.columns.weight is None:
                column = weight_column(row, self.columns)
                self.weighted_by = column if column != "weight" else None
            return convert_row(row, self._forms[part], self.columns, self.last_turn)
        except BadRow as problem:
            return problem
        except RecursionError:  # where the wrong value itself is quoted
            return BadRow("nested too deeply")


class _Spool:
    """Conversations on their way to disk."""

    def __init__(self, parts: int) -> None:
        import pyarrow
        from datasets import config

        self.count = 0
        self._hash = hashlib.sha256(str(parts).encode())
        cache = Path(config.HF_DATASETS_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        self.folder = tempfile.TemporaryDirectory(prefix="rows-", dir=cache, ignore_cleanup_errors=True)
        self._schema = pyarrow.schema(
            {"conversation": pyarrow.large_string(), "number": pyarrow.string(), "part": pyarrow.int32()}
        )
        self._path = Path(self.folder.name) / "rows.arrow"
        self._stream = pyarrow.ipc.new_stream(str(self._path), self._schema)
        self._pending: list[tuple[str, str, int]] = []

    def write(self, conversation: Conversation, number: int | str, part: int) -> None:
        content = {field.name: getattr(conversation, field.name) for field in dataclasses.fields(conversation)}
        text, place = json.dumps(content), json.dumps(number)
        self._hash.update(f"{part}{place}{text}".encode())
        self._pending.append((text, place, part))
        self.count += 1
        if len(self._pending) == _WRITTEN_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        columns = zip(zip(*self._pending, strict=True), self._schema, strict=True)
        arrays = [pyarrow.array(values, field.type) for values, field in columns]
        self._stream.write_batch(pyarrow.record_batch(arrays, schema=self._schema))
        self._pending = []

    def table(self) -> Dataset:
        from datasets import Dataset

        if self._pending:
            self._flush()
        self._stream.close()
        return Dataset.from_file(str(self._path))

    def digest(self) -> str:
        return self._hash.hexdigest()
