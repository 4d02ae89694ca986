"""An adapter as peft's files, or merged into its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from dft_lightning.assets import resolve
from dft_lightning.distributed.shard_loading import parameters_on_meta
from dft_lightning.errors import InputError
from dft_lightning.export.checkpoint import TrainedCheckpoint
from dft_lightning.export.model import converted, empty_model
from dft_lightning.models.fingerprints import base_fingerprint
from dft_lightning.models.loading import load_causal_lm
from dft_lightning.models.lora.adapter import attach
from dft_lightning.models.lora.options import lora_config
from dft_lightning.models.lora.saved import adapter_tensors, check_adapter, check_tensors

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


def adapter_model(trained: TrainedCheckpoint, base: str | None) -> tuple[nn.Module, LoraConfig]:
    """A model on the meta device with the adapter of a checkpoint, and its config, which names the base.

    Args:
        trained: the checkpoint.
        base: name or folder of the base; ``None`` for the run's own.
    """
    values = json.loads(trained.record["adapter"]["config"])
    config = lora_config(values)
    model = empty_model(trained)
    with parameters_on_meta():
        attach(model, config, values=False)
    check_tensors(trained.tensors, model, str(trained.path))
    config.base_model_name_or_path = _name_of_base(trained, base)
    config.revision = None if base is not None else trained.hyper_parameters.get("revision")
    config.inference_mode = True
    return model, config


def save_adapter(folder: Path, model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor]) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``."""
    from safetensors.torch import save_file

    named = {name: tensor.contiguous() for name, tensor in adapter_tensors(model, tensors).items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def merged_model(
    trained: TrainedCheckpoint, base: str | None, dtype: torch.dtype | None, trust_remote_code: bool
) -> PreTrainedModel:
    """The base with the adapter's product added to its weights.

    The base is loaded and rounded as it was in training, the sum is taken in float32, and rounded once: in the dtype of
    the base small products would be lost.

    Args:
        trained: the checkpoint.
        base: name or folder of the base; ``None`` for the run's own.
        dtype: to convert floating-point tensors to.
        trust_remote_code: run code that comes with the base.

    Raises:
        InputError: the base cannot be loaded, is not the one that the adapter was trained on, or has layers with an
            adapter each that share a weight.
    """
    record, hyper = trained.record, trained.hyper_parameters
    options: dict[str, Any] = {"dtype": hyper["loading"]["dtype"], "trust_remote_code": trust_remote_code}
    if base is None:
        options["revision"] = hyper["loading"]["revision"]
    model: Any = load_causal_lm(_name_of_base(trained, base), **options)
    if record["trainer"].get("precision") in _ROUNDED:
        model.to(_ROUNDED[record["trainer"]["precision"]])
    kept_in = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if model.dtype != torch.float64:
        model.float()
    values = json.loads(record["adapter"]["config"])
    tuner = attach(model, lora_config(values))
    check_adapter(record["adapter"], values, base_fingerprint(model), str(trained.path))
    check_tensors(trained.tensors, model, str(trained.path))
    _check_shared(model, trained.path)
    model.load_state_dict(trained.tensors, strict=False)
    merged = cast("PreTrainedModel", tuner.merge_and_unload(safe_merge=True))
    for name, parameter in merged.named_parameters():
        parameter.data = converted(name, parameter.data, dtype or kept_in.get(name, parameter.dtype))
    return merged


def _check_shared(model: nn.Module, path: Path) -> None:
    """Layers that share a weight have an adapter each, and merging would add all of them to the one weight."""
    from peft.tuners.lora import LoraLayer

    sharing: dict[int, tuple[str, nn.Module]] = {}
    for name, layer in model.named_modules():
        weight = getattr(layer.get_base_layer(), "weight", None) if isinstance(layer, LoraLayer) else None
        if weight is None:
            continue
        first, base_layer = sharing.setdefault(id(weight), (name, layer.get_base_layer()))
        if base_layer is not layer.get_base_layer():
            raise InputError(
                f"{path}: {first} and {name} share one weight and have an adapter each, so that no merged weight does "
                "what the two do: export without --merge"
            )


_ROUNDED = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


def _name_of_base(trained: TrainedCheckpoint, base: str | None) -> str:
    name = base if base is not None else trained.record["base"]
    if name is None:
        raise InputError(f"{trained.path} does not say what its adapter was trained on: give --base")
    found = resolve(name, "--base")
    if not Path(found).is_dir():
        return found
    if not (Path(found) / "config.json").is_file():
        raise InputError(f"--base: {found} is a folder without config.json; expected the adapter's base")
    return str(Path(found).resolve())
