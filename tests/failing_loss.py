"""A loss that fails in the middle of training."""

from __future__ import annotations

import os
import signal

from dft_lightning import TokenLoss


class FailingLoss(TokenLoss):
    """Cross-entropy for two steps, then what ``AFTER_TWO_STEPS`` in the environment says: an error, a kill, or more."""

    uses_step = True

    def token_loss(self, stats):
        then = os.environ.get("AFTER_TWO_STEPS", "error") if stats.step > 1 else "more"
        if then == "error":
            raise RuntimeError("this loss fails on purpose")
        if then == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return -stats.log_prob


class UnbuildableLoss(FailingLoss):
    """Raises what nobody expects of a constructor."""

    def __init__(self):
        raise RuntimeError("this loss cannot be built")
