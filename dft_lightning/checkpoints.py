"""Which checkpoint ``--ckpt_path`` means."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dft_lightning.errors import InputError, one_line


def resolve_checkpoint(ckpt_path: str | Path | None, trainer: pl.Trainer) -> str | None:
    """The checkpoint to load.

    Args:
        ckpt_path: a path; ``"last"``, the newest checkpoint of earlier runs with the same root folder; ``"auto"``,
            the same if there is one; ``"hpc"`` and ``"registry"``, which are left to Lightning.
        trainer: tells where checkpoints are kept.

    Raises:
        InputError: the path does not exist or holds no whole checkpoint, there is no ``last``, or it is ``"best"``.
    """
    if ckpt_path is None or str(ckpt_path) in ("hpc", "registry"):
        return None if ckpt_path is None else str(ckpt_path)
    if str(ckpt_path) == "best":
        raise InputError("--ckpt_path best: a new process has not seen which was best; give the checkpoint's path")
    if str(ckpt_path) not in ("last", "auto"):
        if not Path(ckpt_path).exists():
            raise InputError(f"--ckpt_path: no such checkpoint: {ckpt_path}")
        return _readable(Path(ckpt_path))
    folders = checkpoint_folders(trainer)
    found = [path for folder in folders for path in folder.glob("*.ckpt")]
    for cut in [path for path in found if path.is_dir() and not _is_whole(path)]:
        rank_zero_warn(f"{cut} is passed over: its run ended while it was being saved")
        found.remove(cut)
    if found:
        newest = max(found, key=lambda path: path.stat().st_mtime_ns)
        rank_zero_info(f"ckpt_path {ckpt_path}: {newest}")
        return _readable(newest)
    roots = ", ".join(str(folder) for folder in _roots(trainer))
    if str(ckpt_path) == "last":
        raise InputError(f"--ckpt_path last: no checkpoint under {roots}; leave it out to start from the beginning")
    rank_zero_info(f"ckpt_path auto: no checkpoint under {roots}, starting from the beginning")
    return None


def _readable(path: Path) -> str:
    """The path, if it holds a Lightning checkpoint; tensors are mapped and not read."""
    if path.is_dir():
        if not any(path.iterdir()):
            raise InputError(f"--ckpt_path: {path} is an empty folder")
        return str(path)
    try:
        content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:  # a cut file raises whatever the unpickler stumbled on
        raise InputError(f"--ckpt_path: {path} is cut short or no checkpoint: {one_line(error, 200)}") from error
    if not isinstance(content, dict) or not {"state_dict", "pytorch-lightning_version"} <= set(content):
        raise InputError(f"--ckpt_path: {path} is not a Lightning checkpoint")
    return str(path)


def _is_whole(folder: Path) -> bool:
    """Whether a folder of shards has what is written last, by torch and by Lightning."""
    return (folder / ".metadata").exists() and (folder / "meta.pt").exists()


def _roots(trainer: pl.Trainer) -> list[Path]:
    """Where ``ModelCheckpoint`` puts runs: its own folder, or below each logger's, or below the trainer's."""
    own = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    if own:
        return [Path(folder) for folder in own]
    logged = [Path(logger.save_dir) / str(logger.name) for logger in trainer.loggers if logger.save_dir]
    return list(dict.fromkeys(logged)) or [Path(trainer.default_root_dir)]


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
