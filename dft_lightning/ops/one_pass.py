"""One pass for pointwise losses: logits, statistics, loss and gradients of a chunk while it is at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dft_lightning.losses.base import TokenLoss, loss_and_slopes
from dft_lightning.losses.statistics import raised_dtype
from dft_lightning.ops.backward import add_chunk_gradients, refuse_double_backward, returned_gradients
from dft_lightning.ops.concatenation import concatenated
from dft_lightning.ops.normalizer import inverse_normalizer
from dft_lightning.ops.output import TokenOutput
from dft_lightning.ops.products import HeadProducts, Wanted, wanted_gradients
from dft_lightning.ops.reference import reference_products
from dft_lightning.ops.row_math import coefficients_of, statistics_of
from dft_lightning.ops.rows import chunk_moments, reference_logits, reference_rows
from dft_lightning.ops.settings import HeadSettings
from dft_lightning.ops.target_tokens import TargetTokens


@dataclass(frozen=True)
class _Task:
    """All that is not differentiated."""

    batch: TargetTokens
    loss: TokenLoss
    settings: HeadSettings
    normalizer: Tensor | float | None
    step: int
    wanted: Wanted


def one_pass(
    batch: TargetTokens,
    weight: Tensor,
    bias: Tensor | None,
    loss: TokenLoss,
    settings: HeadSettings,
    normalizer: Tensor | float | None,
    step: int,
) -> TokenOutput:
    """Loss and statistics of ``n`` target tokens, gradients computed on the way."""
    hidden = batch.hidden
    task = _Task(batch, loss, settings, normalizer, step, wanted_gradients(hidden, weight, bias))
    names = list(settings.statistics)
    value, loss_sum, slope, correct, log_prob, *rest = OnePass.apply(hidden, weight, bias, task)  # type: ignore[no-untyped-call, unused-ignore]
    return TokenOutput(
        loss=value,
        loss_sum=loss_sum,
        weight=slope,
        correct=correct,
        log_prob=log_prob,
        step=step,
        vocab_size=weight.shape[0],
        **batch.inputs,
        **dict(zip(names, rest, strict=True)),
    )


class OnePass(torch.autograd.Function):
    """Computes the gradients in forward, for an upstream gradient of 1, and scales them in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task) -> tuple[Tensor, ...]:
        settings = task.settings
        with (
            torch.autocast(hidden.device.type, enabled=False),
            HeadProducts(hidden, weight, bias, settings.dtype, settings.chunk_bytes, task.wanted) as products,
            reference_products(task.batch.reference, settings) as reference,
        ):
            # The normaliser goes in before anything is rounded, so that backward need not round again.
            inverse = inverse_normalizer(task.normalizer, len(hidden), raised_dtype(settings.dtype))
            kept = [_chunk(products, reference, rows, task, inverse) for rows in products.chunks()]
        names = ("losses", "weight", "correct", "log_prob", *settings.statistics)  # as one_pass unpacks them
        per_token = concatenated(kept, names, settings.dtype, hidden.device)
        losses = per_token.pop("losses")
        loss_sum = losses.sum()
        ctx.save_for_backward(*products.gradients)
        ctx.settings = settings
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        details = (loss_sum, *per_token.values())
        ctx.mark_non_differentiable(*details)
        return (loss_sum * inverse, *details)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        return *returned_gradients(ctx.saved_tensors, ctx.dtypes, upstream, ctx.settings), None


def _chunk(
    products: HeadProducts, beside: HeadProducts | None, rows: slice, task: _Task, inverse: Tensor | float
) -> dict[str, Tensor]:
    """Everything for one chunk; returns its per-token results."""
    settings, batch = task.settings, task.batch
    targets = batch.targets[rows]
    logits = products.logits(rows)
    reference = reference_logits(beside, batch.reference, rows)
    moments = chunk_moments(logits, targets, settings, reference)
    values = statistics_of(moments, settings.statistics, products.vocabulary)
    token_weight = None if batch.weight is None else batch.weight[rows]
    losses, slopes = loss_and_slopes(task.loss, batch.stats(values, task.step, products.vocabulary, rows), token_weight)
    if products.wanted:
        # What was given to the loss from outside does not depend on these logits.
        slopes = {name: slope for name, slope in slopes.items() if name in values}
        coefficients = coefficients_of(slopes, values, products.vocabulary).scaled(inverse)
        add_chunk_gradients(
            products,
            settings,
            rows,
            logits,
            targets,
            moments.log_prob,
            moments.log_normalizer,
            coefficients,
            reference_rows(reference, moments.reference_log_normalizer),
        )
    return {"losses": losses, "weight": -slopes["log_prob"], "correct": moments.correct, **values}
