"""From records to what a report says: chosen learning rates, means over seeds, pairs of losses, checks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from dft_lightning.compare.checks import Check, check_sameness
from dft_lightning.compare.records import Record
from dft_lightning.compare.statistics import (
    LEVEL,
    Interval,
    Values,
    holm,
    mean_interval,
    paired_bootstrap,
    share_interval,
    sign_flip_test,
)
from dft_lightning.errors import InputError
from dft_lightning.evaluation.measures import Measure, measures_of

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
        tied: other rates that were as good by the measure.
        records: its runs, the sweep's and those of further seeds.
    """

    loss: str
    measure: Measure
    learning_rate: float
    validation: float
    at_edge: bool
    tied: list[float]
    records: list[Record] = field(repr=False)

    def of_seeds(self, split: str, measure: str) -> list[float]:
        """What each seed has at the end of its run."""
        return [record.at_end(split, measure) for record in self.records]

    def over_problems(self) -> Interval:
        """Mean of the measure over seeds on test rows, with its interval over problems."""
        return share_interval(_scores(self, [record.seed for record in self.records]).mean(axis=0))


def choose(records: Sequence[Record], loss: str, measure: Measure, settings: dict[str, Any]) -> Choice | None:
    """The learning rate of a loss that is best on validation rows after the last step, over the sweep's seeds.

    Of equally good ones, which are common where few problems are counted, the one with the lower ``nll`` on the same
    rows, and then the lowest. Rates of which a seed of the sweep has no finished run take no part.

    Args:
        records: finished runs.
        loss: its name.
        measure: by which to choose.
        settings: the comparison's, of which ``learning_rates`` and ``seeds`` are read.

    Returns:
        ``None`` where no rate has a finished run of each seed of the sweep.

    Raises:
        InputError: the measure was never logged.
    """
    own = [record for record in records if record.loss == loss]
    found: dict[float, tuple[float, float]] = {}
    for rate in settings["learning_rates"]:
        sweep = [r for r in own if r.learning_rate == rate and r.seed in settings["seeds"]]
        if {record.seed for record in sweep} == set(settings["seeds"]):
            found[rate] = _mean_at_end(sweep, measure.name), _mean_at_end(sweep, "nll")
    if not found:
        return None
    sign = 1 if measure.higher_is_better else -1
    best = max(found, key=lambda rate: (*(_rank(sign * found[rate][0]), _rank(-found[rate][1])), -rate))
    rates = settings["learning_rates"]
    at_edge = len(rates) > 1 and best in (min(rates), max(rates))
    tied = sorted(rate for rate, (value, _) in found.items() if value == found[best][0] and rate != best)
    runs = sorted((record for record in own if record.learning_rate == best), key=lambda record: record.seed)
    return Choice(loss, measure, best, found[best][0], at_edge, tied, runs)


def _mean_at_end(records: Sequence[Record], measure: str) -> float:
    # Rounded: sums of equal shares in another order differ in the last digit, and would be no tie.
    return round(math.fsum(record.at_end("validation", measure) for record in records) / len(records), 12)


def _rank(value: float) -> float:
    """What is no number is worse than any."""
    return value if math.isfinite(value) else -math.inf


@dataclass(frozen=True)
class Pair:
    """Two losses by one measure, each at its own best learning rate.

    Attributes:
        first: name of one loss.
        second: name of the other.
        over_problems: ``first - second`` on test rows, bootstrapped over problems, mean over the seeds both have.
        over_seeds: the same difference with the interval over seeds, where there are three that differ.
        by_seed: the difference of each seed that both have.
        p_value: that problems give a difference as large if there is none.
        adjusted: the same by Holm, among all pairs of the measure.
    """

    first: str
    second: str
    over_problems: Interval
    over_seeds: Interval
    by_seed: list[float]
    p_value: float
    adjusted: float = 1.0

    @property
    def winner(self) -> str | None:
        """The better of the two on these problems, beyond chance; ``None`` where it is not shown.

        Where there is an interval over seeds it must exclude zero as well. Of fewer than three seeds, and of those that
        differ in nothing, the statement is of the seeds that ran.
        """
        seeds_agree = self.over_seeds.low is None or self.over_seeds.excludes_zero()
        if not (self.adjusted < 1 - LEVEL and self.over_problems.excludes_zero() and seeds_agree):
            return None
        return self.first if self.over_problems.mean > 0 else self.second


def compare_pair(a: Choice, b: Choice) -> Pair:
    """Two losses on test problems, by the seeds that both have."""
    seeds = sorted({r.seed for r in a.records} & {r.seed for r in b.records})
    return _compare((a.loss, b.loss), _scores(a, seeds), _scores(b, seeds))


def compare_with_base(choice: Choice, base: Record) -> Pair:
    """The same between a loss and the base model, which has no seeds."""
    scores = _scores(choice, [record.seed for record in choice.records])
    of_base = base.by_problem(choice.measure.name)
    return _compare((choice.loss, BASE), scores, np.broadcast_to(of_base, scores.shape))


def _scores(choice: Choice, seeds: Sequence[int]) -> Values:
    """``[seeds, problems]``."""
    runs = {record.seed: record for record in choice.records}
    return np.stack([runs[seed].by_problem(choice.measure.name) for seed in seeds])


def _compare(names: tuple[str, str], a: Values, b: Values) -> Pair:
    of_problems = a.mean(axis=0), b.mean(axis=0)
    by_seed = (a - b).mean(axis=1).tolist()
    over_seeds = mean_interval(by_seed, furthest=1.0)
    return Pair(*names, paired_bootstrap(*of_problems), over_seeds, by_seed, sign_flip_test(*of_problems))


@dataclass(frozen=True)
class Findings:
    """All that a report is made of.

    Attributes:
        settings: the comparison's config, as ``compare.yaml`` has it.
        measures: every measure, by name.
        losses: names of the losses that have a learning rate with all its runs, in the config's order.
        records: the finished runs that belong to the comparison.
        left_out: the names of runs and losses that are not in it, with the reason.
        base: the base model's test, where it was run.
        choices: by measure, each loss at its best learning rate.
        checks: whether runs that must agree do.
    """

    settings: dict[str, Any]
    measures: dict[str, Measure]
    losses: list[str]
    records: list[Record]
    left_out: dict[str, str]
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

    @property
    def base_is_the_start(self) -> bool:
        """Whether every run began with the weights that were tested as the base model's."""
        weights = self.base.test["weights"] if self.base and self.base.test else None
        return all(record.fit["initial_weights"] == weights for record in self.records if record.fit)

    @cached_property
    def pairs(self) -> dict[str, list[Pair]]:
        """By each measure that problems have: every pair of losses, and each loss with the base if all began there."""
        return {name: self._pairs(self.choices[name]) for name in self.choices if self.measures[name].by_problem}

    def _pairs(self, choices: list[Choice]) -> list[Pair]:
        pairs = [compare_pair(a, b) for a, b in itertools.combinations(choices, 2)]
        if self.base is not None and self.base_is_the_start:
            pairs += [compare_with_base(choice, self.base) for choice in choices]
        adjusted = holm([pair.p_value for pair in pairs])
        return [replace(pair, adjusted=value) for pair, value in zip(pairs, adjusted, strict=True)]

    def rates(self, measure: str | None = None) -> str:
        """The learning rate of each loss that is best by a measure, or by the main one, in words."""
        measure = measure or self.main_measure
        rates = ", ".join(f"{choice.loss} {choice.learning_rate:g}" for choice in self.chosen_by(measure))
        return f"Learning rates, best on validation rows ({self.measures[measure].title}): {rates}."

    def sweep(self) -> list[Record]:
        """The runs by which learning rates are chosen."""
        return [r for r in self.records if r.loss in self.losses and r.seed in self.settings["seeds"]]

    def swept(self, loss: str, rate: float) -> list[Record]:
        """Those of a loss at a learning rate."""
        return [r for r in self.sweep() if (r.loss, r.learning_rate) == (loss, rate)]

    def chosen_by(self, measure: str) -> list[Choice]:
        """Each loss at the learning rate that was best by any measure."""
        if measure in self.choices:
            return self.choices[measure]
        return _choose_all(self.records, self.losses, self.measures[measure], self.settings)


def analyse(settings: dict[str, Any], records: Sequence[Record]) -> Findings:
    """Choose learning rates and check sameness.

    Raises:
        InputError: no loss has a learning rate with all its runs, or a measure was never logged.
    """
    evaluation = settings["evaluation"]
    measures = measures_of(evaluation["num_samples"], evaluation["temperature"])
    belonging, left_out = sort_records(settings, records)
    main = measures[settings["best_by"][0]]
    losses = []
    for loss in settings["losses"]:
        if choose(belonging, loss, main, settings) is not None:
            losses.append(loss)
        else:
            left_out[f"{loss} (all of it)"] = "no learning rate has a finished run of each seed of the sweep"
    if not losses:
        raise InputError("no loss has a learning rate with a finished run of each seed: there is nothing to report yet")
    wanted = dict.fromkeys([*settings["measures"], *settings["best_by"]])
    choices = {name: _choose_all(belonging, losses, measures[name], settings) for name in wanted}
    base = next((record for record in belonging if record.loss is None), None)
    return Findings(settings, measures, losses, belonging, left_out, base, choices, check_sameness(belonging))


def _choose_all(
    records: Sequence[Record], losses: Sequence[str], measure: Measure, settings: dict[str, Any]
) -> list[Choice]:
    choices = [choose(records, loss, measure, settings) for loss in losses]
    return [choice for choice in choices if choice is not None]


def sort_records(settings: dict[str, Any], records: Sequence[Record]) -> tuple[list[Record], dict[str, str]]:
    """The finished runs of the comparison's grid, and why each other finished run is none of them."""
    belonging, left_out = [], {}
    for record in records:
        if not record.whole:
            continue
        reason = _reason_against(settings, record) if record.loss is not None else None
        if reason is None:
            belonging.append(record)
        else:
            left_out[record.name] = reason
    return belonging, left_out


def _reason_against(settings: dict[str, Any], record: Record) -> str | None:
    if record.loss not in settings["losses"]:
        return f"{record.loss!r} is none of the comparison's losses"
    if record.config.get("model", {}).get("loss") != settings["losses"][record.loss]:
        return f"its config has another loss by the name {record.loss!r}"
    if record.learning_rate not in settings["learning_rates"]:
        return f"learning rate {record.learning_rate:g} is none of the comparison's"
    if record.seed not in (*settings["seeds"], *settings["seeds_at_best"]):
        return f"seed {record.seed} is none of the comparison's"
    return None
