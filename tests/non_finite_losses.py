"""Losses that are not finite at given steps, and what trains by them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from dft_lightning import CausalLMModule, TokenLoss
from dft_lightning.data.batches.collating import Collator
from small_runs import TINY_ARITHMETIC


class At(TokenLoss):
    """Cross-entropy; at some steps, one token's loss is something else.

    Args:
        steps: at which.
        what: ``"nan"``, ``"inf"`` (with gradients that are finite) or ``"gradient"`` (NaN below a loss that is finite).
    """

    uses_step = True

    def __init__(self, steps: tuple[int, ...] = (), what: str = "nan") -> None:
        super().__init__()
        self.steps, self.what = tuple(steps), what

    def token_loss(self, stats: Any) -> torch.Tensor:
        losses = -stats.log_prob
        if stats.step not in self.steps:
            return losses
        first, rest = losses[:1], losses[1:]
        # sqrt has an infinite slope at 0, and 0 * inf is nan.
        more = (0 * first).sqrt() if self.what == "gradient" else float(self.what)
        return torch.cat([first + more, rest])


def rows_of(num_rows: int, batch_size: int, empty: tuple[int, ...] = ()) -> DataLoader[Any]:
    """Random rows of the same length in their order; those of ``empty`` have no target."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(num_rows):
        ids = torch.randint(3, 20, (8,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 8 if i in empty else [-100, *ids[1:]]})
    return DataLoader(rows, batch_size=batch_size, collate_fn=Collator(0))


def make(loss: TokenLoss, **options: Any) -> CausalLMModule:
    pl.seed_everything(0)
    return CausalLMModule(TINY_ARITHMETIC, loss=loss, optimizer={"lr": 0.01, "weight_decay": 0.1}, **options)
