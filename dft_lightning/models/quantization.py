"""A frozen base in 4 or 8 bits, by bitsandbytes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from dft_lightning.errors import InputError, one_line

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def bitsandbytes_config(values: dict[str, Any]) -> BitsAndBytesConfig:
    """The config that ``from_pretrained`` takes.

    Args:
        values: options of transformers' ``BitsAndBytesConfig``, ``load_in_4bit`` or ``load_in_8bit`` among them.

    Raises:
        InputError: bitsandbytes is missing, an option is unknown or has a value that the class refuses, or no number
            of bits is asked for.
    """
    from transformers import BitsAndBytesConfig

    import_bitsandbytes("model.loading.quantization_config")
    try:
        config: BitsAndBytesConfig = BitsAndBytesConfig(**values)  # type: ignore[no-untyped-call]
    except (TypeError, ValueError) as error:
        raise InputError(f"model.loading.quantization_config: {one_line(error)}") from error
    unknown = sorted(set(values) - set(inspect.signature(BitsAndBytesConfig.__init__).parameters))
    if unknown:  # the class logs them and goes on
        raise InputError(f"model.loading.quantization_config: BitsAndBytesConfig has no {', '.join(unknown)}")
    if not (config.load_in_4bit or config.load_in_8bit):
        raise InputError("model.loading.quantization_config: set load_in_4bit: true or load_in_8bit: true")
    return config


def check_quantized(model: nn.Module) -> None:
    """Raise ``InputError`` for widths that bitsandbytes cannot multiply by in 4 bits on the CPU."""
    from bitsandbytes.nn.modules import Linear4bit

    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit) and layer.weight.device.type == "cpu" and layer.in_features % _BLOCK:
            raise InputError(
                f"model.loading.quantization_config: on the CPU bitsandbytes' 4 bits need widths that {_BLOCK} "
                f"divides, and {name} has {layer.in_features}: use a GPU, or load_in_8bit"
            )


_BLOCK = 64


def is_quantized(model: nn.Module) -> bool:
    """Whether bitsandbytes keeps weights of the model."""
    return getattr(model, "quantization_method", None) is not None


def import_bitsandbytes(key: str) -> Any:
    """The package.

    Raises:
        InputError: it is missing; the message begins with ``key``.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise InputError(
            f"{key} needs the bitsandbytes extra: pip install 'dft-lightning[bitsandbytes]' ({error})"
        ) from error
    return bitsandbytes
