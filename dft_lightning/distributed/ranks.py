"""What all ranks of an optimizer step put together: the gradient of its token mean, that gradient's norm, and lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from dft_lightning.distributed.sharding import local_part
from dft_lightning.errors import InputError
from dft_lightning.foreign.torch import multiply

T = TypeVar("T")


@dataclass(frozen=True)
class StepTotals:
    """Of all micro-batches and ranks of an optimizer step, on the host.

    Attributes:
        targets: target tokens.
        non_finite: micro-batches whose loss is not finite.
        differs: micro-batches that are not what their layout says.
        asked: ranks that were asked to stop.
        weight: the sum of the targets' weights, where the step is divided by it.
        norm: of the gradient, where it was given.
    """

    targets: int
    non_finite: int
    differs: int
    asked: int
    weight: float | None
    norm: float | None

    @property
    def divisor(self) -> float:
        """What the step's sums are divided by."""
        return self.targets if self.weight is None else self.weight


class TokenNormalizer:
    """Makes the step's gradient that of the token mean, however the step is split into micro-batches and ranks.

    Each micro-batch backpropagates the *sum* of its token losses over what :meth:`divisor_of` returns, and is counted
    where it does (:meth:`count`). Before the optimizer steps, :meth:`rescale` divides by the target tokens that all
    micro-batches and ranks counted, and undoes the divisions by the number of micro-batches (Lightning) and of ranks
    (data parallelism), which know no tokens. Until :meth:`totals` nothing waits for the device: what was counted stays
    there, is summed there over ranks in one exchange, and divides there.

    Sums of thousands of tokens would overflow a fp16 gradient scaler. So sums are divided by a power of two near the
    expected count of a micro-batch: that of the last step, and of the first micro-batch before there is one. Powers
    of two change no digits, and :meth:`rescale` multiplies it back. It is constant within a step and equal on all
    ranks, taken from the mean over ranks.

    Where weights are counted, the step's divisor is their sum in place of the targets' number.

    Args:
        all_reduce: sums a tensor over ranks, in place.
        world_size: number of data-parallel ranks.

    Attributes:
        divisor: that power of two, for the next step; ``None`` before the first micro-batch.
    """

    def __init__(self, all_reduce: Callable[[Tensor], None], world_size: int) -> None:
        self._all_reduce = all_reduce
        self._world_size = world_size
        self.divisor: float | None = None
        self._targets = 0
        self._counted: Tensor | None = None  # losses not finite, layouts that differ, and weights, of this rank
        self._summed: Tensor | None = None  # targets, these three and ranks asked to stop, of all ranks
        self._micro_batches = 1
        self._by_weight = False

    @property
    def pending(self) -> bool:
        """Whether micro-batches were counted since the last :meth:`rescale`."""
        return self._counted is not None

    def divisor_of(self, num_targets: int, device: torch.device) -> float:
        """What to divide a micro-batch's summed loss by, of its number of targets.

        The first call is a collective on ``device``.
        """
        if self.divisor is None:
            total = torch.full((), num_targets, dtype=torch.int64, device=device)
            self._all_reduce(total)
            mean = int(total) / self._world_size
            if mean == 0:
                return 1.0  # no rank has targets: the loss is 0, and 0 needs no range
            self.divisor = _power_of_two(mean)
        return self.divisor

    def count(
        self, num_targets: int, finite: Tensor, differs: Tensor | None = None, weight: Tensor | None = None
    ) -> None:
        """Count a micro-batch that is backpropagated; nothing waits for the device.

        Args:
            num_targets: of it.
            finite: whether its loss is, a scalar bool tensor.
            differs: whether it is not what its layout says, likewise; ``None`` for no.
            weight: the sum of its targets' weights ``-dL/dl``, a scalar in float64, where the step is divided by these.
        """
        zero = torch.zeros_like(finite)
        parts = (~finite, zero if differs is None else differs, zero if weight is None else weight)
        counted = torch.stack([part.double() for part in parts])
        self._counted = counted if self._counted is None else self._counted + counted
        self._targets += num_targets
        self._by_weight = weight is not None

    @torch.no_grad()
    def rescale(self, parameters: Iterable[Tensor], accumulate_grad_batches: int, asked: bool = False) -> None:
        """Turn the accumulated gradients into those of the token mean, or of the mean by weight. A collective.

        Where there is nothing to divide by they become 0, and are to be removed by whoever reads :meth:`totals`. Does
        nothing where nothing was counted.

        Args:
            parameters: whose gradients.
            accumulate_grad_batches: what Lightning divided by.
            asked: whether this rank was asked to stop, which all of them learn.
        """
        if self._counted is None:
            return
        summed = self._counted.new_zeros(5)
        summed[0], summed[1:4], summed[4] = self._targets, self._counted, float(asked)
        self._all_reduce(summed)
        self._targets, self._counted, self._summed = 0, None, summed
        self._micro_batches = accumulate_grad_batches * self._world_size
        divided_by = summed[3 if self._by_weight else 0]
        factor = (self.divisor or 1.0) * self._micro_batches / divided_by
        multiply_gradients(parameters, torch.where(divided_by == 0, 0.0, factor))

    def totals(self, norm: Tensor | None = None) -> StepTotals | None:
        """What was counted of the step, and the norm of its gradient. The one time that a step waits for the device.

        Args:
            norm: a scalar, where it is known.

        Returns:
            ``None`` where nothing was counted, or all was told already.

        Raises:
            RuntimeError: the weights' sum is negative.
        """
        if self._summed is None:
            return None
        values = [*self._summed] if norm is None else [*self._summed, norm.to(self._summed)]
        self._summed = None
        targets, non_finite, differs, weight, asked, *norms = torch.stack(values).tolist()
        if self._by_weight and weight < 0 and not non_finite:
            raise RuntimeError(
                f"renormalize divides by the sum of the tokens' weights -dL/dl, which is {weight} in this step: it "
                "needs a loss whose weights are not negative"
            )
        found = StepTotals(
            targets=int(targets),
            non_finite=int(non_finite),
            differs=int(differs),
            asked=int(asked),
            weight=weight if self._by_weight else None,
            norm=norms[0] if norms else None,
        )
        if found.divisor and not non_finite:
            self.divisor = _power_of_two(targets / self._micro_batches)
        return found


class StopFlag:
    """Whether a run is to stop. Each rank says it for itself; all learn it in the exchange of an optimizer step.

    Attributes:
        asked: whether this process was asked.
    """

    def __init__(self) -> None:
        self.asked = False
        self._found: bool | None = None

    def reset(self) -> None:
        """Before a run: nobody was asked."""
        self.asked, self._found = False, None

    def answer(self, found: bool) -> None:
        """Of an exchange: whether any rank was asked."""
        self._found = found

    def taken(self) -> bool | None:
        """The answer, once; ``None`` where there was no exchange since."""
        found, self._found = self._found, None
        return found


def multiply_gradients(parameters: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place by a scalar of float64 on the device, which is not waited for.

    The products are in float32 or float64 whatever the gradients are: of a factor in bfloat16 two digits were left.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = local_part(parameter.grad)
            kinds.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (device, dtype), gradients in kinds.items():
        if dtype in (torch.float32, torch.float64):
            multiply(gradients, factor.to(device, dtype))
            continue
        number = factor.to(device, torch.float32)
        for gradient in gradients:
            torch.mul(gradient, number.expand(gradient.shape), out=gradient)


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
    torch.distributed.all_reduce(square, group=mesh.get_group(mesh.ndim - 1))  # replicas hold the same
    return square.sqrt().to(local[0])


def sum_over_ranks(tensor: Tensor) -> None:
    """In place, and nothing waits for the device. A collective."""
    torch.distributed.all_reduce(tensor)


def largest_of_ranks(number: int, device: torch.device) -> int:
    """The largest of what ranks give; it travels on ``device``. A collective."""
    found = torch.tensor(number, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return int(found)


def gather_lists(items: list[T], world_size: int) -> list[T]:
    """The lists of all ranks, one after the other. A collective: call it on every rank."""
    if world_size == 1:
        return items
    parts: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
