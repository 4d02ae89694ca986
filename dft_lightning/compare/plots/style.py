"""Colours, markers and the empty figure: the same loss looks the same everywhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

# Okabe and Ito's colours, told apart by colour-blind readers; markers tell losses apart in black and white too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BASE_COLOUR = "#6b6b6b"

_RC: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.fonttype": "path",
    "text.parse_math": False,  # a name with dollar signs is a name
    "svg.hashsalt": "dft_lightning",  # the same figure gives the same file
}


def drawing() -> AbstractContextManager[None]:
    """The style, for everything that is drawn or saved inside."""
    return mpl.rc_context(_RC)


class Styles:
    """How each loss is drawn, by its place in the comparison.

    Args:
        losses: names in the comparison's order.
    """

    def __init__(self, losses: Sequence[str]) -> None:
        self._place = {name: place for place, name in enumerate(losses)}

    def colour(self, loss: str) -> str:
        """Its colour."""
        return _COLOURS[self._place[loss] % len(_COLOURS)]

    def line(self, loss: str) -> dict[str, Any]:
        """Colour, marker and dashes for a line; where colours come again, markers are hollow."""
        place = self._place[loss]
        dashes = ("-", "--", ":")[place // len(_COLOURS) % 3]
        style = {"color": self.colour(loss), "marker": _MARKERS[place % len(_MARKERS)], "linestyle": dashes}
        return style if place < len(_COLOURS) else {**style, "markerfacecolor": "white"}


@dataclass(frozen=True)
class Plot:
    """A figure with its words.

    Attributes:
        name: of its files.
        title: above it.
        caption: below it: what was chosen how, and what the reader should know.
        figure: the drawing.
    """

    name: str
    title: str
    caption: str
    figure: Figure

    def save(self, folder: Path) -> None:
        """Write ``NAME.png`` and ``NAME.svg``."""
        folder.mkdir(parents=True, exist_ok=True)
        with drawing():
            self.figure.savefig(folder / f"{self.name}.png", dpi=160, metadata={"Software": None})
        (folder / f"{self.name}.svg").write_bytes(self._svg)

    def data_uri(self) -> str:
        """The SVG for an ``img`` in a page that needs no other file."""
        return "data:image/svg+xml;base64," + base64.b64encode(self._svg).decode()

    @cached_property
    def _svg(self) -> bytes:
        buffer = io.BytesIO()
        with drawing():
            self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()


def new_figure(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """An empty panel with its axes named."""
    figure = Figure(figsize=(4.8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def add_legend(axes: Axes) -> None:
    """Below the panel, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    columns = 3 if max(map(len, labels)) < 14 else 2
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))


def make_logarithmic(axes: Axes, x: bool = True, y: bool = True) -> None:
    """Logarithmic axes with few and plain numbers; an axis stays linear where a value is 0 or less.

    Call it when the lines are drawn.
    """
    data = np.concatenate([np.column_stack(line.get_data()).astype(float) for line in axes.get_lines()])
    for wanted, axis, values, scale in (
        (x, axes.xaxis, data[:, 0], axes.set_xscale),
        (y, axes.yaxis, data[:, 1], axes.set_yscale),
    ):
        if wanted and (values > 0).all():
            scale("log")
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
