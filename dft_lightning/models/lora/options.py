"""The options of a LoRA adapter, and peft's config of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dft_lightning.errors import InputError, did_you_mean, one_line

if TYPE_CHECKING:
    from peft import LoraConfig


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
        if peft.get("task_type", "") is None:  # of no task: peft does not ask for one
            del peft["task_type"]
    if not isinstance(peft, dict):
        raise InputError(f"model.peft: expected the options of a LoraConfig, got {type(peft).__name__}")
    lora_config(peft)
    return peft


def lora_config(values: dict[str, Any]) -> LoraConfig:
    """The config that :func:`lora_values` took apart."""
    lora_config_class = _lora_config_class()
    defaults = vars(lora_config_class(task_type="CAUSAL_LM"))
    for name, value in values.items():
        if name not in defaults:
            known = [each for each in defaults if not _is_refused(each)]
            end = did_you_mean(str(name), known, f": it has {', '.join(known)}")
            raise InputError(f"model.peft: LoraConfig has no {name}{end}")
        if _is_refused(name) and value != defaults[name]:
            raise InputError(
                f"model.peft.{name} is not supported, as it changes the base, of which checkpoints hold nothing, wants "
                "data before training or something in every forward, or is for other uses: override build_model and "
                "use peft there"
            )
        if name == "init_lora_weights" and value not in _INITIALISATIONS:
            raise InputError(
                f"model.peft.init_lora_weights: {value!r} is not supported, as it changes the base, of which "
                "checkpoints hold nothing, or wants data or a start that is no longer the base: set true or gaussian"
            )
    _check_values(values)
    try:
        return lora_config_class(**{"task_type": "CAUSAL_LM", **values})
    except (TypeError, ValueError) as error:
        raise InputError(f"model.peft: {one_line(error)}") from error


_INITIALISATIONS = (True, "gaussian")
# Beside those that are a config of a method's own. The first three lines are methods, too; the others are what peft
# keeps in an adapter's folder, or what adapts parameters and tied ends, of which nothing is checked here.
_REFUSED = {
    *("alora_invocation_tokens", "use_qalora", "qalora_group_size", "use_bdlora", "layer_replication"),
    *("trainable_token_indices", "megatron_core"),
    *("task_type", "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_parameters", "ensure_weight_tying"),
}


def _is_refused(name: str) -> bool:
    return name in _REFUSED or name.endswith("_config")


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
