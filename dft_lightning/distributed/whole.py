"""The state of a module whose ranks hold parts of it, put together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor

from dft_lightning.distributed.sharding import gather_again
from dft_lightning.distributed.strategies import shards_parameters
from dft_lightning.foreign.torch import name_in_state, non_persistent_buffers


def whole_state(trainer: pl.Trainer, folder: Path) -> dict[str, Any]:
    """The module's state dict with whole tensors. Where ranks hold parts it is a collective, and other ranks than 0 get
    nothing.

    Under FSDP2 tensors are gathered one after the other and put into files of rank 0, which they are mapped from: its
    memory holds one at a time. Under FSDP1 all of them are in its host memory.

    Args:
        trainer: of the module.
        folder: for the files, which are to be there as long as the tensors are used.
    """
    model = trainer.strategy.model
    if isinstance(model, FullyShardedDataParallel):
        return _summoned_state(model)
    if not shards_parameters(trainer):
        return dict(trainer.lightning_module.state_dict())
    assert model is not None
    found = _mapped(get_model_state_dict(model), folder, keep=trainer.is_global_zero)
    gather_again(trainer.lightning_module)
    return found


def _mapped(state: Mapping[str, Any], folder: Path, *, keep: bool) -> dict[str, Any]:
    """Whole tensors, in files where they are to be kept."""
    found: dict[str, Any] = {}
    for number, (name, value) in enumerate(state.items()):
        whole = value
        if isinstance(value, DTensor):
            on_devices: Any = value.to(value.device_mesh.device_type)  # offloaded ones are where NCCL does not reach
            whole = on_devices.full_tensor()
        if keep:
            found[name] = _in_file(folder / f"{number}.bin", whole) if isinstance(whole, Tensor) else whole
    return found


def _in_file(path: Path, tensor: Tensor) -> Tensor:
    if not tensor.numel():
        return tensor.cpu()
    mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return mapped.view(tensor.shape).copy_(tensor)


def _summoned_state(model: FullyShardedDataParallel) -> dict[str, Any]:
    """As FSDP1's own full state dict, which ends torch's process where shards are on the CPU."""
    parts = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
    in_shards = all(part.sharding_strategy != ShardingStrategy.NO_SHARD for part in parts)
    offload = in_shards and model.compute_device != torch.device("cpu")
    options = {"writeback": False, "rank0_only": True, "offload_to_cpu": offload}
    with FullyShardedDataParallel.summon_full_params(model, **options):
        if torch.distributed.get_rank() != 0:
            return {}
        found: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
        for prefix, module in model.named_modules():
            left_out = dict(non_persistent_buffers(module))
            for name, buffer in module.named_buffers(recurse=False):
                if name not in left_out:
                    found[f"{prefix}.{name}"] = buffer
        copies: dict[int, torch.Tensor] = {}  # of what is tied, one
        for tensor in found.values():
            copies.setdefault(id(tensor), tensor.detach().to("cpu", copy=True))
        return {name_in_state(name): copies[id(tensor)] for name, tensor in found.items()}
