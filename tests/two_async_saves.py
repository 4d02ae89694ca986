"""Run by test_async_saves on two processes: checkpoints in shards that are written while training goes on.

usage: two_async_saves.py FOLDER    (leaves out.pt there)
"""

from __future__ import annotations

import errno
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint import FileSystemWriter

from dft_lightning import CausalLMModule, DFTLoss
from dft_lightning.checkpoints import keep_whole, whole_problem
from dft_lightning.distributed import gather_lists
from dft_lightning.errors import InputError
from small_runs import TINY_ARITHMETIC, arithmetic_data, strategy_of, trainer

WRITE = FileSystemWriter.write_data


class Steps(pl.Callback):
    """When each step ended, and how far the checkpoint of the step before was."""

    def __init__(self, events: list[Any], folder: Path) -> None:
        self.events, self.folder = events, folder

    def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
        done = sorted(path.name for path in self.folder.glob("*.ckpt") if whole_problem(path) is None)
        self.events.append(("step", trainer.global_step + 1, done))


class Own(pl.Callback):
    """Saves by itself, and at once reads what it saved; also when all is over."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str | None] = []

    def _save(self, trainer: Any, name: str) -> None:
        trainer.save_checkpoint(self.folder / name)
        self.problems.append(whole_problem(self.folder / name))

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self._save(trainer, "own.ckpt")

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        self._save(trainer, "end.ckpt")


def run(
    folder: Path,
    meanwhile: bool,
    *,
    keep: int = -1,
    write: Any = None,
    steps: int = 3,
    more: tuple[pl.Callback, ...] = (),
) -> Any:
    """What happened, and the ``ModelCheckpoint``."""
    events: list[Any] = []
    pl.seed_everything(0)
    module = CausalLMModule(
        TINY_ARITHMETIC,
        loss=DFTLoss(),
        optimizer={"lr": 0.01},
        schedule={"decay": "constant"},
        sharding={"async_save": meanwhile},
    )
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=keep, monitor="step", mode="max")
    options = {"devices": 2, "strategy": strategy_of("fsdp2"), "enable_checkpointing": True}
    fit = trainer(max_steps=steps, max_epochs=steps, callbacks=[saver, Steps(events, folder), *more], **options)
    keep_whole(fit)

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        events.append(("write begins", sorted(path.name for path in folder.glob("*.ckpt"))))
        time.sleep(0.5 if meanwhile else 0)
        if write is not None:
            write(len([each for each in events if each[0] == "write begins"]))
        found = WRITE(self, *args, **kwargs)
        events.append(("write ends",))
        return found

    problem = None
    with patch.object(FileSystemWriter, "write_data", slow):
        try:
            fit.fit(module, datamodule=arithmetic_data(4 * steps, batch_size=2, shuffle=False))
        except InputError as error:
            problem = str(error)
    names = sorted(path.name for path in folder.iterdir())
    return {"events": events, "problem": problem, "names": names, "last": saver.best_model_path}


def second_of_rank_1_fails(number: int) -> None:
    if number == 2 and torch.distributed.get_rank() == 1:
        raise OSError(errno.ENOSPC, "No space left on device")


def full(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
    if str(file).endswith("meta.pt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    SAVE(value, file, *args, **kwargs)


SAVE = torch.save


def main(folder: Path) -> None:
    found = {
        "plain": run(folder / "plain", False),
        "meanwhile": run(folder / "meanwhile", True),
        "one": run(folder / "one", True, keep=1),
        "failing": run(folder / "failing", True, keep=1, write=second_of_rank_1_fails, steps=4),
    }
    own = Own(folder / "own")
    run(folder / "own", True, keep=1, steps=2, more=(own,))
    found["own"] = own.problems
    with patch("torch.save", full):
        found["meta"] = run(folder / "meta", True)
    until = time.monotonic() + 10  # what had begun ends by itself, and is taken away then
    while list((folder / "meta").iterdir()) and time.monotonic() < until:
        time.sleep(0.05)
    found["meta"]["names"] = [path.name for path in (folder / "meta").iterdir()]
    several = (ModelCheckpoint(folder / "several", "other-{step}", every_n_epochs=1),)
    (folder / "several").mkdir(exist_ok=True)
    found["several"] = run(folder / "several", True, more=several)
    found["failing ranks"] = gather_lists([found["failing"]["problem"]], 2)
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "out.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
