"""Documents packed into rows of a fixed length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from dft_lightning.data.options import Packing
from dft_lightning.losses.base import IGNORE_INDEX

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
    """Best fit, row by row: a few operations on numbers of ``max_length`` bits for each piece.

    A row begins with the longest piece left, goes on with random ones, and ends with the one or two that fill it
    exactly, or with the longest that fits. Plain best-fit decreasing packs pieces of like lengths together until none
    are left that fill a row: it leaves 2.4% of the GSM8K rows of 1024 tokens empty, this 0.1%.

    Args:
        pieces: each of 1 to ``max_length`` tokens.
        max_length: tokens of a row.
        seed: of the random ones, and so of what comes together.

    Raises:
        ValueError: a piece is longer than ``max_length``, or empty.

    Example:
        >>> packs = pack(whole([5, 2, 4, 3, 1]), max_length=8)
        >>> [sorted(stop - start for _, start, stop in packs[row]) for row in range(len(packs))]
        [[3, 5], [1, 2, 4]]
    """
    lengths = pieces.lengths
    if len(lengths) and not (lengths.min() > 0 and lengths.max() <= max_length):
        raise ValueError(f"pieces must have 1 to {max_length} tokens, got {lengths.min()} to {lengths.max()}")
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    ends = np.cumsum(np.bincount(lengths, minlength=max_length + 1)).tolist()
    order: list[int] = []
    offsets = [0]
    for row in _rows_of_lengths(lengths[shuffled], max_length):
        for length in row:  # the last piece of that length that is left
            ends[length] -= 1
            order.append(ends[length])
        offsets.append(len(order))
    return Packs(pieces, by_length[np.array(order, np.int64)], np.array(offsets, np.int64))


def pack_documents(
    lengths: Sequence[int] | Integers, packing: Packing, max_length: int, seed: int, labels_of: Callable[[int], Any]
) -> Packs:
    """Documents packed whole (``"bfd"``), or cut where they are longer than a row (``"bfd_split"``).

    Args:
        lengths: tokens of each document.
        packing: which of the two.
        max_length: tokens of a row.
        seed: of what comes together.
        labels_of: the labels of a document by its index, -100 where there is no target.

    Raises:
        ValueError: a whole document is longer than ``max_length``, or empty.
    """
    if packing == "bfd":
        return pack(whole(lengths), max_length, seed)
    pieces = cut(lengths, max_length, lambda index: np.asarray(labels_of(index)) != IGNORE_INDEX)
    return pack(pieces, max_length, seed)


_ROOM_FOR_EXACT = 2.5  # mean lengths: two pieces of about that are left to choose


def _rows_of_lengths(shuffled: Integers, max_length: int) -> Iterator[list[int]]:
    """The lengths of the pieces of each row."""
    left = _Lengths(shuffled, max_length)
    while left.number:
        row = [left.take(left.longest(max_length))]
        room = max_length - row[0]
        while room and left.longest(room):
            drawn = left.draw(room) if room >= _ROOM_FOR_EXACT * left.total / left.number else None
            for length in [drawn] if drawn else left.exactly(room) or [left.longest(room)]:
                row.append(left.take(length))
                room -= length
        yield row


class _Lengths:
    """The lengths of the pieces that are left. Which there are is kept in the bits of two numbers."""

    def __init__(self, shuffled: Integers, max_length: int) -> None:
        self.number = len(shuffled)
        self.total = int(shuffled.sum())
        self._max = max_length
        self._counts = np.bincount(shuffled, minlength=max_length + 1).tolist()
        there = [length for length, count in enumerate(self._counts) if count]
        self._there = sum(1 << length for length in there)
        self._mirrored = sum(1 << (max_length - length) for length in there)
        self._draws = iter(cast("list[int]", shuffled.tolist()))

    def take(self, length: int) -> int:
        self.number -= 1
        self.total -= length
        self._counts[length] -= 1
        if not self._counts[length]:
            self._there ^= 1 << length
            self._mirrored ^= 1 << (self._max - length)
        return length

    def longest(self, room: int) -> int:
        """The longest that fits; 0 where none does."""
        return max((self._there & ((2 << room) - 1)).bit_length() - 1, 0)

    def draw(self, room: int) -> int | None:
        """A random one; ``None`` where it does not fit."""
        drawn = next((length for length in self._draws if self._counts[length]), None)
        return drawn if drawn is not None and drawn <= room else None

    def exactly(self, room: int) -> list[int] | None:
        """One that fills the room, or two of lengths as near as can be."""
        if self._there >> room & 1:
            return [room]
        shorter = self._there & (self._mirrored >> (self._max - room)) & ((2 << room // 2) - 1)
        while shorter:
            length = shorter.bit_length() - 1
            if 2 * length != room or self._counts[length] > 1:
                return [length, room - length]
            shorter ^= 1 << length
        return None
