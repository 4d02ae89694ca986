"""What a checkpoint or a folder holds of an adapter, and whether it belongs on a model."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from dft_lightning.errors import InputError
from dft_lightning.models.fingerprints import first_difference
from dft_lightning.models.lora.adapter import ADAPTER, trained_names
from dft_lightning.models.lora.options import lora_config

# What an adapter's weights mean nothing without.
_OF_THE_FUNCTION = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")


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
        of_base: see :func:`.base_fingerprint`; ``None`` where it is not to be compared.
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
