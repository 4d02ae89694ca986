"""Small runs shared by tests, in this process and on two gloo processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import Any

import lightning.pytorch as pl
import torch

from dft_lightning import CausalLMModule, InstructionDataModule
from dft_lightning.data import ArithmeticRows

# GPT-2 computes in the parameters' dtype throughout. Llama's norms and rotary embedding go through float32, whose
# rounding (1e-8 on a gradient) would hide what a float64 test is after.
TINY_GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 256}
TINY_GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TINY_ARITHMETIC = {**TINY_GPT2, "vocab_size": 20}


def arithmetic_data(num_rows: int = 16, **options: Any) -> InstructionDataModule:
    """Very ragged rows: 1 to 9 digits."""
    rows = ArithmeticRows(num_rows, min_digits=1, max_digits=9, seed=3)
    return InstructionDataModule(rows, tokenizer="asset://arithmetic-base", **options)


def trainer(**options: Any) -> pl.Trainer:
    """A silent CPU trainer that writes nothing."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "inference_mode": False,
        "max_steps": 1,
    }
    return pl.Trainer(**{**defaults, **options})


class GradientRecorder(CausalLMModule):
    """Keeps the gradient of each optimizer step as the optimizer gets it, before clipping."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.gradients: list[torch.Tensor] = []

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in self.parameters()]))
        super().configure_gradient_clipping(*args, **kwargs)


def run_two_processes(script: str, *args: str, timeout: float = 150) -> str:
    """Run a script of ``tests/`` that starts two DDP processes; a hard limit ends them all.

    Returns:
        Its standard output.
    """
    path = os.path.join(os.path.dirname(__file__), script)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, path, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=env,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err[-4000:]
    return out
