"""Figures over steps, temperatures and learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from dft_lightning.compare.analysis import Findings
from dft_lightning.compare.plots.style import (
    BASE_COLOUR,
    Plot,
    Styles,
    add_legend,
    fit_to_lines,
    make_logarithmic,
    new_figure,
    plain,
    set_log,
)

_SPLITS = {"validation": "validation rows", "forgetting": "forgetting rows"}


def along_training(findings: Findings, styles: Styles, measure: str, split: str = "validation") -> Plot | None:
    """A measure against optimizer steps, each loss at its best learning rate, with a band over seeds."""
    judged = findings.measures[measure].higher_is_better is not None
    chosen_by = measure if split == "validation" and judged else findings.main_measure
    choices = findings.chosen_by(chosen_by)
    lines = {choice.loss: [record.curve(split, measure) for record in choice.records] for choice in choices}
    if not any(any(curves) for curves in lines.values()):
        return None
    found = findings.measures[measure]
    figure, axes = new_figure("optimizer step", found.title)
    bands = _draw(axes, styles, lines, logarithmic=measure == "nll", highest=1.0 if found.is_share else math.inf)
    add_legend(axes)
    caption = f"On {_SPLITS[split]}. {findings.rates(chosen_by)} {bands}"
    return Plot(f"{split}_{measure}", f"{found.title}, along training", caption, figure)


def logged_in_training(findings: Findings, styles: Styles, name: str, title: str) -> Plot | None:
    """What the training step logged, at the learning rate that was best by the main measure."""
    choices = findings.choices[findings.main_measure]
    lines = {choice.loss: [record.logged(name) for record in choice.records] for choice in choices}
    if not any(any(curves) for curves in lines.values()):
        return None
    figure, axes = new_figure("optimizer step", title)
    bands = _draw(axes, styles, lines, logarithmic=True, marked=False)
    add_legend(axes)
    caption = f"As logged in training. {findings.rates()} {bands}"
    return Plot(name.replace("/", "_"), title, caption, figure)


def temperature_curve(findings: Findings, styles: Styles) -> Plot | None:
    """Exact match on test rows against the temperature of sampling."""
    measure = "sampled" if "sampled" in findings.choices else findings.main_measure
    choices = findings.choices[measure]
    figure, axes = new_figure("temperature (0 is greedy)", "exact match")
    base = findings.base.test["curve"] if findings.base and findings.base.test else []
    if base:
        axes.plot(*zip(*base, strict=True), color=BASE_COLOUR, linestyle="--", label="base model")
    bands = _draw(
        axes, styles, {c.loss: [record.test["curve"] for record in c.records if record.test] for c in choices}
    )
    axes.set_ylim(0, 1)
    add_legend(axes)
    caption = f"On test rows, after training. {findings.rates(measure)} {bands}"
    return Plot("temperature", "Exact match against temperature", caption, figure)


def learning_rate_sensitivity(findings: Findings, styles: Styles, measure: str) -> Plot | None:
    """A measure on validation rows after training, against the learning rate, over the sweep's seeds."""
    sweep = findings.sweep()
    if len({record.learning_rate for record in sweep}) < 2:
        return None
    title = findings.measures[measure].title
    figure, axes = new_figure("learning rate", title)
    seeds = set()
    for loss in findings.losses:
        own = [record for record in sweep if record.loss == loss]
        seeds |= {record.seed for record in own}
        rates = sorted({record.learning_rate for record in own})
        values = [
            float(np.mean([r.at_end("validation", measure) for r in own if r.learning_rate == rate])) for rate in rates
        ]
        axes.plot(rates, values, label=loss, **styles.line(loss))
    fit_to_lines(axes, highest=1.0)
    _mark_rates(axes, sorted({record.learning_rate for record in sweep}))
    add_legend(axes)
    of = "one seed" if len(seeds) == 1 else f"mean of {len(seeds)} seeds"
    return Plot(
        f"learning_rate_{measure}", f"{title}, by learning rate", f"After training, on validation rows, {of}.", figure
    )


def nll_against_objective(findings: Findings, styles: Styles) -> Plot | None:
    """Each loss's way through training: its own objective across, cross-entropy up."""
    choices = findings.choices[findings.main_measure]
    figure, axes = new_figure("objective (its own, per target token)", "nll (nats per token)")
    for choice in choices:
        record = choice.records[0]
        objective, nll = record.curve("validation", "loss"), record.curve("validation", "nll")
        if not objective:
            return None
        x, y = [value for _, value in objective], [value for _, value in nll]
        line = styles.line(choice.loss)
        axes.plot(x, y, label=choice.loss, **line)
        axes.plot(x[-1:], y[-1:], marker=line["marker"], color=line["color"], markersize=10, markerfacecolor="white")
    make_logarithmic(axes)
    fit_to_lines(axes)
    add_legend(axes)
    caption = (
        "On validation rows, before training, along it and after (the large hollow mark). On a line with slope one the "
        "two fall together; where a line rises to the left, cross-entropy grows while the objective falls. The first "
        "seed. " + findings.rates()
    )
    return Plot("nll_against_objective", "nll against the objective", caption, figure)


def _mark_rates(axes: Axes, rates: Sequence[float]) -> None:
    """A tick at each rate of the sweep, with its number where that does not lie on the one before."""
    set_log(axes, "x")
    decades = math.log10(rates[-1] / rates[0])
    numbered, end = [], -math.inf
    for rate in rates:
        centre = math.log10(rate / rates[0]) / decades
        half = 0.015 + 0.013 * len(plain(rate))  # of the panel's width, at the size of its font
        if centre - half >= end:
            numbered.append(rate)
            end = centre + half
    axes.set_xticks(numbered)
    axes.set_xticks([rate for rate in rates if rate not in numbered], minor=True)


def _draw(
    axes: Axes,
    styles: Styles,
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    *,
    logarithmic: bool = False,
    highest: float = math.inf,
    marked: bool = True,
) -> str:
    """Each loss's mean over its runs and, where there are several, from the lowest to the highest as a band.

    Args:
        axes: to draw in.
        styles: of the losses.
        curves: by loss, ``(x, y)`` of each run.
        logarithmic: whether the vertical axis is, if all means are above 0.
        highest: that a value can be.
        marked: whether each point has a mark.

    Returns:
        What the caption says of the bands.
    """
    bands, halved = {}, False
    for loss, runs in curves.items():
        common = sorted(set.intersection(*({x for x, _ in run} for run in runs)))
        found = [dict(run) for run in runs]
        values = np.array([[run[x] for run in found] for x in common], dtype=np.float64).reshape(len(common), -1)
        style = styles.line(loss) if marked else {**styles.line(loss), "marker": ""}
        axes.plot(common, values.mean(axis=1), label=loss, **style)
        if common and len(runs) > 1:
            bands[loss] = common, values
    if logarithmic:
        make_logarithmic(axes, "y")
    for loss, (common, values) in bands.items():
        low, high = values.min(axis=1), values.max(axis=1)
        if axes.get_yscale() == "log":  # which has no place for 0: the band would fall through the panel
            halved |= bool((low <= 0).any())
            low = np.where(low > 0, low, values.mean(axis=1))
        axes.fill_between(common, low, high, color=styles.colour(loss), alpha=0.15, linewidth=0)
    fit_to_lines(axes, highest)
    return _bands([len(runs) for runs in curves.values()]) + (
        " Where a band reaches 0, which a logarithmic axis has no place for, its upper half alone is drawn."
        if halved
        else ""
    )


def _bands(counts: Sequence[int]) -> str:
    if max(counts) == 1:
        return "One seed: no band."
    fewest, most = min(counts), max(counts)
    seeds = f"{most}" if fewest == most else f"{fewest} to {most}"
    return f"Mean of {seeds} seeds, from the lowest to the highest as a band."
