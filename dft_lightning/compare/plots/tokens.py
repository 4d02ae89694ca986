"""Tokens by their probability: what a loss taught and what it gave up, and the weight that it gives each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dft_lightning.checkpoints.trust import check_classes
from dft_lightning.compare.analysis import Findings
from dft_lightning.compare.files import slug_of
from dft_lightning.compare.plots.style import BASE_COLOUR, Plot, Styles, add_legend, new_figure, set_log
from dft_lightning.compare.records import BUCKETS
from dft_lightning.component import from_plain
from dft_lightning.errors import one_line
from dft_lightning.losses import TokenLoss, TokenStats, token_loss_and_weight
from dft_lightning.losses.statistics import normalise_needs

_BINS = [i / 20 for i in range(21)]
# Of a schedule: dashed, for its ends lie on the lines of the losses it goes between.
_DASHES = {"at first": ":", "at last": "--"}


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
        _, _, after = choice.records[0].bucket_means()
        axes.bar(
            places + (i - (len(choices) - 1) / 2) * width,
            after,
            width,
            label=choice.loss,
            **styles.bar(choice.loss),
        )
    counts, before, _ = choices[0].records[0].bucket_means()
    axes.hlines(before, places - 0.42, places + 0.42, color="black", linewidth=1.5, label="before")
    labels = [f"{low:g} to {high:g}\n({count})" for (low, high), count in zip(BUCKETS, counts, strict=True)]
    axes.set_xticks(places, labels)
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, 1.02)
    add_legend(axes)
    caption = "Targets of training rows by what the base model gave them; wrong demonstrations are among the unlikely. "
    caption += f"The first seed. {findings.rates()}"
    return Plot("probability_buckets", "What was unlikely before, and after", caption, figure)


def weights(loss: TokenLoss, probabilities: Tensor, step: int) -> Tensor | None:
    """``-dL/dl`` at each probability, ``l = log p``; ``None`` where a loss reads more than the probability."""
    reads_more = any(need.name not in ("log_prob", "log_expected_prob") for need in normalise_needs(loss.needs))
    if reads_more or not loss.pointwise:
        return None
    return token_loss_and_weight(loss, TokenStats(log_prob=probabilities.log(), step=step))[1]


def weight_of_p(findings: Findings, styles: Styles) -> Plot | None:
    """One line a loss; a loss with a schedule has one for its beginning and one for its end."""
    probabilities = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    last = max((step for record in findings.records for step, _ in record.curve("validation", "nll")), default=0)
    figure, axes = new_figure("probability p of the target", "weight of the token, -dL/d log p")
    left_out, drawn, lowest = [], 0, 0.0
    for name, spec in findings.settings["losses"].items():
        style = {**styles.line(name), "marker": ""}
        try:
            check_classes(spec, "its loss", "compare --config, whose classes are imported, draws it")
            lines = _lines(from_plain(spec, TokenLoss), probabilities, last)
        except Exception as error:  # a user's own loss: what it raises must not cost the report
            left_out.append(f"{name} ({one_line(error, 200)})")
            continue
        if not lines:
            left_out.append(f"{name} (it reads more than p)")
        for when, values in lines.items():
            dashes = {"linestyle": _DASHES[when]} if when in _DASHES else {}
            axes.plot(probabilities, values, label=f"{name} {when}".strip(), **{**style, **dashes})
            drawn, lowest = drawn + 1, min(lowest, float(values.min()))
    if not drawn:
        return None
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if lowest < 0 else 0)
    add_legend(axes)
    caption = "What a token counts in the gradient, whatever the model: cross-entropy counts each alike."
    if left_out:
        caption += f" Not drawn: {', '.join(left_out)}."
    return Plot("weight_of_p", "Weight as a function of p", caption, figure)


def _lines(loss: TokenLoss, probabilities: Tensor, last_step: int) -> dict[str, Tensor]:
    """Weights by what the legend calls them: two lines for a loss with a schedule, none for one that reads more."""
    steps = {"at first": 0, "at last": last_step} if loss.uses_step else {"": 0}
    found = {when: weights(loss, probabilities, step) for when, step in steps.items()}
    return {when: values for when, values in found.items() if values is not None}
