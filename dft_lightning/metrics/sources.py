"""Objective and nll of each source of a mixture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dft_lightning.metrics.exact_sums import ExactSums

MAX_SOURCES = 64


class SourceMetrics(ExactSums):
    """Mean objective and nll over the targets of each source.

    States are sums in float64 and counts in int64 for each of up to 64 sources, added over ranks.

    :meth:`compute` returns float64 ``loss`` and ``nll`` and int64 ``targets``, each ``[64]`` by source; the means of a
    source without targets are nan.
    """

    higher_is_better = None

    loss_sums: Tensor
    nll_sums: Tensor
    targets: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("loss_sums", "nll_sums"):
            self.add_state(name, torch.zeros(MAX_SOURCES, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("targets", torch.zeros(MAX_SOURCES, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, source: Tensor, loss: Tensor, nll: Tensor) -> None:
        """Add targets.

        Args:
            source: ``[n]``, the index of each target's source.
            loss: ``[n]``, the objective.
            nll: ``[n]``, ``-log p``.
        """
        self.loss_sums += torch.zeros_like(self.loss_sums).index_add_(0, source, loss.double())
        self.nll_sums += torch.zeros_like(self.nll_sums).index_add_(0, source, nll.double())
        self.targets += torch.bincount(source, minlength=MAX_SOURCES)

    def compute(self) -> dict[str, Tensor]:
        return {
            "loss": self.loss_sums / self.targets,
            "nll": self.nll_sums / self.targets,
            "targets": self.targets,
        }
