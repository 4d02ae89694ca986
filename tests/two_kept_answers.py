"""Run by test_kept_answers on two processes: predictions that are stopped, and go on.

usage: two_kept_answers.py FOLDER STRATEGY...    (leaves STRATEGY.jsonl and STRATEGY.json, of how often each rank asked)
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch

from dft_lightning.distributed import gather_lists
from small_runs import strategy_of, trainer
from test_kept_answers import Stopping, Stops, predicted


def run(name: str, folder: Path) -> None:
    path = folder / f"{name}.jsonl"
    Stopping.asked, Stopping.after = [], 1
    with contextlib.suppress(Stops):
        predicted(path, devices=2, strategy=strategy_of(name))
    Stopping.asked, Stopping.after = [], None
    running, kept = trainer(devices=2, strategy=strategy_of(name)), []
    if running.is_global_zero:
        (part,) = folder.glob(f"{name}.jsonl.*.partial")
        kept = part.read_text().splitlines()[:-1]
        part.write_text("".join(f"{line}\n" for line in kept))
    torch.distributed.barrier()
    predicted(path, running)
    asked = gather_lists([sorted(Stopping.asked)], 2)
    if running.is_global_zero:
        (folder / f"{name}.json").write_text(json.dumps({"kept": kept, "asked": asked}))


if __name__ == "__main__":
    for strategy in sys.argv[2:]:
        run(strategy, Path(sys.argv[1]))
