"""The table of docs/paper.md: memory and time that the paper's recipes should take, estimated, as Markdown.

usage: python benchmarks/paper_table.py
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from memory_table import MODELS, TOKENS, empty_model, estimate_memory

GPUS = 8
# Assumptions, none of them measured: an H100's dense bfloat16 peak, the share of it that training reaches, and the mean
# length of a row of the data.
PEAK, SHARE, TOKENS_PER_ROW = 989e12, 0.4, 500
ROWS = 100_000
# Problems of the five benchmarks, samples of each, problems that a GPU answers at a time; and for one token of all of
# them, in seconds, the overhead of a step and the memory's bandwidth in bytes per second.
PROBLEMS, LONGEST, AT_A_TIME = (500, 272, 674, 30, 40), 4096, {"DeepSeekMath-7B": 1}
STEP, BANDWIDTH = 0.03, 3.35e12


def training_minutes(parameters: int) -> float:
    """Forward, backward and the forward again of gradient checkpointing: 8 operations per parameter and token."""
    return 8 * parameters * ROWS * TOKENS_PER_ROW / (GPUS * PEAK * SHARE) / 60


def evaluation_hours(name: str, parameters: int) -> float:
    """A greedy and a sampled pass; every batch goes on to the longest answer, and reads the weights once a token."""
    batches = 2 * sum(math.ceil(count / (AT_A_TIME.get(name, 4) * GPUS)) for count in PROBLEMS)
    return batches * LONGEST * (STEP + 2 * parameters / BANDWIDTH) / 3600


def table() -> str:
    """A row for each model."""
    lines = ["| model | GiB per GPU | training, minutes | avg@16, hours |", "|---|---|---|---|"]
    for name in MODELS:
        model = empty_model(name)
        count = sum(parameter.numel() for parameter in model.parameters())
        memory = estimate_memory(model, tokens=TOKENS, ranks=GPUS).total / 2**30
        minutes, hours = training_minutes(count), evaluation_hours(name, count)
        lines.append(f"| {name} | {memory:.0f} | {minutes:.0f} | {hours:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
