"""LoRA by peft: adapters put into a language model, which alone are trained and saved."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dft_lightning.distributed.sharding import local_part
from dft_lightning.errors import InputError, one_line
from dft_lightning.models.head import ends_of

if TYPE_CHECKING:
    from peft import LoraConfig, LoraModel

ADAPTER = "default"
"""Its name in the model, as peft's own."""

# What else LoraConfig has changes the base's weights, of which checkpoints hold nothing, wants data before training,
# or arguments in every forward.
_SUPPORTED = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "init_lora_weights",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "bias",
    "fan_in_fan_out",
)
_INITIALISATIONS = (True, "gaussian")
# What an adapter's weights mean nothing without.
_OF_THE_FUNCTION = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
_ADAPTER_PARTS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}


def lora_values(peft: dict[str, Any] | LoraConfig | None) -> dict[str, Any] | None:
    """The options of a ``LoraConfig`` that are not its defaults, in plain values.

    Args:
        peft: a config, its options, or ``None`` for no adapter.

    Raises:
        InputError: the peft extra is missing, an option is unknown, not supported here or has a value that
            ``LoraConfig`` refuses.
    """
    if peft is None:
        return None
    lora_config_class = _lora_config_class()
    if isinstance(peft, lora_config_class):
        defaults = lora_config_class(task_type="CAUSAL_LM")
        given = {field.name: getattr(peft, field.name) for field in dataclasses.fields(peft)}
        peft = {name: _plain(value) for name, value in given.items() if value != getattr(defaults, name)}
        peft.pop("task_type", None)
    if not isinstance(peft, dict):
        raise InputError(f"model.peft: expected the options of a LoraConfig, got {type(peft).__name__}")
    lora_config(peft)
    return peft


def lora_config(values: dict[str, Any]) -> LoraConfig:
    """The config that :func:`lora_values` took apart."""
    lora_config_class = _lora_config_class()
    known = {field.name for field in dataclasses.fields(lora_config_class)}
    values = {name: value for name, value in values.items() if (name, value) not in _OF_EVERY_ADAPTER}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), _SUPPORTED, n=1)
            hint = f"; did you mean {near[0]}?" if near else f": it has {', '.join(_SUPPORTED)}"
            raise InputError(f"model.peft: LoraConfig has no {name}{hint}")
        if name not in _SUPPORTED:
            raise InputError(
                f"model.peft.{name} is not supported (supported are {', '.join(_SUPPORTED)}): override build_model and "
                "use peft there"
            )
        if name == "init_lora_weights" and value not in _INITIALISATIONS:
            raise InputError(
                f"model.peft.init_lora_weights: {value!r} is not supported, as it changes the base, of which "
                "checkpoints hold nothing, or wants data or a start that is no longer the base: set true or gaussian"
            )
    _check_values(values)
    try:
        return lora_config_class(task_type="CAUSAL_LM", **values)
    except (TypeError, ValueError) as error:
        raise InputError(f"model.peft: {one_line(error)}") from error


_OF_EVERY_ADAPTER = (("task_type", "CAUSAL_LM"), ("peft_type", "LORA"))


def _check_values(values: dict[str, Any]) -> None:
    """What ``LoraConfig`` takes and the layers then stumble on, or do not."""
    checks: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "r": ("a whole number from 1", lambda value: _is(value, int) and value >= 1),
        "lora_alpha": ("a number above 0", lambda value: _is(value, int, float) and 0 < value < math.inf),
        "lora_dropout": ("a number in [0, 1)", lambda value: _is(value, int, float) and 0 <= value < 1),
        "rank_pattern": ("names with whole numbers from 1", _are(lambda value: _is(value, int) and value >= 1)),
        "alpha_pattern": ("names with numbers above 0", _are(lambda value: _is(value, int, float) and value > 0)),
        "target_modules": ("a name or a list of names", _is_names),
        "exclude_modules": ("a name or a list of names", _is_names),
        "modules_to_save": ("a list of names", lambda value: _is_names(value) and not isinstance(value, str)),
    }
    for name, (expected, holds) in checks.items():
        if values.get(name) is not None and not holds(values[name]):
            raise InputError(f"model.peft.{name}: expected {expected}, got {values[name]!r}")


def _is(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _are(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(holds(each) for each in value.values())


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, (list, tuple, set)) and bool(value) and all(isinstance(name, str) for name in value)
    )


def _lora_config_class() -> type[LoraConfig]:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError(f"model.peft needs the peft extra: pip install 'dft-lightning[peft]' ({error})") from error
    return LoraConfig


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def attach(model: nn.Module, config: LoraConfig, values: bool = True) -> LoraModel:
    """Put an adapter into a model, in place, and freeze all else. Adapters of a half-precision base are in float32.

    On a model whose parameters are on the meta device the adapter's are on the CPU, and drawn as on any other model.
    Experts that a model keeps in one parameter are adapted where peft does so: it then writes into the config what it
    made of the options.

    Args:
        model: the base.
        config: of the adapter.
        values: ``False`` where names and shapes will do.

    Returns:
        What peft merges them by.

    Raises:
        InputError: the config names something that the model has not, something that peft cannot adapt, or an end of
            the model that is tied to the other.
    """
    from peft import LoraModel
    from peft.tuners.tuners_utils import cast_adapter_dtype

    on_meta = any(parameter.is_meta for parameter in model.parameters())
    if on_meta and config.use_dora and values:
        raise InputError("model.peft.use_dora needs the base's weights when it begins: set model.sharding.load: whole")
    tied, asked = _tied_ends(model), copy.deepcopy(config)
    try:
        with warnings.catch_warnings():
            # peft looks for its own patterns of experts among the modules, where they are not.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            tuner: LoraModel = LoraModel(model, config, ADAPTER)
    except Exception as error:  # whatever peft and torch raise over a name or a size
        raise InputError(f"model.peft: {one_line(error)}{_way_out(error)}") from error
    _check_matches(model, asked, tuner)
    _check_linear(model)
    if tied and _changed_ends(model):
        raise InputError(
            f"model.peft: {type(model).__name__} ties its embedding to its output layer, and an adapter or a copy of "
            "one would leave the other behind: leave both out of target_modules and modules_to_save"
        )
    cast_adapter_dtype(model, ADAPTER)
    if values:
        _draw(model, config)
    return tuner


def _way_out(error: Exception) -> str:
    """What peft leaves unsaid of modules that ``all-linear`` takes along."""
    if "ParamWrapper" in str(error):
        return " (it is what adapts a model's experts: leave that out, or list target_modules without the experts')"
    if "incompatible with Mamba" in str(error):
        return " (or name it in model.peft.exclude_modules)"
    return ""


def _check_matches(model: nn.Module, config: LoraConfig, tuner: LoraModel) -> None:
    """peft ignores most of what names nothing.

    Args:
        model: with its adapter.
        config: as it was given, before peft made parameters of the names of experts.
        tuner: what peft made of it.
    """
    from peft.tuners.lora import LoraLayer

    names = {own for name, _ in model.named_modules() if (own := base_name(name))}
    adapted = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    parameters, targets = tuner.targeted_parameter_names, getattr(tuner.peft_config[ADAPTER], "target_modules", None)
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        given = getattr(config, key)
        if key == "exclude_modules" and isinstance(given, str):
            continue
        for each in [] if given is None or isinstance(given, str) else given:
            of_experts = parameters and key == "target_modules" and each not in (targets or ())
            if not of_experts and not any(name == each or name.endswith(f".{each}") for name in names):
                raise InputError(f"model.peft.{key}: {type(model).__name__} has no module {each}")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in [*dict(adapted), *parameters]):
                raise InputError(f"model.peft.{key}: no module with an adapter is meant by {pattern}")
    layers = config.layers_to_transform
    for index in [layers] if isinstance(layers, int) else layers or []:
        if not any(f".{index}." in name for name, _ in adapted):
            raise InputError(f"model.peft.layers_to_transform: {type(model).__name__} has no layer {index} to adapt")
    for name in parameters:
        for key, leaves_out in (("layers_to_transform", _is_of_another_layer), ("exclude_modules", _is_excluded)):
            if leaves_out(config, name):
                raise InputError(
                    f"model.peft.{key}: peft adapts {name} all the same, a parameter and no module: leave it out "
                    "by a list of target_modules"
                )
    if config.lora_bias:
        for name, layer in adapted:
            if getattr(layer.get_base_layer(), "bias", None) is None:
                raise InputError(f"model.peft.lora_bias: {name} has no bias, so that one could not be merged into it")


def _is_of_another_layer(config: LoraConfig, parameter: str) -> bool:
    layers = config.layers_to_transform
    layers = [layers] if isinstance(layers, int) else layers
    return bool(layers) and not any(f".{index}." in parameter for index in layers or [])


def _is_excluded(config: LoraConfig, parameter: str) -> bool:
    excluded, names = config.exclude_modules or [], (parameter, parameter.rpartition(".")[0])
    if isinstance(excluded, str):
        return any(re.fullmatch(excluded, name) for name in names)
    return any(name == each or name.endswith(f".{each}") for name in names for each in excluded)


def _check_linear(model: nn.Module) -> None:
    """peft adapts every subclass of ``nn.Linear`` as if it computed no more than that, as some routers do."""
    from peft.tuners.lora import Linear

    seen = set()
    for name, layer in model.named_modules():
        base = layer.get_base_layer() if isinstance(layer, Linear) else None
        if not isinstance(base, nn.Linear) or type(base) in seen:
            continue
        kind = type(base)
        seen.add(kind)
        if kind.forward is not nn.Linear.forward and not _is_linear(base):
            raise InputError(
                f"model.peft: peft cannot adapt {name}, as {kind.__name__} does not return its input times its weight: "
                f"set model.peft.exclude_modules: [{name.rpartition('.')[2]}]"
            )


def _is_linear(layer: nn.Linear) -> bool:
    """Tried with values of its own: on the meta device the layer has none."""
    with torch.random.fork_rng([]), torch.no_grad():
        values = {name: torch.randn(parameter.shape) for name, parameter in layer.named_parameters()}
        given = torch.randn(2, layer.in_features)
        expected = F.linear(given, values["weight"], values.get("bias"))
        try:
            output = functional_call(layer, values, (given,))
        except Exception:  # whatever it does with rows that it does not expect
            return False
    return isinstance(output, Tensor) and output.shape == expected.shape and torch.allclose(output, expected, atol=1e-3)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Run a model as its base meanwhile. What is trained stays marked as trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    # Not enable_adapters(), which also freezes and unfreezes parameters under a strategy that has wrapped them.
    layers = [each for each in model.modules() if isinstance(each, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def raise_to_float32(model: nn.Module) -> list[str]:
    """Keep whatever is trained in float32, in place: in half precision small updates are rounded away.

    Returns:
        Names of what was not.
    """
    names = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
            names.append(name)
    return names


def _tied_ends(model: nn.Module) -> bool:
    ends = ends_of(model)
    return None not in ends and ends[0].weight is ends[1].weight


def _changed_ends(model: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return any(isinstance(end, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for end in ends_of(model))


def _draw(model: nn.Module, config: LoraConfig) -> None:
    """Initial values, again: those that peft drew went to the meta device with the base, if that is there.

    They hang on the seed alone, and not on what was drawn before, which differs with the way the base is loaded.
    """
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(torch.initial_seed())
        _draw_layers(model, config)


def _draw_layers(model: nn.Module, config: LoraConfig) -> None:
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.adapter_layer_names:
                part = getattr(layer, name)
                if ADAPTER not in part:
                    continue
                if isinstance(part[ADAPTER], nn.Module):
                    if any(parameter.is_meta for parameter in part[ADAPTER].parameters()):
                        part[ADAPTER].to_empty(device="cpu")
                elif part[ADAPTER].is_meta:
                    part[ADAPTER] = nn.Parameter(torch.empty_like(part[ADAPTER], device="cpu"))
            layer.reset_lora_parameters(ADAPTER, config.init_lora_weights)  # type: ignore[no-untyped-call]


def base_name(name: str) -> str | None:
    """What the base called a tensor of the model with its adapter; ``None`` for a tensor of the adapter.

    Example:
        >>> base_name("layers.0.q_proj.base_layer.weight"), base_name("layers.0.q_proj.lora_A.default.weight")
        ('layers.0.q_proj.weight', None)
    """
    parts = name.split(".")
    if _ADAPTER_PARTS & set(parts):
        return None
    for inner in ("original_module", "base_layer"):
        parts = [part for part in parts if part != inner]
    if "modules_to_save" in parts:  # a copy that is trained
        at = parts.index("modules_to_save")
        del parts[at : at + 2]
    return ".".join(parts)


def trained_names(model: nn.Module) -> set[str]:
    """Names of what a checkpoint holds of a model with an adapter: all that is trained."""
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Tells one base from another: a hash of shape and first values of every frozen parameter, by the base's names.

    In float32 and float64 the values are rounded to bfloat16, so that a base that was loaded in bfloat16 has the same;
    the word before each hash says what it was made of, and those of one word alone are to be compared. Where ranks hold
    rows of a model, rank 0's count.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            # Of vectors rank 0 may hold no more than one value; of matrices it has the first row.
            first = local_part(parameter).detach().flatten()[: _FIRST if parameter.ndim > 1 else 1].cpu()
            if first.dtype in (torch.float32, torch.float64):
                first = first.to(torch.bfloat16)
            digest = hashlib.sha256(f"{list(parameter.shape)}".encode() + first.view(torch.uint8).numpy().tobytes())
            found[str(base_name(name))] = f"{str(first.dtype)[6:]}:{digest.hexdigest()[:16]}"
    return found


_FIRST = 16


def first_difference(saved: dict[str, str], own: dict[str, str]) -> str | None:
    """The first parameter of which two :func:`fingerprint` tell that it differs; ``None`` where there is none."""
    for name, own_hash in own.items():
        other = saved.get(name, "")
        if other != own_hash and other.partition(":")[0] == own_hash.partition(":")[0]:
            return name
    return None


def adapter_record(values: dict[str, Any], of_base: dict[str, str]) -> dict[str, Any]:
    """What a checkpoint says of its adapter, in plain values."""
    return {"config": json.dumps(values), "base_fingerprint": of_base}


def check_adapter(
    saved: dict[str, Any] | None,
    values: dict[str, Any] | None,
    of_base: dict[str, str] | None,
    key: str = "--ckpt_path",
) -> None:
    """Whether a checkpoint's adapter belongs on this model.

    Args:
        saved: what :func:`adapter_record` made; ``None`` for a checkpoint without an adapter.
        values: of the adapter that the model has; ``None`` for none.
        of_base: see :func:`fingerprint`; ``None`` where it is not to be compared.
        key: what an error message calls the checkpoint.

    Raises:
        InputError: one has an adapter and the other has none, they differ in what an adapter's weights mean, or the
            base is another.
    """
    if saved is None and values is not None:
        raise InputError(
            f"{key}: the checkpoint holds a whole model and no adapter: leave model.peft out, or export the checkpoint "
            "and give that folder as model.model"
        )
    if saved is not None and values is None:
        raise InputError(f"{key}: the checkpoint holds an adapter alone: set model.peft as its run did")
    if saved is None or values is None:
        return
    of_checkpoint, own = lora_config(json.loads(saved["config"])), lora_config(values)
    for name in _OF_THE_FUNCTION:
        if getattr(of_checkpoint, name) != getattr(own, name):
            raise InputError(
                f"{key}: the checkpoint's adapter has {name} {getattr(of_checkpoint, name)}, and model.peft.{name} is "
                f"{getattr(own, name)}"
            )
    if differing := first_difference(saved["base_fingerprint"], of_base or {}):
        raise InputError(f"{key}: the checkpoint's adapter was trained on another base: {differing} differs")


def check_tensors(there: Iterable[str], model: nn.Module, key: str = "--ckpt_path") -> None:
    """Raise ``InputError`` where a checkpoint lacks what is trained of a model, or has what is not in it."""
    there = set(there)
    lacking, unknown = trained_names(model) - there, there - set(model.state_dict())
    for found, what in ((lacking, "lacks"), (unknown, "has, and the model has not,")):
        if found:
            raise InputError(
                f"{key}: the checkpoint {what} {min(found)} ({len(found)} such tensors of the adapter): it is of a run "
                "with another model.peft or another model"
            )


def adapter_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's trained tensors by the names of peft's own files.

    Args:
        model: has the adapter; its values are not read.
        tensors: by the model's names.

    Raises:
        InputError: more than the adapter was trained, which such a file has no place for, or peft would not find a
            tensor again.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    found = get_peft_model_state_dict(
        model, state_dict=dict(tensors), adapter_name=ADAPTER, save_embedding_layers=False
    )
    if len(found) != len(tensors):
        kept = {id(tensor) for tensor in found.values()}
        left = sorted(name for name, tensor in tensors.items() if id(tensor) not in kept)
        raise InputError(
            f"{left[0]} ({len(left)} such tensors) was trained beside the adapter, and an adapter's folder has no "
            "place for it: export with --merge"
        )
    read: Any = set_peft_model_state_dict(copy.deepcopy(model), found, ADAPTER)
    if lost := read.unexpected_keys:
        raise InputError(
            f"{lost[0]} ({len(lost)} such tensors) is not found again when peft loads the adapter of a "
            f"{type(model).__name__}: export with --merge"
        )
    return {f"base_model.model.{name}": tensor for name, tensor in found.items()}
