"""Hashes of weights, which tell one model from another."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dft_lightning.distributed.sharding import gather_again, local_part
from dft_lightning.models.lora.adapter import base_name

_FIRST = 16


def add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Add a tensor's name, dtype, shape and every bit of its values to a hash, whatever its device.

    Of a sharded one it is a collective, and the same as of the whole.
    """
    if isinstance(tensor, DTensor):  # of shards on the host, too, by the devices' own collective
        on_devices: Any = tensor.to(tensor.device_mesh.device_type)
        tensor = on_devices.full_tensor()
    plain = tensor.detach().cpu().contiguous()
    digest.update(f"{name} {plain.dtype} {list(plain.shape)}".encode())
    digest.update(_bits(plain))


def hash_weights(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers without those of its ``loss``, by which runs may differ.

    Of all of them: a module's own ``state_dict`` may leave out what is frozen.

    Example:
        >>> one, other = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> other.load_state_dict(one.state_dict()), hash_weights(one) == hash_weights(other)
        (<All keys matched successfully>, True)
    """
    state, digest = nn.Module.state_dict(module), hashlib.sha256()
    for name in sorted(state):
        if not name.startswith("loss."):
            add_tensor(digest, name, state[name])
    gather_again(module)
    return digest.hexdigest()


def base_fingerprint(model: nn.Module) -> dict[str, str]:
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
            digest = hashlib.sha256(f"{list(parameter.shape)}".encode() + _bits(first))
            found[str(base_name(name))] = f"{str(first.dtype)[6:]}:{digest.hexdigest()[:16]}"
    return found


def first_difference(saved: dict[str, str], own: dict[str, str]) -> str | None:
    """The first parameter of which two :func:`base_fingerprint` tell that it differs; ``None`` where there is none."""
    for name, own_hash in own.items():
        other = saved.get(name, "")
        if other != own_hash and other.partition(":")[0] == own_hash.partition(":")[0]:
            return name
    return None


def _bits(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy())
