r"""Loss curves of the same run without and with a gradient threshold, and with another order of the rows.

    python ../shared/get_smollm2.py smollm2
    python benchmarks/threshold_curve.py --model.model smollm2 \
        --data.train.init_args.path ../shared/data/svamp_test.jsonl

Of ``configs/word_problems_smollm2.yaml`` with 4 rows a step, or of another ``--config``; further arguments are those of
``fit``, for all three runs. The objective and the nll are means over the steps between two that are logged.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from pathlib import Path

import dft_lightning.__main__  # isort: skip  # noqa: F401 (what the command tells torch and OpenMP, before torch)
from linear_head import RESULTS, machine

from dft_lightning.fit import main as command

CONFIG = Path(__file__).parents[1] / "configs" / "word_problems_smollm2.yaml"
SETTINGS = ("--data.batch_size=4", "--trainer.max_epochs=null", "--trainer.max_steps=200", "--model.optimizer.lr=2e-5")
SETTINGS += ("--trainer.log_every_n_steps=5", "--data.validation=null", "--data.test=null")


def curve(arguments: list[str]) -> list[tuple[int, float, float]]:
    """Steps done, objective and nll of one fit, wherever they are logged."""
    with tempfile.TemporaryDirectory() as folder:
        command(["fit", *arguments, "--trainer.default_root_dir", folder, "--trainer.enable_checkpointing=false"])
        (logged,) = Path(folder).rglob("metrics.csv")
        rows = [row for row in csv.DictReader(logged.open()) if row["train/loss"]]
    return [(int(row["step"]) + 1, float(row["train/loss"]), float(row["train/nll"])) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--threshold", type=float, default=2.0**-14)
    parser.add_argument("--output", type=Path, default=RESULTS / "threshold_curve.json")
    options, arguments = parser.parse_known_args()
    same = [*SETTINGS, *arguments]
    runs = {
        "exact": (),
        "threshold": (f"--model.step.gradient_threshold={options.threshold}",),
        "another order": ("--data.batches.seed=1",),
    }
    curves = {name: curve(["--config", str(options.config), *same, *own]) for name, own in runs.items()}
    settings = {"config": options.config.name, "arguments": same, "runs": runs}
    output = {**machine("cpu"), **settings, "steps, objective, nll": curves}
    options.output.write_text(json.dumps(output) + "\n")


if __name__ == "__main__":
    main()
