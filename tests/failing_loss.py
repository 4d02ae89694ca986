"""A loss that fails in the middle of training."""

from __future__ import annotations

from dft_lightning import TokenLoss


class FailingLoss(TokenLoss):
    """Cross-entropy until the second step."""

    uses_step = True

    def token_loss(self, stats):
        if stats.step > 0:
            raise RuntimeError("this loss fails on purpose")
        return -stats.log_prob


class UnbuildableLoss(FailingLoss):
    """Raises what nobody expects of a constructor."""

    def __init__(self):
        raise RuntimeError("this loss cannot be built")
