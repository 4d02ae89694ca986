"""A frozen base in 4 or 8 bits and AdamW with 8-bit states, by bitsandbytes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from dft_lightning.errors import InputError, one_line

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

OptimizerName = Literal["adamw", "adamw_8bit"]
_DEVICES = ("cpu", "cuda", "xpu")


def bitsandbytes_config(values: dict[str, Any]) -> BitsAndBytesConfig:
    """The config that ``from_pretrained`` takes.

    Args:
        values: options of transformers' ``BitsAndBytesConfig``, ``load_in_4bit`` or ``load_in_8bit`` among them.

    Raises:
        InputError: bitsandbytes is missing, an option is unknown or has a value that the class refuses, or no number
            of bits is asked for.
    """
    from transformers import BitsAndBytesConfig

    _import_bitsandbytes("model.quantization_config")
    try:
        config: BitsAndBytesConfig = BitsAndBytesConfig(**values)  # type: ignore[no-untyped-call]
    except (TypeError, ValueError) as error:
        raise InputError(f"model.quantization_config: {one_line(error)}") from error
    unknown = sorted(set(values) - set(inspect.signature(BitsAndBytesConfig.__init__).parameters))
    if unknown:  # the class logs them and goes on
        raise InputError(f"model.quantization_config: BitsAndBytesConfig has no {', '.join(unknown)}")
    if not (config.load_in_4bit or config.load_in_8bit):
        raise InputError("model.quantization_config: set load_in_4bit: true or load_in_8bit: true")
    return config


def check_quantized(model: nn.Module) -> None:
    """Raise ``InputError`` for widths that bitsandbytes cannot multiply by in 4 bits on the CPU."""
    from bitsandbytes.nn.modules import Linear4bit

    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit) and layer.weight.device.type == "cpu" and layer.in_features % _BLOCK:
            raise InputError(
                f"model.quantization_config: on the CPU bitsandbytes' 4 bits need widths that {_BLOCK} divides, and "
                f"{name} has {layer.in_features}: use a GPU, or load_in_8bit"
            )


_BLOCK = 64


def check_optimizer_name(name: str) -> None:
    """Raise ``ValueError`` for a name that is none of :data:`OptimizerName`."""
    if name not in get_args(OptimizerName):
        raise ValueError(f"optimizer must be one of {get_args(OptimizerName)}, got {name!r}")


def adamw_8bit(groups: list[dict[str, Any]], device: torch.device, **options: Any) -> Optimizer:
    """bitsandbytes' AdamW, whose states take a byte each; tensors of less than 4096 elements keep theirs in float32.

    Args:
        groups: parameter groups.
        device: of the parameters.
        options: of AdamW.

    Raises:
        InputError: bitsandbytes is missing or not for the device.
    """
    bitsandbytes = _import_bitsandbytes("model.optimizer: adamw_8bit")
    if device.type not in _DEVICES:
        raise InputError(f"model.optimizer: bitsandbytes has no adamw_8bit for {device.type}: set adamw")
    made: Optimizer = bitsandbytes.optim.AdamW8bit(groups, **options)
    return made


def is_quantized(model: nn.Module) -> bool:
    """Whether bitsandbytes keeps weights of the model."""
    return getattr(model, "quantization_method", None) is not None


def _import_bitsandbytes(key: str) -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise InputError(
            f"{key} needs the bitsandbytes extra: pip install 'dft-lightning[bitsandbytes]' ({error})"
        ) from error
    return bitsandbytes
