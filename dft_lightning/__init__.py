"""Fine-tune causal language models with a pluggable token loss.

Importing the package imports nothing else. What it shows is resolved on first use (PEP 562), a loss with torch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dft_lightning.version import __version__ as __version__

if TYPE_CHECKING:
    from dft_lightning import integrations as integrations
    from dft_lightning import losses as losses
    from dft_lightning.callbacks import GenerationEvaluation as GenerationEvaluation
    from dft_lightning.callbacks import HuggingFaceExport as HuggingFaceExport
    from dft_lightning.data import InstructionDataModule as InstructionDataModule
    from dft_lightning.integrations import compute_loss_func as compute_loss_func
    from dft_lightning.losses import *  # noqa: F403
    from dft_lightning.modules import CausalLMModule as CausalLMModule

_LOSSES = (
    "IGNORE_INDEX",
    "LOSSES",
    "AnchoredLoss",
    "ChordPhiLoss",
    "CrossEntropyLoss",
    "DEFTLoss",
    "DFTLoss",
    "EAFTLoss",
    "FocalLoss",
    "FromReference",
    "GEMLoss",
    "ImportanceWeightedLoss",
    "InfoSFTLoss",
    "MixtureLoss",
    "PowerLoss",
    "PriorWeightedLoss",
    "ProximalLoss",
    "RectifiedLoss",
    "ReferenceKLLoss",
    "SEDSFTLoss",
    "ScheduledLoss",
    "SequenceDFTLoss",
    "Statistic",
    "TargetSFTLoss",
    "ThresholdLoss",
    "TokenLoss",
    "TokenStats",
    "TrustRegionLoss",
    "dft_cross_entropy",
    "focal_cross_entropy",
    "statistics_from_logits",
    "token_loss_and_weight",
)
_LAZY = dict.fromkeys(_LOSSES, "dft_lightning.losses") | {
    "CausalLMModule": "dft_lightning.modules",
    "GenerationEvaluation": "dft_lightning.callbacks",
    "HuggingFaceExport": "dft_lightning.callbacks",
    "InstructionDataModule": "dft_lightning.data",
    "compute_loss_func": "dft_lightning.integrations",
}

__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = globals()[name] = getattr(import_module(_LAZY[name]), name)
        return value
    if name in ("integrations", "losses"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
