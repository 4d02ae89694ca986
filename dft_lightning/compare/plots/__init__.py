"""The report's figures, one panel each: side by side on a screen, one below the other on a phone."""

from __future__ import annotations

from dft_lightning.compare.analysis import Findings
from dft_lightning.compare.plots.curves import (
    along_training,
    learning_rate_sensitivity,
    logged_in_training,
    nll_against_objective,
    temperature_curve,
)
from dft_lightning.compare.plots.style import Plot, Styles, drawing
from dft_lightning.compare.plots.tokens import by_bucket, histogram, weight_of_p

__all__ = ["Plot", "all_plots"]


def all_plots(findings: Findings) -> list[Plot]:
    """The figures that the records of a comparison allow, in the report's order."""
    with drawing():
        plots = _drawn(findings, Styles(list(dict.fromkeys([*findings.settings["losses"], *findings.losses]))))
    return [plot for plot in plots if plot is not None]


def _drawn(findings: Findings, styles: Styles) -> list[Plot | None]:
    largest_k = [name for name in findings.measures if name.startswith("pass_at_")][-1:]
    plots: list[Plot | None] = [along_training(findings, styles, name) for name in ("greedy", "sampled", *largest_k)]
    plots.append(temperature_curve(findings, styles))
    plots += [learning_rate_sensitivity(findings, styles, name) for name in ("greedy", "sampled")]
    plots += [along_training(findings, styles, name) for name in ("nll", "token_accuracy", "entropy", "mean_weight")]
    plots.append(logged_in_training(findings, styles, "train/grad_norm", "gradient norm before clipping"))
    plots.append(nll_against_objective(findings, styles))
    plots += [histogram(findings, styles, loss) for loss in findings.losses]
    plots.append(by_bucket(findings, styles))
    plots += [along_training(findings, styles, name, split="forgetting") for name in ("greedy", "sampled", "nll")]
    plots.append(weight_of_p(findings, styles))
    return plots
