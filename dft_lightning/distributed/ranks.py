"""What all ranks of an optimizer step put together: the gradient of its token mean, that gradient's norm, and lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from dft_lightning.errors import InputError
from dft_lightning.foreign.torch import multiply

T = TypeVar("T")


class TokenNormalizer:
    """Makes the step's gradient that of the token mean, however the step is split into micro-batches and ranks.

    Each micro-batch backpropagates the *sum* of its token losses over what :meth:`divisor_of` returns, and is counted
    where it does (:meth:`count`). Before the optimizer steps, :meth:`rescale` divides by the target tokens that all
    micro-batches and ranks counted, and undoes the divisions by the number of micro-batches (Lightning) and of ranks
    (data parallelism), which know no tokens.

    Sums of thousands of tokens would overflow a fp16 gradient scaler. So sums are divided by a power of two near the
    expected count of a micro-batch: that of the last step, and of the first micro-batch before there is one. Powers
    of two change no digits, and :meth:`rescale` multiplies it back. It is constant within a step and equal on all
    ranks, taken from the mean over ranks.

    Where weights are counted, the step's divisor is their sum in place of the targets' number.

    Losses that are not finite are counted on the way, in the same exchange, so that all ranks know.

    Args:
        all_reduce: sums a tensor over ranks.
        world_size: number of data-parallel ranks.

    Attributes:
        divisor: that power of two, for the next step; ``None`` before the first micro-batch.
    """

    def __init__(self, all_reduce: Callable[[Tensor], Tensor], world_size: int) -> None:
        self._all_reduce = all_reduce
        self._world_size = world_size
        self.divisor: float | None = None
        self._counted: Tensor | None = None  # targets, losses not finite, and weights where the step is divided by them
        self._by_weight = False

    @property
    def pending(self) -> bool:
        """Whether micro-batches were counted since the last :meth:`rescale`."""
        return self._counted is not None

    def divisor_of(self, num_targets: Tensor) -> float:
        """What to divide a micro-batch's summed loss by, of its number of targets (a scalar int64 tensor).

        The first call is a collective.
        """
        if self.divisor is None:
            mean = int(self._all_reduce(num_targets.clone())) / self._world_size
            if mean == 0:
                return 1.0  # no rank has targets: the loss is 0, and 0 needs no range
            self.divisor = _power_of_two(mean)
        return self.divisor

    def count(self, num_targets: Tensor, weight: Tensor | None = None, finite: Tensor | None = None) -> None:
        """Count a micro-batch that is backpropagated; nothing waits for the device.

        Args:
            num_targets: a scalar int64 tensor.
            weight: the sum of its targets' weights ``-dL/dl``, a scalar in float64, where the step is divided by these.
            finite: whether its loss is, a scalar bool tensor; ``None`` for yes.
        """
        zero = torch.zeros_like(num_targets)
        parts = (num_targets, zero if finite is None else ~finite, zero if weight is None else weight)
        counted = torch.stack([part.double() for part in parts])
        self._counted = counted if self._counted is None else self._counted + counted
        self._by_weight = weight is not None

    @torch.no_grad()
    def rescale(self, parameters: Iterable[Tensor], accumulate_grad_batches: int) -> int:
        """Turn the accumulated gradients into those of the token mean, or of the mean by weight.

        Where the whole step had no target on any rank, or none with a weight, or where a loss was not finite, gradients
        are removed, so that the optimizer leaves the parameters as they are, weight decay included. Does nothing where
        nothing was counted.

        Returns:
            How many micro-batches of all ranks had a loss that is not finite.

        Raises:
            RuntimeError: the weights' sum is negative.
        """
        if self._counted is None:
            return 0
        tokens, non_finite, weight = self._all_reduce(self._counted).tolist()  # one exchange, one wait
        self._counted = None
        if self._by_weight and weight < 0 and not non_finite:
            raise RuntimeError(
                f"renormalize divides by the sum of the tokens' weights -dL/dl, which is {weight} in this step: it "
                "needs a loss whose weights are not negative"
            )
        total = weight if self._by_weight else tokens
        if total == 0 or non_finite:
            remove_gradients(parameters)
            return int(non_finite)
        assert self.divisor is not None
        micro_batches = accumulate_grad_batches * self._world_size
        factor = self.divisor * micro_batches / total
        self.divisor = _power_of_two(tokens / micro_batches)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        multiply(gradients, factor)
        return 0


def remove_gradients(parameters: Iterable[Tensor]) -> None:
    """Have the optimizer's next step leave the parameters and its states of them as they are."""
    for parameter in parameters:
        parameter.grad = None


def _power_of_two(count: float) -> float:
    return 2.0 ** round(math.log2(max(count, 1.0)))


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


def gather_lists(items: list[T], world_size: int) -> list[T]:
    """The lists of all ranks, one after the other. A collective: call it on every rank."""
    if world_size == 1:
        return items
    parts: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
