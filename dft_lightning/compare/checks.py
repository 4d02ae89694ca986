"""Whether runs that must agree do: same start, same rows in the same order, same targets at every step."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dft_lightning.compare.records import Record


@dataclass(frozen=True)
class Check:
    """Whether runs that must agree in something do.

    Attributes:
        what: the thing, in words.
        scope: the runs that must agree, in words.
        hashes: each hash found, with the names of its runs.
        note: where they part, if they do.
    """

    what: str
    scope: str
    hashes: dict[str, list[str]]
    note: str = ""

    @property
    def agrees(self) -> bool:
        return len(self.hashes) <= 1


def check_sameness(records: Sequence[Record]) -> list[Check]:
    """Initial weights, row order and targets, among the runs of each seed; the base's weights with them all."""
    checks = []
    trained = [record for record in records if record.fit]
    for seed in sorted({record.seed for record in trained}):
        runs = [record for record in trained if record.seed == seed]
        scope = f"seed {seed}, {len(runs)} runs"
        starts = {r.name: r.fit["initial_weights"] for r in runs if r.fit}
        starts |= {r.name: r.test["weights"] for r in records if r.loss is None and r.test}
        checks.append(Check("initial weights", scope, _grouped(starts)))
        checks.append(Check("row order", scope, _grouped({r.name: r.fit["rows"] for r in runs if r.fit})))
        targets = _grouped({r.name: r.fit["targets"] for r in runs if r.fit})
        checks.append(Check("targets per step", scope, targets, _first_parting(runs) if len(targets) > 1 else ""))
    return checks


def _grouped(hashes: dict[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, value in hashes.items():
        groups[value].append(name)
    return dict(groups)


def _first_parting(runs: Sequence[Record]) -> str:
    """The first micro-batch in which the targets of two runs differ."""
    steps = [record.fit["steps"] for record in runs if record.fit]
    for number, found in enumerate(itertools.zip_longest(*steps), start=1):
        if any(step != found[0] for step in found):
            return f"they part at micro-batch {number}"
    return "they differ"
