"""What runs left behind, read back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dft_lightning.compare.files import CONFIG, FIT, PROBABILITIES, TEST, read_json, read_yaml
from dft_lightning.compare.grid import RUNS, is_tested
from dft_lightning.compare.statistics import Values
from dft_lightning.errors import InputError, one_line
from dft_lightning.metrics import pass_at_k

BUCKETS = ((0.0, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 1.0))
"""Targets by their probability before training."""


@dataclass(frozen=True)
class Record:
    """A run that has ended, or the part of one that was recorded.

    Attributes:
        folder: of the run.
        run: its :class:`~dft_lightning.compare.recorder.RunIdentity`, as a dict.
        fit: content of ``fit.json``, or ``None``.
        test: content of ``test.json``, or ``None``.
        whole: whether its ``fit`` and the ``test`` of that fit have ended.
    """

    folder: Path
    run: dict[str, Any]
    fit: dict[str, Any] | None
    test: dict[str, Any] | None
    whole: bool

    @property
    def name(self) -> str:
        return str(self.run["name"])

    @property
    def loss(self) -> str | None:
        """The comparison's name of the loss; ``None`` for the base model."""
        return self.run["loss"]  # type: ignore[no-any-return]

    @property
    def learning_rate(self) -> float:
        return float(self.run["learning_rate"])

    @property
    def seed(self) -> int:
        return int(self.run["seed"])

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config that the run was made by."""
        return read_yaml(self.folder / CONFIG)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Evaluations along ``fit``."""
        return self.fit["history"] if self.fit else []

    def curve(self, split: str, measure: str) -> list[tuple[int, float]]:
        """``(step, value)`` of a measure along ``fit``; empty where it was not measured."""
        return [(e["step"], e[split][measure]) for e in self.history if measure in e.get(split, {})]

    def logged(self, name: str) -> list[tuple[int, float]]:
        """``(step, value)`` of what training logged."""
        return [(step, values[name]) for step, values in (self.fit or {}).get("logged", []) if name in values]

    def at_end(self, split: str, measure: str) -> float:
        """A measure after the last step, on validation or forgetting rows; on test rows from ``test``.

        Raises:
            InputError: it was never measured.
        """
        if split == "test":
            values = (self.test or {}).get("values", {})
        else:
            values = self.history[-1].get(split, {}) if self.history else {}
        if measure not in values:
            raise InputError(
                f"{self.folder}: {measure!r} was never logged on {split} rows; there are {', '.join(values) or 'none'}"
            )
        return float(values[measure])

    def by_problem(self, measure: str) -> Values:
        """``[problems]``: a measure's value on each test problem: ``greedy``, ``sampled`` or ``pass_at_K``."""
        assert self.test is not None
        correct, samples = self.test["correct"], self.test["num_samples"]
        if measure == "greedy":
            return np.array(correct["greedy"], dtype=np.float64)
        if measure == "sampled":
            shares: Values = np.array(correct["sampled"], dtype=np.float64) / samples
            return shares
        k = int(measure.removeprefix("pass_at_"))
        return np.array([pass_at_k(samples, count, k) for count in correct["sampled"]], dtype=np.float64)

    @cached_property
    def probabilities(self) -> dict[str, Values]:
        """``[targets]``: probability of each kept training target, ``"before"`` and ``"after"``."""
        path = self.folder / PROBABILITIES
        if not path.is_file():
            raise InputError(f"{path}: missing: copy it with its run, or run that again")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {when: np.exp(arrays[when].astype(np.float64)) for when in ("before", "after")}
        except Exception as error:  # whatever its reader stumbled on
            raise InputError(f"{path}: cannot be read: {one_line(error)}; run it again or move it away") from error

    def bucket_means(self) -> tuple[list[int], Values, Values]:
        """Number of targets, mean probability before and mean probability after, for each of ``BUCKETS``.

        A bucket has its lower end and not its upper one; the last has both. The mean of none is nan.
        """
        before, after = self.probabilities["before"], self.probabilities["after"]
        inner_edges = [high for _, high in BUCKETS[:-1]]
        places = np.searchsorted(inner_edges, before, side="right")
        members = [places == i for i in range(len(BUCKETS))]
        counts = [int(member.sum()) for member in members]
        means = [np.array([v[m].mean() if m.any() else np.nan for m in members]) for v in (before, after)]
        return counts, means[0], means[1]


def read_records(output: Path) -> list[Record]:
    """Every run below a comparison's folder, by name, runs made elsewhere and copied there included.

    Raises:
        InputError: there are no runs, or one's record cannot be read.
    """
    folders = sorted(path for path in (output / RUNS).glob("*") if path.is_dir())
    records = []
    for folder in folders:
        try:
            fit, test = read_json(folder / FIT), read_json(folder / TEST)
            found = fit or test
            if found is not None:
                records.append(Record(folder, found["run"], fit, test, is_tested(folder)))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder}: broken record: {one_line(error)}; run it again or move it away") from error
    if not folders:
        raise InputError(f"{output}: no runs in {output / RUNS}")
    return records
