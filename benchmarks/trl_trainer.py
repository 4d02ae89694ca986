"""DFT inside TRL's own trainer: its ``loss_type="dft"`` against ``DFTLoss`` by ``FusedLossMixin``.

    python ../shared/get_smollm2.py smollm2
    python benchmarks/trl_trainer.py --model smollm2 --rows ../shared/data/gsm8k_train.jsonl

Needs the ``bench`` extra, a model folder with tokenizer, and rows with ``question`` and ``answer``. Both sides train on
the same rows in the same order with the same trainer, in float32 and in bf16-mixed. Every measurement is a process of
its own; the sides take turns, and a ratio is the median over turns. Time runs from the end of the second step to the
end of the last. The losses of each step are those that the trainer logs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from linear_head import RESULTS, machine, missing
from training_step import in_own_process, median, parsed, parser_of_steps, train_in_trl


def run(options: argparse.Namespace, folder: str, fused: bool) -> dict:
    import torch

    import dft_lightning.__main__  # noqa: F401 (large tensors on huge pages, for both sides)
    from dft_lightning import DFTLoss
    from dft_lightning.integrations import FusedLossMixin

    torch.manual_seed(0)
    config = {"bf16": options.precision == "bf16-mixed", "gradient_checkpointing": False, "logging_steps": 1}
    if fused:
        clock, trainer = train_in_trl(options, folder, config, (FusedLossMixin,), token_loss=DFTLoss())
    else:
        clock, trainer = train_in_trl(options, folder, {**config, "loss_type": "dft"})
    losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
    return {**clock.result(), "losses": losses}


SIDES = {"dft_lightning": partial(run, fused=True), "trl": partial(run, fused=False)}


def compare(options: argparse.Namespace, precision: str) -> dict:
    turns = []
    for _ in range(options.turns):
        more = ["--device", options.device, "--precision", precision]
        turn = {side: in_own_process(__file__, options, side, *more) for side in SIDES}
        turns.append(turn)
        print(precision, {side: round(result["tokens_per_second"]) for side, result in turn.items()}, flush=True)
    own, theirs = (turns[0][side]["losses"] for side in SIDES)
    return {
        "tokens_per_second": {side: median([turn[side]["tokens_per_second"] for turn in turns]) for side in SIDES},
        "peak_memory_mib": {side: median([turn[side]["peak_memory"] for turn in turns]) / 2**20 for side in SIDES},
        "speed_over_trl": median(
            [turn["dft_lightning"]["tokens_per_second"] / turn["trl"]["tokens_per_second"] for turn in turns]
        ),
        "largest_difference_of_losses": max(abs(a - b) / abs(b) for a, b in zip(own, theirs, strict=True)),
        "losses": {"dft_lightning": own, "trl": theirs},
        "turns": len(turns),
    }


def main() -> None:
    parser = parser_of_steps(__doc__, steps=10)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, help="JSON; benchmarks/results/trl_trainer_DEVICE.json by default")
    parser.add_argument("--precision", default="32-true", help=argparse.SUPPRESS)
    options = parsed(parser)
    if options.side:
        with tempfile.TemporaryDirectory() as folder:
            options.result.write_text(json.dumps(SIDES[options.side](options, folder)))
        return
    if reason := missing("trl"):
        print(f"trl: skipped, {reason}, and there is nothing to compare with", flush=True)
        return
    found = {precision: compare(options, precision) for precision in ("32-true", "bf16-mixed")}
    settings = {"model": options.model.name, "batch_size": options.batch_size, "steps": options.steps}
    path = options.output or RESULTS / f"trl_trainer_{options.device}.json"
    path.write_text(json.dumps({**machine(options.device), **settings, **found}, indent=1) + "\n")
    print(
        json.dumps({name: {k: v for k, v in each.items() if k != "losses"} for name, each in found.items()}, indent=1)
    )


if __name__ == "__main__":
    main()
