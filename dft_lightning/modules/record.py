"""What a checkpoint says of itself, so that it can be exported without the files that the run began from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import nn

from dft_lightning.component import class_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "dft_lightning"
"""Its key in a checkpoint."""


def describe(
    model: nn.Module,
    tokenizer_files: dict[str, str] | None,
    stop_token_ids: list[int],
    trainer: pl.Trainer | None,
) -> dict[str, Any]:
    """A record of a model and its run, in plain values that ``weights_only`` loading can read.

    Args:
        model: the language model.
        tokenizer_files: see :func:`files_of`; ``None`` where there is no tokenizer.
        stop_token_ids: what ends a generated text.
        trainer: of the run; ``None`` for none.
    """
    config, generation = getattr(model, "config", None), getattr(model, "generation_config", None)
    return {
        "model_class": class_path(type(model)),
        "config": None if config is None else config.to_json_string(use_diff=False),
        "generation_config": None if generation is None else generation.to_json_string(),
        "stop_token_ids": stop_token_ids,
        "tokenizer": tokenizer_files,
        "data": {} if trainer is None else dict(getattr(getattr(trainer, "datamodule", None), "hparams", {})),
        "trainer": {} if trainer is None else _settings(trainer),
        "metrics": {} if trainer is None else _floats(trainer.callback_metrics),
    }


def files_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The files that ``save_pretrained`` writes for a tokenizer, by name; its chat template is in them."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}


def _settings(trainer: pl.Trainer) -> dict[str, Any]:
    return {
        "precision": str(trainer.precision),
        "strategy": type(trainer.strategy).__name__,
        "world_size": trainer.world_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "max_steps": trainer.max_steps,
        "max_epochs": trainer.max_epochs,
    }


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def read_config(text: str) -> dict[str, Any]:
    """The values of a config or generation config of a record."""
    values: dict[str, Any] = json.loads(text)
    return values
