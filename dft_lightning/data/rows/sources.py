"""Where rows come from. A source yields numbered rows and knows nothing of what is in them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from dft_lightning.component import Component, from_plain, not_saved
from dft_lightning.data.rows.arrow import read_dataset
from dft_lightning.data.rows.files import is_rows, read_file, reader_of, suffixes_of
from dft_lightning.data.rows.folders import files_of, names_splits
from dft_lightning.data.rows.identity import digest_of, digest_of_rows, digests_of, files_below, identity_of, known_by
from dft_lightning.data.rows.values import BrokenRow, kind_of
from dft_lightning.errors import InputError, one_line
from dft_lightning.foreign.datasets import fingerprint_of

Row = dict[str, Any] | BrokenRow


class RowSource(Component):
    """Yields rows as dicts of columns. Subclass and write :meth:`rows` for data of one's own."""

    _to_write = ("rows",)

    @property
    def name(self) -> str:
        """What an error message calls the source."""
        return repr(self)

    @property
    def parts(self) -> list[str]:
        """Names of the sources that it is mixed from; none of a single one."""
        return []

    def stream(self) -> None:
        """Told that its rows are read as training goes, pass after pass: nothing should be kept on disk for it."""

    def rows(self) -> Iterator[tuple[int | str, Row]]:
        """Each row with its number, as a person would count it in the file (from 1), or with its place."""
        raise NotImplementedError  # a class without it is not made

    def rows_of_parts(self) -> Iterator[tuple[int, int | str, Row]]:
        """As :meth:`rows`, each with the index in :attr:`parts` before it; 0 where there are none."""
        rows, name = self.rows(), f"{type(self).__name__}.rows"
        if not isinstance(rows, Iterable):
            raise InputError(f"{name} must yield a number and a row each time, got {type(rows).__name__}")
        for pair in rows:
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise InputError(f"{name} must yield a number and a row each time (yield 1, row), got {kind_of(pair)}")
            yield (0, *pair)

    def identity(self) -> Any:
        """What the rows are known by before they are read: where it is as it was, their tokens are in the cache.

        Here the class, the files that it and those above it stand in with the modules that these import and that are
        not installed, its arguments, and the bytes of every file and folder that these name. Override it where the
        rows depend on more: on a database, the time, a file that no argument names.

        Returns:
            What JSON holds; ``None`` where the rows are to be read every time.
        """
        return identity_of(self)


class FirstRows(RowSource):
    """The first ``limit`` rows of a source."""

    def __init__(self, source: RowSource, limit: int) -> None:
        self.source = source
        self.limit = limit

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def parts(self) -> list[str]:
        return self.source.parts

    def rows(self) -> Iterator[tuple[int | str, Row]]:
        return islice(self.source.rows(), self.limit)

    def rows_of_parts(self) -> Iterator[tuple[int, int | str, Row]]:
        return islice(self.source.rows_of_parts(), self.limit)

    def identity(self) -> Any:
        inner = self.source.identity()
        return None if inner is None else known_by(self, limit=self.limit, source=inner)


_NO_ROWS = ("cache-", "tmp")  # what datasets leaves in a saved folder when it works on it


class LocalRows(RowSource):
    """Rows of a local file or folder.

    A file is ``.jsonl`` (one object a line), ``.json`` (a list of objects), ``.csv`` (the first line names the columns,
    values stay text) or ``.parquet``; text is UTF-8, and may be packed (``.jsonl.gz``, ``.bz2``, ``.xz``). A folder is
    one of ``datasets``' ``save_to_disk``, or has such files in it or in its folders, which are read in the order of
    their names. Which of them are of a split is told as the hub tells it: by the dataset's card, or by the names
    (``train-00000-of-00001.parquet``, ``test.jsonl``, ``data/validation/``); without either all are ``train``.

    Args:
        path: the file or folder.
        split: of a folder that has several.
        rename_columns: new names of columns, by the old ones.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str | None = None,
        rename_columns: dict[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.split = split
        self.rename_columns = rename_columns or {}

    @property
    def name(self) -> str:
        return str(self.path) if self.split is None else f"{self.path} ({self.split})"

    def rows(self) -> Iterator[tuple[int | str, Row]]:
        return _renamed(self._rows(), self.rename_columns)

    def identity(self) -> Any:
        # Of a file's name only the suffix says how it is read; in a folder all of it is part of the rows' numbers.
        files = digests_of(self._files(), self.path) if self.path.is_dir() else [self._suffix_and_digest()]
        return known_by(self, split=self.split, rename_columns=self.rename_columns, files=files)

    def _rows(self) -> Iterator[tuple[int | str, Row]]:
        if self._is_saved():
            yield from read_dataset(self._saved_dataset(), self.name)
        elif self.path.is_dir():
            for file in self._files():
                name = file.relative_to(self.path).as_posix()
                yield from ((f"{name}:{number}", row) for number, row in read_file(file))
        else:
            yield from read_file(self.path)

    def _suffix_and_digest(self) -> list[str]:
        (file,) = self._files()
        return [*suffixes_of(file), digest_of(file)]

    def _is_saved(self) -> bool:
        return any((self.path / name).is_file() for name in ("dataset_dict.json", "state.json"))

    def _files(self) -> list[Path]:
        """What the rows are read from, in order."""
        if self._is_saved():
            return [file for file in files_below(self.path) if not file.name.startswith(_NO_ROWS)]
        if not self.path.is_dir():
            reader_of(self.path)
            return [self.path]
        return files_of(self.path, self.split)

    def _saved_dataset(self) -> Any:
        from datasets import DatasetDict, load_from_disk

        try:
            found = load_from_disk(str(self.path))
        except Exception as error:  # a folder cut short raises whatever its reader stumbled on
            raise InputError(f"{self.path}: cannot be read as a saved dataset: {one_line(error)}") from error
        if isinstance(found, DatasetDict):
            if self.split not in found:
                raise InputError(
                    f"{self.path}: no split {self.split!r} there, but {', '.join(map(repr, found))}: name one by "
                    "class_path LocalRows and split"
                )
            found = found[self.split]
        return found


class HubRows(RowSource):
    """Rows of a dataset on the Hugging Face hub, or of a local dataset folder, by ``datasets.load_dataset``.

    Args:
        path: hub name or folder.
        name: the configuration, where the dataset has several.
        split: the split, slices such as ``train[:1000]`` included.
        revision: branch, tag or commit.
        rename_columns: new names of columns, by the old ones.
        streaming: read rows as they come, without keeping the dataset on disk.
        num_rows: rows drawn at random, without replacement; ``None`` for all, in their order.
        seed: of the draw.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        revision: str | None = None,
        rename_columns: dict[str, str] | None = None,
        streaming: bool = False,
        num_rows: int | None = None,
        seed: int = 0,
    ) -> None:
        for key, value, least in (("num_rows", 1 if num_rows is None else num_rows, 1), ("seed", seed, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{key} must be a whole number from {least}, got {value!r}")
        self.path = path
        self.config_name = name
        self.split = split
        self.revision = revision
        self.rename_columns = rename_columns or {}
        self.streaming = streaming
        self.num_rows = num_rows
        self.seed = seed

    def stream(self) -> None:
        self.streaming = True

    @property
    def name(self) -> str:
        whole = "/".join(part for part in (self.path, self.config_name, self.split) if part)
        return whole if self.num_rows is None else f"{self.num_rows} rows of {whole}"

    def identity(self) -> Any:
        if self.streaming:
            return None
        fingerprint = fingerprint_of(self._loaded())
        if fingerprint is None:
            return None
        drawn = None if self.num_rows is None else [self.num_rows, self.seed]
        return known_by(self, fingerprint=fingerprint, rename_columns=self.rename_columns, drawn=drawn)

    def _loaded(self) -> Any:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        try:
            return load_dataset(
                self.path, self.config_name, split=self.split, revision=self.revision, streaming=self.streaming
            )
        except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
            reason = one_line(error)
            raise InputError(f"{self.name}: neither a local file nor a dataset that can be loaded: {reason}") from error

    def rows(self) -> Iterator[tuple[int | str, Row]]:
        if self.num_rows is not None and self.streaming:
            raise InputError(
                f"{self.name}: rows cannot be drawn at random from a stream: leave num_rows or streaming out"
            )
        dataset = self._loaded()
        if self.num_rows is not None:
            if self.num_rows > len(dataset):
                raise InputError(f"{self.name}: there are {len(dataset)}")
            dataset = dataset.shuffle(seed=self.seed).select(range(self.num_rows))
        yield from _renamed(read_dataset(dataset, self.name), self.rename_columns)


class MemoryRows(RowSource):
    """Rows in memory, numbered from 1.

    Args:
        given: a list of dicts, or a ``Dataset`` or ``IterableDataset`` of ``datasets``.
        name: what error messages call them.
    """

    def __init__(self, given: Any, name: str = "rows in memory") -> None:
        self.given = given
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    def rows(self) -> Iterator[tuple[int | str, Row]]:
        if not isinstance(self.given, (list, tuple)):
            yield from read_dataset(self.given, self.name)
            return
        for number, row in enumerate(self.given, start=1):
            yield number, row if isinstance(row, dict) else BrokenRow(f"expected a dict of columns, got {kind_of(row)}")

    def identity(self) -> Any:
        of_list = isinstance(self.given, (list, tuple))
        digest = digest_of_rows(self.given) if of_list else fingerprint_of(self.given)
        return None if digest is None else known_by(self, rows=digest)


def _renamed(rows: Iterator[tuple[Any, Row]], names: dict[str, str]) -> Iterator[tuple[Any, Row]]:
    """Rows with their columns under new names."""
    if not names:
        yield from rows
        return
    for number, row in rows:
        if isinstance(row, BrokenRow):
            yield number, row
            continue
        lacking = [name for name in names if name not in row]
        renamed = {names.get(name, name): value for name, value in row.items()}
        if lacking:
            yield number, BrokenRow(f"{lacking[0]}: missing, which rename_columns names")
        elif len(renamed) < len(row):
            yield number, BrokenRow("rename_columns gives two columns one name")
        else:
            yield number, renamed


def as_source(value: Any, split: str, key: str | None = None) -> RowSource:
    """A source as given, or of what is in memory, or for a string: a local file or folder, otherwise a hub name.

    Args:
        value: source, also as a checkpoint holds it, path, hub name, list of dicts, or dataset of ``datasets``.
        split: which is taken of a folder or dataset that has several.
        key: what error messages call rows in memory, where that is not the split.

    Raises:
        InputError: something else, or the dataset has no such split.
    """
    if isinstance(value, RowSource):
        return value
    if said := not_saved(value, ""):
        raise InputError(f"data.{split}: {said[0][1].strip()}, where its options were: give the rows themselves")
    if isinstance(value, dict) and "class_path" in value:  # of a checkpoint
        try:
            return from_plain(value, RowSource)
        except (TypeError, ValueError) as error:
            raise InputError(f"data.{split}: {one_line(error)}") from error
    if not isinstance(value, (str, os.PathLike)):
        return _in_memory(value, key or f"data.{split}", split)
    path = os.fspath(value)
    if not path.strip():
        raise InputError(f"data.{split}: empty")
    folder = Path(path)
    if folder.is_dir() and ((folder / "dataset_dict.json").is_file() or names_splits(folder)):
        return LocalRows(path, split)
    if is_rows(folder) or folder.exists():
        return LocalRows(path)
    return HubRows(path, split=split)


def _in_memory(value: Any, name: str, split: str) -> RowSource:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    if isinstance(value, (DatasetDict, IterableDatasetDict)):
        if split not in value:
            raise InputError(f"{name}: no split {split!r} there, but {', '.join(map(repr, value))}: give one of them")
        value = value[split]
    if not isinstance(value, (list, tuple, Dataset, IterableDataset)):
        raise InputError(
            f"{name}: expected the path of a file or folder, the name of a dataset on the hub, a RowSource, a list of "
            f"dicts or a Dataset of datasets, got {kind_of(value)}"
        )
    return MemoryRows(value, name)
