"""A trained checkpoint as a Hugging Face folder."""

from dft_lightning.export.command import export

__all__ = ["export"]
