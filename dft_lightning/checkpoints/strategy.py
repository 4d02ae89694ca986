"""Saving on several ranks: whole or not at all, and one outcome on all of them."""

from __future__ import annotations

import contextlib
import errno
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from dft_lightning.checkpoints.io import WholeCheckpointIO, failed, local_path, reason_of
from dft_lightning.checkpoints.pending import Books, PendingSave, own_group
from dft_lightning.checkpoints.whole import WRITTEN, clear_leftovers, write_marker
from dft_lightning.distributed.ranks import gather_lists
from dft_lightning.errors import InputError, one_line
from dft_lightning.files import is_local, partial_path, put_in_place, remove, sync_files, unwritable
from dft_lightning.foreign.lightning import (
    WholeAsyncCheckpointIO,
    saves_shards,
    saves_state_in_shards,
    saving_shards_by,
    trainer_of,
)

# Of disks: full, of a quota, read-only, not permitted, broken.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_BOOKS = ("best_model_path", "best_model_score", "current_score", "kth_best_model_path", "kth_value", "last_model_path")


def keep_whole(trainer: pl.Trainer) -> None:
    """Have a trainer save checkpoints that are whole or not there, on one rank or several.

    The trainer's strategy, whichever it is, becomes a :class:`SavesWhole` as well, and Lightning's plain way of writing
    files a :class:`~dft_lightning.checkpoints.WholeCheckpointIO`; a ``CheckpointIO`` of one's own is kept. The command
    calls it. Call it before ``fit``; a second call changes nothing.

    Example:
        >>> import lightning.pytorch as pl
        >>> from dft_lightning.checkpoints import SavesWhole, keep_whole
        >>> trainer = pl.Trainer(accelerator="cpu", logger=False)
        >>> keep_whole(trainer)
        >>> isinstance(trainer.strategy, SavesWhole)
        True
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SavesWhole):
        # Users name strategies by strings, too, and Lightning builds those itself: what it built is extended in place.
        strategy.__class__ = _saving_whole(type(strategy))
    io = strategy.checkpoint_io  # makes Lightning's own where none was given
    if type(io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeCheckpointIO()
    while hasattr(io, "checkpoint_io"):  # one that wraps another
        if type(io) is AsyncCheckpointIO:
            io.__class__ = WholeAsyncCheckpointIO
        if type(io.checkpoint_io) is TorchCheckpointIO:
            io.checkpoint_io.__class__ = WholeCheckpointIO
        io = io.checkpoint_io


def check_saves_meanwhile(strategy: Strategy) -> None:
    """Whether a strategy can save while training goes on, for ``model.sharding.async_save``.

    Raises:
        InputError: it saves one file, or was not given to :func:`keep_whole`.
    """
    if not isinstance(strategy, ModelParallelStrategy) or not saves_shards(strategy):
        raise InputError(
            "model.sharding.async_save: checkpoints in shards alone are saved while training goes on: set "
            "save_distributed_checkpoint: true in trainer.strategy's init_args, or leave async_save out"
        )
    if not isinstance(strategy, SavesWhole):
        raise InputError(
            "model.sharding.async_save: call dft_lightning.checkpoints.keep_whole(trainer) first, as the command does, "
            "which sees to it that each checkpoint is whole before an older one goes"
        )


def _check_savers(savers: list[ModelCheckpoint]) -> None:
    """Raise ``InputError`` where a ``ModelCheckpoint`` counts on what is saved being there at once."""
    if len(savers) > 1:
        raise InputError(
            f"model.sharding.async_save: {len(savers)} ModelCheckpoints would take each other's names, which are free "
            "until a checkpoint is whole: keep one, or leave async_save out"
        )
    if any(saver.save_last == "link" for saver in savers):
        raise InputError(
            "model.sharding.async_save: a link to a checkpoint that is not whole leads nowhere: set ModelCheckpoint's "
            "save_last to true, or leave async_save out"
        )


@functools.cache
def _saving_whole(strategy_class: type) -> type:
    """The strategy's class with :class:`SavesWhole` before it, by the same name: messages and isinstance hold."""
    body = {"__module__": strategy_class.__module__, "__qualname__": strategy_class.__qualname__, "of": strategy_class}
    return type(strategy_class.__name__, (SavesWhole, strategy_class), body)


def _blank(strategy_class: type) -> Any:
    return object.__new__(_saving_whole(strategy_class))


class SavesWhole(Strategy):
    """To go before a Lightning ``Strategy``: checkpoints are whole or not there, and all ranks learn which.

    A folder of shards is written beside its place by all ranks, flushed to disk and marked by ``complete.json`` when
    it is whole, and renamed then. Where writing fails on any rank, all ranks raise the same, what was written is
    deleted, and ``ModelCheckpoint`` names the checkpoints that it named before. Folders of checkpoints and logs that
    cannot be written to end the run before it begins.

    Raises:
        InputError: by ``save_checkpoint`` and ``setup_environment``, on every rank, where the disk is full, the folder
            read-only or the like.
    """

    of: type  # the strategy's own class
    _trains = False
    _pending: PendingSave | None = None
    _group: ProcessGroup | None = None
    resumes_from: str | None = None  # what this rank took for --ckpt_path, to be the same on all
    _books: Books | None = None

    def __reduce__(self) -> Any:  # for processes that are spawned: its class has no name to be found by
        return _blank, (self.of,), self.__dict__

    def setup_environment(self) -> None:
        super().setup_environment()
        chosen = _gather([self.resumes_from])
        if len(set(chosen)) > 1:
            raise InputError(
                f"--ckpt_path: processes found different checkpoints ({', '.join(map(str, dict.fromkeys(chosen)))}): "
                "keep them in a folder that all machines share, or give a path that all have"
            )
        module = self.lightning_module
        if module is not None and trainer_of(module) is not None:
            self._together(lambda: _check_folders(module.trainer))

    def on_train_start(self) -> None:
        super().on_train_start()
        self._trains = True
        if self._is_asked_to_go_on():
            _check_savers([callback for callback, _ in self._named()])
        self._books = self._named()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        filepath = self.broadcast(filepath)
        self._join()
        try:
            if not is_local(filepath):
                self._together(lambda: super(SavesWhole, self).save_checkpoint(checkpoint, filepath, storage_options))
            else:
                self._save(checkpoint, local_path(filepath), filepath, storage_options)
        except BaseException:
            self._forget_books()
            raise
        if self._pending is None:
            self._books = self._named()
        else:
            self._pending.books = self._named()

    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self._pending is not None:  # whose place it is to take: it stays until that is whole
            self._pending.replaced.append(filepath)
            return
        self._together(lambda: super(SavesWhole, self).remove_checkpoint(filepath))

    def on_train_end(self) -> None:
        super().on_train_end()
        self._trains = False
        self._join()

    def teardown(self) -> None:
        self._trains = False
        self._end_alone()
        self._group = None
        super().teardown()

    def _end_alone(self) -> None:
        """Wait for what a run that has failed was writing, without the other ranks."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.wait()
        except BaseException as error:  # the run has an error of its own by now
            self._forget_books()
            rank_zero_warn(f"{pending.target} was not written: {one_line(Exception(str(error)))}")
            return
        self._books = pending.books
        for path in pending.replaced if self.is_global_zero else ():
            super().remove_checkpoint(path)

    def _join(self) -> None:
        """Wait for a checkpoint that is being written, and raise on every rank what went wrong on one. A collective."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            self._together(pending.wait, pending.target)
        except BaseException:
            self._forget_books()
            raise
        for path in pending.replaced:
            self.remove_checkpoint(path)
        self._books = pending.books

    def _save(self, checkpoint: dict[str, Any], target: Path, filepath: str | Path, storage_options: Any) -> None:
        shards = self._writes_shards()
        save = super().save_checkpoint
        if not shards and not self.broadcast(target.is_dir()):
            self._together(lambda: save(checkpoint, filepath, storage_options), target)
            return
        partial: Path = self.broadcast(partial_path(target))
        marker = {"name": target.name, WRITTEN: time.time_ns(), "global_step": checkpoint.get("global_step")}
        goes_on = False
        try:
            self._together(lambda: self._prepare(target), target)
            if goes_on := self._saves_meanwhile(filepath):
                self._begin(lambda: save(checkpoint, partial, storage_options), partial, target, marker)
                return
            self._together(lambda: save(checkpoint, partial, storage_options), target)
            self._together(lambda: self._finish(partial, target, marker), target)
        finally:
            if self.is_global_zero and not goes_on:
                _remove_quietly(partial)

    def _is_asked_to_go_on(self) -> bool:
        return bool(getattr(getattr(self.lightning_module, "sharding", None), "async_save", False))

    def _saves_meanwhile(self, filepath: str | Path) -> bool:
        """Whether training goes on beside a save: one of ``ModelCheckpoint``, which names a path before it saves.

        What others save, they may read as soon as it is saved.
        """
        if not (self._trains and self._is_asked_to_go_on()):
            return False
        books = [named for _, named in self._named()]
        return any(str(filepath) in map(str, (*named.values(), *named["best_k_models"])) for named in books)

    def _begin(self, save: Callable[[], None], partial: Path, target: Path, marker: dict[str, Any]) -> None:
        """Copy the tensors, and have them written while training goes on."""
        group = self._group = self._group or own_group()
        begun: list[PendingSave] = []

        def copy(tensors: dict[str, Any], folder: Path) -> None:
            begun.append(PendingSave(tensors, folder, group))

        def clean() -> None:
            if self.is_global_zero:
                _remove_quietly(partial)

        try:
            with saving_shards_by(copy):
                self._together(save, target)
        except BaseException:
            self._group = None  # a rank that has begun may still wait in it
            for each in begun:
                each.then(lambda: None, clean, target)
            if not begun:
                clean()
            raise
        begun[0].then(lambda: self._finish(partial, target, marker), clean, target)
        self._pending = begun[0]

    def _writes_shards(self) -> bool:
        if isinstance(self, ModelParallelStrategy):
            return saves_shards(self)
        return isinstance(self, FSDPStrategy) and saves_state_in_shards(self)

    def _prepare(self, target: Path) -> None:
        if self.is_global_zero:
            target.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(target.parent)

    def _finish(self, partial: Path, target: Path, marker: dict[str, Any]) -> None:
        if not self.is_global_zero:
            return
        if partial.is_dir():
            sync_files(partial)
            write_marker(partial, marker)
        put_in_place(partial, target)

    def _together(self, action: Callable[[], None], target: Path | None = None) -> None:
        """Do something on every rank, and raise on every rank where it failed on one. A collective."""
        own, reason = None, None
        try:
            action()
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            own = error
            reason = str(error) if isinstance(error, InputError) else _failed(error, target)
        problems = _gather([(reason, None if own is None else one_line(Exception(str(own))))])
        if all(text is None for _, text in problems):
            return
        reasons = [reason for reason, _ in problems if reason is not None]
        if reasons:
            raise InputError(reasons[0]) from own
        if own is not None:
            raise own
        raise RuntimeError(f"another rank has failed: {next(text for _, text in problems if text is not None)}")

    def _forget_books(self) -> None:
        """Have each ``ModelCheckpoint`` name what it named before a save that failed."""
        for callback, books in self._books or []:
            callback.__dict__.update({**books, "best_k_models": dict(books["best_k_models"])})

    def _named(self) -> Books:
        """What each ``ModelCheckpoint`` takes for written: it notes a path before it is."""
        module = self.lightning_module
        callbacks = [] if module is None or trainer_of(module) is None else module.trainer.checkpoint_callbacks
        return [(callback, _books(callback)) for callback in callbacks if isinstance(callback, ModelCheckpoint)]


def _books(callback: ModelCheckpoint) -> dict[str, Any]:
    return {**{name: getattr(callback, name) for name in _BOOKS}, "best_k_models": dict(callback.best_k_models)}


def _gather(items: list[Any]) -> list[Any]:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return items
    return gather_lists(items, torch.distributed.get_world_size())


def _failed(error: BaseException, target: Path | None) -> str | None:
    """The message of a write that failed, and ``None`` where the error is a fault of the program."""
    if target is None:
        return None
    causes = [error]
    if isinstance(error, CheckpointException):  # by rank, each with its traceback
        causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        if (reason := reason_of(cause, target.parent)) is not None:
            return failed(target, reason)
    return None


def _remove_quietly(partial: Path) -> None:
    with contextlib.suppress(OSError):  # the next save into the folder tries again
        remove(partial)


def refused_write(error: BaseException, trainer: pl.Trainer) -> InputError | None:
    """What a run should end in whose disk was full, read-only or broken; ``None`` for one that ended otherwise.

    A logger's error names no path, and closing the logger fails once more, over an error that has a message already.

    Args:
        error: what ended the run.
        trainer: whose folders they are.
    """
    refused = _of_disk(error)
    if refused is None or refused.filename is not None:
        return None
    seen = error.__context__
    while seen is not None and not isinstance(seen, InputError):
        seen = seen.__context__
    if seen is not None:
        return seen
    folders = [folder for _, folder in _written_folders(trainer)] or [str(trainer.default_root_dir)]
    where = " or ".join(dict.fromkeys(folders))
    return InputError(f"nothing can be written to {where}: {refused.strerror}. Checkpoints that were written are whole")


def _of_disk(error: BaseException) -> OSError | None:
    """The disk's error, or the one of a disk that an error was raised from, as Lightning's TensorBoard logger does."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, (OSError, InputError)):  # the latter all ranks know of
        seen = seen.__cause__
    return seen if isinstance(seen, OSError) and seen.errno in _DISK else None


def _check_folders(trainer: pl.Trainer) -> None:
    """Raise ``InputError`` where a checkpoint or log could not be written at all."""
    if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
        return
    for what, folder in _written_folders(trainer):
        if (reason := unwritable(Path(folder))) is not None:
            raise InputError(f"nothing can be written to {folder}, the folder of {what}: {reason}; set another")


def _written_folders(trainer: pl.Trainer) -> Iterator[tuple[str, str]]:
    logged = [str(each.save_dir) for each in trainer.loggers if isinstance(each, (CSVLogger, TensorBoardLogger))]
    yield from (("trainer.logger", folder) for folder in logged if is_local(folder))
    if trainer.state.fn != TrainerFn.FITTING:
        return
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.save_top_k != 0:
            own = callback.dirpath or (trainer.loggers[0].save_dir if trainer.loggers else None)
            folder = str(own or trainer.default_root_dir)
            if is_local(folder):
                yield "trainer.callbacks' ModelCheckpoint", folder
