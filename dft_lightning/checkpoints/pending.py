"""A checkpoint in shards that is written while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict_saver import async_save

Books = list[tuple[ModelCheckpoint, dict[str, Any]]]


class PendingSave:
    """Writes this rank's part in a thread of its own, and then finishes what all ranks have written.

    Args:
        tensors: of the checkpoint, which are copied before this returns.
        partial: the folder that they are written to.
        group: of all ranks, with a CPU backend, that nothing else uses.

    Attributes:
        target: where the folder is to be; set by :meth:`then`.
        replaced: checkpoints to remove once it is there.
        books: what each ``ModelCheckpoint`` is to name then.
    """

    def __init__(self, tensors: dict[str, Any], partial: Path, group: ProcessGroup) -> None:
        future = async_save(tensors, checkpoint_id=partial, process_group=group)
        assert isinstance(future, Future)
        self._written: Future[Any] = future
        self._finished = threading.Event()
        self._error: BaseException | None = None
        self.target: Path | None = None
        self.replaced: list[str | Path] = []
        self.books: Books | None = None

    def then(self, finish: Callable[[], None], clean: Callable[[], None], target: Path) -> None:
        """Call ``finish`` when all ranks have written, which rank 0 knows by its own part's end, and ``clean`` then and
        where one has failed."""
        self.target = target

        def call(written: Future[Any]) -> None:
            try:
                if written.exception() is None:
                    finish()
            except BaseException as error:
                self._error = error
            finally:
                clean()
                self._finished.set()

        self._written.add_done_callback(call)

    def wait(self) -> None:
        """Until it is finished. Raises what writing or finishing did."""
        self._finished.wait()
        self._written.result()
        if self._error is not None:
            raise self._error


def own_group() -> ProcessGroup:
    """A group of all ranks for host memory. A collective."""
    group = torch.distributed.new_group(backend="gloo")
    assert isinstance(group, ProcessGroup)
    return group
