"""Every statistic of a target token from whole logits, differentiable by autograd.

A new statistic is a field of :class:`TokenStats`, a function here, and an entry of ``ops.row_math``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from dft_lightning.errors import InputError
from dft_lightning.losses.statistics import (
    Statistic,
    TokenStats,
    check_params,
    normalise_needs,
    own_values,
    raised_dtype,
    reads_reference,
    with_own,
)


def target_log_prob(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target class, with all its digits where the probability is near 1.

    ``log p_y = -log(1 + exp(L - z_y))`` with ``L`` the log-sum-exp over the *other* classes. The textbook
    ``z_y - logsumexp(z)`` cancels near p = 1 and leaves ``1 - p`` with an error of one rounding of ``z``.

    Args:
        logits: ``[n, V]``, float32 or float64.
        targets: ``[n]`` class indices in ``[0, V)``.

    Returns:
        ``[n]``, differentiable with respect to ``logits``.
    """
    index = targets.unsqueeze(-1)
    # The lowest finite value and not -inf: where all other classes are banned, a log-sum-exp of -inf alone has a nan
    # gradient.
    others = logits.scatter(-1, index, torch.finfo(logits.dtype).min).logsumexp(-1)
    return logsigmoid(logits.gather(-1, index).squeeze(-1) - others)


def statistics_from_logits(
    logits: Tensor,
    targets: Tensor,
    needs: Iterable[Statistic | str] = (),
    *,
    sequence_index: Tensor | None = None,
    reference_log_prob: Tensor | None = None,
    reference_logits: Tensor | None = None,
    step: int = 0,
) -> TokenStats:
    """Compute the statistics that a loss needs, differentiably, from logits.

    Args:
        logits: ``[n, V]``. Half precision is raised to float32.
        targets: ``[n]`` valid class indices, or ``[n, V]`` soft targets. Ignored tokens must be gone already.
        needs: the statistics wanted beyond ``log_prob``.
        sequence_index: ``[n]``, passed through to losses that need it.
        reference_log_prob: ``[n]``, passed through to losses that need it, as a constant.
        reference_logits: ``[n, V]`` of the reference model, for what is taken from its distribution; a constant.
        step: the optimizer step, passed through.

    Raises:
        ValueError: a needed statistic cannot be had from logits alone.
    """
    logits = logits.to(raised_dtype(logits.dtype))
    given: dict[str, Tensor | None] = {"sequence_index": sequence_index}
    if reference_log_prob is not None:
        given["reference_log_prob"] = reference_log_prob.detach().to(logits.dtype)
    values: dict[str, Tensor] = {}
    if targets.ndim == logits.ndim:
        values["log_prob"], values["log_expected_prob"] = _soft_target_log_probs(logits, targets)
    else:
        values["log_prob"] = target_log_prob(logits, targets)
    rows = _Rows(logits, targets, values["log_prob"], reference_logits)
    for need in normalise_needs(needs):
        if need.name in ("log_prob", "log_expected_prob"):
            continue
        if (value := given.get(need.name)) is not None:
            values[need.name] = value
            continue
        check_params(need)
        missing = "reference_logits" if reads_reference(need) and reference_logits is None else need.name
        if need.function is not None:
            values[need.name] = _of_somebody(need, logits, targets)
        elif need.name in _FROM_LOGITS and missing == need.name:
            values[need.name] = _FROM_LOGITS[need.name](rows, **need.params)
        else:
            raise ValueError(f"the loss needs {need!r}, which cannot be computed from logits alone: pass {missing}")
    return TokenStats(step=step, vocab_size=logits.shape[-1], **with_own(values))


class _Rows:
    """Rows of logits, and what several statistics are made of."""

    def __init__(self, logits: Tensor, targets: Tensor, log_prob: Tensor, reference_logits: Tensor | None) -> None:
        self.logits, self.targets, self.log_prob = logits, targets, log_prob
        self._reference_logits = reference_logits

    @cached_property
    def log_probs(self) -> Tensor:
        """``log p``, ``[n, V]``."""
        return self.logits.log_softmax(-1)

    @cached_property
    def reference(self) -> Tensor:
        """``log r``, ``[n, V]``."""
        assert self._reference_logits is not None
        return self._reference_logits.detach().to(self.logits.dtype).log_softmax(-1)


def _of_somebody(need: Statistic, logits: Tensor, targets: Tensor) -> Tensor:
    if targets.ndim == logits.ndim:
        raise InputError(f"{need!r} is a function of class indices, and the targets are soft: give class indices")
    with torch.no_grad():
        return own_values(need, logits.detach(), targets)


def _soft_target_log_probs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    targets = targets.to(logits.dtype)
    log_probs = logits.log_softmax(-1)
    # A class of zero target mass counts nothing even where its logit is -inf (0 * -inf would be nan).
    log_prob = (targets * log_probs.masked_fill(targets == 0, 0.0)).sum(-1)
    log_joint = targets.log() + log_probs
    # A row of zeros (padding, often) or of banned classes has probability 0; logsumexp would give it a nan gradient.
    impossible = (log_joint == float("-inf")).all(-1)
    log_expected_prob = log_joint.masked_fill(impossible.unsqueeze(-1), 0.0).logsumexp(-1)
    return log_prob, log_expected_prob.masked_fill(impossible, float("-inf"))


def _entropy(log_probs: Tensor) -> Tensor:
    # A banned token (logit -inf) has p log p = 0.
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == float("-inf"), 0.0)).sum(-1)


def entropy_of_largest(logits: Tensor, k: int) -> Tensor:
    """Entropy of the ``k`` likeliest classes among themselves, in nats; a constant.

    Args:
        logits: ``[n, V]``, up to a constant for each row.
        k: how many; from 1 to V.
    """
    check_k("top_k_entropy", k, logits.shape[-1])
    return _entropy(logits.detach().topk(k, dim=-1, sorted=False).values.log_softmax(-1))


def check_k(name: str, k: int, vocabulary: int) -> None:
    """Raise ``ValueError`` for a number of the likeliest classes that there is not."""
    if not 1 <= k <= vocabulary:
        raise ValueError(f"{name} takes k from 1 to the size of the vocabulary, {vocabulary}; got {k}")


def _top_k_mass(rows: _Rows, k: int) -> Tensor:
    check_k("top_k_mass", k, rows.logits.shape[-1])
    return rows.log_probs.detach().topk(k, dim=-1, sorted=False).values.exp().sum(-1)


def _tempered(rows: _Rows, power: float, reference_power: float, slope: float | None) -> Tensor:
    """``q h``, constants ``[n, V]``."""
    log_p = rows.log_probs.detach()
    weight = power * log_p if power else torch.zeros_like(log_p)
    if reference_power:
        weight = weight + reference_power * rows.reference
    # Where each class is banned by one of the two, none has a weight.
    weight = weight.clamp(min=torch.finfo(weight.dtype).min).softmax(-1).masked_fill(weight == -math.inf, 0.0)
    if slope is None:
        return weight
    share = torch.sigmoid(slope * (log_p - rows.log_prob.detach().unsqueeze(-1)))
    return weight * share.masked_fill(weight == 0, 0.0)  # of a banned target the difference is nan


def _tempered_log_prob(rows: _Rows, **params: Any) -> Tensor:
    weight = _tempered(rows, **params)
    return (weight * at_least_tiny(rows.log_probs).masked_fill(weight == 0, 0.0)).sum(-1)


def _reference_kl(rows: _Rows) -> Tensor:
    # What the reference bans adds nothing, whatever the model says.
    weight = rows.reference.exp()
    banned = weight == 0
    difference = rows.reference.masked_fill(banned, 0.0) - rows.log_probs.masked_fill(banned, 0.0)
    return (weight * difference).sum(-1)


def _reference_reverse_kl(rows: _Rows) -> Tensor:
    # What the model bans adds nothing, whatever the reference says.
    banned = rows.log_probs.exp() == 0
    difference = rows.log_probs.masked_fill(banned, 0.0) - at_least_tiny(rows.reference).masked_fill(banned, 0.0)
    return (rows.log_probs.exp() * difference).sum(-1)


def at_least_tiny(log_prob: Tensor) -> Tensor:
    """Log-probs with that of the smallest number for a banned class."""
    return log_prob.masked_fill(log_prob == -math.inf, math.log(torch.finfo(log_prob.dtype).tiny))


def _reference_mass_below(rows: _Rows) -> Tensor:
    if rows.targets.ndim == rows.logits.ndim:
        # For each class: what all smaller values add up to, and its own.
        r, order = rows.reference.exp().sort(-1)
        below = nn.functional.pad(r.cumsum(-1), (1, 0)).gather(-1, torch.searchsorted(r, r)) + r
        return (torch.zeros_like(r).scatter(-1, order, below) * rows.targets.to(r.dtype)).sum(-1)
    return mass_below(rows.reference, rows.targets)


def mass_below(log_r: Tensor, targets: Tensor) -> Tensor:
    """Probability of each target and of the classes that are less likely than it; ``[n, V]`` and ``[n]`` to ``[n]``."""
    own = log_r.gather(-1, targets.unsqueeze(-1))
    return log_r.exp().masked_fill(log_r >= own, 0.0).sum(-1) + own.squeeze(-1).exp()


_FROM_LOGITS: dict[str, Callable[..., Tensor]] = {
    "mean_log_prob": lambda rows: rows.log_probs.mean(-1),
    "entropy": lambda rows: _entropy(rows.log_probs),
    "top_k_entropy": lambda rows, k: entropy_of_largest(rows.log_probs, k),
    "top_k_mass": _top_k_mass,
    "sum_squared_prob": lambda rows: (2 * rows.log_probs).exp().sum(-1),
    "tempered_log_prob": _tempered_log_prob,
    "tempered_share": lambda rows, **params: _tempered(rows, **params).sum(-1),
    "reference_kl": _reference_kl,
    "reference_reverse_kl": _reference_reverse_kl,
    "reference_mass_below": _reference_mass_below,
}
