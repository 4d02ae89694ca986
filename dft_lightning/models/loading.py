"""From a name, folder or config to a causal language model."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dft_lightning.assets import resolve
from dft_lightning.checkpoints.trust import code_refused
from dft_lightning.checkpoints.whole import unreadable
from dft_lightning.distributed.shard_loading import WAY_OUT as WHOLE
from dft_lightning.distributed.shard_loading import parameters_on_meta, saved_dtype
from dft_lightning.errors import InputError, one_line
from dft_lightning.foreign.transformers import kept_in_float32, supports_sdpa
from dft_lightning.models.attention import ATTENTION, register_documents_attention
from dft_lightning.models.quantization import bitsandbytes_config, check_quantized

# What transformers makes rope_parameters of, and what it writes into every config of its own.
_ALSO_TAKEN = ("rope_theta", "rope_scaling", "transformers_version", "dtype")
DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]


def load_causal_lm(
    model: str | os.PathLike[str] | dict[str, Any],
    *,
    dtype: DType = "float32",
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization_config: dict[str, Any] | None = None,
) -> nn.Module:
    """Load a pretrained model, or make one from scratch from a config, in training mode.

    Args:
        model: a hub name, a local folder, ``asset://NAME``, or a dict of config values with ``model_type`` for a
            model with random weights (``{"model_type": "llama", "hidden_size": 64, ...}``).
        dtype: of the parameters; ``"auto"`` takes what the checkpoint was saved in.
        attn_implementation: ``"sdpa"``, ``"eager"``, ``"flash_attention_2"`` ...; ``None`` leaves it to transformers.
            ``"documents"`` is this package's, for padding-free batches.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the checkpoint.
        quantization_config: of transformers' ``BitsAndBytesConfig``, for a pretrained model whose weights are frozen.

    Raises:
        InputError: no such folder or hub name, an unknown ``model_type`` or config value, weights missing.
    """
    from transformers import AutoModelForCausalLM

    register_documents_attention()
    torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    if isinstance(model, dict):
        return _from_config(model, torch_dtype, attn_implementation, trust_remote_code)
    path = _checkpoint_path(model)
    options: dict[str, Any] = {"revision": revision} if revision is not None else {}
    if quantization_config is not None:
        options["quantization_config"] = bitsandbytes_config(quantization_config)
    with _loading(path, attn_implementation):
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(
            path,
            config=_read_config(path, trust_remote_code, revision),
            dtype=torch_dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            **options,
        )
    if quantization_config is not None:
        check_quantized(loaded)
    _check_attention(loaded, attn_implementation)
    return loaded.train()  # from_pretrained leaves dropout off and gradient checkpointing inactive


def empty_causal_lm(
    model: str | os.PathLike[str],
    *,
    dtype: DType = "float32",
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, list[Path]]:
    """A pretrained model without its weights, and the files that have them.

    Parameters are on the meta device, tied where the model ties them; buffers have their values.

    Args:
        model: a hub name, a local folder or ``asset://NAME``.
        dtype: see :func:`load_causal_lm`.
        attn_implementation: see :func:`load_causal_lm`.
        revision: see :func:`load_causal_lm`.
        trust_remote_code: see :func:`load_causal_lm`.

    Returns:
        The model in training mode, and its safetensors files, downloaded if need be.

    Raises:
        InputError: no such folder or hub name, no safetensors files, or parameters that stay in float32 whatever the
            ``dtype``.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    register_documents_attention()
    path = _checkpoint_path(model)
    options: dict[str, Any] = {"revision": revision} if revision is not None else {}
    with _loading(path, attn_implementation):
        config = _read_config(path, trust_remote_code, revision)
        files = _safetensors_files(path, options)
        own = config.get_text_config().dtype
        wanted = getattr(torch, dtype) if dtype != "auto" else own or saved_dtype(files)
        with parameters_on_meta():
            made: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config,
                dtype=wanted,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            )
        with contextlib.suppress(OSError):  # a checkpoint may have none
            made.generation_config = GenerationConfig.from_pretrained(path, **options)  # type: ignore[assignment]
    in_float32 = kept_in_float32(made, wanted == torch.float16)
    if in_float32 and wanted in (torch.float16, torch.bfloat16):
        raise InputError(
            f"model.loading.dtype: {type(made).__name__} keeps some parameters in float32 "
            f"({', '.join(sorted(in_float32))}), and FSDP2 shards parameters of one dtype: set model.loading.dtype: "
            "float32 and trainer.precision: bf16-mixed"
        )
    _check_attention(made, attn_implementation)
    return made.train(), files


def _checkpoint_path(model: str | os.PathLike[str]) -> str:
    path = resolve(model, "model.model")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise InputError(
            f"model.model: {path} is a folder without config.json; expected a Hugging Face checkpoint folder"
        )
    return path


@contextlib.contextmanager
def _loading(path: str, attn_implementation: str | None) -> Iterator[None]:
    try:
        yield
    except _OF_FILES as error:
        if isinstance(error, InputError):
            raise
        _check_interface(error, path, attn_implementation)
        refused = code_refused(path, "model.model", error)
        reason = unreadable(error) if isinstance(error, pickle.UnpicklingError) else one_line(error)
        raise refused or InputError(f"model.model: cannot load {path!r}: {reason}") from error


# What a folder's files make transformers stumble on; others are faults, or of a device.
_OF_FILES = (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, pickle.UnpicklingError)


def _read_config(path: str, trust_remote_code: bool, revision: str | None) -> Any:
    from transformers import AutoConfig

    options: dict[str, Any] = {"revision": revision} if revision is not None else {}
    return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **options)


def number_of_positions(
    model: str | dict[str, Any], revision: str | None = None, trust_remote_code: bool = False
) -> int | None:
    """How many tokens a model's config says that it has positions for, without the model.

    Returns:
        The number; ``None`` where it has none, or there is no such config.
    """
    from transformers import AutoConfig

    try:
        if isinstance(model, str):
            config = _read_config(resolve(model, "model.model"), trust_remote_code, revision)
        else:
            values = dict(model)
            config = AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception:  # whatever a config's own code raises: who loads the model says it
        return None
    number = getattr(config.get_text_config(), "max_position_embeddings", None)
    return number if isinstance(number, int) and number > 0 else None


def _safetensors_files(path: str, options: dict[str, Any]) -> list[Path]:
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file

    optional = {**options, "_raise_exceptions_for_missing_entries": False}
    single = cached_file(path, SAFE_WEIGHTS_NAME, **optional)  # as transformers: it comes before an index
    if single is not None:
        return [Path(single)]
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **optional)
    if index is None:
        raise InputError(f"model.model: {path} has no safetensors files; {WHOLE}")
    names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [Path(str(cached_file(path, name, **options))) for name in names]


def _from_config(
    values: dict[str, Any], dtype: torch.dtype | str, attn_implementation: str | None, trust_remote_code: bool
) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(values)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise InputError(f"model.model: a config needs model_type (llama, qwen2, ...), got the keys {sorted(values)}")
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise InputError(f"model.model: unknown model_type {model_type!r}: {one_line(error)}") from error
    unlisted = sorted(key for key in values if not _lists(known, key) and key not in _ALSO_TAKEN)
    if unlisted and (unknown := _unread(unlisted, model_type, values)):
        raise InputError(f"model.model: {type(known).__name__} has no {', '.join(unknown)}")
    try:
        config = AutoConfig.for_model(model_type, **values)
        made: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config,
            dtype=torch.float32 if dtype == "auto" else dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # whatever a model's own code raises over values it cannot work with
        _check_interface(error, model_type, attn_implementation)
        raise InputError(f"model.model: no {model_type} can be made of these values: {one_line(error)}") from error
    _check_attention(made, attn_implementation)
    return made.train()


def _lists(config: Any, key: str) -> bool:
    """Whether a config's class has a value of this name."""
    try:
        return hasattr(config, key)
    except RuntimeError:  # it has one for each layer, and none for all
        return True


def _unread(keys: list[str], model_type: str, values: dict[str, Any]) -> list[str]:
    """Which keys neither the config's class nor a module of its model reads: classes do not list all that is read."""
    readers = _readers(model_type, {key: value for key, value in values.items() if key not in keys})
    source = "".join(inspect.getsource(cls) for cls in readers if cls.__module__.startswith("transformers.models."))
    return [key for key in keys if not re.search(_READS.format(re.escape(key)), source)]


def _readers(model_type: str, values: dict[str, Any]) -> set[type]:
    """The classes of a config and of its model's modules; the default's where these values make none."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model(model_type, **values)
        with torch.device("meta"):
            made: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception:  # whatever the model's own code raises: what is wrong is said when it is made
        return _readers(model_type, {}) if values else set()
    return {type(config), *map(type, made.modules())}


# config.KEY, getattr(config, "KEY", ...) and, in the config's own class, kwargs.pop("KEY", ...).
_READS = r"""\bconfig\.{0}\b|\bconfig,\s*["']{0}["']|\bkwargs\.(?:pop|get)\(\s*["']{0}["']"""


def config_values(config: Any) -> dict[str, Any]:
    """The values of a transformers config that its class does not have by itself, and ``model_type``, in plain form.

    Raises:
        InputError: another config comes of these values.
    """
    from transformers import AutoConfig

    name, values, whole = type(config).__name__, _plain(config, use_diff=True), _plain(config, use_diff=False)
    way_out = "save it beside weights by save_pretrained and give that folder, or give a dict of its values"
    try:
        rest = {key: value for key, value in values.items() if key != "model_type"}
        again = _plain(AutoConfig.for_model(config.model_type, **rest), use_diff=False)
    except Exception as error:  # whatever the class raises over values of its own
        raise InputError(
            f"model: a {name} cannot be made again of its values ({one_line(error)}): {way_out}"
        ) from error
    if lost := sorted(key for key in whole if whole[key] != again.get(key) and key not in _ALSO_TAKEN):
        raise InputError(f"model: a {name} cannot be made again of its values ({lost[0]} comes out another): {way_out}")
    return values


def _plain(config: Any, use_diff: bool) -> dict[str, Any]:
    """A config's values as its file would have them, which spells infinite numbers in a way of its own."""

    def number(value: dict[str, Any]) -> Any:
        return float(value["__float__"]) if value.keys() == {"__float__"} else value

    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=use_diff), object_hook=number)
    values.pop("_name_or_path", None)  # where it was read: no value of the model
    return values


def _check_interface(error: Exception, name: str, attn_implementation: str | None) -> None:
    """Some models choose among attentions of their own, where a name that transformers knows may be missing."""
    if isinstance(error, KeyError) and error.args == (attn_implementation,):
        raise InputError(
            f"model.loading.attn_implementation: {name} has attentions of its own, and none called "
            f"{attn_implementation}: set sdpa or eager"
        ) from error


def _check_attention(model: nn.Module, attn_implementation: str | None) -> None:
    """What transformers checks of its own names: that a model's attention is one that sdpa can compute."""
    if attn_implementation == ATTENTION and not supports_sdpa(model):
        raise InputError(
            "model.loading.attn_implementation: documents is made of sdpa calls, which "
            f"{type(model).__name__} does not support"
        )
