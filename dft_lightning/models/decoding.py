"""Tokens after prompts, one at a time: what is known already is computed once, and rows that are done are left out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

Chooser = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""From logits ``[n, V]`` of rows, their numbers ``[n]`` and the place after the prompt (from 0): the next token of
each, and whether it is its last, ``[n]`` both."""


@dataclass(frozen=True)
class Manner:
    """How a model is run, so that each row's completion is what its own logits say.

    Attributes:
        together: rows in one padded batch; otherwise one at a time.
        use_cache: of keys and values; otherwise all that is before a token is computed again for it.
        masks_on: with the mask of the prompts beside the cache, which recurrent models have no use for.
    """

    together: bool = True
    use_cache: bool = True
    masks_on: bool = True


def decode(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    choose: Chooser,
    *,
    max_new_tokens: int,
    pad_token_id: int,
    manner: Manner,
    others_go_on: Callable[[bool], bool] = bool,
) -> Tensor:
    """Complete a batch of prompts in evaluation mode.

    A prompt that stands in several rows, one below the other, runs through the model once. Rows that are done leave the
    batch as soon as they are an eighth of it.

    Args:
        model: takes ``input_ids``, ``attention_mask`` and ``use_cache``, returns ``.logits``.
        input_ids: ``[B, T]``, padded on the left.
        attention_mask: ``[B, T]``, 0 at padding.
        choose: says the tokens.
        max_new_tokens: of a completion.
        pad_token_id: fills up finished completions.
        manner: how the model is run.
        others_go_on: told whether this rank goes on, says whether any does: of a model whose forward is a collective.

    Returns:
        ``[B, S]`` new tokens, ``S <= max_new_tokens``.

    Raises:
        NoCacheError: ``manner`` has one, and the model returns none.
    """
    first, copies = _distinct(input_ids, attention_mask)
    run = _Run(model, input_ids[first], attention_mask[first], manner)
    logits = run.begin()[copies]
    run.keep(copies)
    rows = torch.arange(len(input_ids), device=input_ids.device)
    going = torch.ones_like(rows, dtype=torch.bool)
    tokens = input_ids.new_full((len(rows), max_new_tokens), pad_token_id)
    for place in count():
        chosen, done = choose(logits, rows, min(place, max_new_tokens - 1))
        if place < max_new_tokens:
            chosen = torch.where(going, chosen, pad_token_id)
            tokens[rows, place] = chosen
            going = going & ~done
        left = int(going.sum()) if place + 1 < max_new_tokens else 0  # waits for the device, once a token
        if not others_go_on(left > 0):
            break
        if 0 < left <= len(rows) - max(1, len(rows) // _LEAVE):
            kept = going.nonzero().squeeze(1)
            run.keep(kept)
            rows, going, chosen = rows[kept], going[kept], chosen[kept]
        logits = run.go_on(chosen)
    return tokens[:, : place + 1]


# What a row that stays though it is done costs is its share of a forward; what its leaving costs, a copy of the cache.
_LEAVE = 8


def _distinct(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of each prompt ``[D]``, and which of these each row is ``[B]``."""
    both = torch.cat([input_ids, attention_mask], dim=1)
    new = torch.cat([both.new_ones(1, dtype=torch.bool), (both[1:] != both[:-1]).any(dim=1)])
    return new.nonzero().squeeze(1), new.cumsum(0) - 1


class NoCacheError(RuntimeError):
    """A model that returns no cache was to go on from one."""


class _Run:
    """A model at work on rows.

    Args:
        model: as of :func:`decode`.
        input_ids: ``[n, T]``, prompts.
        attention_mask: ``[n, T]``.
        manner: how it is run. Rows apart are told no positions, which the model then knows by itself.
    """

    def __init__(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, manner: Manner) -> None:
        self._model = model
        self._ids = input_ids
        self._mask = attention_mask
        self._use_cache = manner.use_cache
        self._masks_on = manner.masks_on
        self._cache: dict[str, Any] = {}
        known = inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._tells_positions = manner.together and "position_ids" in known

    def begin(self) -> Tensor:
        """Logits ``[n, V]`` after the prompts."""
        return self._forward(self._ids)

    def go_on(self, chosen: Tensor) -> Tensor:
        """Logits ``[n, V]`` after one more token ``[n]`` of each row."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(chosen), 1)], dim=1)
        if self._use_cache:
            return self._forward(chosen.unsqueeze(1))
        self._ids = torch.cat([self._ids, chosen.unsqueeze(1)], dim=1)
        return self._forward(self._ids)

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows ``[m]`` of those before, each any number of times."""
        if len(rows) == len(self._mask) and torch.equal(rows, torch.arange(len(rows), device=rows.device)):
            return
        self._mask = self._mask[rows]
        if not self._use_cache:
            self._ids = self._ids[rows]
        for cache in self._cache.values():
            cache.reorder_cache(rows)

    def _forward(self, input_ids: Tensor) -> Tensor:
        options = {**self._options, **self._cache, "use_cache": self._use_cache}
        if self._tells_positions:
            positions = (self._mask.cumsum(dim=1) - 1).clamp_(min=0)
            options["position_ids"] = positions[:, -input_ids.shape[1] :]
        mask = self._mask if self._masks_on or not self._cache else None
        output = self._model(input_ids=input_ids, attention_mask=mask, **options)
        if self._use_cache:
            self._cache = {name: _with_room(cache) for name, cache in _cache_of(output).items()}
        return _as_wide_as_float32(output.logits[:, -1])


def _cache_of(output: Any) -> dict[str, Any]:
    """What a model has to be given again, by the name of its argument, which changed between releases."""
    for name in ("cache", "past_key_values", "cache_params", "state"):
        found = output.get(name) if hasattr(output, "get") else getattr(output, name, None)
        if found is not None:
            return {name: found}
    raise NoCacheError("it returns no cache")


def _with_room(cache: Any) -> Any:
    """A cache whose layers of keys and values do not copy all that they have for each token."""
    from transformers.cache_utils import DynamicLayer

    layers: list[Any] = getattr(cache, "layers", [])
    for place, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layers[place] = _roomy_layer()()
            vars(layers[place]).update(vars(layer))
    return cache


@functools.cache
def _roomy_layer() -> type:
    """transformers' layer, whose ``update`` concatenates; the import takes seconds."""
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
        """Keys and values are the beginning of tensors that have room for what is to come."""

        rooms: tuple[Tensor | None, Tensor | None] = (None, None)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """Add the states ``[B, heads, t, size]`` of some tokens; returns those of all."""
            kept_keys, kept_values = cast(Tensor, self.keys), cast(Tensor, self.values)  # of the layer it is made of
            keys, self.keys = _appended(self.rooms[0], kept_keys, key_states)
            values, self.values = _appended(self.rooms[1], kept_values, value_states)
            self.rooms = keys, values
            return self.keys, self.values

    return RoomyLayer


_ROOM = 64


def _appended(room: Tensor | None, kept: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor that begins with what was kept and what is more, and that beginning of it."""
    length, total = kept.shape[-2], kept.shape[-2] + more.shape[-2]
    has_room = room is not None and room.data_ptr() == kept.data_ptr() and room.shape[-2] >= total
    if room is None or not has_room:  # at first, when rows have left, and when it is full
        room = kept.new_empty(*kept.shape[:-2], total + _ROOM, kept.shape[-1])
        room[..., :length, :] = kept
    room[..., length:total, :] = more
    return room, room[..., :total, :]


def _as_wide_as_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


# -- which token -------------------------------------------------------------------------------------------------------


@dataclass
class _Seeds:
    """Of rows, and how often they were completed."""

    of_rows: Sequence[Sequence[int]]
    calls: int = 0


_SEEDS: ContextVar[_Seeds | None] = ContextVar("_SEEDS", default=None)


@contextmanager
def drawing_by(seeds: Sequence[Sequence[int]]) -> Iterator[None]:
    """Each row of a batch that is completed meanwhile draws by numbers of its own, as (seed, prompt, sample).

    What a row draws then depends neither on the other rows of its batch nor on how many there are, nor on its rank.
    Completed once more, it draws anew. Rows of another number, of a ``generate`` of one's own that divides its batch,
    draw by the batch's first numbers and their own place. Elsewhere rows draw by torch's generator of the CPU.
    """
    token = _SEEDS.set(_Seeds(seeds))
    try:
        yield
    finally:
        _SEEDS.reset(token)


def row_seeds(rows: int) -> Sequence[Sequence[int]]:
    """The numbers that rows draw by; others at the next call."""
    seeds = _SEEDS.get()
    if seeds is None:
        base = int(torch.randint(2**62, ()))
        return [(base, row) for row in range(rows)]
    call, seeds.calls = seeds.calls, seeds.calls + 1
    if len(seeds.of_rows) != rows:
        return [(*seeds.of_rows[0], call, row) for row in range(rows)]
    return [(*seed, call) for seed in seeds.of_rows] if call else seeds.of_rows


@dataclass(frozen=True)
class Known:
    """What a model says to a prompt, greedily.

    Attributes:
        tokens: the likeliest ones.
        log_probs: of each.
        margins: how much the next likeliest is less likely, in nats.
    """

    tokens: list[int]
    log_probs: list[float]
    margins: list[float]

    def clear(self, margin: float) -> int:
        """How many of the first tokens are likeliest by more than ``margin``."""
        return next((place for place, each in enumerate(self.margins) if not each > margin), len(self.margins))


@dataclass
class Draws:
    """Draws tokens from rows' distributions, each row by one number a token.

    Args:
        seeds: of each row, non-negative integers or negative ones, which are taken modulo 2**64.
        max_new_tokens: how many tokens a row may need.
        filters: of logits, in their order: temperature, ``top_k``, ``top_p``.
        device: of the logits.

    Attributes:
        broken: whether a row's probabilities were NaN or infinite: scalar bool tensor on the device.
    """

    seeds: Sequence[Sequence[int]]
    max_new_tokens: int
    filters: Callable[[Tensor], Tensor]
    device: torch.device
    broken: Tensor = field(init=False)

    def __post_init__(self) -> None:
        keys = [[int(number) % 2**64 for number in seed] for seed in self.seeds]
        numbers = np.stack([np.random.default_rng(key).random(self.max_new_tokens) for key in keys])
        self._numbers = torch.from_numpy(numbers).to(self.device)
        self.broken = torch.zeros((), dtype=torch.bool, device=self.device)

    def __call__(self, logits: Tensor, rows: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Tokens ``[n]`` for logits ``[n, V]``, and whether a row has no distribution to draw from ``[n]``.

        The token is the first whose cumulative probability, in float64, exceeds the row's number times the sum.
        """
        cumulative = _cumulative(self.filters(logits).softmax(dim=-1))
        total = cumulative[:, -1:]
        wanted = self._numbers[rows, place].unsqueeze(1) * total
        wanted = torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))
        found = torch.searchsorted(cumulative, wanted, right=True).squeeze(1)
        broken = ~total.squeeze(1).isfinite()
        self.broken |= broken.any()
        return found.clamp_(max=logits.shape[-1] - 1), broken


def _cumulative(probabilities: Tensor) -> Tensor:
    """Sums along the vocabulary in float64; of CUDA there are none that torch calls deterministic, and refuses others
    under ``trainer.deterministic``. They differ in the last of 16 digits."""
    asked, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        return probabilities.double().cumsum(dim=-1)
    finally:
        torch.use_deterministic_algorithms(asked, warn_only=warns)
