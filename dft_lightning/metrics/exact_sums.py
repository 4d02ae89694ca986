"""Metric states that no precision setting of a trainer rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class ExactSums(Metric):
    """Base of metrics whose states are sums in float64 and counts in int64.

    They move between devices with the module but keep their dtype: ``precision: bf16-true`` would otherwise make
    bfloat16 of them, which cannot count beyond 256.
    """

    full_state_update = False

    def _add_sums(self, *names: str) -> None:
        for name in names:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _add_counts(self, *names: str) -> None:
        for name in names:
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def reset(self) -> None:
        """Back to zero, with tensors that later work outside inference mode as well."""
        with torch.inference_mode(False):
            super().reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), *args, **kwargs)
