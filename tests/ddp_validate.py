"""Run by test_telemetry on two processes: validation alone and along fit, and predictions.

usage: ddp_validate.py VALUES PREDICTIONS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from dft_lightning import CausalLMModule, DFTLoss
from dft_lightning.callbacks import PredictionWriter
from dft_lightning.modules import GenerationOptions
from small_runs import TINY_ARITHMETIC, trainer
from test_telemetry import validation_data


def make() -> CausalLMModule:
    pl.seed_everything(0)
    generation = GenerationOptions(max_new_tokens=8)
    return CausalLMModule(TINY_ARITHMETIC, loss=DFTLoss(), learning_rate=0.0, generation=generation)


def predict(path: str, **options: Any) -> None:
    data = validation_data(eval_batch_size=4)
    data.sources["predict"] = data.sources["validation"]
    trainer(callbacks=[PredictionWriter(path)], **options).predict(make(), datamodule=data)


if __name__ == "__main__":
    two = {"devices": 2, "strategy": "ddp"}
    (validated,) = trainer(**two).validate(make(), datamodule=validation_data(eval_batch_size=2), verbose=False)

    run = trainer(**two)
    run.fit(make(), datamodule=validation_data(batch_size=8, eval_batch_size=4))
    fitted = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val/")}

    predict(sys.argv[2], **two)
    if run.is_global_zero:
        Path(sys.argv[1]).write_text(json.dumps({"validate": validated, "fit": fitted}))
