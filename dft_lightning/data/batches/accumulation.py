"""How many micro-batches an optimizer step takes, from the rows that it is to have."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.errors import InputError


def accumulate_to(trainer: pl.Trainer, global_batch_size: int, batch_size: int, derived: int = 1) -> int:
    """Set the trainer's ``accumulate_grad_batches`` so that an optimizer step has a number of rows.

    Args:
        trainer: its world size counts.
        global_batch_size: rows of a step, over all ranks and micro-batches.
        batch_size: rows of a micro-batch on a rank.
        derived: what an earlier call has set.

    Returns:
        The number of micro-batches.

    Raises:
        InputError: it is no whole number of micro-batches, or the trainer accumulates otherwise already.
    """
    ranks = trainer.world_size
    micro_batches = micro_batches_of(global_batch_size, batch_size, ranks)
    scheduled = any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if scheduled or trainer.accumulate_grad_batches not in (1, micro_batches, derived):
        given = "a GradientAccumulationScheduler" if scheduled else str(trainer.accumulate_grad_batches)
        raise InputError(
            f"data.global_batch_size: {global_batch_size} rows are {micro_batches} micro-batches of {batch_size} on "
            f"{ranks} processes, and trainer.accumulate_grad_batches is {given}: leave one of the two out"
        )
    trainer.accumulate_grad_batches = micro_batches
    rank_zero_info(f"an optimizer step: {ranks} processes x {micro_batches} micro-batches x {batch_size} rows")
    return micro_batches


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
