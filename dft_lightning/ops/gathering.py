"""From a chunk of tokens to the moments of its rows and what is kept of its logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dft_lightning.losses.from_logits import mass_below
from dft_lightning.losses.statistics import Statistic, own_values, reads_reference
from dft_lightning.ops import exponentials, kernels
from dft_lightning.ops.call import HeadSettings
from dft_lightning.ops.products import HeadProducts
from dft_lightning.ops.row_math import LogitTransform, Moments, SoftmaxRows, entry_of, reaches_far
from dft_lightning.ops.row_weights import moments_of_rows
from dft_lightning.ops.rows import by_blocks
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
    wanted = _Wanted(settings.statistics, keep)
    transforms = [settings.transform, *filter(None, [settings.reference_transform])]
    straight = exponentials.are_straight(products.device, settings.dtype, transforms) and not wanted.by_blocks
    found = (_straight if straight else _by_blocks)(products, rows, targets, settings, wanted)
    if found.rows is not None:
        for name, value in moments_of_rows(found.rows, targets, found.moments, found.reference, settings).items():
            setattr(found.moments, name, value)
    return found if keep else Gathered(found.moments, None, None)


class _Wanted:
    """What has to be gathered, and of what.

    Attributes:
        moments: that the row kernels gather.
        top_k: of how many classes ``top_k_entropy`` is wanted.
        by_blocks: whether something is wanted that is made of logits in float32, or of classes far below the likeliest.
        rows: whether the chunk's own rows are wanted.
        reference: whether a reference's rows are.
    """

    def __init__(self, statistics: Mapping[str, Statistic], keep: bool) -> None:
        entries = {name: entry_of(statistic) for name, statistic in statistics.items()}
        self.moments = frozenset(entry.moment for entry in entries.values() if entry.gathered == "kernel")
        self.top_k = int(statistics["top_k_entropy"].params["k"]) if "top_k_entropy" in statistics else None
        self.own = [statistic for statistic in statistics.values() if statistic.function is not None]
        far = any(map(reaches_far, statistics.values()))
        self.by_blocks = bool(self.own) or "reference_mass_below" in statistics or far
        of_rows = [statistics[name] for name, entry in entries.items() if entry.gathered == "rows"]
        self.rows = keep or bool(of_rows)
        of_logits_alone = [name for name in statistics if reads_reference(statistics[name])] == ["reference_mass_below"]
        self.reference = (keep and not of_logits_alone) or any(map(reads_reference, of_rows))


def _straight(
    products: HeadProducts, rows: slice, targets: Tensor, settings: HeadSettings, wanted: _Wanted
) -> Gathered:
    """By exponentials that come from the product."""
    moments, own = exponentials.row_moments(products, rows, targets, wanted.moments, wanted.top_k)
    beside = None
    if products.reference is not None and (wanted.reference or "reference_kl" in settings.statistics):
        beside = exponentials.row_softmax(products.reference, rows, targets)
    if beside is not None and "reference_kl" in settings.statistics:
        moments.reference_kl = exponentials.row_divergence(products, rows, targets, own, moments, beside)
    return Gathered(moments, own, beside)


def _by_blocks(
    products: HeadProducts, rows: slice, targets: Tensor, settings: HeadSettings, wanted: _Wanted
) -> Gathered:
    """By logits that are there in float32, a block of rows after another."""
    of_rows, transform = kernels.kernels_for(products.device, settings.dtype), settings.transform
    values, theirs = products.kept(rows) if wanted.rows else None, None
    if products.reference is not None and wanted.reference:
        theirs = products.reference.kept(rows)
    found: list[tuple[Moments, SoftmaxRows]] = []
    beside: list[SoftmaxRows] = []
    for block in products.blocks(rows):
        part = slice(block.start - rows.start, block.stop - rows.start)
        logits, extra = products.logits(block), {}
        if wanted.top_k is not None:
            extra["top_k_entropy"] = row_top_k_entropy(logits, transform, wanted.top_k)
        for each in wanted.own:
            extra[entry_of(each).moment] = by_blocks(logits, targets[part], _function_of(each, transform))
        if products.reference is not None:
            assert settings.reference_transform is not None
            other = products.reference.logits(block)
            if "reference_kl" in settings.statistics:
                extra["cross"] = of_rows.row_cross_entropy(logits, transform, other, settings.reference_transform)
            if "reference_mass_below" in settings.statistics:
                of_reference = _mass_below(settings.reference_transform)
                extra["reference_mass_below"] = by_blocks(other, targets[part], of_reference)
            if theirs is not None:
                beside.append(of_rows.row_softmax(other, settings.reference_transform, theirs[part]))
        out = None if values is None else values[part]
        moments, kept = of_rows.row_moments(logits, targets[part], transform, wanted.moments, out)
        if "cross" in extra:
            extra["reference_kl"] = extra.pop("cross") + moments.log_normalizer
        found.append((Moments(**vars(moments), **extra), kept))
    joined = Moments(**{name: torch.cat([getattr(each, name) for each, _ in found]) for name in vars(found[0][0])})
    own_rows = None if values is None else _joined(values, [kept for _, kept in found])
    return Gathered(joined, own_rows, None if theirs is None else _joined(theirs, beside))


def _function_of(statistic: Statistic, transform: LogitTransform) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, targets: own_values(statistic, transform.apply_(logits), targets)


def _mass_below(transform: LogitTransform) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, targets: mass_below(transform.apply_(logits).log_softmax(-1), targets)


def _joined(values: Tensor, found: list[SoftmaxRows]) -> SoftmaxRows:
    log_factor, total = (torch.cat(parts) for parts in zip(*(own[1:] for own in found), strict=True))
    return SoftmaxRows(values, log_factor, total)
