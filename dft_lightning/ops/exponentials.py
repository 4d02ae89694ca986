"""bfloat16 on the CPU: ``e**z`` of a head's logits straight from the product, before anything is rounded.

A CPU gives no product of bfloat16 in float32, but torch has one that applies a sigmoid to the sums before it rounds
them, and far below 0 a sigmoid is an exponential: ``sigmoid(z - base) = e**(z - base) (1 - e**(z - base) + ...)``. So
rows are kept as :class:`~dft_lightning.ops.row_math.SoftmaxRows` have them at the cost of the product alone.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable

import torch
from torch import Tensor

from dft_lightning.foreign.torch import has_sigmoid_of_product
from dft_lightning.losses.from_logits import entropy_of_largest
from dft_lightning.ops.pieces import slices
from dft_lightning.ops.products import HeadProducts, float32_sums
from dft_lightning.ops.row_math import LogitTransform, Moments, SoftmaxRows
from dft_lightning.ops.rows import largest, put_, row_blocks
from dft_lightning.ops.torch_kernels import log_factor_of, log_sigmoid, row_sums

# What a row's largest value may be. Up to the first a sigmoid is an exponential to 1/16 of what bfloat16 rounds; from
# the second on all classes have a value that are up to 24 nats less likely than the likeliest.
_HIGHEST, _LOWEST = 2.0**-12, 2.0**-91

# From this probability on a class of the reference counts, even if the model has no value for it.
_COUNTS = 1e-7

# How far the base is above the largest of a chunk's targets, which is near the largest of all its logits; and how far
# below these others may be, beside which 33 nats are left.
_ABOVE_TARGETS, _SPREAD = 14.0, 40.0

# What is looked at in float32 at once: some rows, or so many classes of rows.
_AT_ONCE_BYTES, _CLASSES_AT_ONCE = 64 * 2**20, 4096


def are_straight(device: torch.device, dtype: torch.dtype, transforms: Iterable[LogitTransform]) -> bool:
    """Whether the exponentials of such products can be had from the product."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    # A factor that is a power of two does not round the hidden states.
    plain = all(each.softcap is None and math.frexp(abs(each.scale))[0] == 0.5 for each in transforms)
    return plain and has_sigmoid_of_product()


def row_moments(
    products: HeadProducts, rows: slice, targets: Tensor, wanted: frozenset[str], top_k: int | None
) -> tuple[Moments, SoftmaxRows]:
    """Moments of each row of a chunk, and its softmax over the other classes.

    Args:
        products: of the head.
        rows: of the chunk.
        targets: ``[c]`` class indices.
        wanted: optional fields of :class:`Moments` to compute.
        top_k: of how many classes ``top_k_entropy`` is wanted.
    """
    target_logit = products.logits_at(rows, targets.unsqueeze(-1)).squeeze(-1)
    values, base, highest = _exponentials(products, rows, target_logit, targets)
    total = float32_sums(values)
    others = base + total.log()
    log_normalizer = torch.logaddexp(others, target_logit)
    log_factor = log_factor_of(log_sigmoid(others - target_logit), total)
    found = row_sums(values, log_factor, wanted)
    if "sum_logits" in wanted:
        found["sum_logits"] = products.sum_of_logits(rows)
    if top_k is not None:
        found["top_k_entropy"] = _top_k_entropy(values, target_logit - base, top_k)
    correct = _first_largest(products, rows, values, highest, target_logit - base, targets)
    log_prob = log_sigmoid(target_logit - others)
    moments = Moments(log_prob=log_prob, log_normalizer=log_normalizer, correct=correct, **found)
    return moments, SoftmaxRows(values, log_factor, total)


def row_softmax(products: HeadProducts, rows: slice, targets: Tensor) -> SoftmaxRows:
    """Softmax of a chunk's rows of a reference model."""
    target_logit = products.logits_at(rows, targets.unsqueeze(-1)).squeeze(-1)
    values = _exponentials(products, rows, target_logit)[0]
    total = float32_sums(values)
    return SoftmaxRows(values, -total.log(), total)


def row_divergence(
    products: HeadProducts, rows: slice, targets: Tensor, own: SoftmaxRows, moments: Moments, reference: SoftmaxRows
) -> Tensor:
    """``KL(reference || model)`` of each row.

    Args:
        products: of the head.
        rows: of the chunk.
        targets: ``[c]`` class indices.
        own: of :func:`row_moments`.
        moments: likewise.
        reference: of :func:`row_softmax`.
    """
    divergence, smallest = torch.empty_like(moments.log_prob), torch.finfo(own.values.dtype).tiny
    with row_blocks(own.values, divergence.dtype, 2) as blocks:
        for part in slices(len(divergence), blocks.shape[1]):
            log_p, r = blocks[:, : part.stop - part.start]
            torch.mul(r.copy_(reference.values[part]), reference.log_factor[part].exp().unsqueeze(-1), out=r)
            log_p.copy_(own.values[part]).clamp_(min=smallest).log_().add_(own.log_factor[part].unsqueeze(-1))
            put_(log_p, targets[part], moments.log_prob[part])
            missing = (own.values[part] < smallest) & (r > _COUNTS)
            put_(missing, targets[part], torch.zeros_like(targets[part]))
            for some in torch.split(missing.nonzero(), _CLASSES_AT_ONCE):
                row, other = some.unbind(-1)
                logits = products.logits_at(rows, other.unsqueeze(-1), row + part.start).squeeze(-1)
                log_p[row, other] = logits - moments.log_normalizer[part][row]
            log_p.mul_(r)
            torch.sum(torch.xlogy(r, r, out=r).sub_(log_p), -1, out=divergence[part])
    return divergence


def _exponentials(
    products: HeadProducts, rows: slice, target_logit: Tensor, apart: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``e**(z - base)`` of a chunk, bfloat16 ``[c, V]``, ``base`` and the largest value ``[c]``.

    Targets that are to be set apart have 0 in their place, and are not among the largest.
    """
    above = _base(target_logit)
    hidden = products.scaled_hidden(rows)
    values, base = products.sigmoids(rows, hidden, above), torch.full_like(target_logit, above)
    if products.has_nan:
        values.fill_(math.nan)
    if apart is not None:
        put_(values, apart, torch.zeros_like(base))
    highest = values.amax(-1).float()
    of_all = highest if apart is None else torch.maximum(highest, (target_logit - base).exp())
    outside = (~((of_all <= _HIGHEST) & (of_all >= _LOWEST))).nonzero().squeeze(-1)
    if len(outside):
        _again(products, hidden, outside, values, base, highest, apart)
    return values, base, highest


def _base(target_logit: Tensor) -> float:
    """Above as many of a chunk's targets as one base suits."""
    ordered: list[float] = target_logit[target_logit.isfinite()].sort().values.tolist()
    if not ordered:
        return 0.0
    below = [index - bisect_left(ordered, logit - _SPREAD) for index, logit in enumerate(ordered)]
    return ordered[below.index(max(below))] + _ABOVE_TARGETS


def _again(
    products: HeadProducts,
    hidden: Tensor,
    outside: Tensor,
    values: Tensor,
    base: Tensor,
    highest: Tensor,
    apart: Tensor | None,
) -> None:
    """Rows whose logits are far from those of the others, by a product in float32 and bases of their own."""
    for part in slices(len(outside), max(16, _AT_ONCE_BYTES // (4 * values.shape[1]))):
        rows = outside[part]
        logits = products.float32_logits(hidden[rows])
        # A row whose classes are all banned has exponentials of 0, and one with nan or inf those of nan.
        base[rows] = logits.amax(-1).clamp(min=torch.finfo(logits.dtype).min)
        own = logits.sub_(base[rows].unsqueeze(-1)).exp_().to(values.dtype)
        if apart is not None:
            put_(own, apart[rows], torch.zeros_like(base[rows]))
        values[rows], highest[rows] = own, own.amax(-1).float()


def _first_largest(
    products: HeadProducts, rows: slice, values: Tensor, highest: Tensor, target_logit: Tensor, targets: Tensor
) -> Tensor:
    """Whether the target is what argmax of logits in float32 would return; of those within rounding, by a closer look.

    The eight likeliest others are looked at. ``target_logit`` is less the base.
    """
    target = target_logit.exp()
    correct = target > highest
    close = ((target - highest).abs() <= highest / 128).nonzero().squeeze(-1)
    for near in torch.split(close, _CLASSES_AT_ONCE // 10):
        others, own = values[near], targets[near].unsqueeze(-1)
        # The first of equal ones among them, of which there may be many.
        candidates = [others.argmax(-1, keepdim=True), others.topk(min(8, values.shape[1]), dim=-1).indices]
        among = torch.cat([own, *candidates], -1)
        logits, among = products.logits_at(rows, among, near), among[:, 1:]
        ahead = (logits[:, 1:] > logits[:, :1]) | ((logits[:, 1:] == logits[:, :1]) & (among < own))
        correct[near] = ~(ahead & (among != own)).any(-1)
    return correct


def _top_k_entropy(values: Tensor, target_logit: Tensor, k: int) -> Tensor:
    """From a row's largest values, where the target's own is 0, and the target's logit less the base."""
    if not 1 <= k <= values.shape[1]:
        return entropy_of_largest(values, k)  # which refuses it
    others = largest(values, k).float().log()
    return entropy_of_largest(torch.cat([others, target_logit.unsqueeze(-1)], -1), k)
