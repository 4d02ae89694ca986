"""Which checkpoint ``--ckpt_path`` means."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dft_lightning.checkpoints.strategy import SavesWhole
from dft_lightning.checkpoints.whole import checkpoints_below, newest_whole, put_back, whole_problem
from dft_lightning.errors import InputError


def resolve_checkpoint(ckpt_path: str | Path | None, trainer: pl.Trainer) -> str | None:
    """The checkpoint to load.

    Every process asks the file system the same before the first of them writes; where they share none and find
    different checkpoints, ``fit`` says so on each (see :class:`~dft_lightning.checkpoints.SavesWhole`).

    Args:
        ckpt_path: a checkpoint, or a folder of which the newest whole one below it is taken; ``"last"``, the newest
            whole checkpoint of earlier runs with the same root folder; ``"auto"``, the same if there is one; ``"hpc"``
            and ``"registry"``, which are left to Lightning.
        trainer: tells where checkpoints are kept.

    Raises:
        InputError: the path does not exist or holds no whole checkpoint, there is no ``last``, or it is ``"best"``; it
            is in shards and the strategy has none.
    """
    if ckpt_path is None or str(ckpt_path) in ("hpc", "registry"):
        return None if ckpt_path is None else str(ckpt_path)
    if str(ckpt_path) == "best":
        raise InputError("--ckpt_path best: a new process has not seen which was best; give the checkpoint's path")
    named = str(ckpt_path) not in ("last", "auto")
    found = _named(Path(ckpt_path)) if named else _newest(str(ckpt_path), trainer)
    if found is not None and Path(found).is_dir() and isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise InputError(
            f"--ckpt_path: {found} is a checkpoint in shards, which {type(trainer.strategy).__name__} does not read: "
            "set trainer.strategy to the run's own, ModelParallelStrategy or FSDPStrategy; the former may have another "
            "number of devices, one included"
        )
    if isinstance(trainer.strategy, SavesWhole):
        trainer.strategy.resumes_from = found
    return found


def _named(path: Path) -> str:
    put_back(path.absolute().parent)
    if not path.exists():
        raise InputError(f"--ckpt_path: no such checkpoint: {path}")
    if path.is_dir() and path.suffix != ".ckpt" and (below := checkpoints_below(path)):
        found, problems = _newest_of(below, str(path))
        if found is None:
            cut, reason = next(iter(problems.items()))
            raise InputError(f"--ckpt_path: no checkpoint in {path} is whole: {cut} {reason}")
        return found
    if (problem := whole_problem(path)) is not None:
        beside, _ = newest_whole(other for other in path.parent.glob("*.ckpt") if other != path)
        advice = "" if beside is None else f"; the newest whole one beside it is {beside}"
        raise InputError(f"--ckpt_path: {path} {problem}{advice}")
    return str(path)


def _newest_of(checkpoints: Iterable[Path], ckpt_path: str) -> tuple[str | None, dict[Path, str]]:
    """The newest whole one, which is said, and what is wrong with later ones, which are passed over with a warning."""
    newest, problems = newest_whole(checkpoints)
    for path, problem in problems.items():
        rank_zero_warn(f"--ckpt_path {ckpt_path}: passed over {path}, which {problem}")
    if newest is None:
        return None, problems
    rank_zero_info(f"ckpt_path {ckpt_path}: {newest}")
    return str(newest), problems


def _newest(ckpt_path: str, trainer: pl.Trainer) -> str | None:
    folders = checkpoint_folders(trainer)
    for folder in folders:
        put_back(folder)
    newest, problems = _newest_of((path for folder in folders for path in folder.glob("*.ckpt")), ckpt_path)
    if newest is not None:
        return newest
    roots = ", ".join(str(folder) for folder in _roots(trainer))
    none = f"no {'whole ' if problems else ''}checkpoint under {roots}"
    if ckpt_path == "last":
        raise InputError(f"--ckpt_path last: {none}; leave it out to start from the beginning")
    rank_zero_info(f"ckpt_path auto: {none}, starting from the beginning")
    return None


def _roots(trainer: pl.Trainer) -> list[Path]:
    """Where checkpoints are put: folders of ``ModelCheckpoint``'s own, or that which has the folder of each run."""
    own = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    run_folder: str | None = getattr(trainer, "run_folder", None)  # of the command's trainer
    root = Path(run_folder).parent if run_folder else Path(trainer.default_root_dir)
    return [Path(folder) for folder in own] or [root]


def checkpoint_folders(trainer: pl.Trainer) -> list[Path]:
    """Every folder that may hold a checkpoint of this or an earlier run."""
    folders: list[Path] = []
    for root in _roots(trainer):
        folders += [root, root / "checkpoints", *root.glob("*/checkpoints")]
    return [folder for folder in folders if folder.is_dir()]


def newest_saved(trainer: pl.Trainer) -> str | None:
    """The checkpoint that this run saved last, by what its ``ModelCheckpoint`` callbacks know; ``None`` for none."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    named = {path for callback in callbacks for path in (callback.last_model_path, callback.best_model_path)}
    found = [Path(path) for path in named if path and Path(path).exists()]
    return str(max(found, key=lambda path: path.stat().st_mtime_ns)) if found else None
