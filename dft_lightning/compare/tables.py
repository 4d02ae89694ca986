"""The report's tables, as text in rows and columns."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dft_lightning.compare.analysis import BASE, Choice, Findings, Pair
from dft_lightning.compare.records import BUCKETS, Record
from dft_lightning.compare.statistics import FEWEST_PROBLEMS, FEWEST_SEEDS, Interval, share_interval
from dft_lightning.evaluation.measures import Measure


@dataclass(frozen=True)
class Table:
    """A table with its words.

    Attributes:
        title: above it.
        columns: headings.
        rows: cells; the first of each is what the row is of.
        caption: below it.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    caption: str = ""


def number(value: float) -> str:
    """Three decimals, or three digits for what is smaller or larger than those show.

    Example:
        >>> [number(x) for x in (0.97375, 0.000630, 5.0, 12345.6, float("nan"))]
        ['0.974', '0.00063', '5.000', '1.23e+04', 'none']
    """
    if math.isnan(value):
        return "none"
    if value and not 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:.3f}"


def signed(value: float) -> str:
    """A difference, with its sign."""
    return f"{'+' if value > 0 else ''}{number(value)}"


def interval_text(interval: Interval, without: str) -> str:
    """The 95% interval, or what to say where there is none."""
    if interval.low is None or interval.high is None:
        return without
    return f"{number(interval.low)} to {number(interval.high)}"


def spread_text(values: Sequence[float]) -> str:
    """The standard deviation over seeds, where there are enough to speak of one."""
    return number(statistics.stdev(values)) if len(values) >= FEWEST_SEEDS else "too few seeds"


def result_table(findings: Findings, measure: Measure) -> Table:
    """Each loss on test rows at the learning rate that was best by the measure on validation rows."""
    rows = []
    if findings.base:
        value = findings.base.at_end("test", measure.name)
        of_problems = [share_interval(findings.base.by_problem(measure.name))] if measure.by_problem else []
        cells = [BASE, "", number(_start(findings, measure.name)), number(value)]
        rows.append([*cells, *(interval_text(each, _FEW) for each in of_problems), "", ""])
    for choice in findings.choices[measure.name]:
        seeds = choice.of_seeds("test", measure.name)
        rate = f"{choice.learning_rate:g}{' *' if choice.at_edge else ''}{' =' if choice.tied else ''}"
        cells = [choice.loss, rate, number(choice.validation), number(math.fsum(seeds) / len(seeds))]
        cells += [interval_text(choice.over_problems(), _FEW)] if measure.by_problem else []
        rows.append([*cells, ", ".join(map(number, seeds)), spread_text(seeds)])
    notes = []
    if any(choice.at_edge for choice in findings.choices[measure.name]):
        notes.append("* the lowest or highest rate of the sweep: a better one may lie beyond.")
    if any(choice.tied for choice in findings.choices[measure.name]):
        notes.append("= another rate was as good on validation rows; the one with the lower nll is taken.")
    columns = ["loss", "learning rate", "validation", "test", *(["95% over problems"] if measure.by_problem else [])]
    return Table(measure.title, [*columns, "each seed", "deviation over seeds"], rows, " ".join(notes))


_FEW = f"fewer than {FEWEST_PROBLEMS} problems"


def _start(findings: Findings, measure: str) -> float:
    """The base model on validation rows."""
    trained = next(record for record in findings.records if record.history)
    return float(trained.history[0]["validation"].get(measure, math.nan))


def pair_table(findings: Findings, measure: Measure, pairs: Sequence[Pair]) -> Table:
    """Differences on test problems, and who is better where anybody is."""
    rows = [
        [
            pair.first,
            pair.second,
            signed(pair.over_problems.mean),
            interval_text(pair.over_problems, "none"),
            ", ".join(map(signed, pair.by_seed)),
            interval_text(pair.over_seeds, "too few seeds" if len(pair.by_seed) < FEWEST_SEEDS else "seeds alike"),
            f"{number(pair.p_value)}, {number(pair.adjusted)}",
            pair.winner or "no difference shown",
        ]
        for pair in pairs
    ]
    columns = ["loss", "against", "difference", "95% over problems", "each seed", "95% over seeds"]
    columns += ["p, by Holm", "better"]
    caption = (
        f"p, by Holm: of the pair alone, and in the family of the {len(pairs)} pairs of this table. Without an "
        f"interval there are fewer than {FEWEST_PROBLEMS} problems, or none that the two scored differently on; "
        f"without one over seeds, fewer than {FEWEST_SEEDS}, or none that differs from another."
    )
    return Table(f"{measure.title}: differences on test problems", columns, rows, caption)


def forgetting_table(findings: Findings) -> Table | None:
    """Before and after, on the second validation set."""
    choices = findings.choices[findings.main_measure]
    passes = [name for name in findings.measures if name.startswith("pass_at_")][-1:]
    wanted = ("greedy", "sampled", *passes, "nll", "token_accuracy", "entropy", "kl")
    names = [name for name in wanted if _measured(choices, name)]
    if not names:
        return None
    first = choices[0].records[0].history[0]["forgetting"]
    rows = [["before training", *(number(first[name]) for name in names)]]
    for choice in choices:
        rows.append([choice.loss, *(_with_range(choice, "forgetting", name) for name in names)])
    titles = [findings.measures[name].title for name in names]
    return Table("Forgetting", ["", *titles], rows, _after_training(findings))


def forgetting_source_table(findings: Findings) -> Table | None:
    """The same of each source of a mixture, where it is one."""
    choices = findings.choices[findings.main_measure]
    first = choices[0].records[0].history[0].get("forgetting", {})
    measures = ("nll", "token_accuracy", "kl")
    rows = []
    for source in [name.partition("/")[2] for name in first if name.startswith("nll/")]:
        names = [f"{measure}/{source}" for measure in measures]
        if not all(_measured(choices, name) for name in names):
            continue
        rows.append([source, "before training", *(number(first[name]) for name in names)])
        for choice in choices:
            rows.append([source, choice.loss, *(_with_range(choice, "forgetting", name) for name in names)])
    titles = [findings.measures[name].title for name in measures]
    return Table("Forgetting by source", ["source", "", *titles], rows, _after_training(findings)) if rows else None


def _measured(choices: Sequence[Choice], name: str) -> bool:
    return all(record.curve("forgetting", name) for choice in choices for record in choice.records)


_RANGE = "mean and, in brackets, the lowest and the highest seed where there are several"


def _after_training(findings: Findings) -> str:
    return f"After training, {_RANGE}. {findings.rates()}"


def _with_range(choice: Choice, split: str, name: str) -> str:
    """Mean over seeds, of what is a ratio in logarithms, and how far apart they are."""
    values = choice.of_seeds(split, name)
    mean = statistics.geometric_mean if name == "perplexity" and min(values) > 0 else statistics.fmean
    ends = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
    return number(mean(values)) + ends


def description_table(findings: Findings) -> Table:
    """What judges nothing, after training, on test rows; and the gradient norm in training."""
    names = ["loss", "nll", "perplexity", "entropy", "mean_weight"]
    rows = []
    for choice in findings.choices[findings.main_measure]:
        cells = [_with_range(choice, "test", name) for name in names]
        norms = [value for record in choice.records for _, value in record.logged("train/grad_norm")]
        clipped = [value for record in choice.records for _, value in record.logged("train/clipped_steps")]
        cells += [number(_mean(norms)), number(_mean(clipped))]
        rows.append([choice.loss, *cells])
    columns = ["loss", *(findings.measures[name].title for name in names), "gradient norm", "clipped steps (share)"]
    return Table(
        "What the losses leave behind",
        columns,
        rows,
        f"After training on test rows, {_RANGE}; the last two, means over training. {findings.rates()}",
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def bucket_table(findings: Findings) -> Table:
    """Mean probability of the training targets after training, a row a loss, by bucket of initial probability."""
    choices = findings.choices[findings.main_measure]
    counts, before, _ = choices[0].records[0].bucket_means()
    rows = [["targets", *map(str, counts)], ["before training", *map(number, before)]]
    rows += [[choice.loss, *map(number, choice.records[0].bucket_means()[2])] for choice in choices]
    columns = ["probability before", *(f"{low:g} to {high:g}" for low, high in BUCKETS)]
    caption = "Means after training of the targets that the base model gave such a probability, of the first seed. "
    caption += findings.rates()
    return Table("Probabilities of the training targets, before and after", columns, rows, caption)


def sweep_table(findings: Findings) -> Table | None:
    """Every learning rate of every loss, on validation rows and forgetting rows, over the sweep's seeds."""
    sweep = findings.sweep()
    rates = sorted({record.learning_rate for record in sweep})
    if len(rates) < 2:
        return None
    forgotten = [name for name in _FORGOTTEN if all(record.curve("forgetting", name) for record in sweep)]
    columns = [("validation", name) for name in findings.settings["measures"]]
    columns += [("forgetting", name) for name in forgotten]
    rows = []
    for loss in findings.losses:
        for rate in rates:
            own = findings.swept(loss, rate)
            if own:
                cells = [number(_mean([record.at_end(*column) for record in own])) for column in columns]
                rows.append([loss, f"{rate:g}", *cells])
    titles = [findings.measures[name].title for name in findings.settings["measures"]]
    titles += [f"forgetting: {findings.measures[name].title}" for name in forgotten]
    caption = "On validation rows."
    if forgotten:
        caption = (
            "On validation rows, and forgetting rows. What is forgotten depends on the rate: set losses against each "
            "other at one rate, too."
        )
    return Table("Every learning rate", ["loss", "learning rate", *titles], rows, caption)


_FORGOTTEN = ("greedy", "nll", "token_accuracy", "kl")


def results_csv(findings: Findings, records: Sequence[Record]) -> str:
    """A row a run: what it is, and every measure before training, after it and on test rows."""
    names = list(findings.measures)
    columns = ["run", "loss", "learning_rate", "seed", "finished", "steps", "seconds"]
    columns += [f"{when}_{name}" for when in ("start", "end", "forgetting", "test") for name in names]
    columns += ["initial_weights", "rows", "targets"]
    output = io.StringIO()
    writer = csv.DictWriter(output, columns, lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow(_csv_row(record, names))
    return output.getvalue()


def _csv_row(record: Record, names: Sequence[str]) -> dict[str, object]:
    run, fit = record.run, record.fit or {}
    row: dict[str, object] = {"run": run["name"], "loss": run["loss"] or BASE, "finished": record.whole}
    if run["loss"] is not None:
        row |= {key: run[key] for key in ("learning_rate", "seed")}
    if record.history:
        row |= {"steps": record.history[-1]["step"], "seconds": round(fit["seconds"], 1)}
        first, last = record.history[0], record.history[-1]
        parts = {"start": first["validation"], "end": last["validation"], "forgetting": last.get("forgetting", {})}
    else:
        parts = {}
    parts["test"] = (record.test or {}).get("values", {})
    row |= {f"{when}_{name}": values[name] for when, values in parts.items() for name in names if name in values}
    return row | {name: fit[name] for name in ("initial_weights", "rows", "targets") if name in fit}
