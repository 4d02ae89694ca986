"""From records to what a report says: chosen learning rates, means over seeds, pairs of losses, checks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dft_lightning.compare.checks import Check, check_sameness
from dft_lightning.compare.measures import Measure, measures_of
from dft_lightning.compare.records import Record
from dft_lightning.compare.statistics import Interval, Values, mean_interval, paired_bootstrap
from dft_lightning.errors import InputError

BASE = "base model"


@dataclass(frozen=True)
class Choice:
    """A loss at the learning rate that was best for it by a measure.

    Attributes:
        loss: its name in the comparison.
        measure: by which the rate was chosen.
        learning_rate: the rate.
        validation: mean over the sweep's seeds on validation rows, by which it was chosen.
        at_edge: whether it is the lowest or the highest of the sweep: a better one may lie beyond.
        tied: whether another rate was as good by the measure.
        records: its runs, the sweep's and those of further seeds.
    """

    loss: str
    measure: Measure
    learning_rate: float
    validation: float
    at_edge: bool
    tied: bool
    records: list[Record] = field(repr=False)

    def over_seeds(self, split: str, measure: str) -> Interval:
        """Mean and interval over seeds at the end of the runs."""
        return mean_interval([record.at_end(split, measure) for record in self.records])


def choose(records: Sequence[Record], loss: str, measure: Measure) -> Choice:
    """The learning rate of a loss that is best on validation rows after the last step, over the sweep's seeds.

    Of equally good ones, which are common where few problems are counted, the one with the lower ``nll`` on the same
    rows, and then the lowest. Rates of which a seed of the sweep has failed take no part.

    Raises:
        InputError: the measure was never logged, or no rate has all its runs.
    """
    own = [record for record in records if record.loss == loss]
    sweep = [record for record in own if record.run["sweep"]]
    seeds = {record.seed for record in sweep}
    means, nll = {}, {}
    for rate in sorted({record.learning_rate for record in sweep}):
        of_rate = [record for record in sweep if record.learning_rate == rate]
        if {record.seed for record in of_rate} == seeds:
            means[rate] = _mean_at_end(of_rate, measure.name)
            nll[rate] = _mean_at_end(of_rate, "nll")
    if not means:
        raise InputError(f"{loss}: no learning rate has a finished run of each seed of the sweep")
    sign = 1 if measure.higher_is_better else -1
    finite = {rate: value for rate, value in means.items() if np.isfinite(value)}
    best = max(finite or means, key=lambda rate: (sign * means[rate], -nll[rate], -rate))
    at_edge = len(means) > 1 and best in (min(means), max(means))
    runs = sorted((record for record in own if record.learning_rate == best), key=lambda record: record.seed)
    tied = list(means.values()).count(means[best]) > 1
    return Choice(loss, measure, best, means[best], at_edge, tied, runs)


def _mean_at_end(records: Sequence[Record], measure: str) -> float:
    return sum(record.at_end("validation", measure) for record in records) / len(records)


@dataclass(frozen=True)
class Pair:
    """Two losses by one measure, each at its own best learning rate.

    Attributes:
        first: name of one loss.
        second: name of the other.
        over_problems: ``first - second`` on test rows, bootstrapped over problems, mean over the seeds both have.
        over_seeds: the same difference with the interval over seeds.
        winner: the better of the two; ``None`` where an interval includes zero.
    """

    first: str
    second: str
    over_problems: Interval
    over_seeds: Interval
    winner: str | None


def compare_pair(a: Choice, b: Choice) -> Pair:
    """Whether one loss is better than the other on test problems, beyond chance.

    A winner needs the bootstrap's interval to exclude zero and, where there is more than one seed, the interval over
    seeds as well: the first knows nothing of what another seed would have done.

    Raises:
        InputError: they have no seed in common, or were tested on other problems.
    """
    seeds = sorted({r.seed for r in a.records} & {r.seed for r in b.records})
    if not seeds:
        raise InputError(f"{a.loss} and {b.loss} have no seed in common")
    return _compare(a.loss, _scores(a, seeds), b.loss, _scores(b, seeds))


def compare_with_base(choice: Choice, base: Record) -> Pair:
    """The same between a loss and the base model, which has no seeds."""
    scores = _scores(choice, [record.seed for record in choice.records])
    of_base = base.by_problem(choice.measure.name)
    of_base = np.broadcast_to(of_base, (len(scores), len(of_base)))
    return _compare(choice.loss, scores, BASE, of_base)


def _scores(choice: Choice, seeds: Sequence[int]) -> Values:
    """``[seeds, problems]``."""
    runs = {record.seed: record for record in choice.records}
    return np.stack([runs[seed].by_problem(choice.measure.name) for seed in seeds])


def _compare(first: str, a: Values, second: str, b: Values) -> Pair:
    if a.shape != b.shape:
        raise InputError(f"{first} and {second} were tested on different numbers of problems")
    over_problems = paired_bootstrap(a.mean(axis=0), b.mean(axis=0))
    over_seeds = mean_interval((a - b).mean(axis=1).tolist())
    sure = over_problems.excludes_zero() and (len(a) == 1 or over_seeds.excludes_zero())
    return Pair(
        first, second, over_problems, over_seeds, (first if over_problems.mean > 0 else second) if sure else None
    )


@dataclass(frozen=True)
class Findings:
    """All that a report is made of.

    Attributes:
        settings: the comparison's config, as ``compare.yaml`` has it.
        measures: every measure, by name.
        losses: names of the losses that have finished runs, in the config's order.
        records: the finished runs.
        base: the base model's test, where it was run.
        choices: by measure, each loss at its best learning rate.
        checks: whether runs that must agree do.
    """

    settings: dict[str, Any]
    measures: dict[str, Measure]
    losses: list[str]
    records: list[Record]
    base: Record | None
    choices: dict[str, list[Choice]]
    checks: list[Check]

    @property
    def main_measure(self) -> str:
        """By which the learning rate is chosen where a figure is of no one measure."""
        return str(self.settings["best_by"][0])

    @property
    def comparable(self) -> bool:
        """Whether every check agrees: otherwise no loss is set against another."""
        return all(check.agrees for check in self.checks)

    def pairs(self, measure: str) -> list[Pair]:
        """Every pair of losses by a measure that problems have, and each loss with the base."""
        choices = self.choices[measure]
        pairs = [compare_pair(a, b) for a, b in itertools.combinations(choices, 2)]
        return pairs + ([compare_with_base(choice, self.base) for choice in choices] if self.base else [])


def analyse(settings: dict[str, Any], records: Sequence[Record]) -> Findings:
    """Choose learning rates and check sameness.

    Raises:
        InputError: no run of a loss has ended, or a measure was never logged.
    """
    whole = [record for record in records if record.whole]
    trained = [record for record in whole if record.loss is not None]
    if not trained:
        raise InputError("no run of a loss has ended: there is nothing to report yet")
    evaluation = settings["evaluation"]
    measures = measures_of(evaluation["num_samples"], evaluation["temperature"])
    found = {record.loss for record in trained}
    losses = [name for name in settings["losses"] if name in found]
    losses += sorted(str(name) for name in found if name not in losses)  # runs made elsewhere, copied there
    losses = [name for name in losses if _has_sweep(trained, name)]
    wanted = dict.fromkeys([*settings["measures"], *settings["best_by"]])
    choices = {name: [choose(trained, loss, measures[name]) for loss in losses] for name in wanted}
    base = next((record for record in whole if record.loss is None), None)
    return Findings(settings, measures, losses, whole, base, choices, check_sameness(whole))


def _has_sweep(records: Sequence[Record], loss: str) -> bool:
    return any(record.loss == loss and record.run["sweep"] for record in records)
