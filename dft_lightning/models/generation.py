"""Generation with exactly the options that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from dft_lightning.distributed.ranks import largest_of_ranks
from dft_lightning.distributed.sharding import ShardingOptions
from dft_lightning.distributed.strategies import gathered_blocks, gathered_root, shards_parameters
from dft_lightning.errors import InputError, one_line
from dft_lightning.models.blocks import uncompiled
from dft_lightning.models.decoding import Draws, Known, Manner, decode, row_seeds
from dft_lightning.models.row_checks import (
    apart,
    evaluating,
    rotary_length,
    rounding,
    text_config,
    trying,
    vocabulary_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class GenerationOptions:
    """How completions are generated.

    Attributes:
        max_new_tokens: longest completion, in tokens.
        do_sample: sample, rather than take the likeliest token (greedy).
        temperature: of sampling, more than 0.
        top_p: sample from the smallest set of tokens with this probability; 1 is all.
        top_k: sample from the likeliest ``top_k`` tokens; 0 is all.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be more than 0, got {self.temperature}; for greedy set do_sample: false"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")


class Completions:
    """Completes prompts with the tokenizer and the stop tokens of a run.

    Args:
        load_tokenizer: gives the tokenizer beside the model, or ``None``.
        sharding: of the model, where it is sharded.
    """

    def __init__(
        self,
        load_tokenizer: Callable[[], PreTrainedTokenizerBase | None],
        sharding: ShardingOptions = ShardingOptions(),  # noqa: B008 (frozen)
    ) -> None:
        self._load_tokenizer = load_tokenizer
        self._sharding = sharding
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def find_tokenizer(self, datamodule: pl.LightningDataModule | None) -> PreTrainedTokenizerBase | None:
        """The data's tokenizer, or the one beside the model, which is loaded once."""
        of_data: PreTrainedTokenizerBase | None = getattr(datamodule, "tokenizer", None)
        if of_data is None and self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        return of_data if of_data is not None else self._tokenizer

    def tokenizer(self, datamodule: pl.LightningDataModule | None) -> PreTrainedTokenizerBase:
        """As :meth:`find_tokenizer`. Raises ``InputError`` where there is none."""
        if (tokenizer := self.find_tokenizer(datamodule)) is None:
            raise InputError("no tokenizer: a model made from a config has none, set data.text.tokenizer")
        return tokenizer

    def stop_token_ids(self, model: nn.Module | None, datamodule: pl.LightningDataModule | None) -> list[int]:
        """What ends a generated text."""
        return stop_token_ids(model, self.tokenizer(datamodule), getattr(datamodule, "end_of_turn_ids", []))

    def tokens(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        options: GenerationOptions,
        trainer: pl.Trainer | None,
    ) -> Tensor:
        """Completions ``[B, S]`` of prompts ``[B, T]``; see :func:`generate`."""
        datamodule = getattr(trainer, "datamodule", None)
        stops, pad = self.stop_token_ids(model, datamodule), self.tokenizer(datamodule).pad_token_id
        with gathered_root(trainer), gathered_blocks(model, self._sharding, input_ids.device) as whole:
            return generate(
                model,
                input_ids,
                attention_mask,
                options,
                stop_token_ids=stops,
                pad_token_id=int(cast(int, pad)) if pad is not None else (stops[0] if stops else 0),
                ranks_together=shards_parameters(trainer) and not whole,
            )

    def known(
        self, model: nn.Module | None, input_ids: Tensor, max_new_tokens: int, trainer: pl.Trainer | None
    ) -> Known:
        """What a model says to one prompt ``[1, T]``, greedily, and how clear it is."""
        assert model is not None, "call configure_model() first"
        mask, options = torch.ones_like(input_ids), GenerationOptions(max_new_tokens)
        tokens = self.tokens(model, input_ids, mask, options, trainer)
        whole = torch.cat([input_ids, tokens], dim=1)
        with gathered_root(trainer), evaluating(model), uncompiled():
            logits = model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False).logits
        log_probs = logits[0, input_ids.shape[1] - 1 : -1].float().log_softmax(-1)
        two = log_probs.topk(2).values
        own = log_probs.gather(-1, tokens[0].unsqueeze(1)).squeeze(1)
        return Known(tokens[0].tolist(), own.tolist(), (two[:, 0] - two[:, 1]).tolist())

    def texts(self, tokens: Tensor, model: nn.Module | None, datamodule: pl.LightningDataModule | None) -> list[str]:
        """Text of each completion ``[B, S]`` up to, and without, its stop token."""
        return decode_completions(self.tokenizer(datamodule), tokens, self.stop_token_ids(model, datamodule))


def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    options: GenerationOptions,
    *,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    ranks_together: bool = False,
) -> Tensor:
    """Complete a batch of prompts.

    A prompt in several rows, one below the other, runs through the model once. Each row draws by its own numbers; see
    :func:`.drawing_by`.

    Args:
        model: takes ``input_ids``, ``attention_mask`` and ``use_cache``, and returns ``.logits``.
        input_ids: ``[B, T]``, padded on the left.
        attention_mask: ``[B, T]``, 0 at padding.
        options: how to generate.
        stop_token_ids: a completion ends with the first of these.
        pad_token_id: fills up finished completions.
        ranks_together: go on until every rank has finished, as a sharded model must: each forward is a collective.

    Returns:
        ``[B, S]`` new tokens, the stop token included, ``S <= max_new_tokens``.

    Raises:
        InputError: what it generates is not what its logits say, one row at a time or not; or tokens are to be drawn
            by probabilities that are NaN or infinite.
        TypeError: the model is none that generates.
    """
    manner = _manner_of(model, pad_token_id, input_ids.shape[1] + options.max_new_tokens)
    drawn = _draws(options, len(input_ids), input_ids.device)
    stops = torch.tensor(sorted(stop_token_ids), dtype=torch.int64, device=input_ids.device)
    never = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def choose(logits: Tensor, rows: Tensor, place: int) -> tuple[Tensor, Tensor]:
        tokens, broken = (logits.argmax(dim=-1), never[rows]) if drawn is None else drawn(logits, rows, place)
        return tokens, broken | torch.isin(tokens, stops)

    most: Callable[[int], int] = partial(largest_of_ranks, device=input_ids.device) if ranks_together else int

    def completed(ids: Tensor, mask: Tensor, first: int = 0) -> Tensor:
        """Of rows from the ``first`` on."""
        return decode(
            model,
            ids,
            mask,
            lambda logits, rows, place: choose(logits, rows + first, place),
            max_new_tokens=options.max_new_tokens,
            pad_token_id=pad_token_id,
            manner=manner,
            others_go_on=lambda goes_on: bool(most(goes_on)),
        )

    with evaluating(model), uncompiled():
        if manner.together:
            tokens = completed(input_ids, attention_mask)
        else:
            own = len(input_ids)  # where another rank has more rows, this one goes along with its last
            kept = [min(row, own - 1) for row in range(most(own))]
            alone = [(input_ids[row, attention_mask[row].bool()].unsqueeze(0), row) for row in kept]
            rows = [completed(ids, torch.ones_like(ids), row)[0] for ids, row in alone]
            tokens = nn.utils.rnn.pad_sequence(rows[:own], True, float(pad_token_id))
    if drawn is not None and drawn.broken:
        raise InputError(BROKEN)
    return tokens


BROKEN = (
    "the model's probabilities are NaN or infinite: its weights are broken, or trainer.precision is too little for them"
)


def _draws(options: GenerationOptions, rows: int, device: torch.device) -> Draws | None:
    """What draws the tokens; ``None`` for the likeliest."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if not options.do_sample:
        return None
    filters: list[Any] = []  # in transformers' order
    if options.temperature != 1:
        filters.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        filters.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        filters.append(TopPLogitsWarper(options.top_p))

    def filtered(logits: Tensor) -> Tensor:
        return reduce(lambda found, each: each(None, found), filters, logits)

    return Draws(row_seeds(rows), options.max_new_tokens, filtered, device)


_MANNERS: WeakKeyDictionary[nn.Module, Manner] = WeakKeyDictionary()
_LONG, _SHORT, _NEW = 8, 5, 4


def _manner_of(model: nn.Module, pad_token_id: int, tokens: int) -> Manner:
    """Found out once for a model, on a few tokens, before the first prompt.

    A short row beside longer ones that leave the batch, padded on the left as prompts are, has to get the logits that
    the model's forward, which training runs, gives it alone and without a cache. Recurrent states that padding moves,
    positions that count padding, and caches that do not go on as the forward does, fail; then rows are generated one
    at a time, or without a cache. Rotary frequencies that depend on the longest row, as of ``tokens`` there may be,
    move the other rows and all that is in the cache, which few tokens do not show.

    Raises:
        InputError: no manner does.
        TypeError: the model does not even run.
    """
    if (rope := rotary_length(text_config(model))) is not None and tokens > rope[1]:
        _say(model, _ALONE, f"{rope[0]} frequencies change beyond {rope[1]} tokens")
        return _ALONE
    if model in _MANNERS:
        return _MANNERS[model]
    reasons: list[str] = []
    for manner in _TRIED:
        reason = _goes_wrong(model, manner, pad_token_id)
        if not reason:
            break
        reasons.append(reason)
    else:
        if not hasattr(model, "generate"):
            raise TypeError(f"{type(model).__name__} has no generate(); override CausalLMModule.generate for it")
        raise InputError(
            f"model: {type(model).__name__} does not generate what its logits say, not even one row at a time and "
            f"without a cache ({reasons[-1]}): override CausalLMModule.generate, or leave generation out (validate, "
            "fit)"
        )
    if reasons and manner != Manner(masks_on=False):
        _say(model, manner, reasons[0])
    _MANNERS[model] = manner
    return manner


_ALONE = Manner(together=False, use_cache=False)
_TRIED = (
    *(Manner(), Manner(masks_on=False), Manner(together=False, masks_on=False), Manner(together=False)),
    *(Manner(use_cache=False), _ALONE),
)


def _say(model: nn.Module, manner: Manner, reason: str) -> None:
    name = type(model).__name__
    if manner.together:
        said = f"{name} does not go on from a cache, and computes all rows again for each token"
    else:
        said = f"{name} does not keep rows of a padded batch apart, and generates one row at a time"
        said += "" if manner.use_cache else ", without a cache"
    if _SAID.get(model) != said:
        _SAID[model] = said
        rank_zero_info(f"generation: {said} ({reason})")


_SAID: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _goes_wrong(model: nn.Module, manner: Manner, pad_token_id: int) -> str:
    """Why a manner is not one for a model; empty where it is."""
    device = next(model.parameters()).device
    tokens = torch.arange(_LONG + _SHORT, device=device) % vocabulary_of(model, _LONG + _SHORT)
    long, short = tokens[:_LONG], tokens[_LONG:]
    rows, mask = short[None], torch.ones(1, _SHORT, dtype=torch.int64, device=device)
    if manner.together:
        rows = torch.stack([long, torch.cat([short.new_full((_LONG - _SHORT,), pad_token_id), short]), long, long])
        mask = torch.ones_like(rows)
        mask[1, : _LONG - _SHORT] = 0
    place_of_short = int(manner.together)
    seen: list[Tensor] = []

    def choose(logits: Tensor, numbers: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens; the long rows end one after the other."""
        seen.append(logits[numbers == place_of_short])
        return logits.argmax(dim=-1), (numbers != place_of_short) & (numbers <= place + 1)

    try:
        with trying(model):
            made = decode(model, rows, mask, choose, max_new_tokens=_NEW, pad_token_id=pad_token_id, manner=manner)[
                place_of_short
            ]
            whole = torch.cat([short, made])[None, :-1]
            own = model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False).logits[0, -_NEW:]
    except Exception as error:  # whatever a model's own code raises over rows it cannot work with
        return one_line(error)
    found = torch.cat(seen).to(own.dtype)
    moved = apart(found, own)
    if not own.isfinite().all() or moved <= max(1e-3 * own.abs().max().item(), rounding(own, 16)):
        return ""  # a model of nan shows in the loss
    return f"its logits differ by {moved:.3g}"


def stop_token_ids(model: Any, tokenizer: Any, end_of_turn_ids: Sequence[int]) -> list[int]:
    """End of text by the tokenizer and the model's generation config, and end of turn by the template."""
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    candidates: list[Any] = [tokenizer.eos_token_id]
    candidates += of_model if isinstance(of_model, list) else [of_model]
    candidates += end_of_turn_ids
    return sorted({int(token) for token in candidates if token is not None})


def completion_lengths(tokens: Tensor, stop_token_ids: Sequence[int]) -> list[int]:
    """Tokens of each completion ``[B, S]`` up to and with its stop token; ``S`` where it has none."""
    stops = set(stop_token_ids)
    ends = (next((i for i, token in enumerate(row) if token in stops), len(row) - 1) for row in tokens.tolist())
    return [end + 1 for end in ends]


def decode_completions(tokenizer: Any, tokens: Tensor, stop_token_ids: Sequence[int]) -> list[str]:
    """Text of each completion up to, and without, its stop token. ``tokens``: ``[B, S]``."""
    texts = []
    stops = set(stop_token_ids)
    for row in tokens.tolist():
        end = next((i for i, token in enumerate(row) if token in stops), len(row))
        texts.append(tokenizer.decode(row[:end], skip_special_tokens=True))
    return texts
