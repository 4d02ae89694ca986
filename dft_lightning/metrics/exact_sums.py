"""Metric states that no precision setting of a trainer rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

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

    def snapshot(self) -> dict[str, Tensor | int]:
        """What :meth:`restore` goes back to; copies on the device."""
        return {"updates": self._update_count, **{name: getattr(self, name).clone() for name in self._defaults}}

    def restore(self, snapshot: dict[str, Tensor | int]) -> None:
        """Forget every update since :meth:`snapshot`, which is to be taken anew for a second time."""
        for name in self._defaults:
            setattr(self, name, snapshot[name])
        self._update_count, self._computed = cast(int, snapshot["updates"]), None

    def reset(self) -> None:
        """Back to zero, with tensors that later work outside inference mode as well."""
        with torch.inference_mode(False):
            super().reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), *args, **kwargs)
