"""From a chunk of tokens to the moments of its rows and what is kept of its logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dft_lightning.ops import exponentials, kernels
from dft_lightning.ops.call import HeadSettings
from dft_lightning.ops.products import HeadProducts
from dft_lightning.ops.row_math import ENTRIES, Moments, SoftmaxRows
from dft_lightning.ops.torch_kernels import row_top_k_entropy


class Gathered(NamedTuple):
    """Of a chunk: its ``rows`` where they are wanted, and a reference model's where there is one."""

    moments: Moments
    rows: SoftmaxRows | None
    reference: SoftmaxRows | None


def gather(products: HeadProducts, rows: slice, targets: Tensor, settings: HeadSettings, *, keep: bool) -> Gathered:
    """A chunk's moments and rows.

    Args:
        products: of the head.
        rows: of the chunk.
        targets: ``[c]`` class indices.
        settings: of the head, and what statistics are wanted.
        keep: whether the rows are wanted.
    """
    names = settings.statistics
    wanted = frozenset(ENTRIES[name].moment for name in names if ENTRIES[name].in_kernel)
    top_k = int(names["top_k_entropy"].params["k"]) if "top_k_entropy" in names else None
    transforms = [settings.transform, *filter(None, [settings.reference_transform])]
    if not exponentials.are_straight(products.device, settings.dtype, transforms):
        return _by_blocks(products, rows, targets, settings, wanted, top_k, keep)
    moments, own = exponentials.row_moments(products, rows, targets, wanted, top_k)
    beside = None
    if products.reference is not None and (keep or "reference_kl" in names):
        beside = exponentials.row_softmax(products.reference, rows, targets)
    if beside is not None and "reference_kl" in names:
        moments.reference_kl = exponentials.row_divergence(products, rows, targets, own, moments, beside)
    return Gathered(moments, own, beside) if keep else Gathered(moments, None, None)


def _by_blocks(
    products: HeadProducts,
    rows: slice,
    targets: Tensor,
    settings: HeadSettings,
    wanted: frozenset[str],
    top_k: int | None,
    keep: bool,
) -> Gathered:
    """By logits that are there in float32, a block of rows after another."""
    of_rows, transform, theirs = kernels.kernels_for(products.device, settings.dtype), settings.transform, None
    values = products.kept(rows) if keep else None
    if products.reference is not None and keep:
        theirs = products.reference.kept(rows)
    found: list[tuple[Moments, SoftmaxRows]] = []
    beside: list[SoftmaxRows] = []
    for block in products.blocks(rows):
        part = slice(block.start - rows.start, block.stop - rows.start)
        logits, kl = products.logits(block), None
        entropy = None if top_k is None else row_top_k_entropy(logits, transform, top_k)
        if products.reference is not None:
            assert settings.reference_transform is not None
            other = products.reference.logits(block)
            if "reference_kl" in settings.statistics:
                kl = of_rows.row_cross_entropy(logits, transform, other, settings.reference_transform)
            if theirs is not None:
                beside.append(of_rows.row_softmax(other, settings.reference_transform, theirs[part]))
        out = None if values is None else values[part]
        moments, own = of_rows.row_moments(logits, targets[part], transform, wanted, out)
        moments.top_k_entropy = entropy
        moments.reference_kl = None if kl is None else kl + moments.log_normalizer
        found.append((moments, own))
    names = [name for name, value in vars(found[0][0]).items() if value is not None]
    joined = Moments(**{name: torch.cat([getattr(moments, name) for moments, _ in found]) for name in names})
    own_rows = None if values is None else _joined(values, [own for _, own in found])
    return Gathered(joined, own_rows, None if theirs is None else _joined(theirs, beside))


def _joined(values: Tensor, found: list[SoftmaxRows]) -> SoftmaxRows:
    log_factor, total = (torch.cat(parts) for parts in zip(*(own[1:] for own in found), strict=True))
    return SoftmaxRows(values, log_factor, total)
