"""LoRA by peft: adapters put into a language model, which alone are trained and saved."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dft_lightning.errors import InputError, one_line
from dft_lightning.foreign.peft import looking_for_experts, way_out
from dft_lightning.models.head import ends_of

if TYPE_CHECKING:
    from peft import LoraConfig, LoraModel

ADAPTER = "default"
"""Its name in the model, as peft's own."""

_ADAPTER_PARTS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}


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
        with looking_for_experts():
            tuner: LoraModel = LoraModel(model, config, ADAPTER)
    except Exception as error:  # whatever peft and torch raise over a name or a size
        raise InputError(f"model.peft: {one_line(error)}{way_out(error)}") from error
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
