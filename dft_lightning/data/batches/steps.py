"""What an optimizer step is made of: how many rows, in how many micro-batches, and how they are dealt."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from dft_lightning.data.batches.dealing import Integers
from dft_lightning.data.batches.sampling import epoch_order
from dft_lightning.data.batches.step_dealing import RowDealing, TokenDealing
from dft_lightning.data.options import BatchOptions
from dft_lightning.distributed.strategies import shards_parameters
from dft_lightning.errors import InputError
from dft_lightning.progress import RowsOfBatches, accumulation_of, accumulation_scheduler, limited_batches

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class StepRows:
    """What is known of the training rows.

    Attributes:
        lengths: tokens of each row, by index.
        order_of: the rows of an epoch in their order.
        place_of: what a message calls the row of an index.
    """

    lengths: Integers
    order_of: Callable[[int], list[int]]
    place_of: Callable[[int], object]

    @classmethod
    def of(cls, rows: Dataset, lengths: Tensor, options: BatchOptions) -> StepRows:
        """Of tokenised rows, in the order that ``options`` give them."""
        order_of = partial(epoch_order, len(rows), options.shuffle, options.seed)
        return cls(lengths.numpy(), order_of, lambda index: json.loads(rows[index]["number"]))


class Steps:
    """The optimizer steps of a data module.

    Args:
        batch_size: rows of a micro-batch on a rank.
        global_batch_size: rows of a step, over all ranks and micro-batches; ``None`` leaves that to the trainer.
        options: how rows become batches.
    """

    def __init__(self, batch_size: int, global_batch_size: int | None, options: BatchOptions) -> None:
        self._batch_size, self._rows, self._options = batch_size, global_batch_size, options
        self._derived = 1  # micro-batches of a step that the trainer was told
        self._by_tokens: TokenDealing | None = None

    def group_size(self, ranks: int) -> int:
        """Rows that come together where they are grouped by their length."""
        return self._rows or self._batch_size * ranks

    def row_order(self, number: int, ranks: int) -> dict[str, Any]:
        """What the order of the training rows, or packs, hangs on."""
        options = self._options
        order: dict[str, Any] = {
            "number of rows": number,
            "data.batches.seed": options.seed if options.shuffle else None,
            "data.batches.packing": options.packing,
        }
        if options.shuffle and options.group_by_length:
            order["rows of a group"] = self.group_size(ranks)
        return order

    def rows_of_batches(self, ranks: int) -> RowsOfBatches:
        """Rows of training micro-batches over all ranks."""
        if self._by_tokens is not None:
            return RowsOfBatches(self._by_tokens.rows, self._by_tokens.micro_batches)
        return RowsOfBatches(self._batch_size * ranks)

    def accumulate(self, trainer: pl.Trainer) -> None:
        """Tell a fit's trainer how many micro-batches a step has, where rows are counted.

        Raises:
            InputError: the rows of a step are no whole number of micro-batches, or the trainer accumulates otherwise.
        """
        if self._rows is None or self._options.max_tokens is not None:
            return
        number = micro_batches_of(self._rows, self._batch_size, trainer.world_size)
        self._tell(trainer, number, f"{self._rows} rows are {number} micro-batches of {self._batch_size}")
        ranks = trainer.world_size
        rank_zero_info(f"an optimizer step: {ranks} processes x {number} micro-batches x {self._batch_size} rows")

    def count_tokens(self, trainer: pl.Trainer | None, rows: StepRows) -> None:
        """As :meth:`accumulate`, where tokens are counted, once the rows are there.

        Raises:
            InputError: a row has more tokens than a micro-batch may have, the number of epochs is not known, or the
                trainer accumulates otherwise.
        """
        max_tokens = self._options.max_tokens
        if max_tokens is None:
            return
        assert self._rows is not None
        lengths, padded = self._lengths(rows), not self._options.padding_free
        if (longest := int(lengths.max(initial=0))) > max_tokens:
            raise InputError(
                f"data.train: row {rows.place_of(int(lengths.argmax()))} has {longest} tokens, and a micro-batch at "
                f"most {max_tokens} (data.batches.max_tokens): give it more, or set data.text.max_length"
            )
        ranks = 1 if trainer is None else trainer.world_size
        epochs = 1 if trainer is None else _planned_epochs(trainer, math.ceil(len(lengths) / self._rows))
        orders = map(rows.order_of, range(epochs))
        sizes = (lengths, padded, max_tokens, self._rows, ranks)
        self._by_tokens = TokenDealing.of_epochs(orders, *sizes, lockstep=shards_parameters(trainer))
        if trainer is None:
            return
        number, of = self._by_tokens.micro_batches, f"of at most {max_tokens} tokens"
        self._tell(trainer, number, f"{self._rows} rows are {number} micro-batches {of}")
        rank_zero_info(
            f"an optimizer step: {self._rows} rows in {ranks} processes x {number} micro-batches {of}, padding included"
        )

    def dealing(self, trainer: pl.Trainer | None, rows: StepRows) -> RowDealing | TokenDealing:
        """How the training rows are dealt to ranks and micro-batches.

        Args:
            trainer: of the fit; ``None`` for loaders without one.
            rows: the training rows.
        """
        if self._options.max_tokens is not None:
            if self._by_tokens is None:
                self.count_tokens(trainer, rows)
            assert self._by_tokens is not None
            return self._by_tokens
        return RowDealing(
            self._lengths(rows),
            not self._options.padding_free,
            self._batch_size,
            _one if trainer is None else partial(accumulation_of, trainer),
            lockstep=shards_parameters(trainer),
            limit=None if trainer is None else self._limit(trainer, len(rows.lengths)),
        )

    def _lengths(self, rows: StepRows) -> Integers:
        """Tokens of each row, as it is padded."""
        multiple = self._options.pad_to_multiple_of
        return -(-rows.lengths // multiple) * multiple

    def _limit(self, trainer: pl.Trainer, rows: int) -> int:
        """Rows of an epoch, which are dealt among themselves where the trainer cuts it short."""
        of_batch = self._batch_size * trainer.world_size
        return limited_batches(trainer, math.ceil(rows / of_batch)) * of_batch

    def _tell(self, trainer: pl.Trainer, number: int, what: str) -> None:
        scheduled = accumulation_scheduler(trainer) is not None
        if scheduled or trainer.accumulate_grad_batches not in (1, number, self._derived):
            given = "a GradientAccumulationScheduler" if scheduled else str(trainer.accumulate_grad_batches)
            raise InputError(
                f"data.global_batch_size: {what} on {trainer.world_size} processes, and "
                f"trainer.accumulate_grad_batches is {given}: leave one of the two out"
            )
        trainer.accumulate_grad_batches = self._derived = number


def _one(epoch: int) -> int:
    """A loader without a trainer: each micro-batch is a step."""
    return 1


def _planned_epochs(trainer: pl.Trainer, steps: int) -> int:
    """How many epochs of so many steps a fit takes at most."""
    epochs = [] if trainer.max_steps < 0 else [math.ceil(trainer.max_steps / max(steps, 1))]
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        epochs.append(trainer.max_epochs)
    if not epochs:
        raise InputError(
            "data.batches.max_tokens: micro-batches of a step are counted for all epochs, and their number is not "
            "known: set trainer.max_epochs or trainer.max_steps"
        )
    return min(epochs)


def micro_batches_of(global_batch_size: int, batch_size: int, ranks: int) -> int:
    """Micro-batches per rank of a step.

    Raises:
        InputError: they are no whole number; proposes the nearest size that makes one.

    Example:
        >>> micro_batches_of(256, batch_size=4, ranks=8)
        8
    """
    rows = batch_size * ranks
    if global_batch_size % rows:
        nearest = max(1, (global_batch_size + rows // 2) // rows) * rows
        raise InputError(
            f"data.global_batch_size: {global_batch_size} rows are no whole number of micro-batches of batch_size "
            f"{batch_size} on {ranks} processes ({rows} rows): {nearest} is the nearest size that is"
        )
    return global_batch_size // rows
