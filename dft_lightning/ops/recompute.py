"""Differentiable statistics of a linear head; the logits are computed again in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dft_lightning.losses.statistics import TokenStats
from dft_lightning.ops.backward import add_chunk_gradients, refuse_double_backward, returned_gradients
from dft_lightning.ops.concatenation import concatenated
from dft_lightning.ops.kernels import kernels_for
from dft_lightning.ops.products import HeadProducts, Wanted
from dft_lightning.ops.row_math import Moments, coefficients_of, moments_of, statistics_of
from dft_lightning.ops.settings import HeadSettings


def head_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: HeadSettings
) -> tuple[TokenStats, Tensor]:
    """Statistics of ``n`` target tokens, differentiable, and whether each target is the argmax."""
    correct, log_prob, *rest = _Statistics.apply(hidden, weight, bias, targets, settings)  # type: ignore[no-untyped-call, unused-ignore]
    return TokenStats(log_prob=log_prob, **dict(zip(sorted(settings.statistics), rest, strict=True))), correct


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: HeadSettings
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        nothing = Wanted(False, False, False)
        with (
            torch.autocast(hidden.device.type, enabled=False),
            HeadProducts(hidden, weight, bias, settings.dtype, settings.chunk_bytes, nothing) as products,
        ):
            kernels = kernels_for(products.device, settings.dtype)
            wanted = moments_of(settings.statistics)
            chunks = [
                kernels.row_moments(products.logits(rows), targets[rows], settings.transform, wanted)
                for rows in products.chunks()
            ]
        names = ("log_prob", "log_normalizer", "correct", *sorted(wanted))
        moments = Moments(**concatenated([vars(chunk) for chunk in chunks], names, settings.dtype, hidden.device))
        values = statistics_of(moments, settings.statistics, weight.shape[0])
        ctx.save_for_backward(hidden, weight, bias, targets, moments.log_prob, moments.log_normalizer, *values.values())
        ctx.settings, ctx.names = settings, list(values)
        ctx.mark_non_differentiable(moments.correct)
        # log_prob is saved as well: an output that autograd sees must be another tensor
        return moments.correct, *(value.clone() for value in values.values())

    @staticmethod
    def backward(ctx: Any, _: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        hidden, weight, bias, targets, log_prob, log_normalizer, *saved = ctx.saved_tensors
        settings = ctx.settings
        values = dict(zip(ctx.names, saved, strict=True))
        slopes = {name: u for name, u in zip(ctx.names, upstream, strict=True) if u is not None}
        slopes.setdefault("log_prob", torch.zeros_like(log_prob))
        wanted = Wanted(*ctx.needs_input_grad[:3])
        with (
            torch.autocast(hidden.device.type, enabled=False),
            HeadProducts(hidden, weight, bias, settings.dtype, settings.chunk_bytes, wanted) as products,
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
                )
        dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return *returned_gradients(products.gradients, dtypes, 1.0, settings), None, None
