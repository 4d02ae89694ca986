"""What a module is given for its model: a name, a folder, a config, or the model itself."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import nn

from dft_lightning.errors import InputError
from dft_lightning.foreign.peft import has_adapter
from dft_lightning.foreign.transformers import attention_of, supports_sdpa
from dft_lightning.models.loading import config_values
from dft_lightning.models.quantization import is_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Options = TypeVar("Options")


def plain_model(model: Any) -> str | dict[str, Any]:
    """What checkpoints and hyperparameters hold of it: a name, a folder or a config's values.

    Args:
        model: a name, a path, a transformers config, a dict of its values, or a causal language model of transformers,
            of which it is the config's values.

    Raises:
        InputError: it is something else, or a model that cannot be trained as it is.
    """
    if isinstance(model, (str, os.PathLike)):
        return str(os.fspath(model))
    if isinstance(model, Mapping):
        return dict(model)
    if hasattr(model, "to_diff_dict"):  # a transformers config
        return config_values(model)
    if isinstance(model, nn.Module):
        _check_causal(model)
        return config_values(model.config)
    hint = ": give its .model" if isinstance(getattr(model, "model", None), nn.Module) else ""
    what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
    raise InputError(f"{_EXPECTED}, got {what}{hint}")


def kept_model(model: Any) -> Any:
    """As :func:`plain_model`, and what is none of it as it is: an argument of a subclass may mean something else."""
    try:
        return plain_model(model)
    except InputError:
        return model


_EXPECTED = "model: expected a hub name, a folder, a config or a causal language model of transformers"


def _check_causal(model: nn.Module) -> None:
    """Raise ``InputError`` where a module is no causal language model of transformers, whole and in one place."""
    from transformers import PreTrainedModel

    name = type(model).__name__
    if has_adapter(model):
        raise InputError(
            f"model: {name} has an adapter: give its base (or what merge_and_unload() returns), and the options as peft"
        )
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"{_EXPECTED}, got {name}: override build_model of a subclass to train any other module")
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise InputError(f"{_EXPECTED}, got {name}, which predicts no next token: AutoModelForCausalLM makes one")
    if is_quantized(model):
        raise InputError(f"model: {name} is quantized: give its name, with loading.quantization_config and peft")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(f"model: {name} has no weights, it is on the meta device")
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise InputError(f"model: {name} is spread over devices: load it without device_map, the trainer moves it")


def model_itself(model: Any) -> PreTrainedModel | None:
    """The model where it is given as an object, as :func:`plain_model` has checked it; ``None`` otherwise."""
    return cast("PreTrainedModel", model) if isinstance(model, nn.Module) else None


def options_of_itself(model: Any, loading: Options) -> Options:
    """Options of loading as they are of a model that is given as an object; unchanged for what is still to be loaded.

    Args:
        model: as :func:`plain_model` takes it.
        loading: a dataclass with ``dtype``, ``attn_implementation``, ``revision``, ``trust_remote_code`` and
            ``quantization_config``.

    Raises:
        InputError: an option that loads a model says otherwise than it is.
    """
    if (given := model_itself(model)) is None:
        return loading
    _check_causal(given)
    usual = "sdpa" if supports_sdpa(given) else "eager"
    own = {
        "dtype": str(given.dtype).removeprefix("torch."),
        "attn_implementation": None if attention_of(given) == usual else attention_of(given),
        "revision": None,
        "trust_remote_code": False,
        "quantization_config": None,
    }
    defaults = {field.name: field.default for field in dataclasses.fields(loading)}  # type: ignore[arg-type]
    for name, value in own.items():
        asked = getattr(loading, name)
        if asked not in (defaults[name], value, attention_of(given) if name == "attn_implementation" else value):
            raise InputError(
                f"loading.{name}: {asked} is for a model that is loaded, and this {type(given).__name__} is given as "
                "an object: load it so, or give its name"
            )
    return dataclasses.replace(loading, **own)  # type: ignore[type-var]


def name_of(model: Any) -> str | None:
    """The name or folder that a model comes from, beside which its tokenizer is; ``None`` where there is none."""
    if (given := model_itself(model)) is None:
        return model if isinstance(model, str) else None
    name = str(getattr(given, "name_or_path", "") or "")
    is_folder = Path(name).is_dir()
    return name if name and (is_folder or not Path(name).is_absolute()) else None
