"""The commands, given what a shell would give them; each returns its exit status."""

from __future__ import annotations

from functools import partial

from dft_lightning.cli.commands import run

compare, configs, export, inspect, sample, score = (
    partial(run, name) for name in ("compare", "configs", "export", "inspect", "sample", "score")
)
