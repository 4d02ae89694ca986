"""Batches of a source that is read as training goes: for data larger than memory and disk."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

from dft_lightning.data.batches.collating import Collator, piece_of
from dft_lightning.data.batches.packing import pack_documents
from dft_lightning.data.notes import WHOLE, Notes
from dft_lightning.data.options import BatchOptions, StreamOptions
from dft_lightning.data.rows.checks import BadRow
from dft_lightning.data.rows.forms import Conversation
from dft_lightning.data.rows.reading import RowReader
from dft_lightning.data.rows.sources import Row
from dft_lightning.data.text.tokens import ConversationEncoder, EncodedRow
from dft_lightning.errors import InputError, shortened
from dft_lightning.models.row_checks import Positions

T = TypeVar("T")
Placed = tuple[int, int | str, Row]  # part, number, row
State = dict[str, int]
START = {"passes": 0, "rows": 0, "items": 0}
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Stream:
    """What a stream is read from, and how.

    Attributes:
        reader: the rows.
        encoder: to tokens.
        options: of the stream.
        batches: order and packing.
        batch_size: rows, or packs, of a batch.
        max_length: tokens of a pack.
        referenced: whether rows must have reference log-probs; ``None`` to go by a worker's first.
        positions: of the model, where their number is known.
    """

    reader: RowReader
    encoder: ConversationEncoder
    options: StreamOptions = StreamOptions()  # noqa: RUF009 (frozen)
    batches: BatchOptions = BatchOptions()  # noqa: RUF009 (frozen)
    batch_size: int = 8
    max_length: int | None = None
    referenced: bool | None = None
    positions: Positions | None = None


@dataclass
class StreamPosition:
    """Where a rank's workers are.

    Attributes:
        next_worker: whose batch comes next.
        workers: of each worker: ``passes`` over the source, ``rows`` taken in this pass before the present block, and
            ``items`` of the block that are in batches already. None at the start.
    """

    next_worker: int = 0
    workers: list[State] = field(default_factory=list)


class StreamedBatches(IterableDataset[dict[str, Any]]):
    """Batches without end: pass after pass over the source, in a new order each time.

    Row ``i`` of a pass goes to worker ``i % n`` of all ``n`` workers of all ranks, so that each row is in one batch of
    one rank; as passes follow on each other, every rank has batches as long as there are steps. A batch carries
    ``stream``: the worker and where it was left, which :class:`StreamPosition` collects, and what went wrong.

    Args:
        stream: what is read.
        collator: to batches.
        rank: this rank.
        world_size: number of ranks.
        position: where to go on, as it is when an iteration begins; ``None`` for the start.
    """

    def __init__(
        self,
        stream: Stream,
        collator: Collator,
        rank: int = 0,
        world_size: int = 1,
        position: StreamPosition | None = None,
    ) -> None:
        super().__init__()
        self.stream = stream
        self.collator = collator
        self.rank = rank
        self.world_size = world_size
        self.position = position

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        start: State | None = None
        if self.position is not None and self.position.workers:
            worker = (worker + self.position.next_worker) % workers
            start = self.position.workers[worker]
        shard = _Shard(self.stream, self.collator, self.rank * workers + worker, self.world_size * workers)
        try:
            for batch in shard.batches(start):
                yield {**batch, "stream": {**batch["stream"], "worker": worker, "workers": workers}}
        except InputError as error:  # raised in a worker it would come with that one's traceback
            yield {"stream": {"error": str(error)}}


class _Shard:
    """One worker's rows."""

    def __init__(self, stream: Stream, collator: Collator, index: int, total: int) -> None:
        self.stream = stream
        self.reader = stream.reader
        self.collator = collator
        self.index = index
        self.total = total
        self.bad: list[str] = []
        self.dropped = 0
        self.referenced = stream.referenced
        self.made = Notes()

    def batches(self, start: State | None) -> Iterator[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        for item, state in self._items(start or START):
            if isinstance(item, BadRow):
                yield {"stream": {"error": str(item)}}
                return
            items.append(item)
            if len(items) == self.stream.batch_size:
                report = {"state": state, "bad": self.bad, "dropped": self.dropped}
                notes = {**self.reader.notes, WHOLE: self.made}
                report["notes"] = {part: found.plain() for part, found in notes.items()}
                yield {**self.collator(items), "stream": report}
                items, self.bad, self.dropped = [], [], 0

    def _items(self, start: State) -> Iterator[tuple[dict[str, Any] | BadRow, State]]:
        """Rows or packs, each with the state after it."""
        for passes in count(start["passes"]):
            first = passes == start["passes"]
            taken, skipped = (start["rows"], start["items"]) if first else (0, 0)
            found = False
            for block in self._blocks(islice(self._order(passes), taken, None)):
                taken_after = taken + block.rows
                if skipped:  # what was wrong in this block was counted with the batches that have its first items
                    self.bad, self.dropped = [], 0
                for i, item in enumerate(block.items):
                    found = True
                    if i < skipped:
                        continue
                    last = i + 1 == len(block.items)
                    rows, done = (taken_after, 0) if last else (taken, i + 1)
                    yield item, {"passes": passes, "rows": rows, "items": done}
                taken, skipped = taken_after, 0
            if not found and not (first and start["rows"]):
                yield BadRow(f"{self.reader.source.name}: {self._nothing()}"), start
                return

    def _nothing(self) -> str:
        if self.bad:
            return f"a pass over worker {self.index}'s rows has {len(self.bad)} bad ones and no other: {self.bad[0]}"
        return (
            f"a pass over the rows of worker {self.index} of {self.total} has none with a target: take fewer workers, "
            "or more rows"
        )

    def _order(self, passes: int) -> Iterator[Placed]:
        """This worker's rows of a pass."""
        rows = islice(self.reader.source.rows_of_parts(), self.index, None, self.total)
        options = self.stream.batches
        size = self.stream.options.shuffle_buffer_size if options.shuffle else 1
        return _shuffled(rows, size, random.Random(f"{options.seed}-{passes}-{self.index}")) if size > 1 else rows

    def _blocks(self, rows: Iterator[Placed]) -> Iterator[_Block]:
        """Rows with their targets: one by one, or as many as are packed together."""
        packing = self.stream.batches.packing
        size = self.stream.options.pack_buffer_size if packing else _ROWS_AT_ONCE
        while stretch := list(islice(rows, size)):
            items = self._rows(stretch)
            problem = next((item for item in items if isinstance(item, BadRow)), None)
            if problem is not None:
                yield _Block(len(stretch), [problem])
            else:
                yield _Block(len(stretch), self._packs(items) if packing else items)

    def _rows(self, stretch: list[Placed]) -> list[Any]:
        """Rows of tokens; a bad one where they are not skipped."""
        places: list[tuple[int, int | str]] = []
        conversations: list[Conversation] = []
        found: list[Any] = []
        for part, number, row in stretch:
            converted = self.reader.convert(part, row)
            if isinstance(converted, BadRow):
                found += self._problem(number, converted)
            else:
                places.append((part, number))
                conversations.append(converted)
        rows_of_each = self.stream.encoder.encode(conversations)
        self.made.update(self.stream.encoder.take_notes())
        for (part, number), encoded in zip(places, rows_of_each, strict=True):
            if isinstance(encoded, InputError):
                found += self._problem(number, encoded)
                continue
            kept = [each for each in encoded if each.has_target]
            self.dropped += not kept
            for each in kept:
                found += self._unlike_the_others(number, each) + self._too_long(number, each)
                found.append({**vars(each), "part": part})
        return found

    def _too_long(self, number: int | str, row: EncodedRow) -> list[BadRow]:
        """What ends the run as well: the model would look for a position that it has not; rotary ones go on."""
        stream, size = self.stream, len(row.input_ids)
        if stream.batches.packing == "bfd_split" and stream.max_length is not None:
            size = min(size, stream.max_length)
        if stream.positions is None or size <= stream.positions.number:
            return []
        if not stream.positions.learned:
            self.made.add("long", [str(stream.positions.number)])
            return []
        return [
            BadRow(
                f"{self.reader.source.name}: row {number} has {size} tokens, more than the model has positions: set "
                f"data.text.max_length: {stream.positions.number}"
            )
        ]

    def _unlike_the_others(self, number: int | str, row: EncodedRow) -> list[BadRow]:
        """What ends the run: a batch would take a row without reference log-probs for one of certain targets."""
        referenced = row.reference_log_prob is not None
        if self.referenced is None:
            self.referenced = referenced
        if referenced == self.referenced:
            return []
        has = (
            "has a reference_log_prob, and others have none"
            if referenced
            else "has no reference_log_prob, and others have"
        )
        return [BadRow(f"{self.reader.source.name}: row {number} {has}: score every source, or none")]

    def _problem(self, number: int | str, problem: Exception) -> list[BadRow]:
        text = shortened(f"row {number}: {problem}")
        if self.reader.reading.options.on_bad_rows == "raise":
            return [BadRow(f"{self.reader.source.name}: {text}")]
        self.bad.append(text)
        return []

    def _packs(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        options, max_length = self.stream.batches, self.stream.max_length
        assert max_length is not None
        assert options.packing is not None
        if not rows:
            return []
        lengths = [len(row["input_ids"]) for row in rows]
        packs = pack_documents(lengths, options.packing, max_length, options.seed, lambda i: rows[i]["labels"])
        order = torch.randperm(len(packs), generator=torch.Generator().manual_seed(options.seed)).tolist()
        return [{"documents": [piece_of(rows[i], start, stop) for i, start, stop in packs[row]]} for row in order]


@dataclass(frozen=True)
class _Block:
    rows: int
    items: list[Any]


def _shuffled(rows: Iterable[T], size: int, generator: random.Random) -> Iterator[T]:
    """Each row drawn from ``size`` that wait."""
    waiting: list[T] = []
    for row in rows:
        if len(waiting) < size:
            waiting.append(row)
            continue
        chosen = generator.randrange(size)
        yield waiting[chosen]
        waiting[chosen] = row
    generator.shuffle(waiting)
    yield from waiting
