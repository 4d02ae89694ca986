"""The commands, given what a shell would give them; each returns its exit status."""

from __future__ import annotations

from functools import partial

from dft_lightning.cli.commands import run

cache, compare, configs, export, inspect, sample, score = (
    partial(run, name) for name in ("cache", "compare", "configs", "export", "inspect", "sample", "score")
)
