"""Small things that are done to rows of logits, and to what is kept of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from dft_lightning.losses.statistics import raised_dtype
from dft_lightning.ops.pieces import scratch, slices
from dft_lightning.ops.row_math import SoftmaxRows

# Few enough for a cache, and enough that the operations on them are long beside what it takes to wake a thread.
_BLOCK_BYTES = {"cpu": 16 * 2**20}
_BLOCK_BYTES_ELSEWHERE = 64 * 2**20


def value_scale(dtype: torch.dtype) -> float:
    """What a softmax is multiplied by before it is rounded: float16 has room above 1, and too little below."""
    return 2.0**15 if dtype == torch.float16 else 1.0


def smallest_value(dtype: torch.dtype) -> float:
    """What a value of 0 is taken for where its logarithm is needed: a class that is less likely than the dtype says."""
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny


def at(values: Tensor, classes: Tensor) -> Tensor:
    """``values[i, classes[i]]`` of each row."""
    return values.gather(-1, classes.unsqueeze(-1)).squeeze(-1)


def put_(values: Tensor, classes: Tensor, chosen: Tensor) -> None:
    """``values[i, classes[i]] = chosen[i]`` of each row; ``scatter_`` takes a thousand times as long on the CPU."""
    values.index_put_((torch.arange(len(values), device=values.device), classes), chosen.to(values.dtype))


def largest(values: Tensor, k: int, block: int = 128) -> Tensor:
    """The ``k`` largest of each row ``[n, V]``, in any order.

    They lie in the ``k`` blocks with the largest maxima, which cost a pass over the row; a selection among all of a
    vocabulary's logits takes several times as long.
    """
    whole = values.shape[-1] // block * block
    if whole // block > k:
        blocks = values[:, :whole].view(len(values), -1, block)
        best = blocks.amax(-1).topk(k, dim=-1, sorted=False).indices
        found = blocks.gather(1, best.unsqueeze(-1).expand(-1, -1, block)).flatten(1)
        values = torch.cat([found, values[:, whole:]], dim=-1)
    return values.topk(k, dim=-1, sorted=False).values


def row_blocks(values: Tensor, dtype: torch.dtype, copies: int) -> AbstractContextManager[Tensor]:
    """``[copies, rows, V]`` of scratch that together fit the budget."""
    shape = (copies, _rows_of_block(values, dtype, copies), values.shape[1])
    return scratch("rows", shape, dtype, values.device)


def _rows_of_block(values: Tensor, dtype: torch.dtype, copies: int) -> int:
    budget = _BLOCK_BYTES.get(values.device.type, _BLOCK_BYTES_ELSEWHERE)
    # In fours, so that threads share a block evenly.
    return min(len(values), max(4, budget // (copies * values.shape[1] * dtype.itemsize) // 4 * 4))


def by_blocks(logits: Tensor, targets: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What a function makes of copies of a few rows at a time and their targets, ``[n]``."""
    parts = slices(len(logits), _rows_of_block(logits, logits.dtype, 4))
    return torch.cat([function(logits[part].clone(), targets[part]) for part in parts])


def log_of(rows: SoftmaxRows, part: slice, *, out: Tensor) -> Tensor:
    """Logarithms of a block's probabilities, of one that is 0 that of the smallest number."""
    values = rows.values[part]
    out.copy_(values).clamp_(min=smallest_value(values.dtype)).log_().add_(rows.log_factor[part].unsqueeze(-1))
    return out.masked_fill_(values == 0, math.log(torch.finfo(out.dtype).tiny))


def log_at(rows: SoftmaxRows, classes: Tensor) -> Tensor:
    """Logarithm of one class's probability in each row, likewise; not of a target that is set apart."""
    values = at(rows.values, classes).to(raised_dtype(rows.values.dtype))
    log_prob = values.clamp(min=smallest_value(rows.values.dtype)).log() + rows.log_factor
    return log_prob.masked_fill(values == 0, math.log(torch.finfo(log_prob.dtype).tiny))
