"""Writing that is never left half done."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from dft_lightning.errors import InputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file to write; an older one of the name is replaced when the new one is whole.

    Several processes, of several machines too, may write the same file: each writes one of its own first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
        raise InputError(f"{key}: {path} is not empty: give another folder, or overwrite")
    if not any((path / marker).is_file() for marker in markers):
        raise InputError(f"{key}: {path} is not empty and has no {' or '.join(markers)}: it is no folder to overwrite")
    for entry in path.iterdir():
        if (entry.is_dir() and entry.name not in folders) or ".ckpt" in entry.name:
            raise InputError(f"{key}: {path} has {entry.name} in it, which would be deleted: give another folder")


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, beside ``path`` and in its place when it is whole; an older one there is deleted then."""
    path = path.resolve()  # a link stays, and what it leads to is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (path.with_name(f".{path.name}.{uuid.uuid4().hex}.{kind}") for kind in ("partial", "old"))
    partial.mkdir()
    try:
        yield partial
        _open_to_others(partial)
        if path.is_dir():
            path.rename(old)
        partial.rename(path)
    finally:
        if old.is_dir() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)


def _open_to_others(folder: Path) -> None:
    """Give files the mode that new ones have: safetensors keeps its own to their writer."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def refuse_link(path: Path) -> None:
    """Raise ``InputError`` where something would be written through a link, and so elsewhere than it seems."""
    if path.is_symlink():
        raise InputError(f"{path} is a link to {os.readlink(path)}: take it away, nothing is written through it")


def write_text(path: Path, text: str) -> None:
    """Write a text file; an older one of the name is replaced when the new one is whole."""
    with replacing(path) as file:
        file.write(text)


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path, or the address that stands for one, is of a file on this machine."""
    from fsspec.utils import get_protocol

    return get_protocol(str(path)) in ("file", "local")
