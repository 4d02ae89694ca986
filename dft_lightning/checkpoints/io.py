"""Checkpoints of one file."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dft_lightning.checkpoints.whole import WRITTEN, clear_leftovers, newest_whole, put_back
from dft_lightning.errors import InputError, one_line
from dft_lightning.files import is_local, remove, replacing_file, unwritable
from dft_lightning.foreign.torch import is_of_writing


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint's file whole or not at all; reads as Lightning does.

    The file is written beside its place under a hidden name, straight to disk and not through a copy in memory, and
    renamed when all of it is on disk: whatever ends the process, the name has the older file or the new one. A write
    that fails takes its part away again. Leftovers of processes that were killed are deleted by the next save into the
    same folder. Other places than local paths are left to Lightning.

    Raises:
        InputError: by ``save_checkpoint``, where the disk is full, the folder read-only or the like.

    Example:
        >>> import lightning.pytorch as pl
        >>> from dft_lightning.checkpoints import WholeCheckpointIO
        >>> trainer = pl.Trainer(accelerator="cpu", logger=False, plugins=[WholeCheckpointIO()])
        >>> type(trainer.strategy.checkpoint_io).__name__
        'WholeCheckpointIO'
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = local_path(path)
        if target.is_dir():
            raise InputError(f"{target} is a folder, and the checkpoint to be written there a file: move it away")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(target.parent)
            with replacing_file(target) as file, _Watched(file) as watched:
                torch.save({**checkpoint, WRITTEN: time.time_ns()}, watched)  # type: ignore[arg-type]
        except OSError as error:
            raise InputError(failed(target, reason_of(error, target.parent))) from error

    def remove_checkpoint(self, path: str | Path) -> None:
        if not is_local(path):
            super().remove_checkpoint(path)
            return
        target = local_path(path)
        try:
            remove(target)
        except OSError as error:
            raise InputError(f"{target} cannot be deleted: {error.strerror}") from error


def local_path(path: str | Path) -> Path:
    """The path of a local address, which may be written ``file://``."""
    return Path(os.path.abspath(str(path).removeprefix("file://")))


def failed(target: Path, reason: str | None) -> str:
    """What to say of a checkpoint that could not be written."""
    put_back(target.parent)
    newest, _ = newest_whole(path for path in target.parent.glob("*.ckpt"))
    kept = "there is none in its folder yet" if newest is None else f"the newest whole one is {newest}"
    return (
        f"the checkpoint {target} could not be written: {reason}. Earlier checkpoints are untouched; {kept}. "
        "Make room or set another trainer.default_root_dir, and go on with --ckpt_path"
    )


class _Watched:
    """A binary file to write, which remembers why writing failed: torch's own error has no reason in it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self.error = self.error or error
            raise

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None and self.error is not None:
            raise self.error from error


def reason_of(error: BaseException, folder: Path) -> str | None:
    """Why writing below ``folder`` failed, in the words of the system; ``None`` where the error is of another kind."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen.strerror or one_line(seen)
        seen = seen.__cause__ or seen.__context__
    if is_of_writing(error):  # writing once more tells the system's own
        return unwritable(folder) or f"torch could not write ({one_line(Exception(str(error)), 200)})"
    return None
