"""What is measured of the model that runs begin with, once for all of a call: generating answers is what takes time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from dft_lightning.compare.files import read_json, write_json
from dft_lightning.compare.hashes import hash_texts
from dft_lightning.distributed.strategies import on_first_rank

STARTS = "DFT_LIGHTNING_STARTS"  # a folder; set by compare for its runs, which have one config and one code


def measured_once(trainer: pl.Trainer, decided_by: Any, measure: Callable[[], list[int]]) -> list[int]:
    """What another run of the same call of ``compare`` has measured, or what is measured now and kept for others.

    A collective. Runs at once may each measure it; a run that is started by hand does.

    Args:
        trainer: tells the ranks.
        decided_by: what the result depends on beside the code and the config that all runs of a call share, for JSON.
        measure: a collective.

    Raises:
        InputError: what was kept is broken, or cannot be kept.
    """
    if STARTS not in os.environ:
        return measure()
    path = Path(os.environ[STARTS]) / f"{hash_texts([json.dumps(decided_by, sort_keys=True)])[:32]}.json"
    known = list[Any]()
    on_first_rank(trainer, lambda: known.append(read_json(path)))
    found: list[int] | None = trainer.strategy.broadcast(known)[0]
    if found is None:
        found = measure()
        on_first_rank(trainer, lambda: write_json(path, found), f"{path}: ")
    return found
