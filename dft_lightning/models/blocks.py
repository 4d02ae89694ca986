"""A model's repeated blocks: compiled, and what of their activations is kept for backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from dft_lightning.distributed.sharding import repeated_layers
from dft_lightning.errors import InputError, one_line
from dft_lightning.foreign.torch import arguments_of, is_of_a_parameter, split_no_graphs, written_to

Checkpointing = Literal["full", "selective", "every_2", "every_3", "every_4", "offload"]


def spare_activations(model: nn.Module, choice: Checkpointing) -> None:
    """Have a model keep fewer activations on its device for backward, in training; its gradients stay the same.

    Args:
        model: the language model.
        choice: ``"full"`` keeps the blocks' inputs and computes the rest again; ``"every_2"`` and so on do so with
            every second block, the first included; ``"selective"`` keeps matrix products and attention as well;
            ``"offload"`` computes nothing again, and keeps activations in host memory.

    Raises:
        InputError: the model cannot.
    """
    if choice == "offload":
        _around(model, partial(saved_tensors_hooks, _to_host, _from_host))
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if choice == "selective":
        options["context_fn"] = partial(_selecting, type(model).__name__)
        _around(model, _casting_anew)
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise InputError(
            f"{_OPTION}: {type(model).__name__} does not support it ({one_line(error)}): set false"
        ) from error
    if choice.startswith("every_"):
        _leave_out(model, int(choice.removeprefix("every_")))


_OPTION = "model.loading.gradient_checkpointing"


def _leave_out(model: nn.Module, every: int) -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:  # code of one's own that asks the model, and not its blocks
        raise InputError(f"{_OPTION}: the blocks of {type(model).__name__} are computed again all or none: set full")
    for index, block in enumerate(blocks):
        block.gradient_checkpointing = index % every == 0


# -- selective ---------------------------------------------------------------------------------------------------------

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm", "grouped_mm"}


class _Selection:
    """Says of each operation of a block whether its output is kept.

    Products and attention cost most to compute again. What draws random numbers is not kept: what comes after it would
    draw others the second time, for the generator would stand where it stood before.

    Args:
        name: of the model's class.

    Raises:
        InputError: the block changes in place what was kept, which torch does not always notice.
    """

    def __init__(self, name: str) -> None:
        self._name, self._kept = name, set[Any]()

    def __call__(self, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        given = arguments_of(operation, args, kwargs)
        if not self._kept.isdisjoint(_storages(written_to(operation, given))):
            raise InputError(f"{_OPTION}: {self._name} changes matrix products in place: set full")
        name = operation.name().rpartition("::")[2].partition(".")[0]
        is_kept = name in _PRODUCTS or "attention" in name or "attn" in name
        if not is_kept or any(bool(value) for key, value in given.items() if "dropout" in key):
            return CheckpointPolicy.PREFER_RECOMPUTE
        self._kept |= _storages(context.op_output)
        return CheckpointPolicy.MUST_SAVE


def _storages(tensors: Any) -> set[Any]:
    """What tells the storages of a tensor, or of those in a list, from others as long as they live."""
    listed = tensors if isinstance(tensors, (tuple, list)) else (tensors,)
    return {StorageWeakRef(each.untyped_storage()) for each in listed if isinstance(each, Tensor)}  # type: ignore[no-untyped-call]


def _selecting(name: str) -> Any:
    return create_selective_checkpoint_contexts(_Selection(name))  # type: ignore[no-untyped-call]


@contextmanager
def _casting_anew() -> Iterator[None]:
    """Autocast casts weights where they are used, as Lightning's does. Forward and what is computed again are matched
    operation by operation, and one would lack casts that an earlier call has left in its cache."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _around(model: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> None:
    """Have each call of a model made within a context, which stands outside of blocks that may be compiled."""
    entered: list[AbstractContextManager[Any]] = []

    def enter(*_: Any) -> None:
        entered.append(context())
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)


# -- offload -----------------------------------------------------------------------------------------------------------


def _to_host(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
    """A copy in pinned memory, for which nobody waits: what uses the device next comes after it."""
    if _stays(tensor):
        return tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
    return tensor.device, host.copy_(tensor, non_blocking=True)


def _from_host(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, host = packed
    return host.to(device, non_blocking=True)


def _stays(tensor: Tensor) -> bool:
    """Whether a tensor is in host memory already, or on the device whatever becomes of activations."""
    return tensor.device.type == "cpu" or is_of_a_parameter(tensor)


# -- compiled ----------------------------------------------------------------------------------------------------------


def compile_blocks(model: nn.Module) -> None:
    """Have the repeated blocks of a model compiled, in place, one graph for all of them and for every length of rows.

    To be called before the model is sharded. The names of its parameters stay.

    Raises:
        InputError: there are no such blocks.
    """
    blocks = list(repeated_layers(model))
    if not blocks:
        raise InputError(
            f"model.loading.compile: {type(model).__name__} has no ModuleList of repeated layers: set false"
        )
    split_no_graphs()
    for block in blocks:
        block.compile(dynamic=True)


def uncompiled() -> AbstractContextManager[Any]:
    """Meanwhile compiled blocks run as they were: for shapes and modes of a moment, that are worth no graph."""
    stance: Callable[[str], AbstractContextManager[Any]] = torch.compiler.set_stance
    return stance("force_eager")
