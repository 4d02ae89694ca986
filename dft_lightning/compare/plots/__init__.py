"""The report's figures, one panel each: side by side on a screen, one below the other on a phone."""

from dft_lightning.compare.plots.figures import all_plots
from dft_lightning.compare.plots.style import Plot

__all__ = ["Plot", "all_plots"]
