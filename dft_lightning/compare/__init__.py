"""Losses compared from the same start on the same rows: runs, statistics, plots, report."""

from dft_lightning.compare.command import compare
from dft_lightning.compare.recorder import RunRecorder

__all__ = ["RunRecorder", "compare"]
