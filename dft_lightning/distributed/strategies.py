"""What the trainer's strategy means for the module."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from dft_lightning.distributed.ranks import largest_of_ranks
from dft_lightning.distributed.sharding import ShardingOptions, blocks_in_shards, find_blocks
from dft_lightning.errors import InputError, one_line
from dft_lightning.foreign.lightning import checkpointing_options, saves_shards
from dft_lightning.foreign.torch import wrapped_classes
from dft_lightning.ops.chunks import free_memory


def data_parallel_mesh(trainer: pl.Trainer | None, options: ShardingOptions) -> DeviceMesh | None:
    """The ranks that ``ModelParallelStrategy`` shards over, by replica and shard where there are several replicas;
    ``None`` under every other strategy.

    Raises:
        InputError: tensors are to be parallel, the precision is 16 bits that need a gradient scaler, replicas do not
            divide the ranks, or ``options`` were given to a strategy that does not shard by them.
    """
    if trainer is None:  # a checkpoint that is looked at: its options were of the run that wrote it
        return None
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        if options != ShardingOptions():
            raise InputError(
                f"model.sharding: these options are of ModelParallelStrategy (FSDP2), and this is "
                f"{type(strategy).__name__}: leave them out, or set trainer.strategy"
            )
        return None
    mesh = strategy.device_mesh
    if (tensor_parallel := mesh["tensor_parallel"].size()) > 1:
        raise InputError(
            f"trainer.strategy: this ModelParallelStrategy splits tensors over {tensor_parallel} processes "
            "(tensor_parallel_size is the devices of a node unless set), which this module does not: set "
            f"data_parallel_size: {trainer.world_size} and tensor_parallel_size: 1"
        )
    check_precision(strategy, trainer.precision)
    return _by_replica(strategy, options.replicas)


def _by_replica(strategy: ModelParallelStrategy, replicas: int) -> DeviceMesh:
    """The strategy's own mesh is of data and tensors: one of replicas and shards is made beside it, once."""
    ranks = strategy.device_mesh["data_parallel"]
    if replicas == 1:
        return ranks
    if ranks.size() % replicas or ranks.size() == replicas:
        possible = [each for each in range(1, ranks.size()) if ranks.size() % each == 0]
        raise InputError(
            f"model.sharding.replicas: {replicas} replicas of {ranks.size()} processes have no equal number of them, "
            f"two or more, to shard over: take one of {possible}, or DDP, which shards nothing"
        )
    if strategy not in _MESHES:
        shape = (replicas, ranks.size() // replicas)
        _MESHES[strategy] = init_device_mesh(ranks.device_type, shape, mesh_dim_names=("replicate", "shard"))
    return _MESHES[strategy]


_MESHES: WeakKeyDictionary[ModelParallelStrategy, DeviceMesh] = WeakKeyDictionary()


def check_precision(strategy: object, precision: object) -> None:
    """Raise ``InputError`` for fp16 under FSDP2."""
    if isinstance(strategy, ModelParallelStrategy) and str(precision).startswith("16"):
        raise InputError(
            f"trainer.precision: {precision} needs a gradient scaler, and ModelParallelStrategy (FSDP2) has none: use "
            "bf16-mixed, or FSDPStrategy (FSDP1)"
        )


def check_half_precision(trainer: pl.Trainer, asked: Any) -> None:
    """Raise ``InputError`` where a trainer was asked for fp16 and took bfloat16."""
    if str(asked) in ("16", "16-mixed") and trainer.precision != "16-mixed":
        raise InputError("trainer.precision: 16-mixed needs a GPU (Lightning would run bf16-mixed): ask for that")


def check_adapter_strategy(trainer: pl.Trainer | None, quantized: bool) -> None:
    """Raise ``InputError`` where an adapter cannot be trained, or not be saved alone."""
    strategy = None if trainer is None else trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        raise InputError("model.peft is not supported under FSDPStrategy (FSDP1): use ModelParallelStrategy or DDP")
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if quantized:
        raise InputError(
            "model.loading.quantization_config: ModelParallelStrategy (FSDP2) does not shard quantized weights: use "
            "DDP, or leave it out"
        )
    if saves_shards(strategy):
        raise InputError(
            "model.peft: checkpoints hold the adapter alone, which is saved in one file and not as a distributed "
            "checkpoint: set save_distributed_checkpoint: false in trainer.strategy's init_args"
        )


def check_wrapped(trainer: pl.Trainer, changed: list[str]) -> None:
    """Raise ``InputError`` where parameters were frozen or freed behind the back of DDP, which would not see them."""
    if isinstance(trainer.strategy, DDPStrategy):
        raise InputError(
            f"{changed[0]} ({len(changed)} parameters) was frozen or freed after DDP had wrapped the model, so that "
            "ranks would part there: do it in build_parameter_groups or configure_model"
        )


def shards_parameters(trainer: pl.Trainer | None) -> bool:
    """Whether ranks hold parts of the parameters, so that every forward is a collective."""
    return trainer is not None and isinstance(trainer.strategy, (ModelParallelStrategy, FSDPStrategy))


def wraps_parameters(trainer: pl.Trainer | None) -> bool:
    """Whether FSDP1 has the parameters."""
    return trainer is not None and isinstance(trainer.strategy, FSDPStrategy)


def on_first_rank(trainer: pl.Trainer | None, action: Callable[[], None], key: str = "", *, long: bool = False) -> None:
    """Do something on rank 0, and end every rank where it fails: one that ends alone leaves the others waiting.

    A collective. Without a trainer this process is rank 0.

    Args:
        trainer: tells the ranks.
        action: what is done.
        key: what the message begins with.
        long: it may take longer than a process group waits: a thread does it, and the others hear now and then that it
            goes on.

    Raises:
        InputError: it failed.
    """
    found: list[str | None] = []

    def run() -> None:
        try:
            action()
        except Exception as error:
            found.append(one_line(error))
        else:
            found.append(None)

    own = trainer is None or trainer.is_global_zero
    thread = threading.Thread(target=run, daemon=True) if long and own else None
    if thread is not None:
        thread.start()
    elif own:
        run()
    told: list[str | None] = []
    while not told:
        if thread is not None:
            thread.join(_NOW_AND_THEN)
        told = list(found) if trainer is None else trainer.strategy.broadcast(list(found))
    if told[0] is not None:
        raise InputError(f"{key}{told[0]}")


_NOW_AND_THEN = 30.0  # seconds


@contextlib.contextmanager
def gathered_root(trainer: pl.Trainer | None) -> Iterator[None]:
    """Have FSDP1's outermost group, which holds embedding and head, whole outside of its own forward too.

    Inside a step it is: there this does nothing, and nothing is to be done for other strategies.
    """
    root = None if trainer is None else trainer.model
    if isinstance(root, FullyShardedDataParallel) and root.training_state.name == "IDLE":
        with FullyShardedDataParallel.summon_full_params(root, recurse=False, writeback=False):
            yield
    else:
        yield


@contextlib.contextmanager
def gathered_blocks(model: nn.Module, options: ShardingOptions, device: torch.device) -> Iterator[bool]:
    """Have every rank hold all weights of a sharded model's blocks meanwhile, where every rank has room for them.

    Forwards are then no collectives, and ranks need not make as many. A collective itself.

    Args:
        model: the language model, sharded or not.
        options: which it was sharded by.
        device: of its forward.

    Yields:
        Whether the blocks are whole: not those of a model that is not sharded, or that does not fit.
    """
    blocks = blocks_in_shards(model)
    if not blocks or largest_of_ranks(not _fits(blocks, device), device):
        yield False
        return
    try:
        for block in blocks:
            block.unshard()
            block.set_reshard_after_forward(False, recurse=False)
        yield True
    finally:
        for block in blocks:
            block.set_reshard_after_forward(options.reshard_after_forward, recurse=False)
            block.reshard()


def _fits(blocks: Iterable[nn.Module], device: torch.device) -> bool:
    """Whether blocks' whole weights take at most half of the memory that is free."""
    parameters = {id(parameter): parameter for block in blocks for parameter in block.parameters()}
    needed = sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())
    return 2 * needed <= (free_memory(device) if device.type == "cuda" else _free_on_host())


def _free_on_host() -> int:
    """Bytes of memory that each rank of this machine may take; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0


def leave_constant_buffers(trainer: pl.Trainer, model: nn.Module) -> None:
    """Have DDP not send rank 0's buffers around before each step: rotary frequencies and the like are constants.

    Those of a model that keeps running statistics are left to DDP.
    """
    wrapped = trainer.strategy.model
    running = any(getattr(module, "track_running_stats", False) for module in model.modules())
    if isinstance(wrapped, DistributedDataParallel) and not running:
        wrapped.broadcast_buffers = False


def prepare_fsdp1(trainer: pl.Trainer | None, model: nn.Module) -> None:
    """Before FSDP1 wraps a model: refuse what would train wrongly, and keep buffers and reduction in float32.

    Lightning has FSDP1 round buffers to the compute dtype, and with them rotary frequencies, whose phases are then off
    by radians after a thousand tokens; and it reduces gradients in that dtype. A ``mixed_precision`` of the config's
    own is left as it is.

    Raises:
        InputError: the model was wrapped for an earlier call, parameters are to be flattened, or a policy names a class
            of which the model has no module.
    """
    strategy = None if trainer is None else trainer.strategy
    if not isinstance(strategy, FSDPStrategy):
        return
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        # Lightning forgets the wrapper around all of it: embedding and head would be summed over no ranks.
        raise InputError(
            "FSDPStrategy (FSDP1) wraps a module once: make a new one for a second fit, validate, test or predict, "
            "or use ModelParallelStrategy (FSDP2)"
        )
    if not strategy.kwargs.get("use_orig_params", True):
        raise InputError(
            "trainer.strategy: use_orig_params: false makes one parameter of matrices, norms and biases, of which "
            "matrices alone are to decay: leave it out"
        )
    checkpointing = checkpointing_options(strategy)
    _check_policy(model, "auto_wrap_policy", strategy.kwargs.get("auto_wrap_policy"))
    _check_policy(model, "activation_checkpointing_policy", checkpointing.get("auto_wrap_policy"))
    own = strategy.mixed_precision_config
    if strategy.mixed_precision is None and own is not None:
        strategy.mixed_precision = dataclasses.replace(own, reduce_dtype=torch.float32, buffer_dtype=None)


def _check_policy(model: nn.Module, name: str, policy: object) -> None:
    if not isinstance(policy, ModuleWrapPolicy):
        return
    classes = wrapped_classes(policy)
    if not any(isinstance(module, classes) for module in model.modules()):
        blocks = sorted({f"{type(block).__module__}.{type(block).__qualname__}" for block in find_blocks(model)})
        raise InputError(
            f"trainer.strategy: {name}: {type(model).__name__} has no module of "
            f"{', '.join(each.__name__ for each in classes)}; its repeated blocks are {', '.join(blocks)}"
        )
