"""What a token loss may read about each target token: names, parameters, and who is given what.

How each is computed from logits is in ``from_logits``, and from a head's hidden states in ``ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

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

    __slots__ = ("function", "name", "params")

    def __init__(self, name: str, **params: Any) -> None:
        if name not in _STATISTIC_NAMES:
            end = "; a loss that reads it sets uses_step = True" if name == "step" else known_names(_STATISTIC_NAMES)
            raise InputError(f"unknown statistic {name!r}{did_you_mean(str(name), _STATISTIC_NAMES, end)}")
        self.name = name
        self.params = params
        self.function: Callable[[Tensor, Tensor], Tensor] | None = None

    @classmethod
    def of(cls, function: Callable[[Tensor, Tensor], Tensor], name: str | None = None) -> Statistic:
        """A statistic of one's own: a function of the logits, as a constant.

        A loss that names it reads it as ``stats.NAME``, detached: no gradient flows through it. The function is called
        with logits ``[n, V]`` in float32 (float64 of float64) as the model gives them, scale and softcap included, and
        the ``n`` targets, and returns ``[n]``. In the fused head ``n`` is a few rows of a chunk, so that it must not
        depend on how many there are; it must leave the logits as they are. It costs a copy of these logits and what it
        does itself and, on the CPU in bfloat16, a second product for them.

        Args:
            function: of the logits and the class indices. At the top level of a module, if the loss is to be pickled.
            name: how a loss reads it; ``None`` takes the function's own.

        Raises:
            InputError: the name is none that can be read so, or that of a statistic which is there already.

        Example:
            >>> from dft_lightning.losses import TokenLoss
            >>> def margin(logits, targets):
            ...     return logits.gather(-1, targets[:, None])[:, 0] - logits.amax(-1)
            >>> class NearTheTop(TokenLoss):
            ...     needs = (Statistic.of(margin),)
            ...     def token_loss(self, stats):
            ...         return -stats.margin.exp() * stats.log_prob
            >>> NearTheTop()(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))  # the margin is 0
            tensor(0.6931)
        """
        name = getattr(function, "__name__", None) if name is None else name
        if not (isinstance(name, str) and name.isidentifier() and not name.startswith("_")):
            raise InputError(f"Statistic.of: {name!r} cannot be read as stats.NAME: give name=...")
        if name in _TAKEN or hasattr(TokenStats, name) or name in {each.name for each in fields(TokenStats)}:
            raise InputError(f"Statistic.of: {name} is a name that TokenStats has already: give another, name=...")
        statistic = cls.__new__(cls)
        statistic.name, statistic.params, statistic.function = name, {}, function
        return statistic

    def __repr__(self) -> str:
        if self.function is not None:
            return f"Statistic.of({self.name})"
        return f"Statistic({', '.join([repr(self.name)] + [f'{k}={v!r}' for k, v in self.params.items()])})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Statistic) and self._whole == other._whole

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.params)), self.function))

    @property
    def _whole(self) -> tuple[Any, ...]:
        return self.name, self.params, self.function


@dataclass(frozen=True)
class TokenStats:
    """Statistics of ``n`` target tokens under the model, in float32 (float64 where the logits are float64).

    Each tensor has shape ``[n]``, and is ``None`` where it is not known. A loss is given those that it lists in
    ``needs``; reading another raises ``InputError``. Below ``p`` are the model's probabilities, ``r`` those of a
    reference model.

    Attributes:
        log_prob: log-probability ``l`` of the target, differentiable. For soft targets ``q``: ``sum q log p``.
        log_expected_prob: ``log sum q p`` for soft targets, otherwise the same tensor as ``log_prob``.
        mean_log_prob: mean over the vocabulary of ``log p`` (what label smoothing needs).
        entropy: ``-sum p log p`` in nats.
        top_k_entropy: entropy of the ``k`` likeliest tokens among themselves (their probabilities over their sum), in
            nats; a constant.
        top_k_mass: probability of the ``k`` likeliest tokens together; a constant.
        sum_squared_prob: ``sum p**2``.
        tempered_log_prob: ``sum q h log p`` with constants ``q``, proportional to ``p**power r**reference_power`` and
            of sum 1, and ``h``, 1 where ``slope`` is ``None`` and otherwise ``sigmoid(slope (log p - l))``.
        tempered_share: ``sum q h``; a constant.
        reference_log_prob: log-probability of the target under a reference model; a constant.
        reference_kl: ``KL(reference || model)`` over the vocabulary, ``sum r (log r - log p)``, in nats.
        reference_reverse_kl: ``KL(model || reference)``, ``sum p (log p - log r)``, in nats.
        reference_mass_below: ``r`` of the target and of all classes that are less likely under the reference,
            together; a constant.
        sequence_index: which sequence of the batch the token belongs to (int64).
        step: the optimizer step, for schedules; 0 outside training.
        vocab_size: number of classes that the model chooses from; 0 where nobody said.
        own: those of :meth:`Statistic.of` by name, which are read as ``stats.NAME``.
    """

    log_prob: Tensor
    log_expected_prob: Tensor | None = None
    mean_log_prob: Tensor | None = None
    entropy: Tensor | None = None
    top_k_entropy: Tensor | None = None
    top_k_mass: Tensor | None = None
    sum_squared_prob: Tensor | None = None
    tempered_log_prob: Tensor | None = None
    tempered_share: Tensor | None = None
    reference_log_prob: Tensor | None = None
    reference_kl: Tensor | None = None
    reference_reverse_kl: Tensor | None = None
    reference_mass_below: Tensor | None = None
    sequence_index: Tensor | None = None
    step: int = 0
    vocab_size: int = 0
    own: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.log_expected_prob is None:
            object.__setattr__(self, "log_expected_prob", self.log_prob)

    def __getattr__(self, name: str) -> Tensor:
        """A statistic of somebody's own."""
        own: Mapping[str, Tensor] = self.__dict__.get("own", {})
        if name in own:
            return own[name]
        raise AttributeError(f"{type(self).__name__} has no {name}")


# What a head's output has beside, and who is given what.
_TAKEN = ("loss", "losses", "loss_sum", "weight", "correct", "reader", "named")
# What is no statistic that a loss names.
NO_STATISTICS = ("step", "vocab_size", "own")
_STATISTIC_NAMES = tuple(f.name for f in fields(TokenStats) if f.name not in NO_STATISTICS)


def with_own(values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Statistics by name as :class:`TokenStats` takes them: those of somebody's own under ``own``."""
    known = {name: value for name, value in values.items() if name in _STATISTIC_NAMES}
    return {**known, "own": {name: value for name, value in values.items() if name not in known}}


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


def names_of(needs: Iterable[Statistic | str]) -> frozenset[str]:
    """The names alone."""
    return frozenset(need.name for need in normalise_needs(needs))


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
        params = "".join(f", {each}=..." for each in PARAMS.get(self.name, ()))
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
        if name in self.own:
            return self.own[name]
        known = [each.name for each in fields(TokenStats)]
        end = did_you_mean(name, known, known_names(known))
        raise _NoStatisticError(f"{self.reader} reads stats.{name}: there is no such statistic{end}")

    def __repr__(self) -> str:
        return f"GivenStats({', '.join(f'{each.name}={getattr(self, each.name)!r}' for each in fields(self))})"


_ALWAYS = ("log_prob", "log_expected_prob", "vocab_size", "own")
for _name in {each.name for each in fields(TokenStats)} - {*_ALWAYS}:
    setattr(GivenStats, _name, _NotGiven(_name))


class _FieldsThere(dict[str, Any]):
    """The fields of :class:`GivenStats`; of an instance those that it has, which ``dataclasses.replace`` reads."""

    def __get__(self, stats: GivenStats | None, owner: type) -> dict[str, Any]:
        return self if stats is None else {name: field for name, field in self.items() if name in vars(stats)}


GivenStats.__dataclass_fields__ = _FieldsThere(GivenStats.__dataclass_fields__)


def given_to(reader: str, needs: Iterable[Statistic | str], uses_step: bool, stats: TokenStats) -> GivenStats:
    """What a loss of a class's name and these needs is given of the statistics."""
    named = names_of(needs) | ({"step"} if uses_step else set())
    known = {name: value for name, value in vars(stats).items() if name in named or name in _ALWAYS}
    known["own"] = {name: value for name, value in stats.own.items() if name in named}
    return GivenStats(**known, reader=reader, named=named)


def raised_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics of logits of ``dtype`` have: half precision becomes float32, others stay."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


_TEMPERED = ("power", "reference_power", "slope")
PARAMS = {"top_k_entropy": ("k",), "top_k_mass": ("k",), "tempered_log_prob": _TEMPERED, "tempered_share": _TEMPERED}


def check_params(need: Statistic) -> None:
    """Raise ``ValueError`` where a statistic's parameters are not those that it has."""
    known = PARAMS.get(need.name, ())
    if tuple(sorted(need.params)) != known:
        takes = f"takes {', '.join(known)}" if known else "takes no parameters"
        raise ValueError(f"{need!r}: {need.name} {takes}")


# What is taken from a reference model's distribution, and so from its logits.
OF_REFERENCE = ("reference_kl", "reference_reverse_kl", "reference_mass_below")


def reads_reference(need: Statistic) -> bool:
    """Whether a statistic is taken from a reference model's logits."""
    return need.name in OF_REFERENCE or bool(need.params.get("reference_power"))


def reference_need(needs: Iterable[Statistic | str]) -> Statistic | None:
    """The first that is taken from a reference model's logits, if there is one."""
    return next((need for need in normalise_needs(needs) if reads_reference(need)), None)


def own_values(statistic: Statistic, logits: Tensor, targets: Tensor) -> Tensor:
    """A statistic of somebody's own, checked.

    Raises:
        InputError: it is not one number for each target.
    """
    assert statistic.function is not None
    values = statistic.function(logits, targets)
    if not isinstance(values, Tensor) or values.shape != targets.shape or values.is_complex():
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(
            f"{statistic!r} must return one number for each target, of shape {list(targets.shape)}, got {got}"
        )
    return values.detach().to(logits.device, logits.dtype)
