"""Run by test_normalization on two processes: one optimizer step, its gradient to a file.

usage: ddp_gradient.py OUT PRECISION BATCH_SIZE ACCUMULATE LOSS NUM_ROWS RENORMALIZE
"""

from __future__ import annotations

import sys

import lightning.pytorch as pl
import torch

import dft_lightning
from small_runs import TINY_ARITHMETIC, GradientRecorder, arithmetic_data, trainer

if __name__ == "__main__":
    out, precision, batch_size, accumulate, loss, num_rows, renormalize = sys.argv[1:]
    pl.seed_everything(0)
    options = {"dtype": "float64", "renormalize": renormalize == "1"}
    module = GradientRecorder(TINY_ARITHMETIC, loss=getattr(dft_lightning, loss)(), **options)
    run = trainer(devices=2, strategy="ddp", precision=precision, accumulate_grad_batches=int(accumulate))
    run.fit(module, datamodule=arithmetic_data(int(num_rows), batch_size=int(batch_size), shuffle=False))
    if run.is_global_zero:
        torch.save(module.gradients[0], out)
