"""Differentiable statistics of a linear head; the logits are computed again in backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dft_lightning.losses.statistics import TokenStats
from dft_lightning.ops.backward import add_chunk_gradients, refuse_double_backward, returned_gradients
from dft_lightning.ops.concatenation import concatenated
from dft_lightning.ops.products import HeadProducts, Wanted
from dft_lightning.ops.reference import ReferenceHead, reference_products
from dft_lightning.ops.row_math import ENTRIES, Moments, coefficients_of, moments_of, statistics_of
from dft_lightning.ops.rows import chunk_moments, reference_logits, reference_rows
from dft_lightning.ops.settings import HeadSettings


def head_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    settings: HeadSettings,
    reference: ReferenceHead | None = None,
) -> tuple[TokenStats, Tensor]:
    """Statistics of ``n`` target tokens, differentiable, and whether each target is the argmax."""
    correct, log_prob, *rest = _Statistics.apply(hidden, weight, bias, targets, settings, reference)  # type: ignore[no-untyped-call, unused-ignore]
    values = dict(zip(settings.statistics, rest, strict=True))
    return TokenStats(log_prob=log_prob, vocab_size=weight.shape[0], **values), correct


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        settings: HeadSettings,
        reference: ReferenceHead | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        nothing = Wanted(False, False, False)
        with (
            torch.autocast(hidden.device.type, enabled=False),
            HeadProducts(hidden, weight, bias, settings.dtype, settings.chunk_bytes, nothing) as products,
            reference_products(reference, settings) as beside,
        ):
            chunks = [
                chunk_moments(products.logits(rows), targets[rows], settings, reference_logits(beside, reference, rows))
                for rows in products.chunks()
            ]
        names = ["log_prob", "log_normalizer", "correct", *moments_of(settings.statistics)]
        names += ["reference_log_normalizer"] if settings.wants_reference else []
        moments = Moments(**concatenated([vars(chunk) for chunk in chunks], names, settings.dtype, hidden.device))
        values = statistics_of(moments, settings.statistics, weight.shape[0])
        normalizers = (moments.log_normalizer, moments.reference_log_normalizer)
        ctx.save_for_backward(hidden, weight, bias, targets, moments.log_prob, *normalizers, *values.values())
        ctx.settings, ctx.names, ctx.reference = settings, list(values), reference
        # log_prob is saved as well: an output that autograd sees must be another tensor
        outputs = {name: value.clone() for name, value in values.items()}
        constants = [value for name, value in outputs.items() if name in ENTRIES and not ENTRIES[name].add_gradient]
        ctx.mark_non_differentiable(moments.correct, *constants)
        return moments.correct, *outputs.values()

    @staticmethod
    def backward(ctx: Any, _: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        hidden, weight, bias, targets, log_prob, log_normalizer, reference_normalizer, *saved = ctx.saved_tensors
        settings, reference = ctx.settings, ctx.reference
        values = dict(zip(ctx.names, saved, strict=True))
        slopes = {name: u for name, u in zip(ctx.names, upstream, strict=True) if u is not None}
        slopes.setdefault("log_prob", torch.zeros_like(log_prob))
        size = _size_of(slopes, settings)
        slopes = {name: slope / size for name, slope in slopes.items()}
        wanted = Wanted(*ctx.needs_input_grad[:3])
        with (
            torch.autocast(hidden.device.type, enabled=False),
            HeadProducts(hidden, weight, bias, settings.dtype, settings.chunk_bytes, wanted) as products,
            reference_products(reference, settings) as beside,
        ):
            for rows in products.chunks():
                coefficients = coefficients_of(
                    {name: slope[rows] for name, slope in slopes.items()},
                    {name: value[rows] for name, value in values.items()},
                    products.vocabulary,
                )
                add_chunk_gradients(
                    products,
                    settings,
                    rows,
                    products.logits(rows),
                    targets[rows],
                    log_prob[rows],
                    log_normalizer[rows],
                    coefficients,
                    reference_rows(
                        reference_logits(beside, reference, rows),
                        None if reference_normalizer is None else reference_normalizer[rows],
                    ),
                )
        dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return *returned_gradients(products.gradients, dtypes, size, settings), None, None, None


def _size_of(slopes: Mapping[str, Tensor], settings: HeadSettings) -> Tensor | float:
    """A power of two near the largest slope, which float16 would overflow on; 1 in other dtypes.

    What comes from outside has the gradient scaler's factor in it, on top of which goes the head's own. In one pass the
    slopes are the loss's own, and the scaler's factor comes after the products.
    """
    if settings.dtype != torch.float16:
        return 1.0
    largest = torch.stack([slope.abs().amax() for slope in slopes.values() if slope.numel()] or [torch.ones(())]).amax()
    smallest = torch.finfo(largest.dtype).tiny
    size = torch.exp2(largest.clamp(min=smallest).log2().ceil())
    return torch.where(size.isfinite(), size, 1.0)  # inf and nan are the scaler's to see
