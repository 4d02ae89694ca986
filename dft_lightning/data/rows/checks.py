"""Values of rows that are read: texts, weights and JSON, each checked and named where it is wrong."""

from __future__ import annotations

import json
import math
from typing import Any

from dft_lightning.data.rows.values import BrokenText, kind_of, load_json

Noted = set[tuple[str, str]]
"""What is to be said of a row: kinds and names of :class:`~dft_lightning.data.notes.Notes`."""

LARGEST_WEIGHT = 3.4028234663852886e38  # of float32
_DEEPEST = 100


class BadRow(Exception):
    """What is wrong with a row, beginning with the column."""


def is_there(value: Any) -> bool:
    """Whether a value says anything: not null, and no empty text, list or object."""
    return value is not None and not (isinstance(value, (str, list, tuple, dict)) and not value)


def as_text(value: Any, where: str) -> str:
    """A string that is text.

    Raises:
        BadRow: it is no string, or has what no tokenizer can take: half a surrogate pair, or a NUL.
    """
    if not isinstance(value, str):
        raise BadRow(f"{where}: expected a string, got {kind_of(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{where}: half a surrogate pair at character {error.start}, which is not text") from error
    if "\0" in value:
        raise BadRow(f"{where}: a NUL at character {value.index(chr(0))}, which is not text")
    return value


def as_content(value: Any, where: str, noted: Noted) -> str:
    """A string that is text, or the text of a number, as JSON writes it: ``39``, ``0.5``.

    Raises:
        BadRow: it is neither.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return as_text(value, where)
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"{where}: expected a string, got {value}")
    noted.add(("numbers", without_places(where)))
    return json.dumps(value)


def without_places(where: str) -> str:
    """``messages[].content`` of ``messages[3].content``: what the same place of all rows is called."""
    name, *others = where.split("[")
    return "[]".join([name, *(other.partition("]")[2] for other in others)])


def as_weight(value: Any, where: str, signed: bool = False) -> float:
    """A weight of tokens' losses: a number that float32 holds, and not negative unless ``signed``."""
    if isinstance(value, str):  # of a CSV file
        try:
            value = float(value)
        except ValueError:
            raise BadRow(f"{where}: expected a number, got {value!r}") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow(f"{where}: expected a number, got {kind_of(value)}")
    if not (-LARGEST_WEIGHT if signed else 0) <= value <= LARGEST_WEIGHT:  # nor NaN
        raise BadRow(f"{where}: expected a number from {'-3.4e38' if signed else 0} to 3.4e38, got {value}")
    return float(value)


def own_weight(value: dict[str, Any], where: str) -> float | None:
    """What a message, or a part of one, says of its weight: by ``weight``, or as yes or no by ``loss`` or ``train``.

    Raises:
        BadRow: two of them do not agree, or one is none.
    """
    found = value.get("weight")
    weight = None if found is None else as_weight(found, f"{where}.weight")
    for key in ("loss", "train"):
        flag = value.get(key)
        if flag is None:
            continue
        if not isinstance(flag, (bool, int, float)) or flag not in (0, 1):
            raise BadRow(f"{where}.{key}: expected true or false, got {shown(flag)}")
        if weight is not None and (weight > 0) != bool(flag):
            raise BadRow(f"{where}.{key}: {'true' if flag else 'false'}, and its weight is {weight:g}: leave one out")
        weight = float(flag) if weight is None else weight
    return weight


def shown(value: Any) -> str:
    """A wrong value where it is short, or else its kind."""
    return repr(value) if isinstance(value, (bool, int, float, str)) else kind_of(value)


def as_plain(value: Any, where: str, depth: int = 0) -> Any:
    """What a template may read beside role and content (a name, a reasoning), with its strings checked."""
    if isinstance(value, str):
        return as_text(value, where)
    if depth == _DEEPEST:  # Python's own recursion ends at a thousand calls, from wherever it began
        raise BadRow(f"{where}: nested more than {_DEEPEST} deep")
    if isinstance(value, dict):
        return {as_text(key, where): as_plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [as_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise BadRow(f"{where}: expected text, a number, a list or an object, got {kind_of(value)}")


def from_text(value: Any, where: str) -> Any:
    """A value, or what its JSON says where it stands in a text, as in a CSV file; ``None`` for an empty text."""
    if not isinstance(value, str):
        return value
    return parse_json(value, where) if value.strip() else None


def parse_json(text: str, where: str) -> Any:
    """JSON that stands in a string of a row."""
    try:
        return load_json(as_text(text, where))
    except BrokenText as error:
        raise BadRow(f"{where}: {error}") from error
