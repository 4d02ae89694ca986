"""``fit``, ``validate``, ``test`` and ``predict`` by LightningCLI, and the config of a fit for the other commands."""

from dft_lightning.fit.command import DFTLightningCLI, main

__all__ = ["DFTLightningCLI", "main"]
