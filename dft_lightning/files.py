"""Files and folders that appear under their names when they are whole and on disk, and not before."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, TextIO

from dft_lightning.errors import InputError, one_line

MARKER = "complete.json"  # of a folder; written when every other file of it is on disk
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


# -- writing -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, in ``path``'s place when it is whole and on disk; an older one stays until then.

    Several processes, of several machines too, may write the same file: each writes one of its own first.

    Raises:
        OSError: it could not be written. Nothing is left of it then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file to write, as :func:`replacing_file` has one."""
    with replacing_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8")
        yield text
        text.detach()  # which writes what is left


def open_alone(path: Path) -> BinaryIO:
    """A file to read and to add to, made with its folder where there is none, which one process at a time has.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be written.
        InputError: it is a link.
    """
    import fcntl  # of POSIX

    refuse_link(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def add_lines(file: BinaryIO, records: Iterable[Any]) -> None:
    """Write records as lines of JSON, at once."""
    file.write("".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records).encode())
    file.flush()


def write_text(path: Path, text: str) -> None:
    """Write a text file; an older one of the name is replaced when the new one is whole."""
    with replacing(path) as file:
        file.write(text)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, beside ``path`` and in its place when it is whole; an older one there is deleted then."""
    path = path.resolve()  # a link stays, and what it leads to is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    partial.mkdir()
    try:
        yield partial
        _open_to_others(partial)
        sync_files(partial)
        put_in_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, target: Path) -> None:
    """Have a whole folder at ``target``; what is there is deleted after.

    An older one is away between two renames, under a name that says so.
    """
    old = partial_path(target, "old")
    if os.path.lexists(target):
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        with contextlib.suppress(OSError):
            old.rename(target)
        raise
    sync_folder(target.parent)
    with contextlib.suppress(OSError):  # the next save into the folder tries again
        remove(old)


def _open_to_others(folder: Path) -> None:
    """Give files the mode that new ones have: safetensors keeps its own to their writer."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


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
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for each in {path.parent for path in files}:
        sync_folder(each)


# -- what is left of processes that ended -----------------------------------------------------------------------------


def partials(folder: Path) -> list[Path]:
    """What is being written in a folder, or was until its process ended."""
    with contextlib.suppress(OSError):
        return sorted(path for path in folder.iterdir() if _PARTIAL.fullmatch(path.name))
    return []


def is_being_written(partial: Path) -> bool:
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


# -- whether something may be written ----------------------------------------------------------------------------------


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


def check_replaceable(
    path: Path, overwrite: bool, markers: tuple[str, ...], key: str, folders: tuple[str, ...] = ("chat_templates",)
) -> None:
    """Whether :func:`replacing_folder` may put a folder there.

    Args:
        path: of the folder.
        overwrite: whether it may replace one that is not empty.
        markers: files of which such a one must have one, or it is something else that nobody meant.
        key: what an error message calls the path.
        folders: what such a one may have for folders in it. Any other, or a checkpoint, is kept.

    Raises:
        InputError: it may not.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{key}: {path} is a file")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        flag = "--overwrite" if key.startswith("--") else "overwrite"
        raise InputError(f"{key}: {path} is not empty: give another folder, or {flag}")
    if not any((path / marker).is_file() for marker in markers):
        raise InputError(f"{key}: {path} is not empty and has no {' or '.join(markers)}: it is no folder to overwrite")
    for entry in path.iterdir():
        if (entry.is_dir() and entry.name not in folders) or ".ckpt" in entry.name:
            raise InputError(f"{key}: {path} has {entry.name} in it, which would be deleted: give another folder")


def refuse_link(path: Path) -> None:
    """Raise ``InputError`` where something would be written through a link, and so elsewhere than it seems."""
    if path.is_symlink():
        raise InputError(f"{path} is a link to {os.readlink(path)}: take it away, nothing is written through it")


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path, or the address that stands for one, is of a file on this machine."""
    from fsspec.utils import get_protocol

    return get_protocol(str(path)) in ("file", "local")
