"""Runs that are stopped and go on, shared by test_resume and two_resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch.distributed.tensor import DTensor

from dft_lightning import CausalLMModule, DFTLoss
from small_runs import TINY_ARITHMETIC, arithmetic_data, trainer

DROPOUT = {**TINY_ARITHMETIC, "resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}

WITHOUT_DROPOUT = TINY_ARITHMETIC
FIXED_BATCH = {"num_rows": 28, "global_batch_size": 4, "batch_size": 2}


class Records(Logger):
    """Every value that is logged, by step, but for speeds and memory."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[tuple[int, str], float] = {}

    name = property(lambda self: "records")
    version = property(lambda self: 0)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            if "per_second" not in name and "memory" not in name:
                self.values[step, name] = value


class SaveAt(Callback):
    """Writes a checkpoint whenever a hook has run so often."""

    def __init__(self, folder: Path, *hooks: str) -> None:
        self.folder = folder
        for hook in hooks:
            setattr(self, hook, self._saving(hook))

    def _saving(self, hook: str) -> Any:
        def save(trainer: pl.Trainer, *args: Any) -> None:
            if not trainer.sanity_checking:
                self.counts[hook] = self.counts.get(hook, 0) + 1
                trainer.save_checkpoint(self.folder / f"{hook}-{self.counts[hook]}.ckpt")

        return save

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.counts: dict[str, int] = {}


HOOKS = ("on_train_batch_end", "on_validation_batch_end", "on_validation_end", "on_train_epoch_end")


def fit(
    data: dict[str, Any],
    options: dict[str, Any],
    *callbacks: Callback,
    ckpt_path: Path | None = None,
    model: dict[str, Any] = DROPOUT,
    **module_options: Any,
) -> tuple[pl.Trainer, dict[tuple[int, str], float]]:
    pl.seed_everything(1, verbose=False)
    if ckpt_path is not None:
        torch.rand(7)  # the state is the checkpoint's, not what a new process begins with
    module = CausalLMModule(
        model,
        loss=DFTLoss(),
        evaluation={"generation": {"max_new_tokens": 8}},
        **{"optimizer": {"lr": 0.01}, "schedule": {"warmup": 2}, **module_options},
    )
    records = Records()
    run = trainer(
        **{"logger": records, "log_every_n_steps": 2, "gradient_clip_val": 1.0, **options}, callbacks=list(callbacks)
    )
    rows = {"batch_size": 2, "num_rows": 14, "validation": arithmetic_data(4).sources["train"], **data}
    run.fit(module, datamodule=arithmetic_data(**rows), ckpt_path=ckpt_path, weights_only=True)
    return run, records.values


def goes_on_alike(
    path: Path, data: Any, options: Any, expected: Any, logged: Any, *callbacks: Callback, **module_options: Any
) -> None:
    """Resume a checkpoint of a run, and compare it with what that one ended with and logged."""
    step = torch.load(path / "meta.pt" if path.is_dir() else path, weights_only=True)["global_step"]
    resumed, again = fit(data, options, *callbacks, ckpt_path=path, **module_options)
    found = result(resumed)
    if step == expected["step"]:  # nothing was left to do
        found |= {name: expected[name] for name in ("random", "epoch")}
    assert_same(expected, found, f"{path.name} (step {step})")
    for key, value in again.items():
        assert logged[key] == value, (path.name, key)
    missing = [key for key in logged if key not in again and key[0] > step]
    assert not missing, (path.name, missing)


def result(run: pl.Trainer) -> dict[str, Any]:
    optimizer = copy.deepcopy(run.optimizers[0].state_dict())
    return {
        "weights": {name: value.clone() for name, value in run.lightning_module.state_dict().items()},
        "optimizer": optimizer,
        "scheduler": run.lr_scheduler_configs[0].scheduler.state_dict(),
        "random": torch.get_rng_state(),
        "step": run.global_step,
        "epoch": run.current_epoch,
    }


def assert_same(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, torch.Tensor):
        if isinstance(one, DTensor):
            one, other = one.to_local(), other.to_local()
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name, value in one.items():
            assert_same(value, other[name], f"{where}.{name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, value in enumerate(one):
            assert_same(value, other[i], f"{where}.{i}")
    elif not callable(one):
        assert one == other, where
