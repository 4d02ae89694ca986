"""A loss that fails in the middle of training."""

from __future__ import annotations

import os

from dft_lightning import TokenLoss


class FailingLoss(TokenLoss):
    """Cross-entropy for two steps, and in an environment with ``LOSS_IS_MENDED`` beyond it."""

    uses_step = True

    def token_loss(self, stats):
        if stats.step > 1 and "LOSS_IS_MENDED" not in os.environ:
            raise RuntimeError("this loss fails on purpose")
        return -stats.log_prob


class UnbuildableLoss(FailingLoss):
    """Raises what nobody expects of a constructor."""

    def __init__(self):
        raise RuntimeError("this loss cannot be built")
