"""torchmetrics classes with (sum, count) states, and the extractors that find an answer in a text."""

from dft_lightning.metrics.answers import AnswerExtractor, BoxedAnswer, HashAnswer, LastNumber, WholeText
from dft_lightning.metrics.exact_match import ExactMatch
from dft_lightning.metrics.gradients import GradientMetrics
from dft_lightning.metrics.math_answer import MathAnswer
from dft_lightning.metrics.pass_at_k import pass_at_k, reported_k
from dft_lightning.metrics.sources import SourceMetrics
from dft_lightning.metrics.tokens import TokenMetrics

__all__ = [
    "AnswerExtractor",
    "BoxedAnswer",
    "ExactMatch",
    "GradientMetrics",
    "HashAnswer",
    "LastNumber",
    "MathAnswer",
    "SourceMetrics",
    "TokenMetrics",
    "WholeText",
    "pass_at_k",
    "reported_k",
]
