"""What watches or saves a run."""

from dft_lightning.callbacks.engine import EngineAnswers
from dft_lightning.callbacks.export import HuggingFaceExport
from dft_lightning.callbacks.generation import GenerationEvaluation
from dft_lightning.callbacks.interruption import Interrupted, InterruptionCheckpoint
from dft_lightning.callbacks.predictions import PredictionWriter
from dft_lightning.callbacks.progress import StepProgress

__all__ = [
    "EngineAnswers",
    "GenerationEvaluation",
    "HuggingFaceExport",
    "Interrupted",
    "InterruptionCheckpoint",
    "PredictionWriter",
    "StepProgress",
]
