"""``report.html``, ``report.md``, ``results.csv`` and the plots, from the runs' records."""

from __future__ import annotations

import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from dft_lightning.compare.analysis import BASE, Choice, Findings, analyse
from dft_lightning.compare.execute import last_error
from dft_lightning.compare.files import CONFIG, FIT, SETTINGS, TEST, read_calls, read_yaml
from dft_lightning.compare.grid import RUNS, is_tested
from dft_lightning.compare.plots import Plot, all_plots
from dft_lightning.compare.records import read_records
from dft_lightning.compare.statistics import FEWEST_SEEDS
from dft_lightning.compare.tables import (
    Table,
    bucket_table,
    description_table,
    forgetting_source_table,
    forgetting_table,
    number,
    pair_table,
    result_table,
    results_csv,
    sweep_table,
)
from dft_lightning.errors import InputError
from dft_lightning.files import refuse_link, write_text

PLOTS = "plots"


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: its heading.
        text: what stands below it.
        tables: those below the text.
        plots: those below the tables.
    """

    title: str
    text: list[str]
    tables: list[Table]
    plots: list[Plot]


def write_report(output: Path) -> None:
    """Build the report of the runs below a comparison's folder.

    Raises:
        InputError: the folder is no comparison's, or no run of a loss has ended in it.
    """
    for path in (output / PLOTS, *(output / PLOTS).glob("*")):
        refuse_link(path)
    settings = read_written_settings(output)
    records = read_records(output)
    unfinished = unfinished_runs(output)
    if not any(record.whole and record.loss is not None for record in records):
        names = "; ".join(f"{name}: {reason}" for name, reason in list(unfinished.items())[:3])
        raise InputError(f"{output}: {len(unfinished)} runs and none of a loss has ended ({names})")
    findings = analyse(settings, records)
    plots = all_plots(findings)
    for plot in plots:
        plot.save(output / PLOTS)
    config = yaml.safe_dump(settings, sort_keys=False)
    context = {
        "title": f"Comparison of losses: {', '.join(findings.losses)}",
        "summary": summary(findings),
        "facts": facts(findings, read_calls(output)),
        "sections": sections(findings, plots, unfinished),
        "config": config,
        "fence": "`" * max(4, *(len(run) + 1 for run in re.findall("`+", config)), 0),
    }
    write_text(output / "results.csv", results_csv(findings, records))
    for name in ("report.md", "report.html"):
        write_text(output / name, _render(name, {**context, "plots": PLOTS}))
    sys.stderr.write(f"report: {output / 'report.html'}\n")


def read_written_settings(output: Path) -> dict[str, Any]:
    """The comparison's config as it lies beside the runs.

    Raises:
        InputError: there is none.
    """
    path = output / SETTINGS
    if not path.is_file():
        raise InputError(f"{output}: no {SETTINGS} here: not the output folder of a comparison")
    return read_yaml(path)


def unfinished_runs(output: Path) -> dict[str, str]:
    """Why each run that has not ended has not, by name."""
    found = {}
    for folder in sorted((output / RUNS).glob("*")):
        if not (folder / CONFIG).is_file() or is_tested(folder):
            continue
        stages = [(stage, folder / f"{stage}.log") for stage in ("test", "fit")]
        log = next(((stage, path) for stage, path in stages if path.is_file()), None)
        if log is not None:
            text = log[1].read_text(encoding="utf-8", errors="replace")
            found[folder.name] = f"{log[0]}: {last_error(text)}"
        else:
            begun = (folder / FIT).exists() or (folder / TEST).exists()
            found[folder.name] = "begun" if begun else "not begun"
    return found


def summary(findings: Findings) -> list[str]:
    """The report in sentences, with no winner beyond what the intervals carry."""
    if not findings.comparable:
        return [
            "NOT COMPARABLE: runs that must have the same start, rows and targets do not (see the checks). No loss is "
            "set against another."
        ]
    lines = []
    for name in findings.choices:
        measure = findings.measures[name]
        if measure.by_problem:
            lines.append(f"{measure.title}: {_in_words(findings, name)}.")
    lines.append("Where none is called better, no difference is shown beyond chance.")
    lines.append(_of_seeds(findings))
    lines += _at_the_edge(findings)
    lines += _forgotten(findings)
    return lines


def _of_seeds(findings: Findings) -> str:
    """What the statements are of."""
    counts = [len(choice.records) for choices in findings.choices.values() for choice in choices]
    fewest, most = min(counts), max(counts)
    seeds = f"{most}" if fewest == most else f"{fewest} to {most}"
    claim = f"All this is of the seeds that ran, {seeds} of each loss, on test problems like these"
    if fewest >= FEWEST_SEEDS:
        return f"{claim}; a loss is called better only where the seeds agree as well."
    return f"{claim}: too few seeds to tell what another would give."


def _at_the_edge(findings: Findings) -> list[str]:
    """That a better rate may lie beyond the sweep, and how to look there."""
    rates = findings.settings["learning_rates"]
    found = []
    for name in findings.settings["best_by"]:
        choices = findings.choices[name]
        for end, at, times in (("highest", max(rates), 3.0), ("lowest", min(rates), 1 / 3)):
            losses = [choice.loss for choice in choices if choice.at_edge and choice.learning_rate == at]
            if losses:
                who = "every loss" if len(losses) == len(choices) else _listed(losses, losses)
                beyond = float(f"{times * at:.1g}")
                found.append((f"{findings.measures[name].title}: {who} at the {end} rate, {at:g}", beyond))
    if not found:
        return []
    wider = ", ".join(f"{rate:g}" for rate in sorted({*rates, *(beyond for _, beyond in found)}))
    where = "; ".join(who for who, _ in found)
    return [
        f"The best rate lies at the edge of the sweep, so that a better one may lie beyond: {where}. The same command "
        f"goes on with learning_rates: [{wider}] in its config."
    ]


def _forgotten(findings: Findings) -> list[str]:
    """How far each loss went from the start on other rows, with its rate, by which losses may differ."""
    choices = findings.choices[findings.main_measure]
    if not all(record.curve("forgetting", "kl") for choice in choices for record in choice.records):
        return []
    losses = [_distance(findings, choice) for choice in choices]
    several = len({record.learning_rate for record in findings.sweep()}) > 1
    return [
        f"Forgetting, at each loss's best rate ({findings.measures[findings.main_measure].title}): the divergence from "
        f"the start is {', '.join(losses)}, in nats per token on the second validation set."
        + (" For losses at one rate see the table of every learning rate." if several else "")
    ]


def _distance(findings: Findings, choice: Choice) -> str:
    """Of a loss at its rate, and at the lowest of the sweep that was as good."""
    found = f"{choice.loss} {number(statistics.fmean(choice.of_seeds('forgetting', 'kl')))} at {choice.learning_rate:g}"
    lowest = min([choice.learning_rate, *choice.tied])
    if lowest == choice.learning_rate:
        return found
    as_good = statistics.fmean(run.at_end("forgetting", "kl") for run in findings.swept(choice.loss, lowest))
    return f"{found} ({number(as_good)} at {lowest:g}, which was as good)"


def _in_words(findings: Findings, measure: str) -> str:
    """Each loss, the best first, with what it is better than."""
    better: dict[str, list[str]] = {}
    for pair in findings.pairs[measure]:
        if pair.winner is not None:
            better.setdefault(pair.winner, []).append(pair.second if pair.winner == pair.first else pair.first)
    means = {c.loss: statistics.fmean(c.of_seeds("test", measure)) for c in findings.choices[measure]}
    if findings.base:
        means[BASE] = findings.base.at_end("test", measure)
    order = sorted(means, key=lambda name: -means[name])
    return "; ".join(
        f"{name} {number(means[name])}" + (f", better than {_listed(better[name], order)}" if name in better else "")
        for name in order
    )


def _listed(names: list[str], order: list[str]) -> str:
    ordered = sorted(names, key=order.index)
    return " and ".join([", ".join(ordered[:-1]), ordered[-1]] if len(ordered) > 1 else ordered)


def facts(findings: Findings, calls: list[dict[str, float]]) -> list[tuple[str, str]]:
    """What was run, on what, and how long it took."""
    settings = findings.settings
    trained = [record for record in findings.records if record.fit]
    fits = [record.fit for record in trained if record.fit]
    versions = [{**fit["versions"]} for fit in fits]
    devices = sorted({f"{fit['device']}, {fit['world_size']} process(es), {fit['precision']}" for fit in fits})
    return [
        ("losses", ", ".join(findings.losses)),
        ("learning rates", ", ".join(f"{rate:g}" for rate in settings["learning_rates"])),
        ("seeds", _seeds(settings)),
        ("steps", ", ".join(sorted({str(fit["history"][-1]["step"]) for fit in fits}))),
        ("runs", f"{len(trained)} trained, {sum(record.test is not None for record in findings.records)} tested"),
        ("minutes in sum", _in_sum(findings)),
        ("minutes by the clock", _by_the_clock(calls)),
        ("base config", ", ".join(settings["base"])),
        *_own_classes(findings),
        ("device", "; ".join(devices)),
        ("versions", "; ".join(sorted({", ".join(f"{k} {v}" for k, v in each.items()) for each in versions}))),
    ]


def _own_classes(findings: Findings) -> list[tuple[str, str]]:
    """The runs' module and data module, where they are not the package's own."""
    found = []
    for group, what in (("model", "module"), ("data", "data module")):
        paths = {str(record.config.get(group, {}).get("class_path", "")) for record in findings.records}
        if own := ", ".join(sorted(path for path in paths if not path.startswith("dft_lightning."))):
            found.append((what, own))
    return found


def _in_sum(findings: Findings) -> str:
    """What the runs took, one after the other: several at once take less by the clock."""
    seconds = sum(record.fit["seconds"] for record in findings.records if record.fit)
    tests = [record.test for record in findings.records if record.test]
    timed = all("seconds" in test for test in tests)  # records of older versions have no time of their tests
    if timed:
        seconds += sum(test["seconds"] for test in tests)
    what = "training, evaluation and tests" if timed else "training and evaluation, without the tests"
    return f"{_minutes(seconds)}, of {what}; models load beside it"


def _by_the_clock(calls: list[dict[str, float]]) -> str:
    if not calls:
        return "not known: no call of compare made the runs"
    seconds = sum(call["ended"] - call["began"] for call in calls)
    return f"{_minutes(seconds)}, " + ("in one call" if len(calls) == 1 else f"in {len(calls)} calls together")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f}" if seconds >= 600 else f"{seconds / 60:.1f}"


def _seeds(settings: dict[str, Any]) -> str:
    swept = ", ".join(map(str, settings["seeds"]))
    further = ", ".join(map(str, settings["seeds_at_best"]))
    return swept + (f" at every rate, {further} at the best" if further else "")


def sections(findings: Findings, plots: list[Plot], unfinished: dict[str, str]) -> list[Section]:
    """The body, in order."""
    by_name = {plot.name: plot for plot in plots}

    def take(*prefixes: str) -> list[Plot]:
        return [by_name.pop(name) for name in list(by_name) if name.startswith(prefixes)]

    learning_rate = "Each loss at the learning rate that was best for it on validation rows, by the table's measure."
    measured = [findings.measures[name] for name in findings.settings["measures"]]
    results = [result_table(findings, measure) for measure in measured]
    parts = [Section("Results on test rows", [learning_rate], results, take("temperature"))]
    if findings.comparable:
        pairs = [pair_table(findings, m, findings.pairs[m.name]) for m in measured if m.by_problem]
        text = [
            "Of the seeds that both losses have: a paired bootstrap over problems (10,000 resamples), and the p-value "
            "of 20,000 random flips of the problems' differences, which Holm's rule adjusts for the number of pairs. "
            "One is called better where that is below 0.05 and the interval excludes zero; where there is Student's "
            "interval over seeds, it must as well. Otherwise the statement is of the seeds that ran."
        ]
        parts.append(Section("Pairs of losses", text, pairs, []))
    parts.append(Section("Along training", [], [], take("validation_greedy", "validation_sampled", "validation_pass")))
    sweep = sweep_table(findings)
    if sweep is not None:
        parts.append(Section("Learning rates", [], [sweep], take("learning_rate")))
    inside = take("validation_", "train_", "nll_")
    parts.append(Section("Inside the model", [], [description_table(findings)], inside))
    parts.append(Section("What was taught and what was given up", [], [bucket_table(findings)], take("probabilit")))
    forgetting = [table for table in (forgetting_table(findings), forgetting_source_table(findings)) if table]
    if forgetting:
        parts.append(Section("Forgetting", ["On the second validation set."], forgetting, take("forgetting")))
    parts.append(Section("The losses", [], [], take("weight")))
    parts.append(Section("Checks", [], [_check_table(findings)], []))
    if findings.left_out:
        rows = [[name, reason] for name, reason in findings.left_out.items()]
        parts.append(Section("Not part of the comparison", [], [Table("", ["what", "why"], rows)], []))
    if unfinished:
        rows = [[name, reason] for name, reason in unfinished.items()]
        parts.append(Section("Runs that have not ended", [], [Table("", ["run", "why"], rows)], []))
    return parts


def _check_table(findings: Findings) -> Table:
    rows = []
    for check in findings.checks:
        if check.agrees:
            rows.append([check.what, check.scope, "the same", next(iter(check.hashes))[:16]])
        else:
            groups = "; ".join(f"{value[:8]}: {', '.join(names)}" for value, names in check.hashes.items())
            rows.append([check.what, check.scope, f"DIFFERENT {check.note}".strip(), groups])
    caption = (
        f"SHA-256, first 16 digits. The initial weights are those of the {BASE} too, of the seed it was tested with."
    )
    return Table("", ["what", "runs", "result", "hash"], rows, caption)


def _render(name: str, context: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dft_lightning.compare"),
        autoescape=name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = lambda text: re.sub(r"([\\`*_|<>\[\]])", r"\\\1", str(text).replace("\n", " "))
    return environment.get_template(f"{name}.jinja").render(context)
