"""A loss whose process dies in the middle of training."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from dft_lightning import TokenLoss
from dft_lightning.errors import InputError


class DyingLoss(TokenLoss):
    """Cross-entropy, until a rank is killed, or meets a mistake alone, once a checkpoint is there.

    Args:
        rank: which; where it is the first, the other computes for long and is in no collective.
        folder: of the run.
        mistake: what it meets.
    """

    def __init__(self, rank: int, folder: str, mistake: str | None = None) -> None:
        super().__init__()
        self.rank, self.folder, self.mistake = rank, folder, mistake

    def token_loss(self, stats: Any) -> torch.Tensor:
        if list(Path(self.folder).rglob("*.ckpt")):
            if torch.distributed.get_rank() == self.rank:
                if self.mistake is not None:
                    raise InputError(self.mistake)
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.rank == 0:
                time.sleep(600)
        return -stats.log_prob
