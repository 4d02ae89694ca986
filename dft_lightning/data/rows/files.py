"""Rows of one local file, packed or not, by its suffix, one at a time."""

from __future__ import annotations

import codecs
import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from dft_lightning.data.rows.arrow import read_parquet
from dft_lightning.data.rows.values import BrokenRow, BrokenText, check_columns, load_json
from dft_lightning.errors import InputError, one_line

Rows = Iterator[tuple[int, dict[str, Any] | BrokenRow]]


def read_file(path: Path) -> Rows:
    """Rows of a file, each with its number: the line in ``.jsonl`` and ``.csv`` (where it begins), else from 1.

    Raises:
        InputError: no such file, another suffix, or one that cannot be read at all.
    """
    return reader_of(path)(path)


def reader_of(path: Path) -> Callable[[Path], Rows]:
    """What reads a file, which is there, by its suffix.

    Raises:
        InputError: no such file, or another suffix.
    """
    form, packed = suffixes_of(path)
    reader = READERS.get(form)
    if reader is None:
        hint = ', of plain text a .jsonl of {"text": ...} a line' if form == ".txt" else ""
        raise InputError(f"{path}: expected a {', '.join(READERS)} file{hint}")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if packed and (packed not in _OPENERS or form == ".parquet"):
        raise InputError(f"{path}: {form}{packed} is not read: unpack it")
    return reader


def is_rows(path: Path) -> bool:
    """Whether a file is one of rows, by its name."""
    return suffixes_of(path)[0] in READERS


def suffixes_of(path: Path) -> tuple[str, str]:
    """Of the rows, and of what packs them, where something does; in small letters."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    return (before, last) if last in (*_OPENERS, ".zst") else (last, "")


def _gzip(path: Path) -> IO[bytes]:
    import gzip

    return cast("IO[bytes]", gzip.open(path))


def _bzip2(path: Path) -> IO[bytes]:
    import bz2

    return bz2.open(path)


def _xz(path: Path) -> IO[bytes]:
    import lzma

    return lzma.open(path)


_OPENERS: dict[str, Callable[[Path], IO[bytes]]] = {".gz": _gzip, ".bz2": _bzip2, ".xz": _xz}


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their ends, and their numbers. Unicode's other separators, which strings may hold, end none."""
    packed = suffixes_of(path)[1]
    try:
        with _OPENERS[packed](path) if packed else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except Exception as error:  # what unpacks has errors of its own
        if not packed and not isinstance(error, OSError):
            raise
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from error


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BrokenText(f"not UTF-8 text: {error.reason} at byte {error.start + 1}") from error


def _json_lines(path: Path) -> Rows:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            yield number, _as_row(load_json(_decode(line).rstrip()))
        except BrokenText as error:
            yield number, BrokenRow(str(error))


def _json_list(path: Path) -> Rows:
    try:
        items = load_json(_decode(b"".join(line for _, line in _lines(path))))
    except BrokenText as error:
        hint = "; one object a line belongs in a .jsonl file" if "Extra data" in str(error) else ""
        raise InputError(f"{path}: {error}{hint}") from error
    if not isinstance(items, list):
        raise InputError(f"{path}: expected a list of objects, got {_kind(items)}")
    for number, item in enumerate(items, start=1):
        yield number, _as_row(item)


def _as_row(item: Any) -> dict[str, Any] | BrokenRow:
    return item if isinstance(item, dict) else BrokenRow(f"expected an object, got {_kind(item)}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _csv(path: Path) -> Rows:
    """Comma-separated, the first line with the columns' names; every value is text as it stands there."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a document may be longer than Python's 128 KiB
    # Other libraries guess types: 007 becomes 7, and NA nothing.
    reader = csv.reader((_decode(line) for _, line in _lines(path)), strict=True)
    columns: list[str] | None = None
    begins = 1
    try:
        for fields in reader:
            number, begins = begins, reader.line_num + 1
            if not fields:
                continue
            if columns is None:
                columns = fields
                check_columns(path, columns)
            elif len(fields) != len(columns):
                yield number, BrokenRow(f"{len(fields)} fields, and the first line names {len(columns)} columns")
            else:
                yield number, dict(zip(columns, fields, strict=True))
    except (csv.Error, BrokenText) as error:  # where the row ends, and so the next begins, is not known
        raise InputError(f"{path}: broken CSV in the row that begins in line {begins}: {error}") from error


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _csv,
    ".parquet": read_parquet,
}
