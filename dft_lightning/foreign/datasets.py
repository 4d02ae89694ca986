"""datasets, where what it knows of a dataset has no public name."""

from __future__ import annotations

from typing import Any


def fingerprint_of(value: Any) -> str | None:
    """What datasets knows a dataset's content by, without reading it; ``None`` of a stream and of anything else."""
    from datasets import Dataset

    return str(value._fingerprint) if isinstance(value, Dataset) else None


def comes_in_tables(stream: Any) -> bool:
    """Whether the rows of an ``IterableDataset`` come in Arrow's tables, though it may not say their types."""
    return stream._ex_iterable.iter_arrow is not None
