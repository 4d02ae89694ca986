"""How the rows of each optimizer step of a run are dealt: by a number of rows or of tokens a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dft_lightning.data.batches.collating import PADDING_ROW
from dft_lightning.data.batches.dealing import Dealt, Integers, deal_rows, deal_tokens, fits
from dft_lightning.errors import InputError

_PADDING_LENGTH = 2
"""Tokens of a row without targets that evens out ranks."""


@dataclass(frozen=True)
class RowDealing:
    """Deals the rows of steps to micro-batches of a number of rows.

    Attributes:
        lengths: tokens of each row, by index.
        padded: whether rows are padded to the longest of their micro-batch, or joined.
        batch_size: rows of a micro-batch on a rank.
        micro_batches: of a step, by epoch.
        lockstep: whether ranks wait for each other after every micro-batch.
        limit: rows of an epoch at most, over all ranks; ``None`` for all.
    """

    lengths: Integers
    padded: bool
    batch_size: int
    micro_batches: Callable[[int], int]
    lockstep: bool = False
    limit: int | None = None

    def rows_of_step(self, ranks: int, epoch: int) -> int:
        """Rows of an optimizer step, over all ranks."""
        return ranks * self.batch_size * self.micro_batches(epoch)

    def deal(self, rows: Sequence[int], ranks: int) -> list[list[list[int]]]:
        """Of each rank the rows of each micro-batch, as many on each; an epoch's last step may have fewer."""
        whole, rest = divmod(len(rows) // ranks, self.batch_size)
        sizes = [self.batch_size] * whole + [rest] * bool(rest)
        if ranks * len(sizes) == 1:
            return [[list(rows)]]
        return _named(deal_rows(_lengths_of(rows, self.lengths), ranks, sizes, self.padded, self.lockstep), rows)


@dataclass(frozen=True)
class TokenDealing:
    """Deals the rows of steps to micro-batches of a number of tokens.

    Attributes:
        lengths: tokens of each row, by index.
        padded: whether rows are padded to the longest of their micro-batch, or joined.
        max_tokens: of a micro-batch, padding included.
        rows: of a step, over all ranks.
        micro_batches: of a step on each rank.
        last: those of an epoch's last step, which has fewer rows; 0 where there is none.
        lockstep: whether ranks wait for each other after every micro-batch.
    """

    lengths: Integers
    padded: bool
    max_tokens: int
    rows: int
    micro_batches: int
    last: int
    lockstep: bool = False

    @classmethod
    def of_epochs(
        cls,
        orders: Iterable[Sequence[int]],
        lengths: Integers,
        padded: bool,
        max_tokens: int,
        rows: int,
        ranks: int,
        lockstep: bool = False,
    ) -> TokenDealing:
        """With as many micro-batches as the largest step of some epochs needs, and the largest of their last ones.

        Lightning takes the number of micro-batches of a step, and of an epoch, to be the same in all epochs.
        """
        found = {True: 1, False: 0}  # of whole steps, and of the last one
        for order in orders:
            for first in range(0, len(order), rows):
                own = lengths[list(order[first : first + rows])]
                whole = len(own) == rows
                number = max(found[whole], 1)
                while not fits(own, ranks * number, max_tokens, padded):
                    number += 1
                found[whole] = number
        # The trainer takes more than a step's micro-batches for two steps.
        return cls(lengths, padded, max_tokens, rows, max(found.values()), found[False], lockstep)

    def rows_of_step(self, ranks: int, epoch: int) -> int:
        """Rows of an optimizer step, over all ranks."""
        return self.rows

    def micro_batches_of(self, size: int) -> int:
        """Micro-batches of an epoch of so many rows, on each rank."""
        return size // self.rows * self.micro_batches + self.last

    def deal(self, rows: Sequence[int], ranks: int) -> list[list[list[int]]]:
        """Of each rank the rows of each micro-batch; where there are none, one without targets.

        Raises:
            InputError: they do not fit, in an epoch that was not counted.
        """
        number = self.micro_batches if len(rows) == self.rows else self.last
        lengths = _lengths_of(rows, self.lengths)
        dealt = deal_tokens(lengths, ranks, number, self.max_tokens, self.padded, self.lockstep)
        if dealt is None:
            raise InputError(
                f"data.batches.max_tokens: a step of this epoch does not fit in {number} micro-batches of "
                f"{self.max_tokens} tokens, which were counted for fewer epochs: set trainer.max_epochs, whose epochs "
                "are all counted"
            )
        return [[each or [PADDING_ROW] for each in rank] for rank in _named(dealt, rows)]


def _lengths_of(rows: Sequence[int], lengths: Integers) -> Integers:
    index = np.array(rows, np.int64)
    return np.where(index == PADDING_ROW, _PADDING_LENGTH, lengths[index])


def _named(dealt: Dealt, rows: Sequence[int]) -> list[list[list[int]]]:
    return [[[rows[place] for place in places.tolist()] for places in rank] for rank in dealt]
