"""Whether runs that must agree do: same config, start, rows, targets at every step, and test problems."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dft_lightning.compare.grid import common_part, first_difference
from dft_lightning.compare.hashes import hash_texts
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
    """What all runs share, then initial weights, row order and targets among the runs of each seed.

    The base model's weights belong to the seed that it was tested with: a model that is drawn at random differs from
    seed to seed.
    """
    checks = [_check_configs(records)]
    problems = {r.name: r.test["problems"] for r in records if r.test}
    checks.append(Check("test problems", f"{len(problems)} runs", _grouped(problems)))
    trained = [record for record in records if record.fit]
    for seed in sorted({record.seed for record in trained}):
        runs = [record for record in trained if record.seed == seed]
        scope = f"seed {seed}, {len(runs)} runs"
        starts = {r.name: r.fit["initial_weights"] for r in runs if r.fit}
        starts |= {r.name: r.test["weights"] for r in records if r.loss is None and r.test and r.seed == seed}
        checks.append(Check("initial weights", scope, _grouped(starts)))
        checks.append(Check("row order", scope, _grouped({r.name: r.fit["rows"] for r in runs if r.fit})))
        targets = _grouped({r.name: r.fit["targets"] for r in runs if r.fit})
        checks.append(Check("targets per step", scope, targets, _first_parting(runs) if len(targets) > 1 else ""))
    return checks


def _check_configs(records: Sequence[Record]) -> Check:
    common = {record.name: common_part(record.config) for record in records}
    groups = _grouped({name: hash_texts([repr(config)]) for name, config in common.items()})
    note = ""
    if len(groups) > 1:
        first, second = (common[names[0]] for names in list(groups.values())[:2])
        note = f"({first_difference(first, second)})".replace(" there", "").replace(" now", "")
    what = "config but for loss, learning rate and seed"
    return Check(what, f"{len(common)} runs", groups, note)


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
