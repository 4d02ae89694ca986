"""What is measured of the model that runs begin with, once for all of them: generating answers is what takes time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from dft_lightning.compare.files import read_json, write_json
from dft_lightning.compare.hashes import hash_texts
from dft_lightning.distributed.strategies import on_first_rank


def measured_once(trainer: pl.Trainer, folder: Path, decided_by: Any, measure: Callable[[], list[int]]) -> list[int]:
    """What a file holds, which another run has written; without one what is measured, which is written there.

    A collective. Runs at once may each measure it.

    Args:
        trainer: tells the ranks.
        folder: of such files.
        decided_by: all that the result depends on, for JSON.
        measure: a collective.

    Raises:
        InputError: the file is broken, or none can be written.
    """
    path = folder / f"{hash_texts([json.dumps(decided_by, sort_keys=True)])[:32]}.json"
    known: list[Any] = [None]
    on_first_rank(trainer, lambda: known.append(read_json(path)))
    found: list[int] | None = trainer.strategy.broadcast(known)[-1]
    if found is None:
        found = measure()
        on_first_rank(trainer, lambda: write_json(path, found), f"{path}: ")
    return found
