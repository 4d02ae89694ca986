"""The norm of a step's whole gradient, whatever holds its parts, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from dft_lightning.errors import InputError


def clips_at(gradient_clip_val: float | None) -> float | None:
    """What ``trainer.gradient_clip_val`` clips at: ``None`` where it is off, which to Lightning it is at 0 and below.

    Raises:
        InputError: it is NaN, which no gradient is larger than.
    """
    if gradient_clip_val is not None and math.isnan(gradient_clip_val):
        raise InputError("trainer.gradient_clip_val: nan is no value to clip at: give a number, or leave it out")
    return gradient_clip_val if gradient_clip_val is not None and gradient_clip_val > 0 else None


@torch.no_grad()
def clip_by_norm(parameters: Sequence[Tensor], max_norm: float | None, root: object = None) -> Tensor | None:
    """Scale gradients down to a norm, in place. For shards it is a collective.

    Args:
        parameters: those without a gradient take no part.
        max_norm: more than 0; ``None`` scales nothing.
        root: the module as the strategy wrapped it, which clips by itself under FSDP1 (Lightning's own clipping
            refuses there, issue 19235).

    Returns:
        The norm before clipping, a scalar; ``None`` where nothing has a gradient.
    """
    if isinstance(root, FullyShardedDataParallel):  # a rank may have no part of any gradient, and still takes part
        return root.clip_grad_norm_(math.inf if max_norm is None else max_norm)
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    if not with_gradient:
        return None
    norm = total_norm([parameter.grad for parameter in with_gradient])  # type: ignore[misc]
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(with_gradient, float(max_norm), norm)
    return norm


@torch.no_grad()
def total_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, as a scalar of their dtype; of shards over all ranks.

    Shards' squares are summed in float64, so that the number of ranks does not show.

    Raises:
        InputError: some are sharded and others are not.
    """
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not sharded:
        return nn.utils.get_total_norm(gradients)
    if len(sharded) < len(gradients):
        raise InputError(
            "a part of the module that was added after super().configure_model() is not sharded, and would be summed "
            "over no ranks: add it in build_model"
        )
    mesh = sharded[0].device_mesh
    local = [gradient.to_local() for gradient in sharded]
    square = torch.stack([torch.linalg.vector_norm(shard, dtype=torch.float64) for shard in local]).square().sum()
    square = square.to(mesh.device_type)  # offloaded gradients are on the CPU, which NCCL does not reach
    torch.distributed.all_reduce(square, group=mesh.get_group())
    return square.sqrt().to(local[0])
