"""Token metrics as exact sums: the same for any batch size, accumulation and number of ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dft_lightning.metrics.exact_sums import ExactSums
from dft_lightning.ops import TokenOutput


class TokenMetrics(ExactSums):
    """Objective, NLL, perplexity, accuracy, entropy and mean weight over all target tokens seen.

    States are sums in float64 and counts in int64, added over ranks; each mean is one division at the end.
    Perplexity is ``exp`` of the mean ``-log p``, whatever loss is trained. With no target yet the means are nan.

    :meth:`compute` returns float64 scalars under ``loss``, ``nll`` (nats per token), ``perplexity``,
    ``token_accuracy``, ``mean_weight`` (mean ``-dL/dl``), ``target_tokens``, ``tokens`` (non-padding) and, where it
    was given, ``entropy`` (nats).
    """

    higher_is_better = None

    loss_sum: Tensor
    nll_sum: Tensor
    weight_sum: Tensor
    entropy_sum: Tensor
    correct: Tensor
    targets: Tensor
    entropy_targets: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sums("loss_sum", "nll_sum", "weight_sum", "entropy_sum")
        self._add_counts("correct", "targets", "entropy_targets", "tokens")

    def update(self, output: TokenOutput, tokens: Tensor | int = 0) -> None:
        """Add the targets of one batch.

        Args:
            output: what the head returned for the batch.
            tokens: number of non-padding tokens in the batch.
        """
        self.loss_sum += output.loss_sum.double()
        self.nll_sum -= output.log_prob.double().sum()
        self.weight_sum += output.weight.double().sum()
        self.correct += output.correct.sum()
        self.targets += output.log_prob.numel()
        self.tokens += tokens
        if output.entropy is not None:
            self.entropy_sum += output.entropy.double().sum()
            self.entropy_targets += output.entropy.numel()

    def compute(self) -> dict[str, Tensor]:
        nll = self.nll_sum / self.targets
        values = {
            "loss": self.loss_sum / self.targets,
            "nll": nll,
            "perplexity": nll.exp(),
            "token_accuracy": self.correct.double() / self.targets,
            "mean_weight": self.weight_sum / self.targets,
            "target_tokens": self.targets.double(),
            "tokens": self.tokens.double(),
        }
        if self.entropy_targets > 0:
            values["entropy"] = self.entropy_sum / self.entropy_targets
        return values
