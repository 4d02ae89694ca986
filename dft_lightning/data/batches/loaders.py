"""Data loaders over tokenised rows and streams."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch import Tensor
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from dft_lightning.data.batches.collating import Collator
from dft_lightning.data.batches.sampling import BatchSampler, RowSampler
from dft_lightning.data.batches.step_dealing import RowDealing, TokenDealing
from dft_lightning.data.batches.streaming import Stream, StreamedBatches, StreamPosition
from dft_lightning.data.options import BatchOptions
from dft_lightning.foreign.torch import called_by_torchdata


def row_loader(
    dataset: Any,
    collator: Collator,
    *,
    batch_size: int,
    options: BatchOptions,
    ranks: tuple[int, int],
    shuffle: bool,
    lengths: Tensor | None,
    group_size: int,
    dealing: RowDealing | TokenDealing | None,
    num_workers: int,
    begin: Callable[[RowSampler], None] | None,
) -> DataLoader[Any]:
    """Batches of rows that are there.

    Args:
        dataset: rows or packs by index.
        collator: to batches.
        batch_size: rows of a batch.
        options: of the data module.
        ranks: this rank, and how many there are.
        shuffle: a new order in each epoch.
        lengths: of the rows: with them, rows of about the same length come together.
        group_size: how many do.
        dealing: deals the rows of each step to ranks and micro-batches; ``None`` deals rows in turn.
        num_workers: processes that read.
        begin: has the sampler go on where a checkpoint says.
    """
    rank, world_size = ranks
    sampler = RowSampler(dataset, world_size, rank, shuffle, options.seed, lengths, group_size, dealing)
    if begin is not None:
        begin(sampler)
    size = None if isinstance(dealing, TokenDealing) else batch_size  # the sampler's own batches
    return _loader(dataset, sampler, collator, size, options, rank, num_workers)


def prompt_loader(
    dataset: Any,
    collator: Collator,
    *,
    batch_size: int,
    options: BatchOptions,
    ranks: tuple[int, int],
    lengths: Tensor | None,
    num_workers: int,
) -> DataLoader[Any]:
    """Batches of rows that are generated from; see :class:`.BatchSampler`. Arguments as of :func:`row_loader`."""
    rank, world_size = ranks
    sampler = BatchSampler(dataset, batch_size, world_size, rank, lengths)
    return _loader(dataset, sampler, collator, None, options, rank, num_workers)


def _loader(
    dataset: Any,
    sampler: RowSampler | BatchSampler,
    collator: Collator,
    batch_size: int | None,
    options: BatchOptions,
    rank: int,
    num_workers: int,
) -> DataLoader[Any]:
    """Of a sampler that gives rows, or batches where ``batch_size`` is ``None``."""
    loader: DataLoader[Any] = _RowLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=collator,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        **_worker_options(options.seed, rank),
    )
    return loader


class _RowLoader(StatefulDataLoader):  # type: ignore[misc]
    """Of a class of its own, as Lightning makes another one of some loaders."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with called_by_torchdata():
            super().__init__(*args, **kwargs)


def stream_loader(
    stream: Stream,
    collator: Collator,
    num_workers: int,
    ranks: tuple[int, int],
    position: StreamPosition | None,
) -> DataLoader[Any]:
    """Batches of a stream.

    Args:
        stream: what is read.
        collator: to batches.
        num_workers: processes that read.
        ranks: this rank, and how many there are.
        position: where it goes on; see :class:`StreamedBatches`.
    """
    return DataLoader(
        StreamedBatches(stream, collator, *ranks, position),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        **_worker_options(stream.batches.seed, ranks[0]),
    )


def _worker_options(seed: int, rank: int) -> dict[str, Any]:
    return {
        # Of its own: each new pass over a loader would take a number of those that dropout draws from.
        "generator": torch.Generator().manual_seed(seed),
        "worker_init_fn": partial(start_worker, rank=rank),
    }


def goes_on(loader: Any) -> bool:
    """Whether a training loader is one of these, which begins where a checkpoint says."""
    sampled = isinstance(getattr(loader, "sampler", None), RowSampler)
    return sampled or isinstance(getattr(loader, "dataset", None), StreamedBatches)


def start_worker(worker_id: int, rank: int) -> None:
    """Before a worker's first row: leave signals to the process that it works for, and seed it as Lightning would.

    A Ctrl-C goes to all processes of a terminal, and a cluster's SIGTERM to all of a job. A worker that ends by it
    takes the batch away that the run still needs to come to the end of its step. (macOS does not tell who sent a
    signal: there SIGTERM ends a worker, as it does by default.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        threading.Thread(target=_end_where_the_parent_says_so, daemon=True).start()
    if int(os.environ.get("PL_SEED_WORKERS", 0)):
        pl_worker_init_function(worker_id, rank)


def _end_where_the_parent_says_so() -> None:
    """A process that exits sends SIGTERM to those of its workers that are left, and waits for their end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != parent.pid:
        pass
    os._exit(0)
