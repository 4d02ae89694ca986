"""Files and folders that appear under their names when they are whole and on disk, and not before."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dft_lightning.checkpoints.whole import MARKER, files_of, read_marker, whole_problem, written
from dft_lightning.errors import one_line

# Of what is being written, or was until its process ended: the machine, the process and a number drawn.
_PARTIAL = re.compile(r"\.(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{12}\.(partial|old)")
_LONG_AGO = 3600.0  # seconds without a byte written


def partial_path(target: Path, kind: str = "partial") -> Path:
    """A hidden name beside ``target``, of this process and never used before; no ``*.ckpt``."""
    return target.with_name(f".{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:12]}.{kind}")


@functools.cache
def _machine() -> str:
    """Of the host and the numbering of processes on it, which containers have of their own."""
    space = "/proc/self/ns/pid"
    name = f"{socket.gethostname()} {os.readlink(space) if os.path.exists(space) else ''}"
    return hashlib.sha1(name.encode()).hexdigest()[:8]


class WatchedFile:
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


@contextlib.contextmanager
def replacing_file(target: Path) -> Iterator[WatchedFile]:
    """A file to write, in ``target``'s place when it is whole and on disk; an older one stays until then.

    Raises:
        OSError: it could not be written. Nothing is left of it then.
    """
    partial = partial_path(target)
    watched: WatchedFile | None = None
    try:
        with partial.open("xb") as file:
            watched = WatchedFile(file)
            yield watched
            watched.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        sync_folder(target.parent)
    except Exception as error:
        if watched is not None and watched.error is not None and error is not watched.error:
            raise watched.error from error
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def put_in_place(partial: Path, target: Path) -> None:
    """Have a whole folder at ``target``; what is there is deleted after.

    An older one is away between two renames: :func:`put_back` mends what a kill there leaves.
    """
    old = partial_path(target, "old")
    if os.path.lexists(target):
        target.rename(old)
    partial.rename(target)
    sync_folder(target.parent)
    remove(old)


def put_back(folder: Path) -> None:
    """Give a whole folder its name, where a process ended between the two renames of :func:`put_in_place`.

    Several processes may do so at once.
    """
    folders = [path for path in _partials(folder) if (path / MARKER).is_file() and not _lives(path)]
    for partial in sorted(folders, key=written, reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError):  # another was first, or the folder is read-only
            target = folder / str(read_marker(partial)["name"])
            if target.parent == folder and not os.path.lexists(target) and whole_problem(partial) is None:
                partial.rename(target)


def clear_leftovers(folder: Path) -> None:
    """Delete what processes that have ended left half written: of this machine, or not written to for an hour."""
    put_back(folder)
    for partial in _partials(folder):
        if not _lives(partial):
            remove(partial)


def _partials(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(path for path in folder.iterdir() if _PARTIAL.fullmatch(path.name))
    return []


def _lives(partial: Path) -> bool:
    """Whether something may still be writing it."""
    name = _PARTIAL.fullmatch(partial.name)
    assert name is not None
    if name["machine"] == _machine():
        try:
            os.kill(int(name["process"]), 0)
        except ProcessLookupError:
            return False
        except OSError:  # of another user
            pass
    try:
        inside = partial.iterdir() if partial.is_dir() else ()
        latest: float = max(path.stat().st_mtime for path in (partial, *inside))
    except OSError:  # it is being moved or deleted just now
        return True
    return time.time() - latest < _LONG_AGO


def remove(path: Path) -> None:
    """Delete a file or folder; what a kill leaves of a folder has no name of a checkpoint."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not _PARTIAL.fullmatch(path.name):
        hidden = partial_path(path, "old")
        path.rename(hidden)
        path = hidden
    (path / MARKER).unlink(missing_ok=True)  # first: it is whole no longer
    shutil.rmtree(path)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows has no such call
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that do not do so
            raise
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Have every file below a folder on disk."""
    for path in files_of(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for each in {path.parent for path in files_of(folder)}:
        sync_folder(each)


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written to a folder, or to the nearest above it that exists; ``None`` if it can."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or one_line(error)
    return None


def reason_of(error: BaseException, folder: Path) -> str | None:
    """Why writing below ``folder`` failed, in the words of the system; ``None`` where the error is of another kind."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen.strerror or one_line(seen)
        seen = seen.__cause__ or seen.__context__
    if "inline_container" in str(error) or "PytorchStreamWriter" in str(error):
        # torch's writer has swallowed the system's error: writing once more tells it.
        return unwritable(folder) or f"torch could not write ({one_line(Exception(str(error)), 200)})"
    return None
