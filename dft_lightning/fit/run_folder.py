"""The command's trainer, and the folder of its run: config, checkpoints and predictions in one place."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import strategies
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from dft_lightning.callbacks import PredictionWriter
from dft_lightning.errors import InputError
from dft_lightning.foreign.lightning import shard_over_all

_RUNS = "lightning_logs"


def default_loggers(root: str | Path | None) -> list[Logger]:
    """TensorBoard and CSV in the same numbered folder, ``ROOT/lightning_logs/version_N``."""
    folder = str(root or Path.cwd())
    board = TensorBoardLogger(folder, name=_RUNS, default_hp_metric=False)
    return [board, CSVLogger(folder, name=_RUNS, version=board.version)]


class RunTrainer(pl.Trainer):
    """Lightning's trainer with a folder of the run, which its ``log_dir`` is, whatever its loggers are.
    ``ModelParallelStrategy`` splits no tensors unless it is told to.

    The folder is that of the first TensorBoard or CSV logger. Without one it is numbered as theirs are,
    ``ROOT/lightning_logs/version_N``: Lightning's own ``log_dir`` would be the same for all runs there.

    Attributes:
        run_folder: a path or an address, as this process sees it; ``log_dir`` is that of the first.
    """

    run_folder: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.strategy, ModelParallelStrategy):
            shard_over_all(self.strategy)
        self.run_folder = _folder_of(self.loggers, self.default_root_dir)

    @property
    def log_dir(self) -> str | None:
        if self.fast_dev_run:  # type: ignore[attr-defined]
            return super().log_dir
        return str(self.strategy.broadcast(self.run_folder))

    def begin_in_folder(self, goes_on: bool) -> None:
        """Before loggers open their files: have every ``ModelCheckpoint`` that has no folder of its own write to the
        run's, and nothing of an earlier run there be lost.

        Raises:
            InputError: an earlier run has the folder, and this one does not go on from a checkpoint.
        """
        config = Path(self.run_folder) / "config.yaml"
        if config.exists() and not goes_on and not self.fast_dev_run:  # type: ignore[attr-defined]
            raise InputError(
                f"{config} is of an earlier run, and is kept: leave the logger's version out, so that each run has a "
                "folder of its own"
            )
        if goes_on and not self.fast_dev_run:  # type: ignore[attr-defined]
            logged = [Path(logger.log_dir) for logger in self.loggers if isinstance(logger, CSVLogger)]
            kept = [config.parent / name for name in PredictionWriter.NAMES.values()]
            for path in (*kept, *(folder / ExperimentWriter.NAME_METRICS_FILE for folder in logged)):
                _set_aside(path)
        for callback in self.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = os.path.join(self.run_folder, "checkpoints")  # an address, too


def _folder_of(loggers: Iterable[Logger], root: str) -> str:
    kept = [logger.log_dir for logger in loggers if isinstance(logger, (TensorBoardLogger, CSVLogger))]
    return str(kept[0] if kept else CSVLogger(root, name=_RUNS).log_dir)


def named_strategy(given: Any) -> Any:
    """A strategy's class by its name, made; Lightning takes no name of a class where it takes short ones such as
    ``ddp``."""
    name = given.removeprefix(f"{strategies.__name__}.") if isinstance(given, str) else ""
    found = getattr(strategies, name, None) if name.endswith("Strategy") else None
    return given if found is None else found()


@rank_zero_only
def _set_aside(path: Path) -> None:
    """Give an earlier run's file, which would be deleted or replaced, a name of its own."""
    if path.exists():
        path.rename(path.parent / _free_name(path.parent, path.name))


class RunConfig(SaveConfigCallback):
    """``config.yaml`` in the run's folder; ``config-2.yaml`` and so on where a logger's options have several runs in
    one folder."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.already_saved:
            return
        folder = trainer.log_dir or "."  # a collective
        if self.config.get("ckpt_path") is not None:
            self.config_filename = trainer.strategy.broadcast(_free_name(Path(folder), self.config_filename))
        super().setup(trainer, pl_module, stage)
        rank_zero_info(f"this run's folder: {folder}")


def _free_name(folder: Path, name: str) -> str:
    if not (folder / name).exists():
        return name
    stem, _, ending = name.rpartition(".")
    return next(f"{stem}-{i}.{ending}" for i in count(2) if not (folder / f"{stem}-{i}.{ending}").exists())
