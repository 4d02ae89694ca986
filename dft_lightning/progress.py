"""How far a fit is, in whole optimizer steps, and how its loops are told to go on from there."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.combined_loader import CombinedLoader


@dataclass(frozen=True)
class RowsOfBatches:
    """How many rows, over all ranks, are in a number of micro-batches of a rank.

    Attributes:
        rows: how many.
        batches: in so many micro-batches, which are not taken apart: 1, or those of a step.
    """

    rows: int
    batches: int = 1

    def rows_of(self, batches: int) -> int:
        """Rows of whole ones among so many micro-batches."""
        return batches // self.batches * self.rows

    def batches_of(self, rows: int) -> int:
        """Micro-batches of whole ones among so many rows."""
        return rows // self.rows * self.batches


def accumulation_of(trainer: pl.Trainer, epoch: int) -> int:
    """Micro-batches of an optimizer step in an epoch, as a ``GradientAccumulationScheduler`` will have them."""
    scheduler = accumulation_scheduler(trainer)
    return int(scheduler.get_accumulate_grad_batches(epoch) if scheduler else trainer.accumulate_grad_batches)


def accumulation_scheduler(trainer: pl.Trainer) -> GradientAccumulationScheduler | None:
    """What says how many micro-batches a step has in each epoch, where that is not the trainer alone."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in reversed(callbacks) if isinstance(each, GradientAccumulationScheduler)), None)


def limited_batches(trainer: pl.Trainer, batches: int) -> int:
    """Of so many training micro-batches in an epoch, those that a trainer takes."""
    limit = trainer.limit_train_batches
    if isinstance(limit, int):
        return min(batches, limit)
    return int(batches * (1.0 if limit is None else limit))


@dataclass(frozen=True)
class Progress:
    """The last optimizer step of a fit: what was done of the next is done again.

    Attributes:
        epoch: the epoch of the next batch, from 0.
        batches: micro-batches of a rank behind this step in that epoch.
        total_batches: the same in all epochs.
        epoch_full: whether they are all of the epoch, of which only what comes at its end is left.
        validated: whether validation has run since.
        micro_batches: of a rank, begun since the step; done again.
    """

    epoch: int = 0
    batches: int = 0
    total_batches: int = 0
    epoch_full: bool = False
    validated: bool = False
    micro_batches: int = 0

    def to_dict(self) -> dict[str, Any]:
        """In plain values."""
        return asdict(self)

    def in_batches_of(self, now: RowsOfBatches, before: RowsOfBatches, batches_of_epoch: int | None) -> Progress:
        """The same progress where batches have another number of rows, in whole batches.

        Args:
            now: rows of micro-batches.
            before: the same when this was written.
            batches_of_epoch: how many such batches an epoch has.
        """
        if now == before:
            return self
        batches, total = (now.batches_of(before.rows_of(number)) for number in (self.batches, self.total_batches))
        if self.epoch_full and batches_of_epoch is not None:
            batches = batches_of_epoch
        return replace(self, batches=batches, total_batches=total)


def last_step(trainer: pl.Trainer, validated_at: int | None = None) -> Progress:
    """The last optimizer step of the present or last fit.

    Args:
        trainer: its loops know.
        validated_at: what ``total_batches`` was when validation last ran.
    """
    loop, total = trainer.fit_loop, batches_done(trainer)
    epoch, done = cast(Any, loop.epoch_progress.current), cast(Any, loop.epoch_loop.batch_progress)
    batches = done.current.processed
    full = batches == trainer.num_training_batches or (done.is_last_batch and done.current.ready == batches)
    number = epoch.processed
    if epoch.started == number:  # between two epochs, or after the last: the counts of batches are still its
        if full or not batches:
            return Progress(number, 0, total, validated=True)
        number -= 1  # it was ended by max_steps or the like, and has batches left
    of_next = 0 if full else batches % trainer.accumulate_grad_batches
    total -= of_next
    begun = done.current.ready - batches  # the batch that is computed now
    return Progress(number, batches - of_next, total, full, validated_at == total, of_next + begun)


def batches_done(trainer: pl.Trainer) -> int:
    """Micro-batches of this rank in all epochs of the present or last fit."""
    return int(cast(Any, trainer.fit_loop.epoch_loop.batch_progress.total).processed)


def training_loaders(trainer: pl.Trainer) -> list[Any]:
    """The loaders that a fit draws from, which may be given in a list or dict; none before they are set up."""
    loaders = trainer.train_dataloader
    return [] if loaders is None else CombinedLoader(loaders).flattened


def go_on_from(progress: Progress, loops: dict[str, Any]) -> dict[str, Any]:
    """The states of a trainer's loops, as a checkpoint has them, put to a step.

    Lightning's own say at which hook the checkpoint was written. Resumed from some of them it skips a validation,
    counts an epoch without batches, or goes on within a step.

    Args:
        progress: the step.
        loops: the ``loops`` of a checkpoint.

    Returns:
        A changed copy.
    """
    loops = copy.deepcopy(loops)
    state = loops["fit_loop"]
    epochs, batches = progress.epoch, progress.batches
    begun = 1 if batches else 0  # an epoch without a batch is begun anew
    for counts in state["epoch_progress"].values():
        counts.update(ready=epochs + begun, started=epochs + begun, processed=epochs, completed=epochs)
    done = state["epoch_loop.batch_progress"]
    for counts, number in ((done["total"], progress.total_batches), (done["current"], batches)):
        counts.update(ready=number, started=number, processed=number, completed=number)
    done["is_last_batch"] = progress.epoch_full
    # A validation that began and has none of its batches is run if it is due; one that did not begin is passed over.
    pending = 1 if batches and not progress.validated else 0
    evaluation = state["epoch_loop.val_loop.batch_progress"]
    evaluation["total"].update(ready=pending, started=pending, processed=0, completed=0)
    evaluation["current"].update(ready=0, started=0, processed=0, completed=0)
    evaluation["is_last_batch"] = False
    return loops
