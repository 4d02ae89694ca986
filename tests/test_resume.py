"""A run that was stopped and goes on ends as one that was not: bit for bit, with dropout, from any hook."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from dft_lightning import CausalLMModule, DFTLoss
from small_runs import TINY_ARITHMETIC, arithmetic_data, trainer

DROPOUT = {**TINY_ARITHMETIC, "resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}


class Records(Logger):
    """Every value that is logged, by step, but for speeds."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[tuple[int, str], float] = {}

    name = property(lambda self: "records")
    version = property(lambda self: 0)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            if "per_second" not in name:
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
    data: dict[str, Any], options: dict[str, Any], *callbacks: Callback, ckpt_path: Path | None = None
) -> tuple[pl.Trainer, dict[tuple[int, str], float]]:
    pl.seed_everything(1, verbose=False)
    if ckpt_path is not None:
        torch.rand(7)  # the state is the checkpoint's, not what a new process begins with
    module = CausalLMModule(DROPOUT, loss=DFTLoss(), learning_rate=0.01, warmup_steps=2)
    records = Records()
    run = trainer(
        **{"logger": records, "log_every_n_steps": 2, "gradient_clip_val": 1.0, **options}, callbacks=list(callbacks)
    )
    rows = {"batch_size": 2, "num_rows": 14, "validation": arithmetic_data(4).sources["train"], **data}
    run.fit(module, datamodule=arithmetic_data(**rows), ckpt_path=ckpt_path, weights_only=True)
    return run, records.values


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
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name, value in one.items():
            assert_same(value, other[name], f"{where}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, value in enumerate(one):
            assert_same(value, other[i], f"{where}.{i}")
    elif not callable(one):
        assert one == other, where


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "epochs, whole steps": ({}, {"max_steps": -1, "max_epochs": 2}),
    "steps, windows of three": ({}, {"max_steps": 6, "max_epochs": -1, "accumulate_grad_batches": 3}),
    "validation in the middle": (
        {},
        {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 3},
    ),
    "validation over epochs, packed": (
        {"packing": "bfd", "max_length": 64, "num_rows": 40},
        {"max_steps": 9, "max_epochs": -1, "check_val_every_n_epoch": None, "val_check_interval": 4},
    ),
    "streamed": (
        {"streaming": True, "shuffle_buffer_size": 5},
        {"max_steps": 6, "accumulate_grad_batches": 2, "check_val_every_n_epoch": None, "val_check_interval": 3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_from_every_hook(case, tmp_path):
    data, options = CASES[case]
    whole, logged = fit(data, options, SaveAt(tmp_path, *HOOKS))
    expected = result(whole)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert {path.name.partition("-")[0] for path in paths} >= set(HOOKS[:3])
    for path in paths[2 :: len(paths) // 5]:
        step = torch.load(path, weights_only=True)["global_step"]
        resumed, again = fit(data, options, ckpt_path=path)
        found = result(resumed)
        if step == expected["step"]:  # nothing was left to do
            found |= {name: expected[name] for name in ("random", "epoch")}
        assert_same(expected, found, f"{path.name} (step {step})")
        for key, value in again.items():
            assert logged[key] == value, (path.name, key)
        missing = [key for key in logged if key not in again and key[0] > step]
        assert not missing, (path.name, missing)
