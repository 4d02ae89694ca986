"""The command ``sample``: a model's own answers to a split's prompts, checked, as rows that ``fit`` reads."""

from dft_lightning.sampling.command import sample

__all__ = ["sample"]
