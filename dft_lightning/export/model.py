"""The transformers model that a checkpoint's record and tensors make."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dft_lightning.distributed.shard_loading import parameters_on_meta
from dft_lightning.errors import InputError, one_line
from dft_lightning.export.checkpoint import TrainedCheckpoint
from dft_lightning.foreign.transformers import let_pass

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trained_model(trained: TrainedCheckpoint, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model with the checkpoint's tensors for parameters, bit for bit unless ``dtype`` is given.

    Raises:
        InputError: the class is none of transformers, the tensors are not the model's, or ``dtype`` cannot hold them.
    """
    model = empty_model(trained)
    tensors = {name: converted(name, tensor, dtype) for name, tensor in trained.tensors.items()}
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise InputError(
            f"{trained.path}: the weights are not of its {type(model).__name__}: {one_line(error)}"
        ) from error
    _tie(model, tensors, trained.path)
    return model


def empty_model(trained: TrainedCheckpoint) -> PreTrainedModel:
    """The model without values: its parameters are on the meta device."""
    cls, config = model_class_of(trained.record, trained.path), _config_of(trained.record)
    with parameters_on_meta():
        made: PreTrainedModel = cls(config)
    return made


def end_turns(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Give a model the generation config of the run, and have it end turns as training did."""
    from transformers import GenerationConfig

    if record["generation_config"] is not None:
        model.generation_config = GenerationConfig.from_dict(json.loads(record["generation_config"]))
    if model.generation_config is not None:
        if record["stop_token_ids"]:  # a turn may end with another token than a text
            model.generation_config.eos_token_id = record["stop_token_ids"]
        let_pass(model.generation_config)


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
    from transformers import PretrainedConfig

    cls = _class_of(record["config_class"])
    if not (isinstance(cls, type) and issubclass(cls, PretrainedConfig)):
        raise InputError(f"{record['config_class']} is no class of a config of transformers")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(_without_kernels(json.loads(record["config"]))), encoding="utf-8")
        return cls.from_json_file(str(file))


def _without_kernels(values: Any) -> Any:
    """A config without the names of attention code, which may be a stranger's on the hub; it is not saved, either."""
    if isinstance(values, dict):
        return {name: _without_kernels(value) for name, value in values.items() if not name.endswith(_KERNELS)}
    return [_without_kernels(value) for value in values] if isinstance(values, list) else values


_KERNELS = ("attn_implementation", "attn_implementation_internal")


def converted(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in another dtype; ``None`` leaves it as it is."""
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
