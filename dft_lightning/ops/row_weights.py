"""Moments that are sums over what is kept of a chunk's rows, its own and a reference model's, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dft_lightning.losses.from_logits import at_least_tiny, check_k
from dft_lightning.ops.call import HeadSettings
from dft_lightning.ops.pieces import slices
from dft_lightning.ops.row_math import Moments, SoftmaxRows, Tempering
from dft_lightning.ops.rows import at, largest, log_at, log_of, put_, row_blocks


def moments_of_rows(
    own: SoftmaxRows, targets: Tensor, moments: Moments, reference: SoftmaxRows | None, settings: HeadSettings
) -> dict[str, Tensor]:
    """Those of the wanted statistics that are made of what is kept, by name.

    Args:
        own: of the chunk, in which a target's place holds 0.
        targets: ``[c]`` class indices.
        moments: that are known already.
        reference: rows of a reference model, where one is wanted.
        settings: what statistics are wanted.
    """
    statistics, found = settings.statistics, {}
    if "top_k_mass" in statistics:
        found["top_k_mass"] = _top_k_mass(own, moments, int(statistics["top_k_mass"].params["k"]))
    if "reference_reverse_kl" in statistics:
        assert reference is not None
        found |= _log_ratios(own, targets, moments, reference)
    if settings.tempering is not None:
        found |= _tempered(own, targets, moments, reference, settings.tempering)
    return found


def _top_k_mass(own: SoftmaxRows, moments: Moments, k: int) -> Tensor:
    check_k("top_k_mass", k, own.values.shape[1])
    others = largest(own.values, k).to(moments.log_prob.dtype) * own.log_factor.exp().unsqueeze(-1)
    return torch.cat([others, moments.log_prob.exp().unsqueeze(-1)], -1).topk(k, dim=-1, sorted=False).values.sum(-1)


def _log_ratios(own: SoftmaxRows, targets: Tensor, moments: Moments, reference: SoftmaxRows) -> dict[str, Tensor]:
    ratio = moments.log_prob - log_at(reference, targets)
    others = torch.empty_like(moments.log_prob)
    with row_blocks(own.values, others.dtype, 2) as blocks:
        for part in slices(len(others), blocks.shape[1]):
            log_p, log_r = blocks[:, : part.stop - part.start]
            log_of(own, part, out=log_p)
            log_of(reference, part, out=log_r)
            torch.sub(log_p, log_r, out=log_r)
            log_r.mul_(_probabilities(own, part, log_p))  # 0 at the target
            torch.sum(log_r, -1, out=others[part])
    return {"log_ratio_of_target": ratio, "log_ratio_of_others": others}


def _probabilities(rows: SoftmaxRows, part: slice, out: Tensor) -> Tensor:
    return torch.mul(out.copy_(rows.values[part]), rows.log_factor[part].exp().unsqueeze(-1), out=out)


def _tempered(
    own: SoftmaxRows, targets: Tensor, moments: Moments, reference: SoftmaxRows | None, tempering: Tempering
) -> dict[str, Tensor]:
    dtype = moments.log_prob.dtype
    names = ("log_tempered", "tempered_others", "tempered_share", "tempered_log_prob")
    found = {name: moments.log_prob.new_empty(len(targets)) for name in names}
    with row_blocks(own.values, dtype, 3) as blocks:
        for part in slices(len(targets), blocks.shape[1]):
            weight, log_p, more = blocks[:, : part.stop - part.start]
            log_of(own, part, out=log_p)
            put_(log_p, targets[part], moments.log_prob[part])
            log_weights(log_p, part, own, targets[part], reference, tempering, out=weight, scratch=more)
            normalizer = weight.logsumexp(-1).clamp_(min=torch.finfo(dtype).min)
            weight.sub_(normalizer.unsqueeze(-1)).exp_()
            if tempering.slope is not None:
                _sigmoid(log_p, moments.log_prob[part], tempering.slope, out=more)
                put_(more, targets[part], torch.full_like(normalizer, 0.5))  # of a banned one, too
                weight.mul_(more)
            at_target = at(weight, targets[part])
            torch.mul(weight, at_least_tiny(log_p), out=more)
            found["tempered_log_prob"][part] = more.sum(-1)
            put_(weight, targets[part], torch.zeros_like(at_target))
            others = weight.sum(-1)
            found["log_tempered"][part], found["tempered_others"][part] = normalizer, others
            found["tempered_share"][part] = others + at_target
    return found


def log_weights(
    log_p: Tensor,
    part: slice,
    own: SoftmaxRows,
    targets: Tensor,
    reference: SoftmaxRows | None,
    tempering: Tempering,
    *,
    out: Tensor,
    scratch: Tensor,
) -> Tensor:
    """Logarithms of ``p**power r**reference_power`` of a block of rows; ``-inf`` of a class that is banned."""
    if tempering.power:
        torch.mul(log_p, tempering.power, out=out)
        at_target = at(out, targets)
        out.masked_fill_(own.values[part] == 0, -math.inf)
        put_(out, targets, at_target)
    else:
        out.zero_()
    if tempering.reference_power:
        assert reference is not None
        out.add_(log_of(reference, part, out=scratch), alpha=tempering.reference_power)
        out.masked_fill_(reference.values[part] == 0, -math.inf)
    return out


def _sigmoid(log_p: Tensor, log_prob: Tensor, slope: float, *, out: Tensor) -> Tensor:
    return torch.sub(log_p, log_prob.unsqueeze(-1), out=out).mul_(slope).sigmoid_()


def add_log_ratio_(
    gradient: Tensor, log_p: Tensor, p: Tensor, part: slice, reference: SoftmaxRows, factor: Tensor, *, scratch: Tensor
) -> None:
    """Add ``factor p (log p - log r)`` to a block's gradient."""
    torch.sub(log_p, log_of(reference, part, out=scratch), out=scratch)
    gradient.addcmul_(scratch.mul_(p), factor[part].unsqueeze(-1))


def add_tempered_(
    gradient: Tensor,
    log_p: Tensor,
    part: slice,
    own: SoftmaxRows,
    targets: Tensor,
    moments: Moments,
    reference: SoftmaxRows | None,
    factor: Tensor,
    tempering: Tempering,
    *,
    scratch: tuple[Tensor, Tensor],
) -> None:
    """Add ``factor q h`` to a block's gradient."""
    weight, more = scratch
    log_weights(log_p, part, own, targets, reference, tempering, out=weight, scratch=more)
    assert moments.log_tempered is not None
    weight.sub_(moments.log_tempered[part].unsqueeze(-1)).exp_()
    if tempering.slope is not None:
        weight.mul_(_sigmoid(log_p, moments.log_prob[part], tempering.slope, out=more))
    gradient.addcmul_(weight, factor[part].unsqueeze(-1))
