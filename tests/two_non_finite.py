"""Run by test_non_finite on two processes: a loss that is not finite on rank 1 alone, skipped and refused.

usage: two_non_finite.py FOLDER    (leaves out.pt)
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from dft_lightning import TokenLoss
from dft_lightning.distributed import gather_lists
from dft_lightning.distributed.sharding import local_part
from dft_lightning.errors import InputError
from non_finite_losses import make, rows_of
from small_runs import strategy_of, trainer, whole, whole_parameters


class NaNOnRankOne(TokenLoss):
    """Cross-entropy, but for one token of rank 1 at the second step."""

    uses_step = True

    def token_loss(self, stats: Any) -> torch.Tensor:
        losses = -stats.log_prob
        if stats.step == 1 and torch.distributed.get_rank() == 1:
            losses = torch.cat([losses[:1] * float("nan"), losses[1:]])
        return losses


class Before(pl.Callback):
    """What this rank has of the weights after the last step."""

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.weights = [local_part(p.detach()).clone() for p in module.parameters()]


def run(strategy: str, **options: Any) -> dict[str, Any]:
    """Weights of both ranks, what was logged, the message of each rank and whether its weights are still the last."""
    module = make(NaNOnRankOne(), **options)
    found: dict[str, Any] = {"messages": []}
    before, run = Before(), {"max_steps": 3, "accumulate_grad_batches": 2, "log_every_n_steps": 1}
    steps = trainer(devices=2, strategy=strategy_of(strategy), callbacks=[before], **run)
    try:
        steps.fit(module, rows_of(12, 1))
    except InputError as error:
        found["messages"] = [str(error)]
    found["messages"] = gather_lists(found["messages"], 2)
    now = [local_part(p.detach()) for p in module.parameters()]
    found["kept"] = gather_lists([all(map(torch.equal, now, before.weights))], 2)
    with whole_parameters(steps.model):
        weights = torch.cat([whole(p.detach()).flatten() for p in module.parameters()])
    found["weights"] = gather_lists([weights], 2)
    found["logged"] = {name: float(value) for name, value in steps.callback_metrics.items()}
    return found


if __name__ == "__main__":
    out = {}
    for strategy, on_non_finite in itertools.product(("ddp", "fsdp1", "fsdp2"), ("skip", "raise")):
        step, loading = {"on_non_finite": on_non_finite}, {}
        if strategy == "ddp":
            step, loading = {**step, "renormalize": True}, {"head": "full"}
        out[strategy, on_non_finite] = run(strategy, step=step, loading=loading)
    if torch.distributed.get_rank() == 0:
        torch.save(out, Path(sys.argv[1]) / "out.pt")
