"""Run by test_telemetry on two processes: validation alone and along fit, and predictions.

usage: two_validate.py FOLDER STRATEGY...    (leaves STRATEGY.json and STRATEGY.jsonl)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import lightning.pytorch.loops.utilities

from dft_lightning import CausalLMModule, DFTLoss
from dft_lightning.callbacks import PredictionWriter
from dft_lightning.modules import GenerationOptions
from small_runs import TINY_ARITHMETIC, strategy_of, trainer
from test_telemetry import validation_data


def make() -> CausalLMModule:
    pl.seed_everything(0)
    generation = GenerationOptions(max_new_tokens=8)
    return CausalLMModule(TINY_ARITHMETIC, loss=DFTLoss(), optimizer={"lr": 0.0}, evaluation={"generation": generation})


def predict(path: str, **options: Any) -> None:
    data = validation_data(eval_batch_size=4)
    data.sources["predict"] = data.sources["validation"]
    trainer(callbacks=[PredictionWriter(path)], **options).predict(make(), datamodule=data)


def run(name: str, folder: Path) -> None:
    def two() -> dict[str, Any]:
        return {"devices": 2, "strategy": strategy_of(name)}

    module = make()
    (validated,) = trainer(**two()).validate(module, datamodule=validation_data(eval_batch_size=2), verbose=False)

    fit = trainer(**two())
    if name == "fsdp1":  # a module is wrapped once
        module = make()
    fit.fit(module, datamodule=validation_data(batch_size=8, eval_batch_size=4))
    fitted = {key: float(value) for key, value in fit.callback_metrics.items() if key.startswith("val/")}

    one_row = validation_data(1, eval_batch_size=4)  # the other rank has none
    (alone,) = trainer(**two()).validate(make(), datamodule=one_row, verbose=False)

    predict(str(folder / f"{name}.jsonl"), **two())
    if fit.is_global_zero:
        (folder / f"{name}.json").write_text(json.dumps({"validate": validated, "fit": fitted, "alone": alone}))


if __name__ == "__main__":
    # As NCCL is treated: Lightning leaves inference mode alone on gloo, whatever the trainer says.
    lightning.pytorch.loops.utilities.dist = SimpleNamespace(get_backend=lambda: "nccl")
    for strategy in sys.argv[2:]:
        run(strategy, Path(sys.argv[1]))
