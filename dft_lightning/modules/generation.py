"""Generation with exactly the options that were asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; every submodule's own mode is restored, even after an error."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode


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
    with evaluating(model), _own_generation_config(model, config):
        tokens: Tensor = model.generate(  # type: ignore[operator]
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            synced_gpus=ranks_together,
        )
    return tokens[:, input_ids.shape[1] :]


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
