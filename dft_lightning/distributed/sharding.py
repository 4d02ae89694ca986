"""FSDP2: a module cut into shards over the ranks, block by block."""

from __future__ import annotations

import dataclasses
import functools
import pydoc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from dft_lightning.errors import InputError, check_one_of
from dft_lightning.foreign.torch import discard_unreduced_gradients

_END = "_dft_lightning_end"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ShardingOptions:
    """How ``ModelParallelStrategy`` (FSDP2) shards the model.

    Attributes:
        blocks: dotted paths of the classes whose instances are gathered and freed one at a time; ``None`` takes the
            modules of the model's outermost ``ModuleList``\\ s, which are its repeated layers.
        replicas: how many groups of ranks hold all shards each (HSDP). Ranks that follow each other are of one group:
            with as many replicas as nodes, weights are gathered within a node, and nodes exchange each rank's share of
            the gradient alone, at the price of a node's memory for all of the optimizer's state.
        param_dtype: what a block is gathered and computed in; shards and optimizer state stay as loaded. ``"auto"``
            is bfloat16 under ``trainer.precision: bf16-mixed`` and the parameters' own otherwise.
        reduce_dtype: what gradients are summed over ranks in (float64 parameters: in float64).
        reshard_after_forward: free a block's weights after forward and gather them again in backward. ``False``
            keeps them, which saves a third of the traffic and costs the memory of the whole model.
        cpu_offload: keep shards, gradients and optimizer state in host memory.
        sync_micro_batches: reduce gradients after every micro-batch, not only after the last one of a step. Saves
            the memory of a whole gradient per rank and costs traffic for each micro-batch.
        async_save: save checkpoints in shards while training goes on, which waits for the copy to host memory alone
            (torch's ``async_save``). Takes host memory for the copy, and on the disk, until it is whole, room for one
            checkpoint more.
        load: ``"shards"``: each rank reads just its own shards of a checkpoint's safetensors files. ``"whole"``: each
            rank loads the checkpoint into host memory as without sharding, then keeps its shards.
    """

    blocks: list[str] | None = None
    replicas: int = 1
    param_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    sync_micro_batches: bool = False
    async_save: bool = False
    load: Literal["shards", "whole"] = "shards"

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal:
                check_one_of(f"sharding.{name}", getattr(self, name), get_args(kind))
        if self.replicas < 1:
            raise ValueError(f"sharding.replicas must be at least 1, got {self.replicas}")


def find_blocks(model: nn.Module, class_paths: list[str] | None = None) -> list[nn.Module]:
    """The modules that are gathered one at a time, in the model's order.

    Args:
        model: the language model.
        class_paths: dotted paths of their classes, instead of the modules of outermost ``ModuleList``\\ s.

    Raises:
        InputError: a path names no module class, or there are no such modules.
    """
    kind = type(model).__name__
    if class_paths is None:
        blocks = list(repeated_layers(model))
        if not blocks:
            raise InputError(
                f"model.sharding: {kind} has no ModuleList of repeated layers: name their class in "
                "model.sharding.blocks, as a dotted path"
            )
        return blocks
    classes = tuple(_module_class(path) for path in class_paths)
    blocks = [module for module in model.modules() if isinstance(module, classes)]
    if not blocks:
        raise InputError(f"model.sharding.blocks: {kind} has no module of {', '.join(class_paths)}")
    return blocks


def repeated_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model's outermost ``ModuleList``\\ s, in its order."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from repeated_layers(child)


def _module_class(path: str) -> type[nn.Module]:
    try:
        found = pydoc.locate(path)
    except pydoc.ErrorDuringImport as error:
        raise InputError(f"model.sharding.blocks: cannot import {path!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise InputError(f"model.sharding.blocks: {path!r} is no module class that can be imported")
    return found


def shard(
    root: nn.Module,
    model: nn.Module,
    mesh: DeviceMesh,
    options: ShardingOptions,
    precision: str,
    methods: tuple[str, ...],
    ends: Sequence[nn.Module],
) -> None:
    """Shard a model's blocks and then all that remains, in place, over the first dimension of each parameter.

    What remains belongs to ``root``, and is whole inside each of ``methods``, so that a head may use its weight outside
    the model's forward: embedding, head and last norm. Embedding and head that are not tied are groups of their own,
    likewise whole: the head's gradient is reduced while the blocks are at their backward, not after the embedding's.

    Args:
        root: the LightningModule.
        model: the language model in it, whose parameters may be on the meta device.
        mesh: over the data-parallel ranks: of one dimension, or of replicas and shards.
        options: see :class:`ShardingOptions`.
        precision: the trainer's.
        methods: of ``root``, which run the model.
        ends: embedding and head, where they are not tied.

    Raises:
        InputError: no blocks, or parameters of several dtypes.
    """
    # What is frozen is gathered and never reduced: a base in bfloat16 may be below adapters in float32.
    counted = [parameter for parameter in model.parameters() if parameter.requires_grad] or list(model.parameters())
    dtypes = {parameter.dtype for parameter in counted}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise InputError(
            f"model: FSDP2 shards parameters of one dtype, and these are of {names}: set model.loading.dtype"
        )
    policy = _precision_policy(options, precision, dtypes.pop())
    # Pinned memory is for copies to a GPU; without one there is none to pin.
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if options.cpu_offload else OffloadPolicy()
    shared: dict[str, Any] = {"mesh": mesh, "offload_policy": offload}
    for block in reversed(find_blocks(model, options.blocks)):  # what is inside another before that
        fully_shard(block, mp_policy=policy, reshard_after_forward=options.reshard_after_forward, **shared)
    # A batch is no activation. And the head's weight is needed again as soon as backward begins.
    policy = dataclasses.replace(policy, cast_forward_inputs=False)
    # What a class path has made a block, or part of one, stays that.
    ends = [end for end in ends if not any(isinstance(parameter, DTensor) for parameter in end.parameters())]
    for end in ends:
        fully_shard(end, mp_policy=policy, reshard_after_forward=False, **shared)
        end.__dict__[_END] = True
    root.__dict__["_ends"] = ends  # no modules of its own
    fully_shard(root, mp_policy=policy, reshard_after_forward=False, **shared)
    for method in methods:
        _gather_around(root, method)


def _precision_policy(options: ShardingOptions, precision: str, dtype: torch.dtype) -> MixedPrecisionPolicy:
    if options.param_dtype == "auto":
        param_dtype = torch.bfloat16 if precision == "bf16-mixed" else None
    else:
        param_dtype = _DTYPES[options.param_dtype]
    if precision == "bf16-true":  # the strategy converts the shards after this
        dtype = torch.bfloat16
    reduce_dtype = torch.float64 if dtype == torch.float64 else _DTYPES[options.reduce_dtype]
    return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)


def _gather_around(root: nn.Module, method: str) -> None:
    """Have ``root``'s own group gathered for the outermost call of any such method."""
    inner: Callable[..., Any] = getattr(root, method)
    register_fsdp_forward_method(root, method)
    outer: Callable[..., Any] = getattr(root, method)

    @functools.wraps(inner)
    def call(*args: Any, **kwargs: Any) -> Any:
        if root.__dict__.get("_gathered"):
            return inner(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            raise InputError(
                "a sharded model that ran under inference mode cannot be trained afterwards: make the Trainer with "
                "inference_mode=False (trainer.inference_mode: false)"
            )
        root.__dict__["_gathered"] = True
        _gather_ends(root)
        try:
            return outer(*args, **kwargs)
        finally:
            root.__dict__["_gathered"] = False

    setattr(root, method, call)


def gather_again(root: nn.Module) -> None:
    """Within a method that has ``root``'s own group gathered, after ``state_dict``, which shards it."""
    if root.__dict__.get("_gathered"):
        assert isinstance(root, FSDPModule)
        root.unshard()
        _gather_ends(root)


def _gather_ends(root: nn.Module) -> None:
    for end in root.__dict__["_ends"]:
        end.unshard()


def blocks_in_shards(model: nn.Module) -> list[Any]:
    """What of a sharded language model is gathered and freed one at a time."""
    return [module for module in model.modules() if isinstance(module, FSDPModule) and _END not in module.__dict__]


def is_sharded(module: nn.Module) -> bool:
    """Whether a module was given to :func:`shard` as its root."""
    return isinstance(module, FSDPModule)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def synchronise(root: nn.Module, options: ShardingOptions, steps: bool) -> None:
    """Have a sharded module exchange gradients after a micro-batch: the last of a step, or each if asked for.

    Args:
        root: what is trained.
        options: of the sharding.
        steps: whether an optimizer step comes after the micro-batch.
    """
    if is_sharded(root):
        synchronise_gradients(root, steps or options.sync_micro_batches)


def synchronise_gradients(root: nn.Module, synchronise: bool) -> None:
    """Whether the next backward of a sharded module ends with the gradients summed over ranks and sharded."""
    assert isinstance(root, FSDPModule)
    root.set_requires_gradient_sync(synchronise)


def discard_gradients(root: nn.Module) -> None:
    """Forget gradients of micro-batches whose step never came: ``zero_grad`` does not reach what is not reduced yet."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            discard_unreduced_gradients(module)


def kept_on_cpu(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of a module's tensors that leaves shards in host memory, and takes the rest where it will."""

    def apply(tensor: Tensor) -> Tensor:
        return fn(tensor).cpu() if isinstance(tensor, DTensor) else fn(tensor)

    return apply
