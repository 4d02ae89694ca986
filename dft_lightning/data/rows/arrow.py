"""Rows of Arrow's tables as Python's values, without what Arrow adds to give all rows one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dft_lightning.data.rows.values import BrokenText, BrokenValue, check_columns, load_json
from dft_lightning.errors import InputError, one_line
from dft_lightning.foreign.datasets import comes_in_tables

if TYPE_CHECKING:
    import pyarrow

Restore = Callable[[Any], Any]
_MOST_ROWS, _MOST_BYTES = 1024, 1 << 24  # that are Python's objects at once
_OF_STREAMS = 16  # rows, whose size is not known


def read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a Parquet file, numbered from 1.

    Raises:
        InputError: it is none, or has two columns of one name.
    """
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            check_columns(path, file.schema_arrow.names)
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            size = min((_rows_at_once(group.num_rows, group.total_byte_size) for group in groups), default=1)
            yield from enumerate(rows_of_batches(file.iter_batches(batch_size=size)), start=1)
    except InputError:
        raise
    except Exception as error:  # Arrow's own, of many kinds
        raise InputError(f"{path}: cannot be read as Parquet: {one_line(error)}") from error


def read_dataset(dataset: Any, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a ``Dataset`` or ``IterableDataset``, numbered from 1, whatever format it hands its rows out in.

    Pictures and sounds are left as they are: a row may name a file or an address for one, which decoding opens.

    Raises:
        InputError: a stream breaks off, or a file is not whole.
    """
    number = 0
    try:
        for number, row in enumerate(_rows_of_dataset(dataset), start=1):
            yield number, row
    except Exception as error:
        raise InputError(f"{name}: cannot be read beyond row {number}: {one_line(error)}") from error


def _rows_of_dataset(dataset: Any) -> Iterator[dict[str, Any]]:
    from datasets import Dataset

    if not isinstance(dataset, Dataset) and comes_in_tables(dataset):
        yield from rows_of_batches(dataset.with_format("arrow").iter(batch_size=_OF_STREAMS))
    elif not isinstance(dataset, Dataset):
        yield from _rows_of_stream(dataset)
    elif dataset.format["type"] == "custom":  # a function of its owner's makes the rows
        yield from map(dict, dataset)
    else:
        size = _rows_at_once(len(dataset.data), dataset.data.nbytes)
        yield from rows_of_batches(dataset.with_format("arrow").iter(batch_size=size))


def _rows_of_stream(stream: Any) -> Iterator[dict[str, Any]]:
    """Of rows that are Python's already: with Arrow's nulls, but for those that a generator yields as they are."""
    types = {} if stream.features is None else {field.name: field.type for field in stream.features.arrow_schema}
    restores = {name: _restore(kind, parsed=True) for name, kind in types.items()}
    other = None if stream.info.builder_name == "generator" else _without_nulls
    # Iterated over plainly, it would leave out rows in a data loader's worker: other workers'.
    for row in stream.with_format(None).iter(batch_size=1):
        values = {name: found[0] for name, found in row.items()}
        yield {name: _restored(value, restores.get(name, other)) for name, value in values.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _rows_at_once(rows: int, size: int) -> int:
    return max(1, min(_MOST_ROWS, _MOST_BYTES * rows // max(size, 1)))


def rows_of_batches(batches: Iterable[pyarrow.RecordBatch | pyarrow.Table]) -> Iterator[dict[str, Any]]:
    """Rows as dicts of columns.

    A struct has every key that one of the rows has, and null where a row has none: such keys are left out, at every
    depth. Values of the type ``arrow.json``, as which ``datasets`` keeps columns of mixed types, are what their text
    says, with the nulls that stand there. A value that Python has none for is a :class:`BrokenValue`.
    """
    restores: dict[pyarrow.DataType, Restore | None] = {}
    for batch in batches:
        columns = []
        for field, column in zip(batch.schema, batch.columns, strict=True):
            if field.type not in restores:
                restores[field.type] = _restore(field.type)
            columns.append(_values(column, restores[field.type]))
        names = batch.schema.names
        if not columns:
            yield from ({} for _ in range(batch.num_rows))
        for values in zip(*columns, strict=True):
            yield dict(zip(names, values, strict=True))


def _values(column: Any, restore: Restore | None) -> list[Any]:
    values: list[Any]
    try:
        values = column.to_pylist()
    except Exception:  # a date beyond 9999, a string that is not UTF-8
        values = [_value(scalar) for scalar in column]
    if restore is None:
        return values
    return [_restored(value, restore) for value in values]


def _restored(value: Any, restore: Restore | None) -> Any:
    return value if value is None or restore is None or isinstance(value, BrokenValue) else restore(value)


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except Exception as error:
        return BrokenValue(one_line(error))


def _restore(kind: pyarrow.DataType, parsed: bool = False) -> Restore | None:
    """What makes of a value, none of them null, what it was; ``None`` where it is that already.

    Args:
        kind: of the value.
        parsed: JSON is no text any more.
    """
    from pyarrow import types

    if getattr(kind, "extension_name", None) == "arrow.json":
        return None if parsed else _parsed
    if types.is_dictionary(kind):
        return _restore(kind.value_type, parsed)
    if types.is_struct(kind):
        inner = {field.name: _restore(field.type, parsed) for field in kind}
        return lambda value: {
            key: item if (restore := inner[key]) is None else restore(item)
            for key, item in value.items()
            if item is not None
        }
    if types.is_map(kind) and types.is_string(kind.key_type):
        item = _each(_restore(kind.item_type, parsed))
        return lambda pairs: dict(zip((key for key, _ in pairs), item([value for _, value in pairs]), strict=True))
    if types.is_nested(kind) and hasattr(kind, "value_type"):  # a list of one of many kinds
        restore = _restore(kind.value_type, parsed)
        return None if restore is None else _each(restore)
    return None


def _each(restore: Restore | None) -> Restore:
    if restore is None:
        return lambda values: values
    return lambda values: [None if value is None else restore(value) for value in values]


def _parsed(text: str) -> Any:
    try:
        return load_json(text)
    except BrokenText as error:
        return BrokenValue(str(error))
