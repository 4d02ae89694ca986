"""Run by test_checkpoints, on two processes.

usage: checkpoint_runs.py FOLDER DISK    (DISK is a small file system, empty; each run leaves what it met in FOLDER)
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from dft_lightning import CausalLMModule
from dft_lightning.checkpoints import keep_whole
from dft_lightning.errors import InputError
from small_runs import TINY_ARITHMETIC, FSDP1OnCPU, arithmetic_data, trainer, whole

RESUMED = ("ddp", "fsdp2 shards")
WIDE = {**TINY_ARITHMETIC, "n_embd": 64}


class FillsTheDisk(Callback):
    """Leaves almost no room from a step on."""

    def __init__(self, disk: Path, step: int) -> None:
        self.disk, self.step = disk, step

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and trainer.is_global_zero:
            free = os.statvfs(self.disk).f_bavail * os.statvfs(self.disk).f_frsize
            (self.disk / "ballast").write_bytes(bytes(max(free - 200_000, 0)))
        trainer.strategy.barrier()


def strategies() -> dict[str, Any]:
    return {
        "ddp": "ddp",
        "fsdp2 whole": ModelParallelStrategy(2, 1, save_distributed_checkpoint=False),
        "fsdp2 shards": ModelParallelStrategy(2, 1),
        "fsdp1 shards": FSDP1OnCPU(state_dict_type="sharded"),
    }


def fit(strategy: Any, folder: Path, ckpt_path: Any = None, extra: Any = (), steps: int = 3) -> tuple[Any, Any]:
    """The trainer, and the message that a fit with a checkpoint each step ends in."""
    kept = ModelCheckpoint(folder, "{step}", save_top_k=1, every_n_train_steps=1)
    options = {"devices": 2, "max_steps": steps, "max_epochs": 9, "enable_checkpointing": True}
    run = trainer(strategy=strategy, callbacks=[*extra, kept], **options)
    keep_whole(run)
    module = CausalLMModule(WIDE, optimizer={"lr": 0.01})
    try:
        run.fit(module, datamodule=arithmetic_data(8, batch_size=2), ckpt_path=ckpt_path)
    except InputError as error:
        return run, str(error)
    return run, None


def total(run: Any) -> float:
    return sum(float(whole(p).double().abs().sum()) for p in run.lightning_module.parameters())


def full_disk(name: str, disk: Path) -> dict[str, Any]:
    """The third save of a run meets a full disk; the second's checkpoint goes on when there is room."""
    folder = disk / name.replace(" ", "-")
    run, message = fit(strategies()[name], folder, extra=[FillsTheDisk(disk, 2)])
    rank = run.global_rank
    run.strategy.barrier()  # rank 0 has taken away what was written
    found = {"message": message, "step": run.global_step, "best": run.checkpoint_callback.best_model_path}
    found["files"] = sorted(path.name for path in folder.iterdir())
    run.strategy.barrier()
    if rank == 0:
        (disk / "ballast").unlink(missing_ok=True)
    run.strategy.barrier()
    if name in RESUMED:
        again, problem = fit(strategies()[name], folder, ckpt_path=found["best"])
        found |= {"resumed": again.global_step, "problem": problem, "sums": [total(run), total(again)]}
    run.strategy.barrier()
    if rank == 0:
        shutil.rmtree(folder)
    run.strategy.barrier()
    return found


def alone_in_trouble(run: Any, path: Path) -> dict[str, str | None]:
    """What only one rank meets, both are told of."""
    found = {}
    for name, error in (("io", OSError(5, "Input/output error")), ("fault", TypeError("a fault"))):

        def stumble(error: Exception = error) -> None:
            if run.global_rank == 1:
                raise error

        try:
            run.strategy._together(stumble, path)
        except Exception as caught:
            found[name] = f"{type(caught).__name__}: {caught}"
    return found


def main(folder: Path, disk: Path) -> None:
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    found: dict[str, Any] = {name: full_disk(name, disk) for name in strategies()}
    run, message = fit("ddp", folder / "read_only" / "below", steps=1)
    found["read-only"] = message
    found["alone"] = alone_in_trouble(run, disk / "x.ckpt")
    run.strategy.resumes_from = str(rank)  # as two machines without a common folder
    try:
        run.strategy.setup_environment()
    except InputError as error:
        found["differ"] = str(error)
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
