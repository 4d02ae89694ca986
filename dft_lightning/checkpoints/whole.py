"""Whether a checkpoint is whole, from little of what is in it, and which of several was written last."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dft_lightning.errors import one_line
from dft_lightning.files import MARKER, is_being_written, partials, remove, write_text
from dft_lightning.foreign.torch import unpickling_problem

META = "meta.pt"  # beside the shards: all of a checkpoint that is no tensor of model or optimizer
INDEX = ".metadata"  # of the shards
WRITTEN = "written_ns"  # of a file, as a key of it: when it was written, whatever its copy's date


def whole_problem(path: str | Path) -> str | None:
    """What is wrong with a checkpoint, to be read after its path; ``None`` where it is whole.

    Tensors are not read. A file is whole if its end (torch's files are zip archives, whose list of contents is their
    end), each record's beginning and the content without the tensors are. A folder of shards is whole if every file
    that its ``complete.json`` lists is there in its size; one that was written without has to have ``.metadata`` and
    ``meta.pt``. Bytes that were changed or left out in the middle of a tensor are not noticed.

    Args:
        path: a ``.ckpt`` file or folder.

    Example:
        >>> import tempfile
        >>> from dft_lightning.checkpoints import whole_problem
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     whole_problem(folder)
        'is an empty folder'
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _folder_problem(path)
        return _file_problem(path) or _content_problem(path)
    except OSError as error:
        return f"cannot be read: {error.strerror or one_line(error)}"


def newest_whole(paths: Iterable[str | Path]) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint that was written last, of those that are whole.

    What counts is the time that a checkpoint says it was written, which copies keep, or else its files' date; where
    that is the same, the optimizer steps behind it.

    Returns:
        The checkpoint, or ``None``; and what is wrong with each that has a later date, by path.
    """
    problems: dict[Path, str] = {}
    found: list[tuple[tuple[int, int, int], Path]] = []
    for path in map(Path, paths):
        problem = whole_problem(path)
        if problem is None:
            found.append((written(path), path))
        else:
            problems[path] = problem
    newest = max(found)[1] if found else None
    since = 0 if newest is None else _date(newest)
    return newest, {path: problem for path, problem in problems.items() if _date(path) >= since}


def written(path: Path) -> tuple[int, int, int]:
    """To order checkpoints by: when one was written, the steps behind it, and its date."""
    date = _date(path)
    try:
        content = read_marker(path) if path.is_dir() else content_of(path)
    except Exception:  # of one that is not whole, which is passed over by its date
        return date, -1, date
    return int(content.get(WRITTEN, date)), int(content.get("global_step", -1)), date


def write_marker(folder: Path, content: dict[str, Any]) -> None:
    """Say of a folder, whose files are all there, that it is whole."""
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files_of(folder)}
    write_text(folder / MARKER, json.dumps({**content, "files": sizes}, indent=1))


def read_marker(folder: Path) -> dict[str, Any]:
    """What ``complete.json`` says; nothing for a folder that was written without."""
    if not (folder / MARKER).is_file():
        return {}
    return dict(json.loads((folder / MARKER).read_text(encoding="utf-8")))


def files_of(folder: Path) -> list[Path]:
    """Every file of a folder but its marker."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MARKER)


def _date(path: Path) -> int:
    try:
        times: list[int] = [file.stat().st_mtime_ns for file in (path, *(path.iterdir() if path.is_dir() else ()))]
    except OSError:  # a link that leads nowhere, or what is gone by now
        return 0
    return max(times)


def _folder_problem(folder: Path) -> str | None:
    if not any(folder.iterdir()):
        return "is an empty folder"
    try:
        sizes: dict[str, int] = read_marker(folder).get("files", {})
        sizes = {str(name): int(size) for name, size in sizes.items()}
    except (ValueError, TypeError, AttributeError):
        return f"is cut short: its {MARKER} is"
    for name in [*sizes, INDEX, META]:
        if not (folder / name).is_file():
            return f"is cut short: it lacks {name}"
    for name, size in sizes.items():
        if (found := (folder / name).stat().st_size) != size:
            return f"is cut short: {name} has {found} bytes of {size}"
    return None if (problem := _file_problem(folder / META)) is None else f"{problem} ({META})"


def _file_problem(path: Path) -> str | None:
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                _check_header(file, record)
    except (zipfile.BadZipFile, struct.error, ValueError, EOFError, NotImplementedError) as error:
        return f"is cut short or no checkpoint: {one_line(error, 200)}"
    return None


def _check_header(file: BinaryIO, record: zipfile.ZipInfo) -> None:
    if record.header_offset < 0:
        raise zipfile.BadZipFile(f"what is before {record.filename} is too short")
    file.seek(record.header_offset)
    if file.read(4) != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"nothing is where {record.filename} should begin")


def checkpoints_below(folder: Path) -> list[Path]:
    """Every checkpoint in a folder and in those within it, also where a process ended between two renames."""
    for each in (folder, *(below for below in folder.rglob("*") if below.is_dir())):
        put_back(each)
    return [path for path in folder.rglob("*.ckpt") if path.exists()]  # links may dangle


def put_back(folder: Path) -> None:
    """Give a whole folder its name, where a process ended between two renames, of the older and of the newer.

    Several processes may do so at once.
    """
    folders = [path for path in partials(folder) if (path / MARKER).is_file() and not is_being_written(path)]
    for partial in sorted(folders, key=written, reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError):  # another was first, or the folder is read-only
            target = folder / str(read_marker(partial)["name"])
            if target.parent == folder and not os.path.lexists(target) and whole_problem(partial) is None:
                partial.rename(target)


def clear_leftovers(folder: Path) -> None:
    """Delete what processes that have ended left half written: of this machine, or not written to for an hour."""
    put_back(folder)
    for partial in partials(folder):
        if not is_being_written(partial):
            remove(partial)


def content_of(path: Path) -> dict[str, Any]:
    """A checkpoint without the values of its tensors, which are mapped and not read."""
    content: dict[str, Any] = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    return content


def unreadable(error: Exception) -> str:
    """Why a checkpoint was not read, without torch's advice to read it all the same."""
    named, reason = unpickling_problem(error)
    if named is not None:
        return f"it holds more than values, {named}, and opening it would run code"
    return one_line(error if reason is None else Exception(reason), 200)


def _content_problem(path: Path) -> str | None:
    try:
        content = content_of(path)
    except Exception as error:  # whatever the unpickler stumbled on
        return f"is cut short or no checkpoint: {unreadable(error)}"
    if not isinstance(content, dict) or not {"state_dict", "pytorch-lightning_version"} <= set(content):
        return "is not a Lightning checkpoint"
    return None
