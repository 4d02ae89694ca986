"""The LightningModule and what it is made of."""

from dft_lightning.models.generation import GenerationOptions
from dft_lightning.modules.causal_lm import CausalLMModule
from dft_lightning.modules.optimizers import AdamW8bit, Muon
from dft_lightning.modules.options import EvaluationOptions, LoadingOptions, StepOptions
from dft_lightning.modules.schedules import WarmupSchedule

__all__ = [
    "AdamW8bit",
    "CausalLMModule",
    "EvaluationOptions",
    "GenerationOptions",
    "LoadingOptions",
    "Muon",
    "StepOptions",
    "WarmupSchedule",
]
