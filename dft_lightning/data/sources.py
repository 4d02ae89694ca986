"""Where rows come from. A source yields numbered rows and knows nothing of what is in them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dft_lightning.component import Component
from dft_lightning.errors import InputError, one_line


@dataclass(frozen=True)
class BrokenRow:
    """A row that could not even be read, and why."""

    reason: str


class RowSource(Component):
    """Yields rows as dicts of columns. Subclass and write :meth:`rows` for data of one's own."""

    @property
    def name(self) -> str:
        """What an error message calls the source."""
        return repr(self)

    def rows(self) -> Iterator[tuple[int, dict[str, Any] | BrokenRow]]:
        """Each row with its number, as a person would count it in the file (from 1)."""
        raise NotImplementedError(f"{type(self).__name__} must define rows(self)")


class LocalRows(RowSource):
    """Rows of a local file: ``.jsonl`` (one object a line) or ``.json`` (a list of objects), UTF-8.

    Args:
        path: the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def name(self) -> str:
        return str(self.path)

    def rows(self) -> Iterator[tuple[int, dict[str, Any] | BrokenRow]]:
        if self.path.suffix not in (".jsonl", ".json"):
            raise InputError(f"{self.path}: expected a .jsonl or .json file")
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file")
        try:
            text = self.path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path}: cannot be read as UTF-8 text: {error}") from error
        yield from _json_lines(text) if self.path.suffix == ".jsonl" else _json_list(text, self.path)


def _json_lines(text: str) -> Iterator[tuple[int, dict[str, Any] | BrokenRow]]:
    # Not splitlines(): JSON strings may hold the other line separators of Unicode.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, _as_row(json.loads(line))
        except json.JSONDecodeError as error:
            yield number, BrokenRow(f"broken JSON at character {error.colno}: {error.msg}")


def _json_list(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any] | BrokenRow]]:
    try:
        items = json.loads(text)
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


class HubRows(RowSource):
    """Rows of a dataset on the Hugging Face hub, or of a local dataset folder, by ``datasets.load_dataset``.

    Args:
        path: hub name or folder.
        name: the configuration, where the dataset has several.
        split: the split, slices such as ``train[:1000]`` included.
        revision: branch, tag or commit.
    """

    def __init__(self, path: str, name: str | None = None, split: str = "train", revision: str | None = None) -> None:
        self.path = path
        self.config_name = name
        self.split = split
        self.revision = revision

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.path, self.config_name, self.split) if part)

    def rows(self) -> Iterator[tuple[int, dict[str, Any] | BrokenRow]]:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        try:
            dataset = load_dataset(self.path, self.config_name, split=self.split, revision=self.revision)
        except (OSError, ValueError, KeyError, DatasetsError) as error:
            reason = one_line(error)
            raise InputError(f"{self.name}: neither a local file nor a dataset that can be loaded: {reason}") from error
        yield from enumerate((dict(row) for row in dataset), start=1)


def as_source(value: RowSource | str | os.PathLike[str], split: str) -> RowSource:
    """A source as given, or for a string: a local ``.jsonl`` or ``.json`` file, otherwise a hub name.

    Args:
        value: source, path or hub name.
        split: the split of a hub dataset given by name.
    """
    if isinstance(value, RowSource):
        return value
    path = os.fspath(value)
    if not path.strip():
        raise InputError(f"data.{split}: empty")
    if path.endswith((".jsonl", ".json")) or Path(path).is_file():
        return LocalRows(path)
    return HubRows(path, split=split)
