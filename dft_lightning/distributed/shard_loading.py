"""A checkpoint read into shards: each rank reads no more of a tensor than it keeps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dft_lightning.distributed.sharding import local_part
from dft_lightning.errors import InputError
from dft_lightning.foreign.transformers import names_let_be

WAY_OUT = (
    "set model.sharding.load: whole, which has transformers load the whole checkpoint into each rank's host memory"
)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters that are made meanwhile have a shape and no memory; buffers are made as ever.

    Unlike ``torch.device("meta")``, which leaves buffers that no checkpoint holds, such as rotary frequencies,
    without their values.
    """
    register: Callable[..., None] = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # one that is on meta may be tied: it stays the same object
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def allocate_shards(root: nn.Module, device: torch.device) -> None:
    """Give parameters on the meta device memory for their shards, of no particular values; in place."""
    root._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)  # type: ignore[no-untyped-call]


@torch.no_grad()
def read_shards(model: nn.Module, files: list[Path], name_of: Callable[[str], str | None] = str) -> None:
    """Fill a sharded model's parameters and persistent buffers from safetensors files.

    Args:
        model: its parameters are DTensors, sharded over their first dimension.
        files: of a checkpoint in the model's own layout; a prefix that all its keys lack or have is seen to.
        name_of: what the checkpoint calls a tensor of the model; ``None`` for one that it does not hold.

    Raises:
        InputError: a tensor is missing or has another shape, or tied ones have different values.
    """
    from safetensors import safe_open

    parameters = model.state_dict(keep_vars=True)  # themselves, under each of their names
    called = {name: there for name in parameters if (there := name_of(name)) is not None}
    state = {name: parameters[name] for name in called}
    with ExitStack() as stack:
        slices: dict[str, Any] = {}
        for file in files:
            handle = stack.enter_context(safe_open(file, framework="pt"))
            slices.update({key: handle.get_slice(key) for key in list(handle.keys())})
        prefix = _prefix_change(set(called.values()), set(slices), getattr(model, "base_model_prefix", ""))
        by_name = {prefix(key): source for key, source in slices.items()}
        found = {name: by_name[there] for name, there in called.items() if there in by_name}
        _check_keys(model, state, set(found), set(by_name) - set(called.values()))
        filled: dict[int, str] = {}
        for name in found:
            if id(state[name]) not in filled:
                _copy_slice(name, state[name], found[name])
                filled[id(state[name])] = name
            else:
                _check_tied(filled[id(state[name])], name, state[name], found[name])


def saved_dtype(files: list[Path]) -> torch.dtype:
    """The dtype of a checkpoint's first floating-point tensor."""
    from safetensors import safe_open

    known = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for key in list(handle.keys()):
                if (dtype := known.get(handle.get_slice(key).get_dtype())) is not None:
                    return dtype
    return torch.float32


def _prefix_change(wanted: set[str], there: set[str], base: str) -> Callable[[str], str]:
    """Checkpoints of a bare backbone have no ``model.`` before their keys, or ``transformer.``, or whatever it is."""
    if base and not wanted & there:
        if any(f"{base}.{key}" in wanted for key in there):
            return lambda key: f"{base}.{key}"
        if any(key.removeprefix(f"{base}.") in wanted for key in there):
            return lambda key: key.removeprefix(f"{base}.")
    return lambda key: key


def _check_keys(model: nn.Module, state: dict[str, Tensor], there: set[str], left: set[str]) -> None:
    filled = {id(state[name]) for name in state if name in there}  # what is tied is there under one name or more
    missing = sorted(name for name, tensor in state.items() if id(tensor) not in filled)
    if missing:
        raise InputError(
            f"model.model: the checkpoint has no {missing[0]} ({len(missing)} such tensors): read by shards it must be "
            f"in the model's own layout; {WAY_OUT}"
        )
    ignored = [*names_let_be(model), *_COMPUTED]
    unused = sorted(key for key in left if not any(re.search(pattern, key) for pattern in ignored))
    if unused:  # as transformers does
        rank_zero_warn(f"the checkpoint's {unused[0]} ({len(unused)} such tensors) is in no place of the model")


# Buffers that older checkpoints hold and models compute.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


def _copy_slice(name: str, target: Tensor, source: Any) -> None:
    own = _own_rows(name, target, source)
    if own is not None:
        local_part(target).copy_(own)


def _check_tied(name: str, other: str, target: Tensor, source: Any) -> None:
    """Tied by the config and saved twice: transformers unties them where they differ, which every rank must know."""
    own, kept = _own_rows(other, target, source), local_part(target)
    differs = torch.tensor(own is not None and not torch.equal(kept, own.to(kept)), dtype=torch.int)
    if isinstance(target, DTensor):
        differs = differs.to(target.device_mesh.device_type)
        mesh = target.device_mesh
        torch.distributed.all_reduce(differs, group=mesh.get_group(mesh.ndim - 1))  # replicas read the same
    if differs.item():
        raise InputError(
            f"model.model: the config ties {other} to {name}, and the checkpoint has another value for each: set "
            f"tie_word_embeddings: false in its config.json, or {WAY_OUT}"
        )


def _own_rows(name: str, target: Tensor, source: Any) -> Tensor | None:
    """This rank's rows of a checkpoint's tensor; ``None`` for a rank beyond the last row."""
    if list(source.get_shape()) != list(target.shape):
        raise InputError(
            f"model.model: the checkpoint's {name} is {source.get_shape()}, and the model's {list(target.shape)}"
        )
    if not isinstance(target, DTensor):
        whole: Tensor = source[...]
        return whole
    dim = next(dim for dim, placement in enumerate(target.placements) if placement.is_shard(0))
    length = -(-target.shape[0] // target.device_mesh.size(dim))  # of all parts but the last ones
    start = min(length * target.device_mesh.get_local_rank(dim), target.shape[0])
    if start == target.shape[0]:
        return None
    rows: Tensor = source[start : min(start + length, target.shape[0])]
    return rows
