"""A source's rows as conversations, kept on disk, and the account of the bad ones."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import marshal
import pickle
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

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
from dft_lightning.data.rows.identity import writing_to_cache
from dft_lightning.data.rows.sources import Row, RowSource
from dft_lightning.data.rows.turns import Message
from dft_lightning.data.rows.unread import unread_columns
from dft_lightning.data.rows.values import BrokenRow
from dft_lightning.errors import InputError, one_line, shortened

MAX_SHOWN = 10


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


class Records:
    """Values on disk, in a file that has no name: nothing is left of it when its process ends, however it does.

    Args:
        folder: of the file.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with this)

    def add(self, value: Any) -> int:
        """Write a value behind the others; returns its place. None is read before all are there."""
        place = self._file.tell()
        pickle.dump(value, self._file)
        return place

    def __getitem__(self, place: int) -> Any:
        self._file.seek(place)
        return pickle.load(self._file)  # which nobody else can have written

    def flush(self) -> None:
        """Write what is still in memory: a disk that is full says so here."""
        self._file.flush()

    def close(self) -> None:
        """Let go of the file."""
        with contextlib.suppress(OSError):  # of what a full disk did not take, which nobody will read
            self._file.close()

    def __del__(self) -> None:
        self.close()


class Conversations:
    """Rows as conversations, which lie on disk.

    Attributes:
        name: of the source.
        digest: of all the content.
        problems: the rows that were skipped.
    """

    def __init__(
        self,
        name: str,
        records: Records,
        places: Sequence[int],
        positions: Sequence[int],
        digest: str,
        problems: Problems,
    ) -> None:
        self.name = name
        self.digest = digest
        self.problems = problems
        self._records = records  # of a row's number and what it says
        self._places = places  # there
        self._positions = positions  # in the source

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Conversation]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Conversation:
        conversation: Conversation = self._records[self._places[index]][1]
        return conversation

    @property
    def messages(self) -> list[list[Message]]:
        """The messages of each row."""
        return [conversation.messages for conversation in self]

    @property
    def numbers(self) -> list[int | str]:
        """Of each row, as the source counts."""
        return [self._records[place][0] for place in self._places]

    def select(self, chosen: Sequence[int]) -> Conversations:
        """Some of the rows, by index."""
        digest = hashlib.sha256(f"{self.digest}{list(chosen)}".encode()).hexdigest()
        places, positions = (array("q", [each[i] for i in chosen]) for each in (self._places, self._positions))
        return Conversations(self.name, self._records, places, positions, digest, Problems(self.name))

    def at(self, chosen: Callable[[int], bool]) -> Conversations:
        """The rows whose position in the source is chosen."""
        return self.select([i for i, position in enumerate(self._positions) if chosen(position)])


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


def dump_conversation(conversation: Conversation) -> bytes:
    """A conversation as bytes, the same for the same one."""
    return marshal.dumps(vars(conversation), _MARSHAL)


def load_conversation(plain: bytes) -> Conversation:
    """A conversation from its bytes."""
    return Conversation(**marshal.loads(plain))


_MARSHAL = 2  # the last of its formats that says nothing of which values are one object


def read_messages(source: RowSource, reading: Reading) -> Conversations:
    """Read a whole source as conversations. Memory does not grow with what they say.

    Args:
        source: where rows come from.
        reading: how they are read.

    Raises:
        InputError: no rows, or bad ones: names the source, row and column of up to ten, and how many there are.
    """
    problems, places, positions = Problems(source.name), array("q"), array("q")
    reader, digest = RowReader(source, reading), hashlib.sha256()
    with writing_to_cache() as folder:
        records = Records(folder)
        for position, (_, number, found) in enumerate(reader.read()):
            if isinstance(found, BadRow):
                problems.add(number, found)
                continue
            places.append(records.add((number, found)))
            positions.append(position)
            digest.update(f"{number} ".encode() + dump_conversation(found))
        records.flush()
    total = len(places) + problems.count
    if problems.count and (reading.options.on_bad_rows == "raise" or not places):
        raise InputError(problems.report(total))
    if not total:
        raise InputError(f"{source.name}: no rows")
    for part, notes in reader.notes.items():
        name = f"{source.name} ({source.parts[part]})" if source.parts else source.name
        for line, warns in notes.lines(name):
            (rank_zero_warn if warns else rank_zero_info)(line)
    return Conversations(source.name, records, places, positions, digest.hexdigest(), problems)


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
            InputError: the source cannot be read, or not to its end; or a row is of no known form and bad rows end the
                run: all others will be like it.
        """
        try:
            for part, number, row in self.source.rows_of_parts():
                found = self.convert(part, row)
                if isinstance(found, UnknownForm) and self.reading.options.on_bad_rows == "raise":
                    raise InputError(shortened(f"{self.source.name}: row {number}: {found}"))
                yield part, number, found
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
