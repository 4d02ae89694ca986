"""Values of rows as they are read, and what stands in the place of those that cannot be."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dft_lightning.errors import InputError, one_line


@dataclass(frozen=True)
class BrokenRow:
    """A row that could not even be read, and why."""

    reason: str


@dataclass(frozen=True)
class BrokenValue:
    """In the place of a value that could not be read, and why. It is no matter where nothing asks for it."""

    reason: str


def kind_of(value: Any) -> str:
    """What an error message calls a value of the wrong kind."""
    return f"a value that cannot be read ({value.reason})" if isinstance(value, BrokenValue) else type(value).__name__


class BrokenText(Exception):
    """What is wrong with a part of a file."""


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
        raise BrokenText(f"the key {twice(key for key, _ in pairs)!r} is there twice")
    return found


def twice(names: Iterable[str]) -> str | None:
    """The first of the names that are there more than once, if any."""
    return next((name for name, times in Counter(names).items() if times > 1), None)


def check_columns(path: Path, columns: list[str]) -> None:
    """Raise ``InputError`` where a file has two columns of one name."""
    if (name := twice(columns)) is not None:
        raise InputError(f"{path}: the column {name!r} is there twice")
