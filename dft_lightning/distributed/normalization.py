"""The one division: gradients of token sums become the gradient of the mean over the whole optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class TokenNormalizer:
    """Makes the step's gradient that of the token mean, however the step is split into micro-batches and ranks.

    Each micro-batch backpropagates the *sum* of its token losses over what :meth:`count` returns. Before the
    optimizer steps, :meth:`rescale` divides by the target tokens that all micro-batches and ranks counted, and undoes
    the divisions by the number of micro-batches (Lightning) and of ranks (data parallelism), which know no tokens.

    Sums of thousands of tokens would overflow a fp16 gradient scaler. So sums are divided by a power of two near the
    expected count of a micro-batch: that of the last step, and of the first micro-batch before there is one. Powers
    of two change no digits, and :meth:`rescale` multiplies it back. It is constant within a step and equal on all
    ranks, taken from the mean over ranks.

    Where :meth:`weigh` was called for the step, the divisor is the sum of the tokens' weights in place of their number.

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
        self._count: Tensor | None = None
        self._weight: Tensor | None = None

    @property
    def pending(self) -> bool:
        """Whether micro-batches were counted since the last :meth:`rescale`."""
        return self._count is not None

    def count(self, num_targets: Tensor) -> float:
        """Count a micro-batch's targets (a scalar int64 tensor) and return what to divide its summed loss by."""
        self._count = num_targets if self._count is None else self._count + num_targets
        if self.divisor is None:
            mean = int(self._all_reduce(num_targets.clone())) / self._world_size
            if mean == 0:
                return 1.0  # no rank has targets: the loss is 0, and 0 needs no range
            self.divisor = _power_of_two(mean)
        return self.divisor

    def weigh(self, weights: Tensor) -> None:
        """Count a micro-batch's weights (``-dL/dl`` of each target): the step is divided by their sum over all."""
        total = weights.detach().double().sum()
        self._weight = total if self._weight is None else self._weight + total

    @torch.no_grad()
    def rescale(self, parameters: Iterable[Tensor], accumulate_grad_batches: int) -> None:
        """Turn the accumulated gradients into those of the token mean, or of the mean by weight.

        Where the whole step had no target on any rank, or none with a weight, gradients are removed, so that the
        optimizer leaves the parameters as they are, weight decay included. Does nothing where nothing was counted.

        Raises:
            RuntimeError: the weights' sum is negative.
        """
        if self._count is None:
            return
        tokens, total = self._totals()
        if total == 0:
            for parameter in parameters:
                parameter.grad = None
            return
        assert self.divisor is not None
        micro_batches = accumulate_grad_batches * self._world_size
        factor = self.divisor * micro_batches / total
        self.divisor = _power_of_two(tokens / micro_batches)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)

    def _totals(self) -> tuple[int, float]:
        """Targets of the step over all ranks, and what to divide by: the same, or the sum of their weights."""
        count, weight = self._count, self._weight
        self._count = self._weight = None
        assert count is not None
        if weight is None:
            tokens = int(self._all_reduce(count))
            return tokens, tokens
        both = self._all_reduce(torch.stack([count.double(), weight])).tolist()  # one exchange, one wait
        if both[1] < 0:  # what is not finite shows in the loss, and is a gradient scaler's to skip
            raise RuntimeError(
                f"renormalize divides by the sum of the tokens' weights -dL/dl, which is {both[1]} in this step: "
                "it needs a loss whose weights are not negative"
            )
        return int(both[0]), both[1]


def _power_of_two(count: float) -> float:
    return 2.0 ** round(math.log2(max(count, 1.0)))
