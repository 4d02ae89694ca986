"""Rows of one local file, by its suffix."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dft_lightning.errors import InputError, one_line


@dataclass(frozen=True)
class BrokenRow:
    """A row that could not even be read, and why."""

    reason: str


Rows = Iterator[tuple[int, dict[str, Any] | BrokenRow]]


def read_file(path: Path) -> Rows:
    """Rows of a file, each with its number: the line in ``.jsonl`` and ``.csv`` (where it begins), else from 1.

    Raises:
        InputError: no such file, another suffix, or one that cannot be read at all.
    """
    reader = READERS.get(path.suffix)
    if reader is None:
        raise InputError(f"{path}: expected a {', '.join(READERS)} file")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return reader(path)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # line ends as they are: CSV has its own
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def _json_lines(path: Path) -> Rows:
    # Not splitlines(): JSON strings may hold the other line separators of Unicode.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, _as_row(json.loads(line))
        except json.JSONDecodeError as error:
            yield number, BrokenRow(f"broken JSON at character {error.colno}: {error.msg}")


def _json_list(path: Path) -> Rows:
    try:
        items = json.loads(_text(path))
    except json.JSONDecodeError as error:
        hint = "; one object a line belongs in a .jsonl file" if error.msg == "Extra data" else ""
        raise InputError(
            f"{path}: broken JSON at line {error.lineno}, character {error.colno}: {error.msg}{hint}"
        ) from error
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
    reader = csv.reader(_lines(_text(path)), strict=True)
    columns: list[str] | None = None
    begins = 1
    try:
        for fields in reader:
            number, begins = begins, reader.line_num + 1
            if not fields:
                continue
            if columns is None:
                columns = fields
                _check_columns(path, columns)
            elif len(fields) != len(columns):
                yield number, BrokenRow(f"{len(fields)} fields, and the first line names {len(columns)} columns")
            else:
                yield number, dict(zip(columns, fields, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}: broken CSV in the row that begins in line {begins}: {error}") from error


def _lines(text: str) -> list[str]:
    """Lines with their ends; Unicode's other separators end none."""
    return [line + "\n" for line in text.split("\n")] if text else []


def _check_columns(path: Path, columns: list[str]) -> None:
    for name in columns:
        if columns.count(name) > 1:
            raise InputError(f"{path}: the column {name!r} is there twice")


def _parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {one_line(error)}") from error


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _csv,
    ".parquet": _parquet,
}
