"""Row statistics and the gradient in plain torch.

Operations are over all rows of a chunk where torch's own kernel goes through a row at a time: one parallel region each,
at whose end alone threads wait for each other. What takes several operations in float32 is done a block of rows at a
time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dft_lightning.losses.from_logits import entropy_of_largest
from dft_lightning.losses.statistics import raised_dtype
from dft_lightning.ops.pieces import scratch, slices
from dft_lightning.ops.row_math import Coefficients, LogitTransform, Moments, SoftmaxRows
from dft_lightning.ops.row_weights import add_log_ratio_, add_tempered_
from dft_lightning.ops.rows import at, largest, put_, row_blocks, smallest_value, value_scale

_COLUMN_BYTES = 4 * 2**20  # of a block of rows whose columns' largest are taken, in a cache


def row_moments(
    logits: Tensor, targets: Tensor, transform: LogitTransform, wanted: frozenset[str], out: Tensor | None
) -> tuple[Moments, SoftmaxRows]:
    """Moments of each row, and its softmax over the other classes.

    Args:
        logits: ``[n, V]`` before the transform, float32 or float64; destroyed.
        targets: ``[n]`` class indices.
        transform: what makes the model's logits of these.
        wanted: optional fields of :class:`Moments` to compute.
        out: ``[n, V]`` of any floating dtype for the values, which may be the logits themselves; ``None`` where they
            are not needed.
    """
    transform.apply_(logits)
    found = {"sum_logits": logits.sum(-1)} if "sum_logits" in wanted else {}
    target_logit = at(logits, targets)
    # From here on over the other classes alone: the textbook z_y - logsumexp(z) has no digits of 1 - p near p = 1.
    # The lowest finite value and not -inf, so that a row without other classes stays finite.
    lowest = torch.finfo(logits.dtype).min
    put_(logits, targets, torch.full_like(target_logit, lowest))
    highest = logits.amax(-1)
    correct = _first_largest(logits, target_logit, highest, targets)
    # A class of the largest logit in the target's place says what the others were divided by.
    put_(logits, targets, highest)
    torch.softmax(logits, -1, out=logits)
    of_highest = at(logits, targets)
    put_(logits, targets, torch.zeros_like(highest))
    total = logits.sum(-1)
    others = highest + (total / of_highest).log()
    log_prob, log_of_others = log_sigmoid(target_logit - others), log_sigmoid(others - target_logit)
    found |= row_sums(logits, log_factor_of(log_of_others, total), wanted)
    values, total = _rounded(logits, total, out)
    normalizer = torch.logaddexp(others, target_logit)
    moments = Moments(log_prob=log_prob, log_normalizer=normalizer, correct=correct, **found)
    return moments, SoftmaxRows(values, log_factor_of(log_of_others, total), total)


def log_sigmoid(x: Tensor) -> Tensor:
    """``log(sigmoid(x))`` with all digits; torch's own takes several threads for a few elements."""
    return softplus(-x, threshold=40.0).neg_()


def log_factor_of(log_of_others: Tensor, total: Tensor) -> Tensor:
    """What makes the values, as they were rounded, sum up to ``1 - p_y``, whose logarithm this is given.

    So ``log p`` of a class that has nearly everything is as far from 0 as the others say.
    """
    return torch.where(total > 0, log_of_others - total.log(), 0 * total)


def _rounded(softmax: Tensor, total: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of a softmax in the dtype of ``out``, if there is one, and their sums."""
    if out is None or out.data_ptr() == softmax.data_ptr():
        return softmax, total
    scale = value_scale(out.dtype)
    softmax.copy_(out.copy_(softmax if scale == 1 else softmax.mul_(scale)))
    return out, softmax.sum(-1)


def row_softmax(logits: Tensor, transform: LogitTransform, out: Tensor) -> SoftmaxRows:
    """Softmax of the rows of a reference model ``[n, V]``, float32 or float64, which are destroyed, into ``out``."""
    torch.softmax(transform.apply_(logits), -1, out=logits)
    values, total = _rounded(logits, torch.ones_like(logits[:, 0]), out)
    return SoftmaxRows(values, -total.log(), total)


def row_sums(values: Tensor, log_factor: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    """Moments that are sums over the other classes of functions of their probabilities."""
    names = sorted(wanted & {"sum_p_log_p", "sum_p_squared"})
    if not names:
        return {}
    dtype = raised_dtype(values.dtype)
    out = {name: values.new_empty(len(values), dtype=dtype) for name in names}
    factor = log_factor.exp().unsqueeze(-1)
    with row_blocks(values, dtype, 2) as blocks:
        for rows in slices(len(values), blocks.shape[1]):
            p, other = blocks[:, : rows.stop - rows.start]
            torch.mul(p.copy_(values[rows]), factor[rows], out=p)
            if "sum_p_log_p" in out:
                torch.sum(torch.xlogy(p, p, out=other), -1, out=out["sum_p_log_p"][rows])
            if "sum_p_squared" in out:
                torch.sum(p.square_(), -1, out=out["sum_p_squared"][rows])
    return out


def _first_largest(z: Tensor, target_logit: Tensor, highest: Tensor, targets: Tensor) -> Tensor:
    """Whether the target is what argmax would return, ``highest`` being the largest of the others."""
    correct = target_logit > highest
    tied = target_logit == highest
    if z.device.type != "cpu":
        return correct | (tied & (targets < z.argmax(-1)))
    if bool(tied.any()):  # on the CPU the question costs nothing, and ties are rare
        correct[tied] = targets[tied] < z[tied].argmax(-1)
    return correct


def row_gradient_(
    rows: SoftmaxRows,
    targets: Tensor,
    transform: LogitTransform,
    moments: Moments,
    coefficients: Coefficients,
    reference: SoftmaxRows | None,
) -> None:
    """Turn what is kept of the logits into the gradient with respect to them before the transform, in place.

    Args:
        rows: of :func:`row_moments`.
        targets: ``[n]`` class indices.
        transform: what makes the model's logits, whose derivative is part of the gradient.
        moments: of the rows.
        coefficients: of the gradient with respect to the model's logits.
        reference: the reference model's rows, where the coefficients have a part for them; they stay.
    """
    values = rows.values
    dtype = raised_dtype(values.dtype)
    coefficients = coefficients.scaled(transform.scale)
    at_target = coefficients.target_gradient(moments.log_prob)
    linear = coefficients.off_target_linear()
    beside = None if coefficients.reference is None else reference
    smallest = smallest_value(values.dtype)
    capped, by_class = transform.softcap is not None, not coefficients.in_kernels
    with row_blocks(values, dtype, 2 + capped + 3 * by_class) as blocks:
        for part in slices(len(values), blocks.shape[1]):
            p, z, *more = blocks[:, : part.stop - part.start]
            log_factor = rows.log_factor[part].unsqueeze(-1)
            p.copy_(values[part])
            torch.log(torch.clamp(p, min=smallest, out=z), out=z).add_(log_factor)
            p.mul_(log_factor.exp())
            if transform.softcap is not None:
                _cap_derivative(z, moments, targets, part, transform, out=more[0])
            if by_class:
                _by_class(z, p, rows, targets[part], coefficients, moments, reference, part, out=more[-3:])
            gradient = _times_polynomial_(z, p, coefficients, linear, part)
            if by_class:
                gradient.add_(more[-3])
            if coefficients.constant is not None:
                gradient.add_(coefficients.constant[part].unsqueeze(-1))
            put_(gradient, targets[part], at_target[part])
            if beside is not None:
                assert coefficients.reference is not None
                factor = coefficients.reference[part] * beside.log_factor[part].exp()
                gradient.addcmul_(p.copy_(beside.values[part]), factor.unsqueeze(-1), value=-1)
            if transform.softcap is not None:
                gradient.mul_(more[0])
            values[part].copy_(gradient)


def column_largest(gradient: Tensor, row_scale: Tensor | None) -> Tensor:
    """The largest size of each class's gradient in a chunk, ``[V]`` in float32 (float64 of float64); nan where one is.

    Args:
        gradient: ``[n, V]``.
        row_scale: ``[n]``, factors of its rows.
    """
    # bfloat16 has room for a factor of any row; float16 has not.
    dtype = torch.float32 if gradient.dtype == torch.float16 else gradient.dtype
    found = gradient.new_zeros(gradient.shape[1], dtype=dtype)
    rows = max(1, _COLUMN_BYTES // (gradient.shape[1] * dtype.itemsize))
    factor = None if row_scale is None else row_scale.abs().to(dtype).unsqueeze(-1)
    with scratch("columns", (min(rows, len(gradient)), gradient.shape[1]), dtype, gradient.device) as block:
        for part in slices(len(gradient), rows):
            sizes = torch.abs(gradient[part].to(dtype), out=block[: part.stop - part.start])
            if factor is not None:
                sizes.mul_(factor[part])
            torch.maximum(found, sizes.amax(0), out=found)
    return found.to(raised_dtype(gradient.dtype))


def _by_class(
    log_p: Tensor,
    p: Tensor,
    rows: SoftmaxRows,
    targets: Tensor,
    coefficients: Coefficients,
    moments: Moments,
    reference: SoftmaxRows | None,
    part: slice,
    *,
    out: list[Tensor],
) -> None:
    """Parts of a block's gradient that are no polynomials of a class's probability, into the first of three buffers."""
    total, *scratch = out
    total.zero_()
    if coefficients.log_ratio is not None:
        assert reference is not None
        add_log_ratio_(total, log_p, p, part, reference, coefficients.log_ratio, scratch=scratch[0])
    if coefficients.tempered is not None:
        assert coefficients.tempering is not None
        tempering, (weight, more) = coefficients.tempering, scratch
        beside = reference, coefficients.tempered, tempering
        add_tempered_(total, log_p, part, rows, targets, moments, *beside, scratch=(weight, more))


def _cap_derivative(
    log_p: Tensor, moments: Moments, targets: Tensor, part: slice, transform: LogitTransform, *, out: Tensor
) -> None:
    """Derivative of the softcap at each class of a block of rows."""
    torch.add(log_p, moments.log_normalizer[part].unsqueeze(-1), out=out)
    put_(out, targets[part], moments.log_prob[part] + moments.log_normalizer[part])
    transform.cap_derivative(out, out=out)


def row_cross_entropy(
    logits: Tensor, transform: LogitTransform, reference_logits: Tensor, reference_transform: LogitTransform
) -> Tensor:
    """``sum r (log r - z)`` of each row: with ``logsumexp(z)`` added, ``KL(reference || model)``.

    Args:
        logits: ``[n, V]`` before the transform, float32 or float64; not changed.
        transform: what makes the model's logits ``z`` of these.
        reference_logits: ``[n, V]`` of the reference model, before its transform; not changed.
        reference_transform: what makes the reference's logits of these.
    """
    found = logits.new_empty(len(logits))
    with row_blocks(logits, logits.dtype, 3) as blocks:
        for rows in slices(len(logits), blocks.shape[1]):
            own, other, weight = blocks[:, : rows.stop - rows.start]
            transform.apply_(own.copy_(logits[rows]))
            reference_transform.apply_(other.copy_(reference_logits[rows]))
            other.sub_(other.logsumexp(-1, keepdim=True))
            torch.exp(other, out=weight)
            # What the reference bans (r = 0) adds nothing, whatever the model says.
            difference = torch.sub(other, own, out=own).masked_fill_(weight == 0, 0.0)
            torch.sum(difference.mul_(weight), -1, out=found[rows])
    return found


def row_top_k_entropy(logits: Tensor, transform: LogitTransform, k: int) -> Tensor:
    """Entropy of each row's ``k`` likeliest classes among themselves, ``[n]``; on every device.

    The transform keeps the order of logits (or reverses it), so that it is needed for ``k`` of them alone.
    """
    if 1 <= k < logits.shape[-1]:
        logits = largest(logits, k) if transform.scale > 0 else -largest(-logits, k)
    return entropy_of_largest(transform.apply_(logits.to(raised_dtype(logits.dtype), copy=True)), k)


def _times_polynomial_(z: Tensor, p: Tensor, coefficients: Coefficients, linear: Tensor, rows: slice) -> Tensor:
    """``z`` from ``log p`` to ``p (linear + log_linear log p + quadratic p)``."""
    if coefficients.log_linear is None:
        z.zero_()
    else:
        z.clamp_(min=torch.finfo(z.dtype).min / 2**20).mul_(coefficients.log_linear[rows].unsqueeze(-1))
    z.add_(linear[rows].unsqueeze(-1))
    if coefficients.quadratic is not None:
        z.addcmul_(p, coefficients.quadratic[rows].unsqueeze(-1))
    return z.mul_(p)
