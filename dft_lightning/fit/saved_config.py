"""The config that a run leaves beside what it logs."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback


class RunConfig(SaveConfigCallback):
    """``config.yaml`` in the run's folder. That of an earlier run is kept.

    Without a logger all runs have one folder: there a run that goes on from a checkpoint writes ``config-2.yaml`` and
    so on, and one that begins is refused, as its checkpoints would mix with the others'.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not self.already_saved and self.config.get("ckpt_path") is not None:
            folder = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir is a collective
            self.config_filename = trainer.strategy.broadcast(_free_name(folder, self.config_filename))
        super().setup(trainer, pl_module, stage)


def _free_name(folder: Path, name: str) -> str:
    if not (folder / name).exists():
        return name
    stem, _, ending = name.rpartition(".")
    return next(f"{stem}-{i}.{ending}" for i in count(2) if not (folder / f"{stem}-{i}.{ending}").exists())
