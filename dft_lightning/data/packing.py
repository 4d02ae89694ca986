"""Documents packed into rows of a fixed length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Packing = Literal["bfd", "bfd_split"]
Integers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Pieces:
    """Documents, or what they are cut into: tokens ``start`` to ``stop`` of document ``index``, arrays ``[n]``."""

    index: Integers
    start: Integers
    stop: Integers

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> Integers:
        """Tokens of each."""
        return self.stop - self.start


@dataclass(frozen=True)
class Packs:
    """Rows of packed pieces: row ``i`` has ``pieces[order[offsets[i]:offsets[i + 1]]]``."""

    pieces: Pieces
    order: Integers
    offsets: Integers

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Iterator[tuple[int, int, int]]:
        """Document, start and stop of each piece of a row."""
        for piece in self.order[self.offsets[row] : self.offsets[row + 1]].tolist():
            yield int(self.pieces.index[piece]), int(self.pieces.start[piece]), int(self.pieces.stop[piece])

    def efficiency(self, max_length: int) -> float:
        """Share of ``len(self) * max_length`` tokens that are no padding."""
        return float(self.pieces.lengths.sum()) / (len(self) * max_length)


def whole(lengths: Sequence[int] | Integers) -> Pieces:
    """Every document in one piece."""
    stop = np.asarray(lengths, np.int64)
    return Pieces(np.arange(len(stop)), np.zeros_like(stop), stop)


def cut(lengths: Sequence[int] | Integers, max_length: int, is_target: Callable[[int], Any]) -> Pieces:
    """Documents cut into pieces of at most ``max_length`` tokens.

    A piece begins with the last token of the one before it, from which its next is predicted: no target is lost, and
    none counts twice, because the first token of a document or piece is never a target. Pieces without a target are
    left out.

    Args:
        lengths: tokens of each document.
        max_length: of a piece, at least 2.
        is_target: whether each token of a document, by index, is a target: an array of booleans. Asked of those that
            are cut alone.
    """
    lengths = np.asarray(lengths, np.int64)
    found: list[tuple[int, int, int]] = []
    for index, length in enumerate(lengths.tolist()):
        if length <= max_length:
            found.append((index, 0, length))
            continue
        targets = is_target(index)
        for start in range(0, length - 1, max_length - 1):
            stop = min(start + max_length, length)
            if targets[start + 1 : stop].any():
                found.append((index, start, stop))
    columns = np.array(found, np.int64).reshape(-1, 3).T
    return Pieces(*columns)


def pack(pieces: Pieces, max_length: int, seed: int = 0) -> Packs:
    """Best-fit decreasing: the longest first, each into the row that it leaves the least room in.

    Args:
        pieces: each of 1 to ``max_length`` tokens.
        max_length: tokens of a row.
        seed: of the order among pieces of the same length, and so of what comes together.

    Raises:
        ValueError: a piece is longer than ``max_length``, or empty.

    Example:
        >>> packs = pack(whole([5, 2, 4, 3, 1]), max_length=8)
        >>> sorted(sum(stop - start for _, start, stop in packs[row]) for row in range(len(packs)))
        [7, 8]
    """
    lengths = pieces.lengths
    if len(lengths) and not (lengths.min() > 0 and lengths.max() <= max_length):
        raise ValueError(f"pieces must have 1 to {max_length} tokens, got {lengths.min()} to {lengths.max()}")
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    rows = _best_fit(lengths[order].tolist(), max_length)
    by_row = np.argsort(rows, kind="stable")
    sizes = np.bincount(rows) if len(rows) else np.zeros(0, np.int64)
    return Packs(pieces, order[by_row], np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def _best_fit(lengths: list[int], max_length: int) -> Integers:
    """The row of each piece; rows are numbered as they are begun."""
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # rows by what room they have
    rooms = 0  # bit r: there is a row with room r
    rows = np.empty(len(lengths), np.int64)
    begun = 0
    for piece, length in enumerate(lengths):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = max_length, begun
            begun += 1
        rows[piece] = row
        left = room - length
        with_room[left].append(row)
        rooms |= 1 << left
    return rows
