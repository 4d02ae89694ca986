"""Run by test_resume on two processes.

usage: two_resume.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from resumed_runs import FIXED_BATCH, WITHOUT_DROPOUT, SaveAt, fit, goes_on_alike, result

OPTIONS = {"devices": 2, "max_steps": 6, "accumulate_grad_batches": 2, "val_check_interval": 3}
OPTIONS |= {"check_val_every_n_epoch": None}
PLANS = {
    "ddp": ({"num_rows": 28}, "on_train_batch_end", (3, 7)),  # in the middle of a step, and at the epoch's end
    "shards": ({"packing": "bfd", "max_length": 64, "num_rows": 60}, "on_train_batch_end", (5,)),
    "one file": ({"streaming": {}, "shuffle_buffer_size": 5}, "on_validation_batch_end", (2,)),
}


def strategy(name: str) -> Any:
    return "ddp" if name == "ddp" else ModelParallelStrategy(2, 1, save_distributed_checkpoint=name == "shards")


def on_as_many(folder: Path) -> None:
    for name, (data, hook, numbers) in PLANS.items():
        whole, logged = fit(data, {**OPTIONS, "strategy": strategy(name)}, SaveAt(folder / name, hook))
        expected = result(whole)
        for number in numbers:
            path = folder / name / f"{hook}-{number}.ckpt"
            goes_on_alike(path, data, {**OPTIONS, "strategy": strategy(name)}, expected, logged)


def on_more(folder: Path) -> None:
    """From what one process left, and for one to go on from."""
    for name in ("ddp", "shards"):
        options = {"devices": 2, "max_steps": 6, "strategy": strategy(name)}
        saver = SaveAt(folder / name, "on_train_batch_end")
        _, whole = fit(FIXED_BATCH, options, saver, model=WITHOUT_DROPOUT)
        found = {"whole": whole}
        if name == "ddp":
            path = folder / "one" / "on_train_batch_end-5.ckpt"  # of 2 micro-batches each: step 2
            _, found["resumed"] = fit(
                FIXED_BATCH, {**options, "strategy": "ddp"}, ckpt_path=path, model=WITHOUT_DROPOUT
            )
        if torch.distributed.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")


if __name__ == "__main__":
    on_as_many(Path(sys.argv[1]) / "as many")
    on_more(Path(sys.argv[1]) / "more")
