"""``python -m dft_lightning``: ``fit``, ``validate``, ``test``, ``predict``, and the commands of ``cli``."""

from __future__ import annotations

import os
import sys

# What the CPU is faster with, where the user has not decided.
# Large tensors on huge pages, where Linux gives them: some percent of a training step. torch reads this at its first
# large tensor, which importing Lightning may make.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# A thread that waits for another sleeps after some microseconds, not after milliseconds, in which it keeps the other
# from its turn where processes share the cores: many small operations take ten times as long then. GNU's OpenMP reads
# this when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from dft_lightning.cli import COMMANDS
from dft_lightning.cli.commands import answered
from dft_lightning.cli.commands import run as run_command


def run() -> None:
    """The console script: exits with status 0 after a run, with 2 after a mistake."""
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        raise SystemExit(run_command(sys.argv[1], sys.argv[2:]))
    if (status := answered(sys.argv[1:])) is not None:
        raise SystemExit(status)
    from dft_lightning.fit.command import main  # Lightning and transformers, which not every command needs

    main()


if __name__ == "__main__":
    run()
