"""What a checkpoint says of itself, so that it can be exported without the files that the run began from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import nn

from dft_lightning.component import brief_values, class_path
from dft_lightning.models.head import ends_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "dft_lightning"
"""Its key in a checkpoint."""


def describe(
    model: nn.Module,
    base: Any,
    adapter: dict[str, Any] | None,
    tokenizer_files: dict[str, bytes],
    stop_token_ids: list[int],
    trainer: pl.Trainer | None,
) -> dict[str, Any]:
    """A record of a model and its run, in plain values that ``weights_only`` loading can read.

    Args:
        model: the language model.
        base: name or folder that it was loaded from, or the values of a config.
        adapter: see :func:`.adapter_record`; ``None`` where all of the model is trained.
        tokenizer_files: see :func:`files_of`; none where there is no tokenizer.
        stop_token_ids: what ends a generated text.
        trainer: of the run; ``None`` for none.
    """
    config, generation = getattr(model, "config", None), getattr(model, "generation_config", None)
    return {
        "base": base if isinstance(base, str) else None,
        "base_is_local": isinstance(base, str) and Path(base).exists(),
        "adapter": adapter,
        "model_class": class_path(type(model)),
        "config_class": class_path(type(config)),
        "config": None if config is None else _config_text(model, config),
        "generation_config": None if generation is None else generation.to_json_string(),
        "stop_token_ids": stop_token_ids,
        "tokenizer": tokenizer_files,
        "data": {} if trainer is None else brief_values(getattr(getattr(trainer, "datamodule", None), "hparams", {})),
        "trainer": {} if trainer is None else _settings(trainer),
        "metrics": {} if trainer is None else _floats(trainer.callback_metrics),
    }


def _config_text(model: nn.Module, config: Any) -> str:
    """A checkpoint that has two values where its config ties them is loaded untied, and its config still ties."""
    values = json.loads(config.to_json_string(use_diff=False))
    ends = ends_of(model)
    weights = [getattr(end, "weight", None) for end in ends]
    if None not in ends and weights[0] is not weights[1]:
        values["tie_word_embeddings"] = False
    return json.dumps(values)


def files_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files that ``save_pretrained`` writes for a tokenizer, by path; its chat templates are in them."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


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
