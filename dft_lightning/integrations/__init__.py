"""The losses, and the fused head, in other people's trainers and loops."""

from dft_lightning.integrations.causal_lm import fused_causal_lm_loss
from dft_lightning.integrations.transformers import FusedLossMixin, compute_loss_func

__all__ = ["FusedLossMixin", "compute_loss_func", "fused_causal_lm_loss"]
