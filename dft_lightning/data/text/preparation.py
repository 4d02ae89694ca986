"""A source's rows read and tokenised, stretch by stretch: memory does not grow with them."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dft_lightning.data.notes import Notes
from dft_lightning.data.rows.checks import BadRow
from dft_lightning.data.rows.forms import Conversation, Reading
from dft_lightning.data.rows.reading import Records, RowReader, dump_conversation, load_conversation
from dft_lightning.data.rows.sources import RowSource
from dft_lightning.data.text.tokens import ConversationEncoder, attempt
from dft_lightning.errors import InputError, shortened

if TYPE_CHECKING:
    import pyarrow

_ROWS_AT_ONCE = 250  # few enough that processes end at about the same time
_BYTES_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Row:
    """A row that could be read: position in the source, part, place as JSON, what it says, and that as bytes."""

    position: int
    part: int
    number: str
    conversation: Conversation
    plain: bytes


@dataclass
class Stretch:
    """Rows that are tokenised together.

    Attributes:
        start: position of the first.
        read: how many were read, bad ones included.
        rows: the good ones.
        bad: positions of the others, and what is wrong with them.
    """

    start: int
    read: int = 0
    rows: list[Row] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)

    @cached_property
    def digest(self) -> str:
        """Of all that its tokens are made from."""
        total = hashlib.sha256(f"{self.start} {self.read}".encode())
        for row in self.rows:
            total.update(f"\n{row.position} {row.part} {row.number} {len(row.plain)} ".encode() + row.plain)
        return total.hexdigest()[:32]


@dataclass
class Encoded:
    """A stretch's tokens.

    Attributes:
        batch: with the columns of :func:`schema`.
        dropped: positions of the rows without a target.
        bad: positions of those that the template refuses, and why.
        notes: what was found in them.
    """

    batch: pyarrow.RecordBatch
    dropped: list[int]
    bad: list[tuple[int, str]]
    notes: list[tuple[str, str, int]]


class SourceRows:
    """A source's rows, read once.

    Args:
        source: where rows come from.
        reading: how they are read.
        check: looks at the first.

    Attributes:
        notes: of each part of the source, what was found in reading.
    """

    def __init__(
        self, source: RowSource, reading: Reading, check: Callable[[Conversation], None] | None = None
    ) -> None:
        self._reader = RowReader(source, reading)
        self._check = check

    @property
    def notes(self) -> dict[int, Notes]:
        return self._reader.notes

    def stretches(self) -> Iterator[Stretch]:
        """The rows, some at a time: few where they are long. Raises as :meth:`RowReader.read` does."""
        stretch, size = Stretch(0), 0
        for position, (part, number, found) in enumerate(self._reader.read()):
            stretch.read += 1
            if isinstance(found, BadRow):
                stretch.bad.append((position, shortened(f"row {number}: {found}")))
            else:
                if self._check is not None:
                    self._check(found)
                    self._check = None
                plain = dump_conversation(found)
                size += len(plain)
                stretch.rows.append(Row(position, part, json.dumps(number), found, plain))
            if stretch.read == _ROWS_AT_ONCE or size >= _BYTES_AT_ONCE:
                yield stretch
                stretch, size = Stretch(position + 1), 0
        if stretch.read:
            yield stretch


class Spool:
    """A source's rows on disk, for several to take: it is read once.

    Args:
        rows: of the source.
        folder: of the file.

    Attributes:
        notes: as the source's.
        total: of all rows.
    """

    def __init__(self, rows: SourceRows, folder: Path) -> None:
        self._records = Records(folder)
        self._places: list[int] = []
        self.total = 0
        for stretch in rows.stretches():
            self._places.append(self._records.add(stretch))
            self.total += stretch.read
        self._records.flush()
        self.notes = rows.notes

    def stretches(self) -> Iterator[Stretch]:
        """As they were read."""
        return map(self._records.__getitem__, self._places)

    def close(self) -> None:
        """Let go of the file."""
        self._records.close()


class PartOfRows:
    """Some rows of a spool.

    Args:
        spool: of all.
        chosen: positions of those that are taken.
    """

    def __init__(self, spool: Spool, chosen: set[int]) -> None:
        self._spool = spool
        self._chosen = chosen
        self.notes: dict[int, Notes] = {}  # they are said of the whole

    def stretches(self) -> Iterator[Stretch]:
        """Those that have such rows, without the others."""
        for stretch in self._spool.stretches():
            rows = [row for row in stretch.rows if row.position in self._chosen]
            bad = [found for found in stretch.bad if found[0] in self._chosen]
            if rows or bad:
                yield Stretch(stretch.start, len(rows) + len(bad), rows, bad)


@dataclass(frozen=True)
class Preparation:
    """What makes the tokens of a split.

    Attributes:
        source: where rows come from.
        reading: how they are read.
        rows: reads them.
        encoder: how they become tokens.
        with_prompts: add ``prompt``, ``prompt_ids`` and ``answer``, for generation.
        keep_all: keep rows without a target.
        part: what the choice of rows hangs on, where not all are taken.
    """

    source: RowSource
    reading: Reading
    rows: Callable[[], SourceRows | Spool | PartOfRows]
    encoder: ConversationEncoder
    with_prompts: bool
    keep_all: bool
    part: list[Any] = field(default_factory=list)


@dataclass
class Tokenizing:
    """What turns stretches into columns."""

    encoder: ConversationEncoder
    with_prompts: bool
    keep_all: bool

    def __call__(self, rows: list[Row]) -> Encoded:
        import pyarrow as pa

        types = schema(self.with_prompts)
        columns: dict[str, list[Any]] = {name: [] for name in types.names}
        dropped, bad = [], []
        encoded = self.encoder.encode([row.conversation for row in rows])
        for row, found in zip(rows, encoded, strict=True):
            made = attempt(self._columns, (row, found))
            if isinstance(made, InputError):
                bad.append((row.position, shortened(f"row {json.loads(row.number)}: {made}")))
            elif not made:
                dropped.append(row.position)
            else:
                for values in made:
                    for name, column in columns.items():
                        column.append(values[name])
        batch = pa.record_batch([pa.array(columns[each.name], each.type) for each in types], schema=types)
        return Encoded(batch, dropped, bad, self.encoder.take_notes().plain())

    def _columns(self, pair: tuple[Row, Any]) -> list[dict[str, Any]]:
        """Of each row that a conversation makes, without those that are not kept."""
        row, found = pair
        if isinstance(found, InputError):
            raise found
        place = {"number": row.number, "part": row.part, "position": row.position}
        return [
            {**vars(tokens), **place, **(self._prompt(tokens.part_of(row.conversation)) if self.with_prompts else {})}
            for tokens in found
            if self.keep_all or tokens.has_target
        ]

    def _prompt(self, conversation: Conversation) -> dict[str, Any]:
        text, ids = self.encoder.prompt(conversation)
        return {"prompt": text, "prompt_ids": ids, "answer": conversation.answer}


def schema(with_prompts: bool) -> pyarrow.Schema:
    """Columns of tokenised rows."""
    import pyarrow as pa

    fields = {"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "weights": pa.list_(pa.float32())}
    fields |= {"reference_log_prob": pa.list_(pa.float32())}
    fields |= {"number": pa.string(), "part": pa.int32(), "position": pa.int64(), "truncated": pa.bool_()}
    if with_prompts:
        fields |= {"prompt_ids": pa.list_(pa.int32()), "prompt": pa.string(), "answer": pa.string()}
    return pa.schema(fields)


# -- in this process or in several -------------------------------------------------------------------------------------


def encoded(
    found: Iterable[tuple[Stretch, Encoded | None]], task: Tokenizing, num_proc: int | None
) -> Iterator[tuple[Stretch, Encoded]]:
    """The tokens of stretches in their order, of those that have none yet.

    Args:
        found: stretches, some with their tokens from an earlier time.
        task: what makes them.
        num_proc: processes; ``None`` for this one, whose tokenizer uses every core by itself.

    Raises:
        InputError: a process died.
    """
    if num_proc in (None, 1):
        for stretch, ready in found:
            yield stretch, ready or task(stretch.rows)
        return
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context(method), _begin_process, (task,))
    pending: deque[tuple[Stretch, Encoded | Future[Encoded]]] = deque()
    try:
        for stretch, ready in found:
            pending.append((stretch, ready or pool.submit(_encode_in_process, _sent(stretch))))
            if len(pending) > 2 * num_proc:  # so many are in memory at once
                yield _received(pending.popleft())
        while pending:
            yield _received(pending.popleft())
    except BrokenProcessPool as error:
        raise InputError(
            f"data.num_proc: one of {num_proc} processes died while tokenising, for want of memory perhaps: take fewer"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _sent(stretch: Stretch) -> list[tuple[int, int, str, bytes]]:
    return [(row.position, row.part, row.number, row.plain) for row in stretch.rows]


def _received(pair: tuple[Stretch, Encoded | Future[Encoded]]) -> tuple[Stretch, Encoded]:
    stretch, found = pair
    return stretch, found.result() if isinstance(found, Future) else found


_task_of_process: Tokenizing | None = None


def _begin_process(task: Tokenizing) -> None:
    global _task_of_process
    _task_of_process = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    threading.Thread(target=_end_with_the_first, daemon=True).start()


def _end_with_the_first() -> None:
    """A process that is killed ends no others, and these would wait for rows for ever."""
    first = multiprocessing.parent_process()
    assert first is not None
    first.join()
    os._exit(1)


def _encode_in_process(rows: list[tuple[int, int, str, bytes]]) -> Encoded:
    assert _task_of_process is not None
    return _task_of_process(
        [Row(position, part, number, load_conversation(plain), plain) for position, part, number, plain in rows]
    )
