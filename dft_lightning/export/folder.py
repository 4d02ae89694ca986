"""A trained model written as a Hugging Face folder."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dft_lightning.distributed.shard_loading import parameters_on_meta
from dft_lightning.errors import InputError, one_line
from dft_lightning.export.card import model_card
from dft_lightning.export.checkpoint import TrainedCheckpoint
from dft_lightning.files import check_replaceable, replacing_folder

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
    try:
        return _write(trained, output, None if dtype is None else getattr(torch, dtype), max_shard_size)
    except InputError:
        raise
    except Exception as error:  # whatever transformers, safetensors and the disk raise
        raise InputError(f"{trained.path} cannot be written to {output}: {one_line(error)}") from error


def check_shard_size(size: str) -> None:
    """Raise ``InputError`` where it is none that transformers understands."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?(KB|MB|GB|TB)", size):
        raise InputError(f"max_shard_size: expected a size such as 5GB or 500MB, got {size!r}")


def _write(trained: TrainedCheckpoint, output: Path, dtype: torch.dtype | None, max_shard_size: str) -> int:
    model = _model_of(trained, dtype)
    with replacing_folder(output) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        for name, content in trained.record["tokenizer"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise InputError(f"{trained.path}: its tokenizer has a file outside of its folder: {name}")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        card = model_card(trained, sum(parameter.numel() for parameter in model.parameters()), str(model.dtype))
        (folder / "README.md").write_text(card, encoding="utf-8")
    return sum(parameter.numel() for parameter in model.parameters())


def _model_of(trained: TrainedCheckpoint, dtype: torch.dtype | None) -> PreTrainedModel:
    """The transformers model with the checkpoint's tensors for parameters."""
    from transformers import GenerationConfig

    record, path = trained.record, trained.path
    cls = model_class_of(record, path)
    config = _config_of(record)
    with parameters_on_meta():
        model: PreTrainedModel = cls(config)
    tensors = {name: _converted(name, tensor, dtype) for name, tensor in trained.tensors.items()}
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise InputError(f"{path}: the weights are not of its {cls.__name__}: {one_line(error)}") from error
    _tie(model, tensors, path)
    if record["generation_config"] is not None:
        model.generation_config = GenerationConfig.from_dict(json.loads(record["generation_config"]))
    if model.generation_config is not None:
        if record["stop_token_ids"]:  # a turn may end with another token than a text
            model.generation_config.eos_token_id = record["stop_token_ids"]
        # Some published ones, sampling options without do_sample, say, would not pass as new: this is no new one.
        model.generation_config._original_object_hash = hash(model.generation_config)
    return model


def model_class_of(record: dict[str, Any], path: Path) -> type[PreTrainedModel]:
    """The class that a record names: of transformers, or one that this process has imported.

    A file does not decide what else is imported.

    Raises:
        InputError: it is another.
    """
    from transformers import PreTrainedModel

    found = _class_of(record["model_class"])
    if isinstance(found, type) and issubclass(found, PreTrainedModel) and record["config"] is not None:
        return found
    raise InputError(
        f"{path}: {record['model_class']} is no model class of transformers; a model of one's own, or one with remote "
        "code, is exported by the callback HuggingFaceExport in its fit, and must be a PreTrainedModel"
    )


def _class_of(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    if module not in sys.modules and module.startswith("transformers."):
        with contextlib.suppress(ImportError):  # another version's
            importlib.import_module(module)
    return getattr(sys.modules.get(module), name, None)


def _config_of(record: dict[str, Any]) -> Any:
    """From a file: it is where transformers reads infinity, as Mamba's configs have it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(record["config"], encoding="utf-8")
        return _class_of(record["config_class"]).from_json_file(str(file))


def _converted(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    converted = tensor.to(dtype)
    if converted.isinf().any() and not tensor.isinf().any():
        raise InputError(f"--dtype: {name} has values that {dtype} does not reach")
    return converted


def _tie(model: PreTrainedModel, tensors: dict[str, Tensor], path: Path) -> None:
    """Make one of what the config ties, which a checkpoint in shards holds twice."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    model.tie_weights()
    for name, tensor in model.state_dict().items():
        if name in tensors and not _same(tensor, tensors[name]):
            raise InputError(f"{path}: its config ties {name} to another parameter, and the two have different values")


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() or torch.equal(one.view(torch.uint8), other.view(torch.uint8))
