"""The two ways through a linear head, as autograd functions: one pass, or the logits computed again in backward.

Both take the tokens in chunks: logits, moments of the rows, what is kept of these, and from that the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dft_lightning.foreign.torch import keeps_graph
from dft_lightning.losses.base import TokenLoss, loss_and_slopes
from dft_lightning.losses.statistics import TokenStats, raised_dtype, with_own
from dft_lightning.ops import kernels, torch_kernels
from dft_lightning.ops.call import HeadSettings, ReferenceHead, TargetTokens, TokenOutput, inverse_normalizer
from dft_lightning.ops.gathering import Gathered, gather
from dft_lightning.ops.pieces import scaled
from dft_lightning.ops.products import HeadProducts
from dft_lightning.ops.row_math import (
    Coefficients,
    Moments,
    coefficients_of,
    entry_of,
    moment_names,
    needed_for_gradient,
    statistics_of,
)
from dft_lightning.ops.rows import put_


def one_pass(
    batch: TargetTokens,
    weight: Tensor,
    bias: Tensor | None,
    loss: TokenLoss,
    settings: HeadSettings,
    normalizer: Tensor | float | None,
    step: int,
) -> TokenOutput:
    """Pointwise loss and statistics of ``n`` target tokens, gradients computed on the way."""
    leaves = (batch.hidden, weight, bias)
    wanted = tuple(torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves)
    # The normaliser goes in before anything is rounded, so that backward need not round again.
    inverse = inverse_normalizer(normalizer, len(batch.hidden), raised_dtype(settings.dtype))
    value, loss_sum, slope, correct, log_prob, *rest = OnePass.apply(  # type: ignore[no-untyped-call, unused-ignore]
        *leaves, wanted, batch, loss, settings, inverse, step
    )
    dropped = rest.pop() if len(rest) > len(settings.statistics) else None
    known = batch.inputs | with_own(dict(zip(settings.statistics, rest, strict=True)))
    return TokenOutput(
        loss=value,
        loss_sum=loss_sum,
        weight=slope,
        correct=correct,
        log_prob=log_prob,
        step=step,
        vocab_size=weight.shape[0],
        dropped=dropped,
        **known,
    )


class OnePass(torch.autograd.Function):
    """Computes the gradients in forward, for an upstream gradient of 1, and scales them in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: tuple[bool, bool, bool],
        batch: TargetTokens,
        loss: TokenLoss,
        settings: HeadSettings,
        inverse: Tensor | float,
        step: int,
    ) -> tuple[Tensor, ...]:
        chunks = []
        with (
            torch.autocast(hidden.device.type, enabled=False),
            HeadProducts(hidden, weight, bias, settings, wanted, batch.reference) as products,
        ):
            for rows in products.chunks():
                gathered = gather(products, rows, batch.targets[rows], settings, keep=any(wanted))
                moments = gathered.moments
                values = statistics_of(moments, settings.statistics, products.vocabulary)
                known = with_own(values) | _rows_of(batch.inputs, rows)
                stats = TokenStats(step=step, vocab_size=weight.shape[0], **known)
                losses, slopes = loss_and_slopes(loss, stats, None if batch.weight is None else batch.weight[rows])
                left = {}
                if any(wanted):
                    # What was given to the loss from outside does not depend on these logits.
                    slopes = {name: slope for name, slope in slopes.items() if name in values}
                    coefficients = coefficients_of(
                        slopes, values, moments, settings.tempering, products.vocabulary
                    ).scaled(inverse)
                    unit = inverse.abs() if isinstance(inverse, Tensor) else abs(inverse)
                    limit = settings.gradient_threshold * unit
                    dropped = _push_back(products, rows, batch.targets[rows], settings, gathered, coefficients, limit)
                    left = {} if dropped is None else {"dropped": dropped / unit}
                del gathered  # before the next chunk's
                found = {"losses": losses, "weight": -slopes["log_prob"], "correct": moments.correct, **values, **left}
                chunks.append(found)
        names = ["losses", "weight", "correct", "log_prob", *settings.statistics]  # as one_pass unpacks them
        if any(wanted) and settings.gradient_threshold:
            names.append("dropped")
        per_token = _concatenated(chunks, names, settings.dtype, hidden.device)
        loss_sum = per_token.pop("losses").sum()
        ctx.save_for_backward(*products.gradients)
        ctx.scale, ctx.dtypes, ctx.first = products.scale, _dtypes(hidden, weight, bias), True
        details = (loss_sum, *per_token.values())
        ctx.mark_non_differentiable(*details)
        return (loss_sum * inverse, *details)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        # Not where another backward may need the gradients as they are, nor where an earlier one may have given them
        # to somebody as they are.
        in_place = ctx.first and not keeps_graph()
        ctx.first = False
        returned = _returned(ctx.saved_tensors, ctx.dtypes, upstream, ctx.scale, in_place=in_place)
        return (*returned, *[None] * 6)


def head_statistics(
    batch: TargetTokens, weight: Tensor, bias: Tensor | None, settings: HeadSettings
) -> tuple[TokenStats, Tensor]:
    """Statistics of ``n`` target tokens, differentiable, and whether each target is the argmax."""
    correct, log_prob, *rest = _Statistics.apply(  # type: ignore[no-untyped-call, unused-ignore]
        batch.hidden, weight, bias, batch.targets, settings, batch.reference
    )
    values = dict(zip(settings.statistics, rest, strict=True))
    return TokenStats(log_prob=log_prob, vocab_size=weight.shape[0], **with_own(values)), correct


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
        with (
            torch.autocast(hidden.device.type, enabled=False),
            HeadProducts(hidden, weight, bias, settings, reference=reference) as products,
        ):
            chunks = [
                vars(gather(products, rows, targets[rows], settings, keep=False).moments) for rows in products.chunks()
            ]
        names = moment_names(settings.statistics)
        moments = Moments(**_concatenated(chunks, names, settings.dtype, hidden.device))
        values = statistics_of(moments, settings.statistics, weight.shape[0])
        ctx.save_for_backward(hidden, weight, bias, targets, *values.values())
        ctx.settings, ctx.names, ctx.reference = settings, list(values), reference
        # These are saved: an output that autograd sees must be another tensor.
        outputs = {name: value.clone() for name, value in values.items()}
        constants = [outputs[name] for name, each in settings.statistics.items() if entry_of(each).gradient is None]
        ctx.mark_non_differentiable(moments.correct, *constants)
        return moments.correct, *outputs.values()

    @staticmethod
    def backward(ctx: Any, _: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        hidden, weight, bias, targets, *saved = ctx.saved_tensors
        values = dict(zip(ctx.names, saved, strict=True))
        slopes = {name: u for name, u in zip(ctx.names, upstream, strict=True) if u is not None}
        slopes.setdefault("log_prob", torch.zeros_like(values["log_prob"]))
        settings = replace(ctx.settings, statistics=needed_for_gradient(ctx.settings.statistics))
        with (
            torch.autocast(hidden.device.type, enabled=False),
            HeadProducts(hidden, weight, bias, settings, ctx.needs_input_grad[:3], ctx.reference) as products,
        ):
            for rows in products.chunks():
                gathered = gather(products, rows, targets[rows], settings, keep=True)
                own = _rows_of(slopes, rows), _rows_of(values, rows)
                coefficients = coefficients_of(*own, gathered.moments, settings.tempering, products.vocabulary)
                _push_back(products, rows, targets[rows], settings, gathered, coefficients)
                del gathered
        dtypes = _dtypes(hidden, weight, bias)
        returned = _returned(products.gradients, dtypes, 1.0, products.scale, in_place=True)
        return (*returned, None, None, None)


def _push_back(
    products: HeadProducts,
    rows: slice,
    targets: Tensor,
    settings: HeadSettings,
    gathered: Gathered,
    coefficients: Coefficients,
    limit: Tensor | float = 0.0,
) -> Tensor | None:
    """Turn what is kept of a chunk's logits into their gradient, and add what it contributes to the others.

    Returns:
        ``[c]``, what classes below the limit would have added to each row's sum of sizes; ``None`` without a limit.
    """
    own, transform = gathered.rows, settings.transform
    assert own is not None
    row_scale = None
    scale: Tensor | float = 1.0  # what is on the gradient beyond the factors of its rows
    if coefficients.only_at_target and transform.softcap is None:
        # at_target (1[v = y] - p_v) is what is kept, times a factor of the row, but at the target.
        put_(own.values, targets, -own.total)
        row_scale = -coefficients.at_target * transform.scale * own.log_factor.exp()
    else:
        if settings.dtype == torch.float16:
            largest = coefficients.largest_gradient(gathered.moments.log_prob) * abs(transform.scale)
            scale = products.next_scale(largest)
            coefficients = coefficients.scaled(scale)
        of_rows = kernels.kernels_for(products.device, settings.dtype) if coefficients.in_kernels else torch_kernels
        of_rows.row_gradient_(own, targets, transform, gathered.moments, coefficients, gathered.reference)
    if not settings.gradient_threshold:
        products.add_gradients(rows, own.values, row_scale)
        return None
    with products.chosen(own.values, targets, row_scale, limit * scale) as chosen:
        products.add_gradients(rows, chosen, row_scale)
        return chosen.dropped / scale if row_scale is None else chosen.dropped * row_scale.abs()


def _concatenated(
    chunks: Sequence[Mapping[str, Any]], names: Iterable[str], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """``[n]`` tensors of the chunks' named results; empty ones where there is no chunk. ``correct`` is bool."""
    if chunks:
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in names}
    kinds = {name: torch.bool if name == "correct" else raised_dtype(dtype) for name in names}
    return {name: torch.empty(0, dtype=kind, device=device) for name, kind in kinds.items()}


def _rows_of(values: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in values.items()}


def _dtypes(*leaves: Tensor | None) -> list[torch.dtype | None]:
    return [None if leaf is None else leaf.dtype for leaf in leaves]


def _returned(
    gradients: Iterable[Tensor | None],
    dtypes: Iterable[torch.dtype | None],
    upstream: Tensor | float,
    scale: Tensor | float,
    *,
    in_place: bool,
) -> list[Tensor | None]:
    """Accumulated gradients times the upstream gradient, each in the dtype of its leaf; ``scale`` is divided off."""
    factors = (upstream, upstream / scale, upstream / scale)  # of hidden states, weight and bias
    return [
        None if gradient is None or dtype is None else scaled(gradient, factor, dtype, in_place=in_place)
        for gradient, dtype, factor in zip(gradients, dtypes, factors, strict=True)
    ]


def _refuse_double_backward() -> None:
    """Raise where a second derivative is asked for: gradients that are computed in place have none."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused linear head has no second derivative (create_graph=True): use logits, with logits_token_loss "
            "or head: full"
        )
