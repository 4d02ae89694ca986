"""datasets, where what it knows of a dataset has no public name."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where all that is kept of rows is: in the cache of ``datasets``, which ``HF_DATASETS_CACHE`` moves."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "dft_lightning"


def fingerprint_of(value: Any) -> str | None:
    """What datasets knows a dataset's content by, without reading it; ``None`` of a stream and of anything else."""
    from datasets import Dataset

    return str(value._fingerprint) if isinstance(value, Dataset) else None


def comes_in_tables(stream: Any) -> bool:
    """Whether the rows of an ``IterableDataset`` come in Arrow's tables, though it may not say their types."""
    return stream._ex_iterable.iter_arrow is not None
