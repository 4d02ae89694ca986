"""Where rows come from. A source yields numbered rows and knows nothing of what is in them."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from dft_lightning.component import Component
from dft_lightning.data.files import READERS, BrokenRow, read_file
from dft_lightning.errors import InputError, one_line

Row = dict[str, Any] | BrokenRow


class RowSource(Component):
    """Yields rows as dicts of columns. Subclass and write :meth:`rows` for data of one's own."""

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
        raise NotImplementedError(f"{type(self).__name__} must define rows(self)")

    def rows_of_parts(self) -> Iterator[tuple[int, int | str, Row]]:
        """As :meth:`rows`, each with the index in :attr:`parts` before it; 0 where there are none."""
        return ((0, number, row) for number, row in self.rows())


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


class LocalRows(RowSource):
    """Rows of a local file or folder.

    A file is ``.jsonl`` (one object a line), ``.json`` (a list of objects), ``.csv`` (the first line names the columns,
    values stay text) or ``.parquet``; text is UTF-8. A folder is one of ``datasets``' ``save_to_disk``, or has such
    files in it, which are read in the order of their names, other files left aside.

    Args:
        path: the file or folder.
        split: of a ``save_to_disk`` folder that has several; others have none.
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

    def _rows(self) -> Iterator[tuple[int | str, Row]]:
        if any((self.path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            yield from _rows_of(self._saved_dataset(), self.name)
        elif self.path.is_dir():
            files = sorted(file for file in self.path.iterdir() if file.suffix in READERS)
            if not files:
                raise InputError(f"{self.path}: a folder without a {', '.join(READERS)} file")
            for file in files:
                yield from ((f"{file.name}:{number}", row) for number, row in read_file(file))
        else:
            yield from read_file(self.path)

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
        return _undecoded(found)


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

    def rows(self) -> Iterator[tuple[int | str, Row]]:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        if self.num_rows is not None and self.streaming:
            raise InputError(
                f"{self.name}: rows cannot be drawn at random from a stream: leave num_rows or streaming out"
            )
        try:
            dataset = load_dataset(
                self.path, self.config_name, split=self.split, revision=self.revision, streaming=self.streaming
            )
        except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
            reason = one_line(error)
            raise InputError(f"{self.name}: neither a local file nor a dataset that can be loaded: {reason}") from error
        if self.num_rows is not None:
            if self.num_rows > len(dataset):
                raise InputError(f"{self.name}: there are {len(dataset)}")
            dataset = dataset.shuffle(seed=self.seed).select(range(self.num_rows))
        dataset = _undecoded(dataset)
        if self.streaming:  # iterated over plainly, it would leave out rows in a data loader's worker: other workers'
            dataset = ({name: values[0] for name, values in row.items()} for row in dataset.iter(batch_size=1))
        yield from _renamed(_rows_of(dataset, self.name), self.rename_columns)


def _undecoded(dataset: Any) -> Any:
    """One of ``datasets`` whose pictures and sounds are left as they are: a row may name a file or an address for one,
    which decoding opens."""
    if dataset.features is None:  # a stream of rows that do not say what they have: none are decoded
        return dataset
    if hasattr(dataset, "decode"):  # a stream
        return dataset.decode(False)
    for name, feature in dataset.features.items():
        feature = copy.deepcopy(feature)
        if _turn_decoding_off(feature):
            dataset = dataset.cast_column(name, feature)
    return dataset


def _turn_decoding_off(feature: Any) -> bool:
    """In place; whether there was any."""
    inner = feature.values() if isinstance(feature, dict) else feature if isinstance(feature, list) else []
    found = [_turn_decoding_off(each) for each in [*inner, *([feature.feature] if hasattr(feature, "feature") else [])]]
    own = getattr(feature, "decode", None) is True
    if own:
        feature.decode = False
    return own or any(found)


def _rows_of(dataset: Any, name: str) -> Iterator[tuple[int | str, Row]]:
    """Numbered rows of one of ``datasets``."""
    number = 0
    try:
        for number, row in enumerate(dataset, start=1):
            yield number, dict(row)
    except Exception as error:  # a stream that breaks off, or whatever Python's types cannot hold
        raise InputError(f"{name}: cannot be read beyond row {number}: {one_line(error)}") from error


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


def as_source(value: RowSource | str | os.PathLike[str], split: str) -> RowSource:
    """A source as given, or for a string: a local file or folder, otherwise a hub name.

    Args:
        value: source, path or hub name.
        split: the split of a hub dataset or of a saved one that has several.
    """
    if isinstance(value, RowSource):
        return value
    path = os.fspath(value)
    if not path.strip():
        raise InputError(f"data.{split}: empty")
    if Path(path, "dataset_dict.json").is_file():
        return LocalRows(path, split)
    if path.endswith(tuple(READERS)) or Path(path).exists():
        return LocalRows(path)
    return HubRows(path, split=split)
