"""Runs on two processes of which one is asked to stop."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from dft_lightning import CausalLMModule
from dft_lightning.callbacks.interruption import InterruptionCheckpoint
from dft_lightning.distributed import gather_lists
from small_runs import TINY_ARITHMETIC, arithmetic_data, trainer


class SignalOne(Callback):
    """Sends a SIGTERM to rank 1 in a micro-batch."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and batch_idx == self.number:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped_at(number: int, folder: str, strategy: Any = "auto", devices: int = 1) -> list[Any]:
    """Of each rank: the code that it left with, and at which step; with steps of three micro-batches."""
    callbacks = [SignalOne(number), InterruptionCheckpoint()]
    options = {"max_steps": 4, "accumulate_grad_batches": 3, "default_root_dir": folder}
    run = trainer(strategy=strategy, devices=devices, callbacks=callbacks, **options)
    code: int | str | None = None
    try:
        run.fit(CausalLMModule(TINY_ARITHMETIC), datamodule=arithmetic_data(48, batch_size=2))
    except SystemExit as ending:
        code = ending.code
    torch.distributed.barrier()
    return gather_lists([(code, run.global_step)], 2)
