"""Row statistics and the in-place gradient in plain torch, a few rows at a time.

Rows go through a block of float32 (float64 for float64 logits) that stays in the processor's cache: elementwise work
in memory would cost as much as the matrix products.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dft_lightning.losses.statistics import entropy_of_largest, raised_dtype
from dft_lightning.ops.products import scratch, slices
from dft_lightning.ops.row_math import Coefficients, LogitTransform, Moments, ReferenceRows

# Half of the second-level cache of two current cores; an accelerator wants few launches instead.
_BLOCK_BYTES = {"cpu": 2 * 2**20}
_BLOCK_BYTES_ELSEWHERE = 64 * 2**20


def row_moments(logits: Tensor, targets: Tensor, transform: LogitTransform, wanted: frozenset[str]) -> Moments:
    """Moments of each row.

    Args:
        logits: ``[n, V]`` before the transform, contiguous rows, any floating dtype; not changed.
        targets: ``[n]`` class indices.
        transform: what makes the model's logits of these.
        wanted: optional fields of :class:`Moments` to compute.
    """
    dtype = raised_dtype(logits.dtype)
    n = logits.shape[0]
    out = {name: logits.new_empty(n, dtype=dtype) for name in ("log_prob", "log_normalizer", *sorted(wanted))}
    correct = torch.empty(n, dtype=torch.bool, device=logits.device)
    copies = 2 if "sum_p_log_p" in wanted else 1
    with _block(logits, dtype, copies) as blocks:
        for rows in slices(n, blocks.shape[1]):
            z = blocks[0, : rows.stop - rows.start]
            transform.apply_(z.copy_(logits[rows]))
            correct[rows] = _block_moments(z, blocks, targets[rows], {name: value[rows] for name, value in out.items()})
    return Moments(correct=correct, **out)


def _block_moments(z: Tensor, blocks: Tensor, targets: Tensor, out: dict[str, Tensor]) -> Tensor:
    """Fill the moments of one block, whose logits are destroyed; returns ``correct``."""
    index = targets.unsqueeze(-1)
    target_logit = z.gather(-1, index).squeeze(-1)
    if "sum_logits" in out:
        torch.sum(z, -1, out=out["sum_logits"])
    # From here on over the other classes alone: the textbook z_y - logsumexp(z) has no digits of 1 - p near p = 1.
    # The lowest finite value and not -inf, so that a row without other classes stays finite.
    lowest = torch.finfo(z.dtype).min
    z.scatter_(-1, index, lowest)
    highest = z.amax(-1)
    correct = _first_largest(z, target_logit, highest, targets)
    z.sub_(highest.unsqueeze(-1))
    exp = z.exp_() if "sum_p_log_p" not in out else torch.exp(z, out=blocks[1, : z.shape[0]])
    sum_exp = exp.sum(-1)
    others = highest + sum_exp.log()
    log_normalizer = torch.logaddexp(others, target_logit)
    out["log_prob"].copy_(logsigmoid(target_logit - others))
    out["log_normalizer"].copy_(log_normalizer)
    shift = highest - log_normalizer
    if "sum_p_log_p" in out:
        weighted = z.clamp_(min=lowest).mul_(exp).sum(-1)  # a banned class (logit -inf) has p log p = 0
        out["sum_p_log_p"].copy_(shift.exp() * (weighted + shift.clamp(min=lowest) * sum_exp))
    if "sum_p_squared" in out:
        out["sum_p_squared"].copy_((2 * shift).exp() * exp.square_().sum(-1))
    return correct


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
    logits: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    log_prob: Tensor,
    log_normalizer: Tensor,
    coefficients: Coefficients,
    bias_gradient: Tensor | None,
    reference: ReferenceRows | None,
) -> None:
    """Turn logits into the gradient with respect to them, in place.

    Args:
        logits: ``[n, V]`` before the transform.
        targets: ``[n]`` class indices.
        transform: what makes the model's logits of these; its derivative is part of the gradient.
        log_prob: of the targets.
        log_normalizer: ``logsumexp`` of the model's logits.
        coefficients: of the gradient with respect to the model's logits.
        bias_gradient: ``[V]``, float32 or float64: the sum over the rows is added to it.
        reference: the reference model's rows, where the coefficients have a part for them; its logits stay.
    """
    dtype = raised_dtype(logits.dtype)
    coefficients = coefficients.scaled(transform.scale)
    at_target = coefficients.target_gradient(log_prob).unsqueeze(-1)
    linear = coefficients.off_target_linear()
    only_linear = coefficients.log_linear is None and coefficients.quadratic is None
    beside = None if coefficients.reference is None else reference
    copies = 1 + (not only_linear or beside is not None) + (transform.softcap is not None)
    with _block(logits, dtype, copies) as blocks:
        for rows in slices(logits.shape[0], blocks.shape[1]):
            block = blocks[:, : rows.stop - rows.start]
            z = transform.apply_(block[0].copy_(logits[rows]))
            if transform.softcap is not None:
                transform.cap_derivative(z, out=block[-1])
            z.sub_(log_normalizer[rows].unsqueeze(-1))
            if only_linear:
                z.exp_().mul_(linear[rows].unsqueeze(-1))
            else:
                _times_polynomial_(z, block[1], coefficients, linear, rows)
            if coefficients.constant is not None:
                z.add_(coefficients.constant[rows].unsqueeze(-1))
            z.scatter_(-1, targets[rows].unsqueeze(-1), at_target[rows])
            if beside is not None:
                assert coefficients.reference is not None
                r = beside.transform.apply_(block[1].copy_(beside.logits[rows]))
                r.sub_(beside.log_normalizer[rows].unsqueeze(-1)).exp_()
                z.addcmul_(r, coefficients.reference[rows].unsqueeze(-1), value=-1)
            if transform.softcap is not None:
                z.mul_(block[-1])
            if bias_gradient is not None:
                bias_gradient.add_(z.sum(0))
            logits[rows].copy_(z)


def row_divergence(
    logits: Tensor,
    transform: LogitTransform,
    log_normalizer: Tensor,
    reference_logits: Tensor,
    reference_transform: LogitTransform,
) -> tuple[Tensor, Tensor]:
    """``KL(reference || model)`` of each row, and the ``logsumexp`` of the reference's logits.

    Args:
        logits: ``[n, V]`` before the transform; not changed.
        transform: what makes the model's logits of these.
        log_normalizer: ``[n]``, their ``logsumexp``.
        reference_logits: ``[n, V]`` of the reference model, before its transform; not changed.
        reference_transform: what makes the reference's logits of these.
    """
    dtype = raised_dtype(logits.dtype)
    divergence, normalizer = (logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(2))
    with _block(logits, dtype, 3) as blocks:
        for rows in slices(logits.shape[0], blocks.shape[1]):
            own, other, weight = blocks[:, : rows.stop - rows.start]
            transform.apply_(own.copy_(logits[rows])).sub_(log_normalizer[rows].unsqueeze(-1))
            reference_transform.apply_(other.copy_(reference_logits[rows]))
            normalizer[rows] = other.logsumexp(-1)
            other.sub_(normalizer[rows].unsqueeze(-1))
            torch.exp(other, out=weight)
            # What the reference bans (r = 0) adds nothing, whatever the model says.
            difference = torch.sub(other, own, out=own).masked_fill_(weight == 0, 0.0)
            torch.sum(difference.mul_(weight), -1, out=divergence[rows])
    return divergence, normalizer


def row_top_k_entropy(logits: Tensor, transform: LogitTransform, k: int) -> Tensor:
    """Entropy of each row's ``k`` likeliest classes among themselves, ``[n]``; on every device.

    The transform keeps the order of logits (or reverses it), so that it is needed for ``k`` of them alone.
    """
    if 1 <= k < logits.shape[-1]:
        logits = _largest(logits, k) if transform.scale > 0 else -_largest(-logits, k)
    return entropy_of_largest(transform.apply_(logits.to(raised_dtype(logits.dtype), copy=True)), k)


def _largest(values: Tensor, k: int, block: int = 128) -> Tensor:
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


def _times_polynomial_(z: Tensor, p: Tensor, coefficients: Coefficients, linear: Tensor, rows: slice) -> None:
    """``z`` from ``log p`` to ``p (linear + log_linear log p + quadratic p)``."""
    torch.exp(z, out=p)
    if coefficients.log_linear is None:
        z.zero_()
    else:
        z.clamp_(min=torch.finfo(z.dtype).min / 2**20).mul_(coefficients.log_linear[rows].unsqueeze(-1))
    z.add_(linear[rows].unsqueeze(-1))
    if coefficients.quadratic is not None:
        z.addcmul_(p, coefficients.quadratic[rows].unsqueeze(-1))
    z.mul_(p)


def _block(logits: Tensor, dtype: torch.dtype, copies: int) -> AbstractContextManager[Tensor]:
    """``[copies, rows, V]`` of scratch that together fit the budget."""
    n, vocabulary = logits.shape
    budget = _BLOCK_BYTES.get(logits.device.type, _BLOCK_BYTES_ELSEWHERE)
    # In fours, so that threads share a block evenly.
    rows = min(n, max(4, budget // (copies * vocabulary * dtype.itemsize) // 4 * 4))
    return scratch("rows", (copies, rows, vocabulary), dtype, logits.device)
