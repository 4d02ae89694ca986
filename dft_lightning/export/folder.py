"""A trained model written as a Hugging Face folder."""

from __future__ import annotations

import pydoc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dft_lightning.errors import InputError, one_line
from dft_lightning.export.card import model_card
from dft_lightning.export.checkpoint import TrainedCheckpoint
from dft_lightning.files import check_replaceable, replacing_folder
from dft_lightning.modules.record import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16", "float64")
OF_A_MODEL = "config.json"
"""What a folder that may be replaced has in it."""


def export_folder(
    trained: TrainedCheckpoint,
    output: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> int:
    """Write safetensors, config, generation config, tokenizer with chat template, and a model card.

    The folder is made beside its place and moved there when it is whole. Tensors are bit for bit those of the
    checkpoint unless ``dtype`` is given; tied ones are written once.

    Args:
        trained: the checkpoint.
        output: the folder: a new one, an empty one or, with ``overwrite``, one that has a model.
        dtype: to convert floating-point tensors to.
        overwrite: replace a model folder.
        max_shard_size: of a safetensors file.

    Returns:
        The number of parameters.

    Raises:
        InputError: the folder is there and not empty, or the checkpoint is of no transformers model.
    """
    check_replaceable(output, overwrite, OF_A_MODEL, "--output")
    model = _model_of(trained, None if dtype is None else getattr(torch, dtype))
    with replacing_folder(output) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        for name, text in (trained.record["tokenizer"] or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        card = model_card(trained, sum(parameter.numel() for parameter in model.parameters()), str(model.dtype))
        (folder / "README.md").write_text(card, encoding="utf-8")
    return sum(parameter.numel() for parameter in model.parameters())


def _model_of(trained: TrainedCheckpoint, dtype: torch.dtype | None) -> PreTrainedModel:
    """The transformers model with the checkpoint's tensors for parameters."""
    from transformers import GenerationConfig, PreTrainedModel

    record, path = trained.record, trained.path
    cls: Any = _located(record["model_class"])
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)) or record["config"] is None:
        raise InputError(f"{path}: {record['model_class']} is no model class of transformers that can be imported")
    config = cls.config_class.from_dict(read_config(record["config"]))  # type: ignore[union-attr]
    with torch.device("meta"):
        model: PreTrainedModel = cls(config)
    tensors = {name: _converted(tensor, dtype) for name, tensor in trained.tensors.items()}
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise InputError(f"{path}: the weights are not of its {cls.__name__}: {one_line(error)}") from error
    _tie(model, tensors, path)
    if record["generation_config"] is not None:
        model.generation_config = GenerationConfig.from_dict(read_config(record["generation_config"]))
    if model.generation_config is not None and record["stop_token_ids"]:
        # A turn ends with another token than a text, where a base model was taught to chat.
        model.generation_config.eos_token_id = record["stop_token_ids"]
    return model


def _located(model_class: str) -> Any:
    try:
        return pydoc.locate(model_class)
    except pydoc.ErrorDuringImport as error:
        raise InputError(f"{model_class} cannot be imported: {one_line(error)}") from error


def _converted(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _tie(model: PreTrainedModel, tensors: dict[str, Tensor], path: Path) -> None:
    """Make one of what the config ties, which a checkpoint in shards holds twice."""
    model.tie_weights()
    for name, tensor in model.state_dict().items():
        if name in tensors and tensor.data_ptr() != tensors[name].data_ptr() and not torch.equal(tensor, tensors[name]):
            raise InputError(f"{path}: its config ties {name} to another parameter, and the two have different values")
