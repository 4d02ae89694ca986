"""Row statistics and the in-place gradient on CUDA: one Triton program a row, float32 inside, no copy of the logits.

The same functions as in ``torch_kernels``. Under ``TRITON_INTERPRET=1`` they run on CPU tensors, which is how they are
tested without a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dft_lightning.ops.row_math import Coefficients, LogitTransform, Moments, ReferenceRows

_BLOCK = 4096
_NUM_WARPS = 8


@triton.jit
def _transformed(z, scale, softcap, HAS_SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    z = z.to(tl.float32)
    if HAS_SOFTCAP:
        z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)  # softcap * tanh
    return z * scale


@triton.jit
def _loaded(pointers, inside, RAGGED: tl.constexpr):  # type: ignore[no-untyped-def]
    # Without a mask whole vectors are loaded; a mask that no vector fits in has each element loaded for itself.
    if RAGGED:
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _log1p(u):  # type: ignore[no-untyped-def]
    # log(1 + u) loses u where it is small; the quotient gives back what the sum has rounded off.
    w = 1 + u
    return tl.where(w == 1, u, tl.log(w) * (u / tl.where(w == 1, 1.0, w - 1)))


@triton.jit
def _moments_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    targets,
    log_prob,
    log_normalizer,
    correct,
    sum_logits,
    sum_p_log_p,
    sum_p_squared,
    vocabulary,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    WANT_SUM_LOGITS: tl.constexpr,
    WANT_SUM_P_LOG_P: tl.constexpr,
    WANT_SUM_P_SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # a chunk may hold more than 2**31 logits
    start_of_row = logits + row * row_stride
    target = tl.load(targets + row)
    target_logit = _transformed(tl.load(start_of_row + target), scale, softcap, HAS_SOFTCAP)
    # Online over the other classes: with m their largest logit so far, sums of e**(z - m), of e**(z - m) (z - m) and
    # of e**(2 (z - m)).
    highest = -float("inf")
    exp_sum = 0.0
    weighted_sum = 0.0
    squared_sum = 0.0
    total = 0.0
    larger = 0
    whole = vocabulary // BLOCK * BLOCK
    for RAGGED in tl.static_range(2):
        for start in range(whole if RAGGED else 0, vocabulary if RAGGED else whole, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < vocabulary
            z = _loaded(start_of_row + offsets, inside, RAGGED)
            z = _transformed(z, scale, softcap, HAS_SOFTCAP)
            if WANT_SUM_LOGITS:
                total += tl.sum(tl.where(inside, z, 0.0), axis=0)
            z = tl.where(inside & (offsets != target), z, -float("inf"))
            ahead = inside & ((z > target_logit) | ((z == target_logit) & (offsets < target)))
            larger += tl.sum(ahead.to(tl.int32), axis=0)
            new = tl.maximum(highest, tl.max(z, axis=0))
            base = tl.where(new == -float("inf"), 0.0, new)
            shift = tl.where(highest == -float("inf"), 0.0, highest - base)
            rescale = tl.where(highest == -float("inf"), 0.0, tl.exp(shift))
            e = tl.exp(z - base)
            if WANT_SUM_P_LOG_P:
                weighted_sum = rescale * (weighted_sum + shift * exp_sum)
                weighted_sum += tl.sum(tl.where(e > 0, e * (z - base), 0.0), axis=0)
            if WANT_SUM_P_SQUARED:
                squared_sum = squared_sum * rescale * rescale + tl.sum(e * e, axis=0)
            exp_sum = exp_sum * rescale + tl.sum(e, axis=0)
            highest = new
    others = highest + tl.log(exp_sum)
    margin = target_logit - others
    tail = _log1p(tl.exp(-tl.abs(margin)))
    normalizer = tl.maximum(target_logit, others) + tail
    tl.store(log_prob + row, tl.minimum(margin, 0.0) - tail)
    tl.store(log_normalizer + row, normalizer)
    tl.store(correct + row, (larger == 0) & (margin == margin))  # a row with nan has no largest logit
    alone = exp_sum == 0  # all other classes are banned
    shift = tl.where(alone, 0.0, highest - normalizer)
    if WANT_SUM_LOGITS:
        tl.store(sum_logits + row, total)
    if WANT_SUM_P_LOG_P:
        tl.store(sum_p_log_p + row, tl.where(alone, 0.0, tl.exp(shift) * (weighted_sum + shift * exp_sum)))
    if WANT_SUM_P_SQUARED:
        tl.store(sum_p_squared + row, tl.where(alone, 0.0, tl.exp(2 * shift) * squared_sum))


def row_moments(logits: Tensor, targets: Tensor, transform: LogitTransform, wanted: frozenset[str]) -> Moments:
    """As :func:`dft_lightning.ops.torch_kernels.row_moments`."""
    n, vocabulary = logits.shape
    names = ("log_prob", "log_normalizer", *sorted(wanted))
    out = {name: torch.empty(n, dtype=torch.float32, device=logits.device) for name in names}
    correct = torch.empty(n, dtype=torch.bool, device=logits.device)
    unused = out["log_prob"]
    with torch.cuda.device_of(logits):  # Triton launches on the current device, not on the tensor's
        _moments_kernel[(n,)](
            logits,
            logits.stride(0),
            targets,
            out["log_prob"],
            out["log_normalizer"],
            correct,
            out.get("sum_logits", unused),
            out.get("sum_p_log_p", unused),
            out.get("sum_p_squared", unused),
            vocabulary,
            transform.scale,
            transform.softcap or 1.0,
            HAS_SOFTCAP=transform.softcap is not None,
            WANT_SUM_LOGITS="sum_logits" in wanted,
            WANT_SUM_P_LOG_P="sum_p_log_p" in wanted,
            WANT_SUM_P_SQUARED="sum_p_squared" in wanted,
            BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
        )
    return Moments(correct=correct, **out)


@triton.jit
def _divergence_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    log_normalizer,
    reference_logits,
    reference_stride,
    divergence,
    reference_log_normalizer,
    vocabulary,
    scale,
    softcap,
    reference_scale,
    reference_softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REFERENCE_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start_of_row = logits + row * row_stride
    start_of_reference = reference_logits + row * reference_stride
    normalizer = tl.load(log_normalizer + row)
    # Online over the reference's distribution: with m its largest logit so far, sums of e**(z_r - m) and of
    # e**(z_r - m) (z_r - m - log p).
    highest = -float("inf")
    exp_sum = 0.0
    weighted_sum = 0.0
    whole = vocabulary // BLOCK * BLOCK
    for RAGGED in tl.static_range(2):
        for start in range(whole if RAGGED else 0, vocabulary if RAGGED else whole, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < vocabulary
            own = _loaded(start_of_row + offsets, inside, RAGGED)
            own = _transformed(own, scale, softcap, HAS_SOFTCAP) - normalizer
            other = _loaded(start_of_reference + offsets, inside, RAGGED)
            other = _transformed(other, reference_scale, reference_softcap, HAS_REFERENCE_SOFTCAP)
            other = tl.where(inside, other, -float("inf"))
            new = tl.maximum(highest, tl.max(other, axis=0))
            base = tl.where(new == -float("inf"), 0.0, new)
            shift = tl.where(highest == -float("inf"), 0.0, highest - base)
            rescale = tl.where(highest == -float("inf"), 0.0, tl.exp(shift))
            e = tl.exp(other - base)
            weighted_sum = rescale * (weighted_sum + shift * exp_sum)
            weighted_sum += tl.sum(tl.where(e > 0, e * (other - base - own), 0.0), axis=0)
            exp_sum = exp_sum * rescale + tl.sum(e, axis=0)
            highest = new
    log_sum = tl.log(exp_sum)
    tl.store(reference_log_normalizer + row, highest + log_sum)
    tl.store(divergence + row, weighted_sum / exp_sum - log_sum)


def row_divergence(
    logits: Tensor,
    transform: LogitTransform,
    log_normalizer: Tensor,
    reference_logits: Tensor,
    reference_transform: LogitTransform,
) -> tuple[Tensor, Tensor]:
    """As :func:`dft_lightning.ops.torch_kernels.row_divergence`."""
    n, vocabulary = logits.shape
    divergence, normalizer = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(2))
    with torch.cuda.device_of(logits):
        _divergence_kernel[(n,)](
            logits,
            logits.stride(0),
            log_normalizer,
            reference_logits,
            reference_logits.stride(0),
            divergence,
            normalizer,
            vocabulary,
            transform.scale,
            transform.softcap or 1.0,
            reference_transform.scale,
            reference_transform.softcap or 1.0,
            HAS_SOFTCAP=transform.softcap is not None,
            HAS_REFERENCE_SOFTCAP=reference_transform.softcap is not None,
            BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
        )
    return divergence, normalizer


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    targets,
    log_normalizer,
    at_target,
    linear,
    constant,
    log_linear,
    quadratic,
    reference,
    reference_logits,
    reference_stride,
    reference_log_normalizer,
    vocabulary,
    scale,
    softcap,
    reference_scale,
    reference_softcap,
    HAS_REFERENCE: tl.constexpr,
    HAS_REFERENCE_SOFTCAP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
    HAS_LOG_LINEAR: tl.constexpr,
    HAS_QUADRATIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start_of_row = logits + row * row_stride
    target = tl.load(targets + row)
    normalizer = tl.load(log_normalizer + row)
    target_value = tl.load(at_target + row)
    row_linear = tl.load(linear + row)
    row_constant = tl.load(constant + row)
    row_log_linear = tl.load(log_linear + row)
    row_quadratic = tl.load(quadratic + row)
    row_reference = tl.load(reference + row)
    reference_normalizer = tl.load(reference_log_normalizer + row)
    whole = vocabulary // BLOCK * BLOCK
    for RAGGED in tl.static_range(2):
        for start in range(whole if RAGGED else 0, vocabulary if RAGGED else whole, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < vocabulary
            z = _transformed(_loaded(start_of_row + offsets, inside, RAGGED), scale, softcap, HAS_SOFTCAP)
            log_p = z - normalizer
            p = tl.exp(log_p)
            polynomial = row_linear
            if HAS_LOG_LINEAR:
                polynomial += row_log_linear * tl.where(p > 0, log_p, 0.0)
            if HAS_QUADRATIC:
                polynomial += row_quadratic * p
            gradient = p * polynomial
            if HAS_CONSTANT:
                gradient += row_constant
            gradient = tl.where(offsets == target, target_value, gradient)
            if HAS_REFERENCE:
                other = _loaded(reference_logits + row * reference_stride + offsets, inside, RAGGED)
                other = _transformed(other, reference_scale, reference_softcap, HAS_REFERENCE_SOFTCAP)
                gradient -= row_reference * tl.exp(other - reference_normalizer)
            if HAS_SOFTCAP:
                tanh = z / (scale * softcap)
                gradient *= 1 - tanh * tanh
            if RAGGED:
                tl.store(start_of_row + offsets, gradient.to(logits.dtype.element_ty), mask=inside)
            else:
                tl.store(start_of_row + offsets, gradient.to(logits.dtype.element_ty))


def row_gradient_(
    logits: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    log_prob: Tensor,
    log_normalizer: Tensor,
    coefficients: Coefficients,
    bias_gradient: Tensor | None,
    reference: ReferenceRows | None,
) -> None:
    """As :func:`dft_lightning.ops.torch_kernels.row_gradient_`."""
    n, vocabulary = logits.shape
    coefficients = coefficients.scaled(transform.scale)
    unused = log_normalizer
    beside = reference if coefficients.reference is not None else None
    theirs = LogitTransform() if beside is None else beside.transform
    with torch.cuda.device_of(logits):
        _gradient_kernel[(n,)](
            logits,
            logits.stride(0),
            targets,
            log_normalizer,
            coefficients.target_gradient(log_prob).contiguous(),
            coefficients.off_target_linear().contiguous(),
            _or(coefficients.constant, unused),
            _or(coefficients.log_linear, unused),
            _or(coefficients.quadratic, unused),
            _or(coefficients.reference, unused),
            logits if beside is None else beside.logits,
            logits.stride(0) if beside is None else beside.logits.stride(0),
            unused if beside is None else beside.log_normalizer,
            vocabulary,
            transform.scale,
            transform.softcap or 1.0,
            theirs.scale,
            theirs.softcap or 1.0,
            HAS_REFERENCE=beside is not None,
            HAS_REFERENCE_SOFTCAP=theirs.softcap is not None,
            HAS_SOFTCAP=transform.softcap is not None,
            HAS_CONSTANT=coefficients.constant is not None,
            HAS_LOG_LINEAR=coefficients.log_linear is not None,
            HAS_QUADRATIC=coefficients.quadratic is not None,
            BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
        )
    if bias_gradient is not None:
        bias_gradient.add_(logits.sum(0, dtype=bias_gradient.dtype))


def _or(coefficient: Tensor | None, unused: Tensor) -> Tensor:
    return unused if coefficient is None else coefficient.contiguous()
