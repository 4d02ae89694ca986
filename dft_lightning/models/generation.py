"""Generation with exactly the options that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from dft_lightning.distributed.strategies import gathered_root, shards_parameters
from dft_lightning.errors import InputError, one_line
from dft_lightning.models.blocks import uncompiled
from dft_lightning.models.row_checks import apart, evaluating, rounding, trying, vocabulary_of

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


@contextmanager
def _own_generation_config(model: Any, config: Any) -> Iterator[None]:
    """What the caller leaves unset, ``generate`` fills in from the model (a checkpoint's temperature or repetition
    penalty). Swapping the model's config for ours means the options asked for are the ones that run."""
    saved = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = saved


class Completions:
    """Completes prompts with the tokenizer and the stop tokens of a run.

    Args:
        load_tokenizer: gives the tokenizer beside the model, or ``None``.
    """

    def __init__(self, load_tokenizer: Callable[[], PreTrainedTokenizerBase | None]) -> None:
        self._load_tokenizer = load_tokenizer
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
        with gathered_root(trainer):
            return generate(
                model,
                input_ids,
                attention_mask,
                options,
                stop_token_ids=stops,
                pad_token_id=int(cast(int, pad)) if pad is not None else (stops[0] if stops else 0),
                ranks_together=shards_parameters(trainer),
            )

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

    Args:
        model: a transformers model with ``generate``.
        input_ids: ``[B, T]``, padded on the left.
        attention_mask: ``[B, T]``, 0 at padding.
        options: how to generate.
        stop_token_ids: a completion ends with the first of these.
        pad_token_id: fills up finished completions.
        ranks_together: go on until every rank has finished, as a sharded model must: each forward is a collective.

    Returns:
        ``[B, S]`` new tokens, the stop token included, ``S <= max_new_tokens``.

    Raises:
        InputError: what it generates is not what its logits say, one row at a time or not.
        TypeError: the model has no ``generate``.
    """
    from transformers import GenerationConfig

    if not hasattr(model, "generate"):
        raise TypeError(f"{type(model).__name__} has no generate(); override CausalLMModule.generate for it")
    sampling = {"temperature": options.temperature, "top_p": options.top_p} if options.do_sample else {}
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=options.max_new_tokens,
        do_sample=options.do_sample,
        top_k=options.top_k if options.do_sample else None,
        eos_token_id=list(stop_token_ids),
        pad_token_id=pad_token_id,
        **sampling,
    )
    manner = _manner_of(model, pad_token_id, ranks_together)
    config.use_cache = manner.use_cache
    with evaluating(model), uncompiled():
        if manner.together:
            return _generated(model, input_ids, attention_mask, config, synced_gpus=ranks_together).sequences
        rows = [
            _generated(model, ids[kept.bool()][None], kept[kept.bool()][None], config, synced_gpus=ranks_together)
            for ids, kept in zip(input_ids, attention_mask, strict=True)
        ]
    return nn.utils.rnn.pad_sequence([row.sequences[0] for row in rows], True, float(pad_token_id))


@dataclass(frozen=True)
class _Manner:
    """How a model has to generate, so that each row's completion is what its own logits say."""

    together: bool = True
    use_cache: bool = True


_MANNERS: WeakKeyDictionary[nn.Module, _Manner] = WeakKeyDictionary()
_LONG, _SHORT, _NEW = 8, 5, 3


def _manner_of(model: nn.Module, pad_token_id: int, ranks_together: bool) -> _Manner:
    """Found out once for a model, on a few tokens, before the first prompt.

    A short row beside a longer one, padded on the left as prompts are, has to get the logits that the model's forward,
    which training runs, gives it alone and without a cache. Recurrent states that padding moves, positions that count
    padding, and caches that do not go on as the forward does, fail; then rows are generated one at a time, and at last
    without a cache.

    Raises:
        InputError: no manner does.
    """
    if model in _MANNERS:
        return _MANNERS[model]
    reason = ""
    for manner in (_Manner(), _Manner(together=False), _Manner(together=False, use_cache=False)):
        reason = _goes_wrong(model, manner, pad_token_id, ranks_together)
        if not reason:
            break
    else:
        raise InputError(
            f"model: {type(model).__name__} does not generate what its logits say, not even one row at a time and "
            f"without a cache ({reason}): override CausalLMModule.generate, or leave generation out (validate, fit)"
        )
    if not manner.together:
        rank_zero_info(
            f"generation: {type(model).__name__} does not keep rows of a padded batch apart, and generates one row "
            "at a time" + ("" if manner.use_cache else ", without a cache")
        )
    _MANNERS[model] = manner
    return manner


def _goes_wrong(model: nn.Module, manner: _Manner, pad_token_id: int, ranks_together: bool) -> str:
    """Why a manner is not one for a model; empty where it is."""
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    tokens = torch.arange(_LONG + _SHORT, device=device) % vocabulary_of(model, _LONG + _SHORT)
    long, short = tokens[:_LONG], tokens[_LONG:]
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=_NEW,
        do_sample=False,
        eos_token_id=[],
        pad_token_id=pad_token_id,
        use_cache=manner.use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    rows, mask = short[None], torch.ones(1, _SHORT, dtype=torch.int64, device=device)
    if manner.together:
        rows = torch.stack([torch.cat([short.new_full((_LONG - _SHORT,), pad_token_id), short]), long])
        mask = torch.ones_like(rows)
        mask[0, : _LONG - _SHORT] = 0
    try:
        with trying(model):
            made = _generated(model, rows, mask, config, synced_gpus=ranks_together)
            whole = torch.cat([short, made.sequences[0]])[None, :-1]
            own = model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False).logits[0, -_NEW:]
    except Exception as error:  # whatever a model's own code raises over rows it cannot work with
        return one_line(error)
    found = torch.stack([step[0] for step in made.logits]).to(own.dtype)
    moved = apart(found, own)
    if not own.isfinite().all() or moved <= max(1e-3 * own.abs().max().item(), rounding(own, 16)):
        return ""  # a model of nan shows in the loss
    return f"its logits differ by {moved:.3g}"


@dataclass
class _Generated:
    sequences: Tensor
    logits: Sequence[Tensor]


def _generated(model: Any, input_ids: Tensor, attention_mask: Tensor, config: Any, *, synced_gpus: bool) -> _Generated:
    """New tokens ``[B, S]``, and the logits of each step where ``config`` asks for them."""
    with _own_generation_config(model, config):
        made: Any = model.generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=config, synced_gpus=synced_gpus
        )
    sequences: Tensor = made if isinstance(made, Tensor) else made.sequences
    return _Generated(sequences[:, input_ids.shape[1] :], () if isinstance(made, Tensor) else made.logits)


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
