"""A checkpoint read into shards: each rank reads no more of a tensor than it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dft_lightning.errors import InputError

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
def read_shards(model: nn.Module, files: list[Path]) -> None:
    """Fill a sharded model's parameters and persistent buffers from safetensors files.

    Args:
        model: its parameters are DTensors, sharded over their first dimension.
        files: of a checkpoint in the model's own layout; a prefix that all its keys lack or have is seen to.

    Raises:
        InputError: a tensor is missing, has another shape, or the checkpoint has tensors that the model has not.
    """
    from safetensors import safe_open

    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in files:
            handle = stack.enter_context(safe_open(file, framework="pt"))
            where.update(dict.fromkeys(handle.keys(), handle))
        wanted = _unique(model)
        prefix = _prefix_change(set(wanted), set(where), getattr(model, "base_model_prefix", ""))
        _check_keys(model, wanted, {prefix(key) for key in where})
        for key, handle in where.items():
            if (target := wanted.get(prefix(key))) is not None:
                _copy_slice(prefix(key), target, handle.get_slice(key))


def _unique(model: nn.Module) -> dict[str, Tensor]:
    """State by name, what is tied by the first of its names; parameters themselves and no copies."""
    state = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    return {name: tensor for name, tensor in state.items() if not (id(tensor) in seen or seen.add(id(tensor)))}  # type: ignore[func-returns-value]


def _prefix_change(wanted: set[str], there: set[str], base: str) -> Callable[[str], str]:
    """Checkpoints of a bare backbone have no ``model.`` before their keys, or ``transformer.``, or whatever it is."""
    if base and not wanted & there:
        if any(f"{base}.{key}" in wanted for key in there):
            return lambda key: f"{base}.{key}"
        if any(key.removeprefix(f"{base}.") in wanted for key in there):
            return lambda key: key.removeprefix(f"{base}.")
    return lambda key: key


def _check_keys(model: nn.Module, wanted: dict[str, Tensor], there: set[str]) -> None:
    missing = sorted(set(wanted) - there)
    # A head that is tied is there under both names, or was saved before it was tied.
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    unexpected = sorted(there - set(wanted) - own)
    for names, what in ((missing, "has no"), (unexpected, "has, and the model has not,")):
        if names:
            raise InputError(
                f"model.model: the checkpoint {what} {names[0]} ({len(names)} such tensors): read by shards it must be "
                f"in the model's own layout; {WAY_OUT}"
            )


def _copy_slice(name: str, target: Tensor, source: Any) -> None:
    if list(source.get_shape()) != list(target.shape):
        raise InputError(
            f"model.model: the checkpoint's {name} is {source.get_shape()}, and the model's {list(target.shape)}"
        )
    if not isinstance(target, DTensor):
        target.copy_(source[...])
        return
    shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    if shape and shape[0] > 0:  # a rank beyond the last row has none
        target.to_local().copy_(source[offset[0] : offset[0] + shape[0]])
