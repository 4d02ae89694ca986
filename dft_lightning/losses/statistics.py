"""What a token loss may read about each target token, and how it is computed from logits.

Every statistic is one entry of ``_FROM_LOGITS``. A new one is a field of :class:`TokenStats` and a function here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dft_lightning.errors import InputError, did_you_mean


class Statistic:
    """The name of a per-token statistic and its parameters, as a loss lists it in ``needs``.

    Args:
        name: a field of :class:`TokenStats`.
        **params: what the statistic depends on, such as ``k`` for the entropy of the ``k`` likeliest tokens.

    Example:
        >>> Statistic("entropy")
        Statistic('entropy')
        >>> Statistic("top_k_entropy", k=20) == Statistic("top_k_entropy", k=20)
        True
    """

    __slots__ = ("name", "params")

    def __init__(self, name: str, **params: Any) -> None:
        if name not in _STATISTIC_NAMES:
            end = "; a loss that reads it sets uses_step = True" if name == "step" else known_names(_STATISTIC_NAMES)
            raise InputError(f"unknown statistic {name!r}{did_you_mean(str(name), _STATISTIC_NAMES, end)}")
        self.name = name
        self.params = params

    def __repr__(self) -> str:
        return f"Statistic({', '.join([repr(self.name)] + [f'{k}={v!r}' for k, v in self.params.items()])})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Statistic) and (self.name, self.params) == (other.name, other.params)

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.params.items()))))


@dataclass(frozen=True)
class TokenStats:
    """Statistics of ``n`` target tokens under the model, in float32 (float64 where the logits are float64).

    Each tensor has shape ``[n]``, and is ``None`` where it is not known. A loss is given those that it lists in
    ``needs``; reading another raises ``InputError``.

    Attributes:
        log_prob: log-probability ``l`` of the target, differentiable. For soft targets ``q``: ``sum q log p``.
        log_expected_prob: ``log sum q p`` for soft targets, otherwise the same tensor as ``log_prob``.
        mean_log_prob: mean over the vocabulary of ``log p`` (what label smoothing needs).
        entropy: ``-sum p log p`` in nats.
        top_k_entropy: entropy of the ``k`` likeliest tokens among themselves (their probabilities over their sum), in
            nats; a constant.
        sum_squared_prob: ``sum p**2``.
        reference_log_prob: log-probability of the target under a reference model; a constant.
        reference_kl: ``KL(reference || model)`` over the vocabulary, ``sum r (log r - log p)``, in nats.
        sequence_index: which sequence of the batch the token belongs to (int64).
        step: the optimizer step, for schedules; 0 outside training.
        vocab_size: number of classes that the model chooses from; 0 where nobody said.
    """

    log_prob: Tensor
    log_expected_prob: Tensor | None = None
    mean_log_prob: Tensor | None = None
    entropy: Tensor | None = None
    top_k_entropy: Tensor | None = None
    sum_squared_prob: Tensor | None = None
    reference_log_prob: Tensor | None = None
    reference_kl: Tensor | None = None
    sequence_index: Tensor | None = None
    step: int = 0
    vocab_size: int = 0

    def __post_init__(self) -> None:
        if self.log_expected_prob is None:
            object.__setattr__(self, "log_expected_prob", self.log_prob)


_STATISTIC_NAMES = tuple(f.name for f in fields(TokenStats) if f.name not in ("step", "vocab_size"))


def normalise_needs(needs: Iterable[Statistic | str]) -> tuple[Statistic, ...]:
    """Plain names become :class:`Statistic`.

    Raises:
        InputError: an unknown name, or what is no collection of names.
    """
    if isinstance(needs, (str, Statistic)):
        needs = (needs,)
    if callable(needs) or not isinstance(needs, Iterable):
        hint = ": put @property above it" if callable(needs) else ""
        raise InputError(f"needs must be names of statistics, got {needs!r}{hint}")
    return tuple(need if isinstance(need, Statistic) else Statistic(need) for need in needs)


class _NoStatisticError(InputError, AttributeError):
    """So that ``hasattr`` says no."""


def known_names(names: Iterable[str]) -> str:
    """How a message about an unknown name ends where none is like it."""
    return f"; the known ones are {', '.join(names)}"


class _NotGiven:
    """In the place of a statistic that a loss is not given; one that it is given stands in the instance, before it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, stats: GivenStats | None, owner: type) -> Any:
        if stats is None:
            return self
        reads = f"{stats.reader} reads stats.{self.name}"
        if self.name in stats.named:  # of a loss within another, which names less
            raise InputError(f"{reads}, which it is not given: what calls its token_loss has to name it in its needs")
        if self.name == "step":
            raise InputError(f"{reads} and does not say so: write uses_step = True in the class")
        params = "".join(f", {each}=..." for each in _PARAMS.get(self.name, ()))
        need = f'Statistic("{self.name}"{params})' if params else f'"{self.name}"'
        raise InputError(f"{reads} and does not name it: write needs = ({need},) in the class, or add it to its needs")


@dataclass(frozen=True, repr=False, eq=False)
class GivenStats(TokenStats):
    """The statistics that one loss is given, and no others: to read one of those raises ``InputError``.

    ``dataclasses.replace`` makes such an object of it again.

    Attributes:
        reader: name of the loss's class.
        named: the statistics that the loss names.
    """

    reader: str = ""
    named: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        super().__post_init__()
        values = vars(self)
        for name in values.keys() - {*_ALWAYS, "reader", "named"}:
            if name not in self.named or values[name] is None:
                del values[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = [each.name for each in fields(TokenStats)]
        end = did_you_mean(name, known, known_names(known))
        raise _NoStatisticError(f"{self.reader} reads stats.{name}: there is no such statistic{end}")

    def __repr__(self) -> str:
        return f"GivenStats({', '.join(f'{each.name}={getattr(self, each.name)!r}' for each in fields(self))})"


_ALWAYS = ("log_prob", "log_expected_prob", "vocab_size")
for _name in {field.name for field in fields(TokenStats)} - {*_ALWAYS}:
    setattr(GivenStats, _name, _NotGiven(_name))


class _FieldsThere(dict[str, Any]):
    """The fields of :class:`GivenStats`; of an instance those that it has, which ``dataclasses.replace`` reads."""

    def __get__(self, stats: GivenStats | None, owner: type) -> dict[str, Any]:
        return self if stats is None else {name: field for name, field in self.items() if name in vars(stats)}


GivenStats.__dataclass_fields__ = _FieldsThere(GivenStats.__dataclass_fields__)


def given_to(reader: str, needs: Iterable[Statistic | str], uses_step: bool, stats: TokenStats) -> GivenStats:
    """What a loss of a class's name and these needs is given of the statistics."""
    named = frozenset([need.name for need in normalise_needs(needs)] + ["step"] * uses_step)
    known = {name: value for name, value in vars(stats).items() if name in named or name in _ALWAYS}
    return GivenStats(**known, reader=reader, named=named)


def raised_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics of logits of ``dtype`` have: half precision becomes float32, others stay."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


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
        reference_logits: ``[n, V]`` of the reference model, for ``reference_kl``; a constant.
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
    log_probs: Tensor | None = None
    for need in normalise_needs(needs):
        if need.name in ("log_prob", "log_expected_prob"):
            continue
        if (value := given.get(need.name)) is not None:
            values[need.name] = value
            continue
        check_params(need)
        log_probs = logits.log_softmax(-1) if log_probs is None else log_probs
        if need.name == "reference_kl" and reference_logits is not None:
            reference = reference_logits.detach().to(logits.dtype).log_softmax(-1)
            values[need.name] = _reference_kl(log_probs, reference)
        elif need.name in _FROM_LOGITS:
            values[need.name] = _FROM_LOGITS[need.name](log_probs, **need.params)
        else:
            raise ValueError(
                f"the loss needs {need!r}, which cannot be computed from logits alone: pass {_GIVEN_AS[need.name]}"
            )
    return TokenStats(step=step, vocab_size=logits.shape[-1], **values)


_GIVEN_AS = {
    "sequence_index": "sequence_index",
    "reference_log_prob": "reference_log_prob",
    "reference_kl": "reference_logits",
}
_PARAMS = {"top_k_entropy": ("k",)}


def check_params(need: Statistic) -> None:
    """Raise ``ValueError`` where a statistic's parameters are not those that it has."""
    known = _PARAMS.get(need.name, ())
    if tuple(sorted(need.params)) != known:
        takes = f"takes {', '.join(known)}" if known else "takes no parameters"
        raise ValueError(f"{need!r}: {need.name} {takes}")


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
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"top_k_entropy takes k from 1 to the size of the vocabulary, {logits.shape[-1]}; got {k}")
    return _entropy(logits.detach().topk(k, dim=-1, sorted=False).values.log_softmax(-1))


def _reference_kl(log_probs: Tensor, reference: Tensor) -> Tensor:
    # What the reference bans adds nothing, whatever the model says.
    weight = reference.exp()
    banned = weight == 0
    difference = reference.masked_fill(banned, 0.0) - log_probs.masked_fill(banned, 0.0)
    return (weight * difference).sum(-1)


_FROM_LOGITS: dict[str, Callable[..., Tensor]] = {
    "mean_log_prob": lambda log_probs: log_probs.mean(-1),
    "entropy": _entropy,
    "top_k_entropy": entropy_of_largest,
    "sum_squared_prob": lambda log_probs: (2 * log_probs).exp().sum(-1),
}
