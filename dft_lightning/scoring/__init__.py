"""The command ``score``: log-probs of a data set's targets under a model, as a column of its rows."""

from dft_lightning.scoring.command import score

__all__ = ["score"]
