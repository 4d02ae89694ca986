"""Rows with reference log-probs, for the losses of a comparison that read them: made once, from its own config."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dft_lightning.compare.files import CONFIG
from dft_lightning.compare.grid import Run
from dft_lightning.compare.recorder import RunIdentity

SCORED, _ROWS, _RECORD = "scored", "rows", "score.json"
_SPLITS = ("train", "validation", "forgetting", "test")


@dataclass(frozen=True)
class ScoringRun(Run):
    """The command ``score`` over the comparison's rows, by the model that every run begins with."""

    def commands(self) -> dict[str, list[str]]:
        """What is left to do: nothing, where the rows are there."""
        rows = self.folder / _ROWS
        if (rows / _RECORD).is_file():
            return {}
        return {"score": ["score", "--config", str(self.folder / CONFIG), "--output", str(rows)]}


def scoring_run(fit_config: dict[str, Any], output: Path) -> ScoringRun:
    """Of a comparison's config, in its folder."""
    folder, config = output / SCORED, copy.deepcopy(fit_config)
    config["trainer"] |= {"default_root_dir": str(folder), "callbacks": None, "logger": None}
    return ScoringRun(RunIdentity(SCORED), folder, config)


def with_scored_rows(fit_config: dict[str, Any], output: Path) -> dict[str, Any]:
    """The config with the scored rows in the place of its own."""
    config, rows = copy.deepcopy(fit_config), output / SCORED / _ROWS
    for split in _SPLITS:
        if (rows / split).is_dir():
            config["data"][split] = str(rows / split)
    if (rows / "validation").is_dir():
        config["data"]["validation_fraction"] = 0.0
    return config
