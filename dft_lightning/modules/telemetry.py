"""What a training run logs, gathered between two logged steps."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor, nn

from dft_lightning.metrics import GradientMetrics, TokenMetrics
from dft_lightning.ops import TokenOutput


class TrainTelemetry(nn.Module):
    """Token metrics, gradient norm, share of clipped steps and speed since the last :meth:`collect`.

    Device tensors are only added up; nothing waits for the device until :meth:`collect`.

    Attributes:
        seconds: of training since then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens = TokenMetrics()
        self.gradients = GradientMetrics()
        self.seconds = 0.0
        self._mark: float | None = None

    def update(self, output: TokenOutput, tokens: Tensor | int) -> None:
        """Count a micro-batch."""
        self.tokens.update(output, tokens)

    def update_gradient(self, norm: Tensor, clip_val: float | int | None, skips_non_finite: bool = False) -> None:
        """Count an optimizer step by its gradient norm before clipping."""
        self.gradients.update(norm, clip_val, skips_non_finite)

    def start_clock(self) -> None:
        """Time from here counts as training."""
        self._mark = time.perf_counter()

    def stop_clock(self) -> None:
        """Time from here (validation, generation, saving) does not count."""
        if self._mark is not None:
            self.seconds += time.perf_counter() - self._mark
            self._mark = None

    def collect(self) -> dict[str, Any]:
        """All values since the last call, reduced over ranks. A collective: call it on every rank."""
        self.stop_clock()
        values: dict[str, Any] = self.tokens.compute()
        values["tokens_per_second"] = values.pop("tokens") / max(self.seconds, 1e-9)
        if self.gradients.update_called:
            values |= self.gradients.compute()
        self.reset()
        self.start_clock()
        return values

    def reset(self) -> None:
        """Forget everything gathered."""
        self.tokens.reset()
        self.gradients.reset()
        self.seconds = 0.0
