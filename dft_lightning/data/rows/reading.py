"""A source's rows as conversations, kept on disk, and the account of the bad ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dft_lightning.data.notes import Notes
from dft_lightning.data.options import RowForm, RowFormName
from dft_lightning.data.rows.checks import BadRow, is_there
from dft_lightning.data.rows.forms import (
    Conversation,
    Reading,
    UnknownForm,
    convert_row,
    own_row,
    recognise_form,
)
from dft_lightning.data.rows.sources import Row, RowSource
from dft_lightning.data.rows.turns import Message
from dft_lightning.data.rows.unread import unread_columns
from dft_lightning.data.rows.values import BrokenRow
from dft_lightning.errors import InputError, one_line, shortened

if TYPE_CHECKING:
    from datasets import Dataset

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

    def report(self, total: int, of: str = "") -> str:
        """All of it, of ``total`` rows, which may be ``of`` them ``"the first "``."""
        lines = [f"{self.name}: {self.count} of {of}{total} rows are bad", *(f"  {problem}" for problem in self.shown)]
        if self.count > len(self.shown):
            lines.append(f"  ... and {self.count - len(self.shown)} more")
        return "\n".join(lines)


class Conversations:
    """Rows as conversations, in a table on disk of ``conversation`` (JSON), ``number``,
    ``part`` and ``position`` in the source.

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

    def at(self, chosen: Callable[[int], bool]) -> Conversations:
        """The rows whose position in the source is chosen."""
        return self.select([i for i, position in enumerate(self.table["position"]) if chosen(position)])


def validation_positions(total: int, validation_fraction: float, seed: int) -> set[int]:
    """Which of a source's rows, by position, are set apart for validation.

    Raises:
        InputError: one of the two parts would have none.
    """
    size = round(total * validation_fraction)
    if not 0 < size < total:
        raise InputError(
            f"data.validation_fraction {validation_fraction} of {total} rows leaves "
            f"{size} for validation and {total - size} for training"
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return set(order[:size].tolist())


def dump_conversation(conversation: Conversation) -> str:
    """A conversation as JSON."""
    return json.dumps(vars(conversation))


def load_conversation(text: str) -> Conversation:
    """A conversation from its JSON."""
    return Conversation(**json.loads(text))


def read_messages(source: RowSource, reading: Reading) -> Conversations:
    """Read a whole source as conversations. Memory does not grow with it.

    Args:
        source: where rows come from.
        reading: how they are read.

    Raises:
        InputError: no rows, or bad ones: names the source, row and column of up to ten, and how many there are.
    """
    on_bad_rows = reading.options.on_bad_rows
    problems = Problems(source.name)
    writer = _spool(len(source.parts))
    reader = RowReader(source, reading)
    for position, (part, number, found) in enumerate(reader.read()):
        if isinstance(found, UnknownForm) and on_bad_rows == "raise":
            raise InputError(shortened(f"{source.name}: row {number}: {found}"))  # as all the others will be
        if isinstance(found, BadRow):
            problems.add(number, found)
        else:
            writer.write(found, number, part, position)
    total = writer.count + problems.count
    if problems.count and (on_bad_rows == "raise" or not writer.count):
        raise InputError(problems.report(total))
    if not total:
        raise InputError(f"{source.name}: no rows")
    for part, notes in reader.notes.items():
        name = f"{source.name} ({source.parts[part]})" if source.parts else source.name
        for line, warns in notes.lines(name):
            (rank_zero_warn if warns else rank_zero_info)(line)
    return Conversations(source.name, source.parts, writer.table(), writer.digest(), problems, writer.folder)


class RowReader:
    """Rows of a source as conversations, one at a time; each part of a mixture has its own form.

    Attributes:
        notes: what is to be said of the good rows of each part.
    """

    def __init__(self, source: RowSource, reading: Reading) -> None:
        self.source = source
        self.reading = reading
        self.notes: dict[int, Notes] = defaultdict(Notes)
        self._forms: dict[int, RowFormName] = {}
        self._unread: dict[tuple[str, tuple[Any, ...]], list[tuple[str, Any]]] = {}

    def read(self) -> Iterator[tuple[int, int | str, Conversation | BadRow]]:
        """Part, number, and what the row says or what is wrong with it.

        Raises:
            InputError: the source cannot be read, or not to its end.
        """
        try:
            for part, number, row in self.source.rows_of_parts():
                yield part, number, self.convert(part, row)
        except OSError as error:  # of somebody's own: a file or a connection that it has not
            raise InputError(f"{self.source.name}: cannot be read: {one_line(error)}") from error

    def convert(self, part: int, row: Row) -> Conversation | BadRow:
        """What a row of a part says, or what is wrong with it."""
        if isinstance(row, BrokenRow):
            return BadRow(row.reason)
        own, noted = self.reading.options.form, set[tuple[str, str]]()
        try:
            if isinstance(own, RowForm):
                row = own_row(row, own)
            form = self._form(part, row)
            conversation = convert_row(row, form, self.reading, noted)
        except BadRow as problem:
            return problem
        except RecursionError:  # where the wrong value itself is quoted
            return BadRow("nested too deeply")
        for kind, column in self._columns(form, row):
            if is_there(row[column]):
                noted.add((kind, str(column)))
        for kind, name in sorted(noted):  # the same order in every process
            self.notes[part].add(kind, [name])
        return conversation

    def _form(self, part: int, row: dict[str, Any]) -> RowFormName:
        """By the first row of the part; by each where somebody's own code may make them of several."""
        if part not in self._forms or isinstance(self.reading.options.form, RowForm):
            self._forms[part] = recognise_form(row, self.reading.options, self.reading.last_turn != "optional")
        return self._forms[part]

    def _columns(self, form: RowFormName, row: dict[str, Any]) -> list[tuple[str, Any]]:
        """The columns that are not read, which are the same in most rows."""
        key = (form, tuple(row))
        if key not in self._unread:
            if len(self._unread) == _MOST_SHAPES:
                self._unread.clear()
            self._unread[key] = unread_columns(row, form, self.reading.options)
        return self._unread[key]


_MOST_SHAPES = 1000  # of rows whose columns differ


def _spool(parts: int) -> _Spool:
    try:
        return _Spool(parts)
    except OSError as error:
        raise InputError(
            f"{error.filename or 'HF_DATASETS_CACHE'}: cannot be written: {error.strerror or one_line(error)}: set "
            "HF_DATASETS_CACHE to another folder"
        ) from error


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
            {
                "conversation": pyarrow.large_string(),
                "number": pyarrow.string(),
                "part": pyarrow.int32(),
                "position": pyarrow.int64(),
            }
        )
        self._path = Path(self.folder.name) / "rows.arrow"
        self._stream = pyarrow.ipc.new_stream(str(self._path), self._schema)
        self._pending: list[tuple[str, str, int, int]] = []

    def write(self, conversation: Conversation, number: int | str, part: int, position: int) -> None:
        text, place = dump_conversation(conversation), json.dumps(number)
        self._hash.update(f"{part}{place}{text}".encode())
        self._pending.append((text, place, part, position))
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
