"""Probabilities of the training targets before and after: what a loss taught and what it gave up."""

from __future__ import annotations

import numpy as np

from dft_lightning.compare.analysis import Findings
from dft_lightning.compare.buckets import BUCKETS, bucket_means
from dft_lightning.compare.names import slug_of
from dft_lightning.compare.plots.style import BASE_COLOUR, Plot, Styles, add_legend, new_figure, set_log

_BINS = [i / 20 for i in range(21)]


def histogram(findings: Findings, styles: Styles, loss: str) -> Plot | None:
    """Targets by probability, before training and after, one loss."""
    choice = next(c for c in findings.choices[findings.main_measure] if c.loss == loss)
    record = choice.records[0]
    before, after = record.probabilities["before"], record.probabilities["after"]
    figure, axes = new_figure("probability of the target", "targets")
    axes.hist(after, _BINS, color=styles.colour(loss), alpha=0.75, label=f"after {loss}")
    axes.hist(before, _BINS, histtype="step", color=BASE_COLOUR, linewidth=1.8, label="before")
    set_log(axes, "y")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0.7)  # one target is a bar
    add_legend(axes)
    caption = (
        f"{len(before)} targets of training rows, learning rate {choice.learning_rate:g}, seed {record.seed}. "
        f"Below 0.1: {np.mean(before < 0.1):.1%} before, {np.mean(after < 0.1):.1%} after; "
        f"from 0.9: {np.mean(before >= 0.9):.1%} before, {np.mean(after >= 0.9):.1%} after."
    )
    return Plot(f"probabilities_{slug_of(loss)}", f"Probabilities of the targets: {loss}", caption, figure)


def by_bucket(findings: Findings, styles: Styles) -> Plot | None:
    """Mean probability after training of the targets in each bucket of initial probability."""
    choices = findings.choices[findings.main_measure]
    figure, axes = new_figure("probability before training (and how many targets)", "mean probability after")
    places = np.arange(len(BUCKETS))
    width = 0.8 / len(choices)
    for i, choice in enumerate(choices):
        _, _, after = bucket_means(choice.records[0])
        axes.bar(
            places + (i - (len(choices) - 1) / 2) * width,
            after,
            width,
            label=choice.loss,
            **styles.bar(choice.loss),
        )
    counts, before, _ = bucket_means(choices[0].records[0])
    axes.hlines(before, places - 0.42, places + 0.42, color="black", linewidth=1.5, label="before")
    labels = [f"{low:g} to {high:g}\n({count})" for (low, high), count in zip(BUCKETS, counts, strict=True)]
    axes.set_xticks(places, labels)
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, 1.02)
    add_legend(axes)
    caption = "Targets of training rows by what the base model gave them; wrong demonstrations are among the unlikely."
    return Plot("probability_buckets", "What was unlikely before, and after", caption, figure)
