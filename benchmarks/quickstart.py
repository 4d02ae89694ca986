"""The quickstart with each of its losses: exact match before and after, and the time of each run.

    python benchmarks/quickstart.py
    python benchmarks/quickstart.py --beside 2 --trainer.max_steps 30
    GOMP_SPINCOUNT=300000 python benchmarks/quickstart.py --beside 2 --trainer.max_steps 30 --output spinning.json

With ``--beside``, as many busy processes are there meanwhile; the last line has OpenMP's threads wait for each other as
they do by default. Further arguments are those of ``fit``, for all three runs.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from pathlib import Path

import dft_lightning.__main__  # isort: skip  # noqa: F401 (what the command tells torch and OpenMP, before torch)
from linear_head import RESULTS, beside, machine

from dft_lightning.fit import main as command

CONFIGS = Path(__file__).parents[1] / "configs"
OVERLAYS = {"DFT": [], "cross-entropy": ["quickstart_ce.yaml"], "focal": ["quickstart_focal.yaml"]}


def run(overlays: list[str], arguments: list[str]) -> dict[str, float]:
    """One fit: the first and the last of its values of exact match, and the seconds of the whole."""
    files = [argument for name in ("quickstart.yaml", *overlays) for argument in ("--config", str(CONFIGS / name))]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        trainer = command(["fit", *files, "--trainer.default_root_dir", folder, *arguments]).trainer
        found = {"steps": trainer.global_step, "seconds": round(time.perf_counter() - started, 1)}
        (logged,) = Path(folder).rglob("metrics.csv")
        rows = list(csv.DictReader(logged.open()))
    for name in ("greedy", "sampled"):
        values = [float(row[f"generation/{name}"]) for row in rows if row[f"generation/{name}"]]
        found |= {f"{name} before": values[0], f"{name} after": values[-1]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=int, default=0, help="busy processes")
    parser.add_argument("--output", type=Path, help="by default in benchmarks/results")
    options, arguments = parser.parse_known_args()
    with beside(options.beside):
        runs = {name: run(overlays, arguments) for name, overlays in OVERLAYS.items()}
    name = "quickstart" + (f"_beside_{options.beside}" if options.beside else "")
    output = options.output or RESULTS / f"{name}.json"
    output.write_text(json.dumps({**machine("cpu"), "runs": runs}, indent=1) + "\n")
    print(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
