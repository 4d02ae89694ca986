"""What the trainer's strategy means for the module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import lightning.pytorch as pl
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import TrainingState

from dft_lightning.distributed.sharding import ShardingOptions
from dft_lightning.errors import InputError


def data_parallel_mesh(trainer: pl.Trainer | None, options: ShardingOptions) -> DeviceMesh | None:
    """The ranks that ``ModelParallelStrategy`` shards over; ``None`` under every other strategy.

    Raises:
        InputError: tensors are to be parallel, the precision is 16 bits that need a gradient scaler, or ``options``
            were given to a strategy that does not shard by them.
    """
    strategy = None if trainer is None else trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        if options != ShardingOptions():
            name = "no trainer" if strategy is None else type(strategy).__name__
            raise InputError(
                f"model.sharding: these options are of ModelParallelStrategy (FSDP2), and this is {name}: leave them "
                "out, or set trainer.strategy"
            )
        return None
    assert trainer is not None
    mesh = strategy.device_mesh
    if (tensor_parallel := mesh["tensor_parallel"].size()) > 1:
        raise InputError(
            f"trainer.strategy: this ModelParallelStrategy splits tensors over {tensor_parallel} processes "
            "(tensor_parallel_size is the devices of a node unless set), which this module does not: set "
            f"data_parallel_size: {trainer.world_size} and tensor_parallel_size: 1"
        )
    check_precision(strategy, trainer.precision)
    return mesh["data_parallel"]


def check_precision(strategy: object, precision: object) -> None:
    """Raise ``InputError`` for fp16 under FSDP2."""
    if isinstance(strategy, ModelParallelStrategy) and str(precision).startswith("16"):
        raise InputError(
            f"trainer.precision: {precision} needs a gradient scaler, and ModelParallelStrategy (FSDP2) has none: use "
            "bf16-mixed, or FSDPStrategy (FSDP1)"
        )


def shards_parameters(trainer: pl.Trainer | None) -> bool:
    """Whether ranks hold parts of the parameters, so that every forward is a collective."""
    return trainer is not None and isinstance(trainer.strategy, (ModelParallelStrategy, FSDPStrategy))


@contextlib.contextmanager
def gathered_root(trainer: pl.Trainer | None) -> Iterator[None]:
    """Have FSDP1's outermost group, which holds embedding and head, whole outside of its own forward too.

    Inside a step it is: there this does nothing, and nothing is to be done for other strategies.
    """
    root = None if trainer is None else trainer.model
    if isinstance(root, FullyShardedDataParallel) and root.training_state == TrainingState.IDLE:
        with FullyShardedDataParallel.summon_full_params(root, recurse=False, writeback=False):
            yield
    else:
        yield


def check_wrapped_anew(trainer: pl.Trainer | None, model: nn.Module) -> None:
    """Refuse a model that FSDP1 wrapped for an earlier call.

    Lightning wraps the blocks in place and forgets the wrapper around all of it: in a second call, embedding and head
    would be summed over no ranks.

    Raises:
        InputError: parts of the model are wrapped already.
    """
    if trainer is not None and any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise InputError(
            "FSDPStrategy (FSDP1) wraps a module once: make a new one for a second fit, validate, test or predict, "
            "or use ModelParallelStrategy (FSDP2)"
        )


def check_original_parameters(trainer: pl.Trainer | None) -> None:
    """Refuse FSDP1's flat parameters, in which matrices are not told from norms.

    Raises:
        InputError: ``FSDPStrategy(use_orig_params=False)``.
    """
    strategy = None if trainer is None else trainer.strategy
    if isinstance(strategy, FSDPStrategy) and not strategy.kwargs.get("use_orig_params", True):
        raise InputError(
            "trainer.strategy: use_orig_params: false makes one parameter of matrices, norms and biases, of which "
            "matrices alone are to decay: leave it out"
        )
