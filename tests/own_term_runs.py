"""Modules that add terms of their own to what ``training_step`` returns, in this process and on two."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from dft_lightning import CausalLMModule, DFTLoss
from dft_lightning.distributed import gather_lists
from small_runs import TINY_ARITHMETIC, arithmetic_data, trainer, whole


class OwnTerms(CausalLMModule):
    """Adds ``ones . 1 + others . c`` with ``c`` the first target of the micro-batch: the gradient of the first is 1."""

    def build_model(self) -> torch.nn.Module:
        model = super().build_model()
        for name in ("ones", "others"):
            model.register_parameter(name, torch.nn.Parameter(torch.zeros(4, dtype=next(model.parameters()).dtype)))
        return model

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.batches: list[tuple[float, float, float]] = []  # of the step at hand: targets, weights, c
        self.found: list[dict[str, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
        factor = float(targets[0]) if len(targets) else 5.0
        with torch.no_grad():
            weights = self.token_output(batch).weight.double().sum()
        self.batches.append((float(len(targets)), float(weights), factor))
        return loss + self.model.ones.sum() + factor * self.model.others.sum()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        gradients = {name: getattr(self.model, name).grad for name in ("ones", "others")}
        of_term = {name: None if g is None else float(whole(g).mean()) for name, g in gradients.items()}
        batches = gather_lists(self.batches, self.trainer.world_size)
        self.found.append({**of_term, "batches": batches})
        self.batches = []


def found_steps(
    cls: type[CausalLMModule] = OwnTerms,
    rows: int = 15,
    steps: int = 2,
    dtype: str = "float64",
    renormalize: bool = False,
    data: Any = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """What :class:`OwnTerms` found at each step of a fit on ragged rows."""
    pl.seed_everything(0, verbose=False)
    module = cls(
        TINY_ARITHMETIC,
        loss=DFTLoss(),
        optimizer={"lr": 1e-3},
        schedule={"decay": "constant"},
        loading={"dtype": dtype},
        step={"renormalize": renormalize},
    )
    data = arithmetic_data(rows, batch_size=2) if data is None else data
    trainer(**{"max_steps": steps, **options}).fit(module, data)
    return module.found


def expected(step: dict[str, Any], renormalize: bool = False) -> float:
    """What the gradient of the second term has to be: its factors' mean over targets, or over their weights."""
    shares = [weight if renormalize else targets for targets, weight, _ in step["batches"]]
    return sum(share * factor for share, (_, _, factor) in zip(shares, step["batches"], strict=True)) / sum(shares)
