"""Draw the figures of docs/losses.md, docs/losses/*.svg: the weight that each loss gives a token.

python docs/plot_losses.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dft_lightning.compare.plots.style import BASE_COLOUR, Styles, add_legend, drawing
from dft_lightning.losses import (
    ChordPhiLoss,
    CrossEntropyLoss,
    DEFTLoss,
    DFTLoss,
    EAFTLoss,
    FocalLoss,
    ImportanceWeightedLoss,
    InfoSFTLoss,
    MixtureLoss,
    PowerLoss,
    ProximalLoss,
    RectifiedLoss,
    SEDSFTLoss,
    ThresholdLoss,
    TokenLoss,
    TokenStats,
    TrustRegionLoss,
    statistics_from_logits,
    token_loss_and_weight,
)

FOLDER = Path(__file__).with_name("losses")

P = torch.arange(1, 1000, dtype=torch.float64) / 1000
RATIO = torch.arange(1, 501, dtype=torch.float64) / 200
_REFERENCE = 0.25  # probability under the reference; the weight depends on the ratio alone


@dataclass(frozen=True)
class Line:
    """A loss and what it is given at each point.

    Attributes:
        loss: the loss.
        stats: of the points of the horizontal axis, for this loss.
    """

    loss: TokenLoss
    stats: Callable[[TokenLoss], TokenStats]

    def weight(self) -> Tensor:
        """``-dL/dl`` at each point."""
        return token_loss_and_weight(self.loss, self.stats(self.loss))[1]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        xlabel: of the horizontal axis.
        x: its points.
        lines: by what the legend calls them.
    """

    title: str
    xlabel: str
    x: Tensor
    lines: dict[str, Line]


def of_p(loss: TokenLoss) -> TokenStats:
    """The target's probability and nothing else."""
    return TokenStats(log_prob=P.log())


def of_spread(loss: TokenLoss) -> TokenStats:
    """The likeliest tokens have little together."""
    return TokenStats(log_prob=P.log(), top_k_mass=torch.zeros_like(P))


def others(count: int) -> Callable[[TokenLoss], TokenStats]:
    """What is not on the target lies on ``count`` other tokens alike."""

    def stats(loss: TokenLoss) -> TokenStats:
        # EAFT takes the entropy of 20 tokens: where there are fewer, the rest cannot be chosen.
        impossible = max(0, 19 - count)
        rest = ((1 - P) / count).log()[:, None].expand(-1, count)
        logits = torch.cat([P.log()[:, None], rest, rest.new_full((len(P), impossible), -math.inf)], dim=1)
        return statistics_from_logits(logits, torch.zeros(len(P), dtype=torch.long), loss.needs)

    return stats


def of_ratio(loss: TokenLoss) -> TokenStats:
    """The target's probability under the model and under the reference."""
    reference = torch.full_like(RATIO, _REFERENCE).log()
    return TokenStats(log_prob=(RATIO * _REFERENCE).log(), reference_log_prob=reference)


# Grey and over the others, which lie on them in places.
_KNOWN = {"CrossEntropyLoss": "--", "DFTLoss": ":"}

_P = "probability p of the target"
_RATIO = "p over the reference's probability"

LIKELY = Panel(
    "More for what the model finds likely",
    _P,
    P,
    {
        "CrossEntropyLoss": Line(CrossEntropyLoss(), of_p),
        "DFTLoss, PowerLoss q=1": Line(DFTLoss(), of_p),
        "PowerLoss q=0.3": Line(PowerLoss(q=0.3), of_p),
        "PowerLoss q=4": Line(PowerLoss(q=4.0), of_p),
        "ThresholdLoss 0.3": Line(ThresholdLoss(threshold=0.3), of_p),
        "MixtureLoss, half DFT": Line(MixtureLoss([CrossEntropyLoss(), DFTLoss()]), of_p),
    },
)
UNLIKELY = Panel(
    "More for what it finds unlikely, or is undecided about",
    _P,
    P,
    {
        "CrossEntropyLoss": Line(CrossEntropyLoss(), of_p),
        "ChordPhiLoss": Line(ChordPhiLoss(), of_p),
        "FocalLoss gamma=1": Line(FocalLoss(gamma=1.0), of_p),
        "FocalLoss gamma=2": Line(FocalLoss(gamma=2.0), of_p),
        "ThresholdLoss 0.3, above=False": Line(ThresholdLoss(threshold=0.3, above=False), of_p),
    },
)
BOUNDED = Panel(
    "Held back below a probability, or from one on",
    _P,
    P,
    {
        "CrossEntropyLoss": Line(CrossEntropyLoss(), of_p),
        "DFTLoss": Line(DFTLoss(), of_p),
        "InfoSFTLoss 0.93": Line(InfoSFTLoss(), of_p),
        "TrustRegionLoss 0.1": Line(TrustRegionLoss(), of_p),
        "TrustRegionLoss 0.4": Line(TrustRegionLoss(floor=0.4), of_p),
        "RectifiedLoss 0.5": Line(RectifiedLoss(), of_p),
    },
)
SPREAD = Panel(
    "SEDSFTLoss, where the likeliest have little",
    _P,
    P,
    {
        "CrossEntropyLoss": Line(CrossEntropyLoss(), of_p),
        "weight 0.5": Line(SEDSFTLoss(threshold=0.9, weight=0.5), of_spread),
        "weight 1": Line(SEDSFTLoss(threshold=0.9), of_spread),
    },
)
_COUNTS = (1, 19, 1000)
DEFT = Panel(
    "DEFTLoss, by where the rest lies",
    _P,
    P,
    {
        "CrossEntropyLoss": Line(CrossEntropyLoss(), of_p),
        "DFTLoss": Line(DFTLoss(), of_p),
        **{f"on {count} other{'s' * (count > 1)}": Line(DEFTLoss(), others(count)) for count in _COUNTS},
    },
)
EAFT = Panel(
    "EAFTLoss, by where the rest lies",
    _P,
    P,
    {
        "CrossEntropyLoss": Line(CrossEntropyLoss(), of_p),
        "DFTLoss": Line(DFTLoss(), of_p),
        **{f"on {count} other{'s' * (count > 1)}": Line(EAFTLoss(), others(count)) for count in _COUNTS},
    },
)
IMPORTANCE = Panel(
    'ImportanceWeightedLoss, level="token"',
    _RATIO,
    RATIO,
    {
        "CrossEntropyLoss": Line(CrossEntropyLoss(), of_ratio),
        "clip to [0, 16]": Line(ImportanceWeightedLoss("token"), of_ratio),
        "clip to [0.2, 1.8]": Line(ImportanceWeightedLoss("token", clip=(0.2, 1.8)), of_ratio),
        "temperature 0.5": Line(ImportanceWeightedLoss("token", temperature=0.5), of_ratio),
    },
)
PROXIMAL = Panel(
    "ProximalLoss",
    _RATIO,
    RATIO,
    {
        "CrossEntropyLoss": Line(CrossEntropyLoss(), of_ratio),
        "epsilon 0.28": Line(ProximalLoss(), of_ratio),
        "epsilon 0.1": Line(ProximalLoss(epsilon=0.1), of_ratio),
    },
)

#: The panels of each figure, by the name of its file.
FIGURES = {
    "weight_of_p": (LIKELY, UNLIKELY),
    "weight_within_bounds": (BOUNDED, SPREAD),
    "weight_of_the_rest": (DEFT, EAFT),
    "weight_of_the_ratio": (IMPORTANCE, PROXIMAL),
}


def draw(name: str) -> Figure:
    """A figure: its panels side by side."""
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    for part, panel in zip(figure.subfigures(1, 2), FIGURES[name], strict=True):
        axes = part.add_subplot()
        axes.set_title(panel.title)
        axes.set_xlabel(panel.xlabel)
        axes.set_ylabel("weight of the token, -dL/d log p")
        styles = Styles(list(panel.lines))
        for label, line in panel.lines.items():
            style = {"color": styles.colour(label)}
            if label in _KNOWN:
                style = {"color": BASE_COLOUR, "linestyle": _KNOWN[label], "zorder": 3}
            axes.plot(panel.x, line.weight(), label=label, **style)
        axes.set_xlim(0, float(panel.x[-1] + panel.x[0]))
        axes.set_ylim(bottom=0)
        add_legend(axes)
    return figure


def save(name: str, folder: Path) -> None:
    """Write ``NAME.svg``."""
    folder.mkdir(exist_ok=True)
    with drawing():
        draw(name).savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    for name in FIGURES:
        save(name, FOLDER)
