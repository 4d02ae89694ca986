"""Rows of one local file, by its suffix, one at a time."""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dft_lightning.errors import InputError, one_line


@dataclass(frozen=True)
class BrokenRow:
    """A row that could not even be read, and why."""

    reason: str


Rows = Iterator[tuple[int, dict[str, Any] | BrokenRow]]


class BrokenText(Exception):
    """What is wrong with a part of a file."""


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


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their ends, and their numbers. Unicode's other separators, which strings may hold, end none."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BrokenText(f"not UTF-8 text: {error.reason} at byte {error.start + 1}") from error


def load_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        BrokenText: what is wrong with it; an object with one key twice, too.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, character {error.colno}" if error.lineno > 1 else f"character {error.colno}"
        raise BrokenText(f"broken JSON at {place}: {error.msg}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise BrokenText(f"JSON that cannot be read: {one_line(error)}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise BrokenText(f"the key {_twice(key for key, _ in pairs)!r} is there twice")
    return found


def _twice(names: Iterable[str]) -> str | None:
    """The first of the names that are there more than once, if any."""
    return next((name for name, times in Counter(names).items() if times > 1), None)


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
                _check_columns(path, columns)
            elif len(fields) != len(columns):
                yield number, BrokenRow(f"{len(fields)} fields, and the first line names {len(columns)} columns")
            else:
                yield number, dict(zip(columns, fields, strict=True))
    except (csv.Error, BrokenText) as error:  # where the row ends, and so the next begins, is not known
        raise InputError(f"{path}: broken CSV in the row that begins in line {begins}: {error}") from error


def _check_columns(path: Path, columns: list[str]) -> None:
    if (name := _twice(columns)) is not None:
        raise InputError(f"{path}: the column {name!r} is there twice")


def _parquet(path: Path) -> Rows:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except InputError:
        raise
    except Exception as error:  # Arrow's own, and whatever Python's types cannot hold, such as a date beyond 9999
        raise InputError(f"{path}: cannot be read as Parquet: {one_line(error)}") from error


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _csv,
    ".parquet": _parquet,
}
