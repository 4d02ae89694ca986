"""The LightningModule and what it is made of."""

from dft_lightning.modules.causal_lm import CausalLMModule
from dft_lightning.modules.generation import GenerationOptions

__all__ = ["CausalLMModule", "GenerationOptions"]
