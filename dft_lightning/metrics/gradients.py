"""Gradient norm and share of clipped steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dft_lightning.metrics.exact_sums import ExactSums


class GradientMetrics(ExactSums):
    """Mean gradient norm before clipping and share of clipped steps.

    Gradients are equal on all ranks by the time they are measured, so nothing is exchanged.

    :meth:`compute` returns ``grad_norm`` and ``clipped_steps`` (in ``[0, 1]``), float64 scalars.
    """

    higher_is_better = None

    norm_sum: Tensor
    clipped: Tensor
    steps: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(sync_on_compute=False, **kwargs)
        self._add_sums("norm_sum")
        self._add_counts("clipped", "steps")

    def update(self, norm: Tensor, clip_val: float | int | None, skips_non_finite: bool = False) -> None:
        """Add an optimizer step.

        Args:
            norm: total norm of its gradient before clipping.
            clip_val: the norm it is clipped to, or ``None``.
            skips_non_finite: whether a gradient scaler skips steps whose gradient overflowed; they do not count.
        """
        counted = norm.isfinite() if skips_non_finite else torch.ones_like(norm, dtype=torch.bool)
        self.norm_sum += torch.where(counted, norm.detach().double(), 0.0)
        if clip_val:
            self.clipped += counted & (norm > clip_val)
        self.steps += counted

    def compute(self) -> dict[str, Tensor]:
        return {"grad_norm": self.norm_sum / self.steps, "clipped_steps": self.clipped.double() / self.steps}
