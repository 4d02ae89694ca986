"""The losses in other people's trainers."""

from dft_lightning.integrations.transformers_trainer import compute_loss_func

__all__ = ["compute_loss_func"]
