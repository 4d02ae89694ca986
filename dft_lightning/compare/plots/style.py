"""Colours, markers and the empty figure: the same loss looks the same everywhere."""

from __future__ import annotations

import base64
import io
import math
import textwrap
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
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

# Okabe and Ito's colours, told apart by colour-blind readers; markers tell losses apart in black and white too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BASE_COLOUR = "#6b6b6b"
_HEIGHT, _LEGEND_HEIGHT = 3.6, 0.5  # inches of a figure, and of the legend that it has room for

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
    # A name with dollar signs is a name. Nothing may write TeX then: Matplotlib's own logarithmic axes do.
    "text.parse_math": False,
    "axes.formatter.useoffset": False,
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

    def bar(self, loss: str) -> dict[str, Any]:
        """Colour for a bar; where colours come again, it is hatched."""
        hatch = ("", "////", "....")[self._place[loss] // len(_COLOURS) % 3]
        return {"facecolor": self.colour(loss), "edgecolor": "white", "linewidth": 0, "hatch": hatch}

    def line(self, loss: str) -> dict[str, Any]:
        """Colour, marker and dashes for a line; where colours come again, markers are hollow."""
        place = self._place[loss]
        dashes = ("-", "--", ":")[place // len(_COLOURS) % 3]
        style: dict[str, Any] = {"color": self.colour(loss), "marker": _MARKERS[place % len(_MARKERS)]}
        style |= {"linestyle": dashes, "clip_on": False}  # a mark at 0 or 1 is whole
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
    figure = Figure(figsize=(4.8, _HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def add_legend(axes: Axes) -> None:
    """Below the panel, where it covers nothing; a figure of one panel grows with it. Long names are broken."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    figure = axes.figure
    for columns, letters in ((3, 40), (2, 40), (1, 40), (1, 25)):
        broken = [textwrap.fill(label, letters) for label in labels]
        legend = figure.legend(handles, broken, loc="outside lower center", ncols=min(columns, len(labels)))
        size = legend.get_window_extent()
        if size.width <= figure.bbox.width or letters == 25:
            break
        legend.remove()
    if isinstance(figure, Figure):
        figure.set_figheight(_HEIGHT + max(0.0, size.height / figure.dpi - _LEGEND_HEIGHT))


def plain(value: float) -> str:
    """A number on an axis.

    Example:
        >>> [plain(value) for value in (0.0002, 1e-5, 20, 5e6)]
        ['0.0002', '1e-5', '20', '5e6']
    """
    mantissa, e, exponent = f"{value:g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


class _FewNumbers(LogLocator):
    """Between two and six places on a logarithmic axis: of each decade 1, 2 and 5, of many decades the powers of ten
    alone or some of them, and even steps where there is less than a decade."""

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        low, high = sorted((vmin, vmax))
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        sparse = [((1,), stride) for stride in range(1, last - first + 1)]
        choices: list[tuple[tuple[int, ...], int]] = [((1, 2, 5), 1), ((1, 3), 1), *sparse]
        for multiples, stride in choices:
            powers = range(-(-first // stride) * stride, last + 1, stride)
            places = [m * 10.0**power for power in powers for m in multiples if low <= m * 10.0**power <= high]
            if len(places) <= 6:
                break
        if len(places) > 2:
            return places
        even = MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(low, high)
        return [place for place in even if low <= place <= high]


def set_log(axes: Axes, which: str) -> None:
    """A logarithmic axis, ``"x"`` or ``"y"``, with few and plain numbers: Matplotlib's own are TeX."""
    axis, set_scale = {"x": (axes.xaxis, axes.set_xscale), "y": (axes.yaxis, axes.set_yscale)}[which]
    set_scale("log")
    axis.set_major_locator(_FewNumbers())
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def make_logarithmic(axes: Axes, which: str = "xy") -> None:
    """Logarithmic axes; one stays linear where a value is 0 or less. Call it when the lines are drawn."""
    for name, values in zip("xy", _drawn_values(axes), strict=True):
        if name in which and values.size and (values > 0).all():
            set_log(axes, name)


def fit_to_lines(axes: Axes, highest: float = math.inf) -> None:
    """Vertical limits that show every line, and of a band what a value can be.

    Not below 0 where no line is, not above ``highest``, and on a logarithmic axis no further down than the lines: the
    lower end of a band may be anywhere.
    """
    lowest = float(min(_drawn_values(axes)[1], default=0.0))
    bottom, top = axes.get_ylim()
    if axes.get_yscale() == "log":
        bottom = max(bottom, lowest / 1.25)
    elif lowest >= 0:
        bottom = max(bottom, 0.0)
    axes.set_ylim(bottom, min(top, highest))


def _drawn_values(axes: Axes) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What is finite of the lines' values across and up."""
    data = np.concatenate([np.column_stack(line.get_data()).astype(float) for line in axes.get_lines()])
    across, up = (values[np.isfinite(values)] for values in data.T)
    return across, up
