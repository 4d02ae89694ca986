"""Fine-tune causal language models with a pluggable token loss.

Importing the package imports torch alone; what needs Lightning or transformers is resolved on first use (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dft_lightning import losses
from dft_lightning.integrations import compute_loss_func
from dft_lightning.losses import *  # noqa: F403
from dft_lightning.version import __version__ as __version__

if TYPE_CHECKING:
    from dft_lightning.callbacks import GenerationEvaluation as GenerationEvaluation
    from dft_lightning.callbacks import HuggingFaceExport as HuggingFaceExport
    from dft_lightning.data import InstructionDataModule as InstructionDataModule
    from dft_lightning.modules import CausalLMModule as CausalLMModule

_LAZY = {
    "CausalLMModule": "dft_lightning.modules",
    "GenerationEvaluation": "dft_lightning.callbacks",
    "HuggingFaceExport": "dft_lightning.callbacks",
    "InstructionDataModule": "dft_lightning.data",
}

__all__ = [*losses.__all__, *_LAZY, "compute_loss_func"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
