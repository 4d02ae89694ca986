"""What is left out of a head's gradient products: classes that have next to no gradient at any token of a chunk.

Most of ``softmax - onehot`` is nothing. On real text nine classes in ten stay below 2**-12 at every one of some
thousand tokens, and both gradient products are of the columns of the others alone. What a token loses is known,
``m = sum |g_v|`` over the classes that are left out of it, and bounds the error of both: of a token's hidden gradient
by ``m max |W_v|``, of the weight's by ``sum m |h|``.

The hidden gradient gets back most of that: ``sum g_v`` as if it were of one class, whose weight is the mean of those
that are left out. Where one of them is farther from that mean than the longest is from 0, nothing is given back, so
that the bound is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dft_lightning.losses.statistics import raised_dtype
from dft_lightning.ops.kernels import kernels_for
from dft_lightning.ops.pieces import PIECE_BYTES, scratch, slices

# Columns of the product, so that its rows lie aligned.
_ALIGNMENT = 16

# How much nearer the mean has to be, in squares, for what distances in half precision are rounded by.
_NEARER = 1 - 2.0**-5

# The largest gradients are taken in half precision, too: none at the threshold is to be missed. They are those of the
# gradient as it is rounded, which for a divergence or an entropy may be a difference of larger numbers.
_BELOW = 1 - 2.0**-6


class Chosen(NamedTuple):
    """The gradient of a chunk's logits at the classes that are not left out.

    Attributes:
        classes: ``[k]``, in order.
        gradient: ``[c, w]``: their columns, then that of all others together, and zeros.
        weight: ``[w, H]``, likewise.
        dropped: ``[c]``, what each row of the gradient loses, in float32 (float64 of float64).
    """

    classes: Tensor
    gradient: Tensor
    weight: Tensor
    dropped: Tensor

    @property
    def of_classes(self) -> Tensor:
        """``[c, k]``, without the others'."""
        return self.gradient[:, : len(self.classes)]


class LeftOut:
    """Chooses classes, a chunk at a time.

    Args:
        weight: ``[V, H]``, in the dtype of the products.
        product: ``(a, b, out)``, which leaves float32 sums where the device can.
        row_sums: ``(matrix, which)``, of the columns at which ``which`` is 1, in float32 or float64.
    """

    def __init__(
        self,
        weight: Tensor,
        product: Callable[[Tensor, Tensor, Tensor], None],
        row_sums: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self._weight, self._product, self._row_sums = weight, product, row_sums
        self._raised = raised_dtype(weight.dtype)
        self._piece_bytes = PIECE_BYTES * (1 if weight.device.type == "cpu" else 256)

    def choose(
        self,
        gradient: Tensor,
        targets: Tensor,
        row_scale: Tensor | None,
        limit: Tensor | float,
        buffer: Callable[[tuple[int, int]], Tensor],
    ) -> Chosen:
        """The classes of which some row has a gradient of ``limit`` or more, and every target. Waits for the device.

        Args:
            gradient: ``[c, V]`` with respect to the logits.
            targets: ``[c]`` class indices.
            row_scale: ``[c]``, factors of the rows, which are not on the gradient, nor on what is returned; with them
                no element but the target's is below 0.
            limit: of the gradient with the factors.
            buffer: makes room for the chosen columns.
        """
        kernels = kernels_for(gradient.device, gradient.dtype)
        largest = kernels.column_largest(gradient, row_scale)
        small = largest < limit * _BELOW  # and not where it is nan
        small[targets] = False
        classes = (~small).nonzero().squeeze(-1)
        size = len(classes)
        width = (size // _ALIGNMENT + 1) * _ALIGNMENT
        index = torch.cat([classes, classes.new_zeros(width - size)])
        chosen = torch.index_select(gradient, 1, index, out=buffer((len(gradient), width)))
        chosen[:, size:] = 0
        # Of these alone: the difference of two sums of whole rows would be rounded by what the rows are.
        left_out = small.to(gradient.dtype)
        rest = self._row_sums(gradient, left_out)
        dropped = self._absolute_sums(gradient, left_out) if row_scale is None else rest
        chosen[:, size] = rest.to(chosen.dtype)
        weight = self._weight.index_select(0, index)
        weight[size:] = 0
        weight[size] = self._mean(largest / limit, small).to(weight.dtype)
        return Chosen(classes, chosen, weight, dropped)

    def _absolute_sums(self, matrix: Tensor, which: Tensor) -> Tensor:
        found = matrix.new_empty(len(matrix), dtype=self._raised)
        rows = max(1, self._piece_bytes // (matrix.shape[1] * matrix.itemsize))
        with scratch("absolute", (min(rows, len(matrix)), matrix.shape[1]), matrix.dtype, matrix.device) as piece:
            for part in slices(len(matrix), rows):
                found[part] = self._row_sums(torch.abs(matrix[part], out=piece[: part.stop - part.start]), which)
        return found

    def _mean(self, share: Tensor, small: Tensor) -> Tensor:
        """``[H]``, the mean weight of the small classes by their largest gradients, or 0 where one of them is farther
        from that than the longest is from 0."""
        share = share.masked_fill(~small, 0)
        mean = torch.empty(1, self._weight.shape[1], dtype=self._raised, device=share.device)
        self._product(share.to(self._weight.dtype).unsqueeze(0), self._weight, mean)
        mean /= share.to(self._weight.dtype).sum(dtype=self._raised).clamp(min=torch.finfo(self._raised).tiny)
        along = torch.empty(len(share), 1, dtype=self._raised, device=share.device)
        self._product(self._weight, mean.t().to(self._weight.dtype), along)
        from_mean = self._squares - 2 * along.squeeze(-1) + mean.square().sum()
        farthest, largest = (each.masked_fill(~small, 0).amax() for each in (from_mean, self._squares))
        return torch.where(farthest <= largest * _NEARER, mean, 0).squeeze(0)

    @cached_property
    def _squares(self) -> Tensor:
        """``[V]``, of the weights' norms."""
        rows = max(1, self._piece_bytes // (self._weight.shape[1] * self._raised.itemsize))
        parts = torch.split(self._weight, rows)
        return torch.cat([part.to(self._raised).square().sum(-1) for part in parts])
