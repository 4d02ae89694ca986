"""torchmetrics classes with (sum, count) states, one's own beside them, and the extractors that find an answer in a
text."""

from dft_lightning.metrics.answers import (
    AnswerExtractor,
    BoxedAnswer,
    ExpressionValue,
    HashAnswer,
    LastNumber,
    MathAnswer,
    WholeText,
)
from dft_lightning.metrics.exact_match import ExactMatch, pass_at_k, reported_k
from dft_lightning.metrics.exact_sums import GradientMetrics, SourceMetrics, TokenMetrics
from dft_lightning.metrics.own import TargetMetric

__all__ = [
    "AnswerExtractor",
    "BoxedAnswer",
    "ExactMatch",
    "ExpressionValue",
    "GradientMetrics",
    "HashAnswer",
    "LastNumber",
    "MathAnswer",
    "SourceMetrics",
    "TargetMetric",
    "TokenMetrics",
    "WholeText",
    "pass_at_k",
    "reported_k",
]
