"""What a server answers, read and checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dft_lightning.engine.api import HalfAnswerError, RefusedError
from dft_lightning.errors import InputError

if TYPE_CHECKING:
    from openai.types import Completion, CompletionChoice
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: without the token that ends the turn.
        log_prob: sum over its tokens, the one that ends the turn included, in nats; ``None`` where the server does not
            give it.
        num_tokens: how many these are.
        finished: whether it has one that ends the turn.
    """

    text: str
    log_prob: float | None
    num_tokens: int
    finished: bool


@dataclass(frozen=True)
class Said:
    """An answer and what the server said of its tokens.

    Attributes:
        answer: the answer.
        tokens: each token's text, where log-probs are given.
        log_probs: each token's.
        likeliest: log-probs of the likeliest first tokens, by their text.
    """

    answer: Answer
    tokens: list[str]
    log_probs: list[float]
    likeliest: dict[str, float]


class Reader:
    """Reads answers.

    Args:
        tokenizer: of the model.
        stop_token_ids: a completion ends with the first of these.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        # Some servers leave the text of a token that ends a turn in, where it is no special one.
        visible = {str(tokenizer.decode([token], skip_special_tokens=True)) for token in stop_token_ids}
        self._visible = sorted(visible - {""}, key=len, reverse=True)
        # As log-probs name it; some show nothing for a special one.
        self._ends = {str(tokenizer.decode([token])) for token in stop_token_ids} | {""}

    def read(self, completion: Completion, n: int) -> list[Said]:
        """The ``n`` answers of a completion.

        Raises:
            HalfAnswerError: something is missing.
            RefusedError: there are more answers, or fewer.
        """
        choices: Any = getattr(completion, "choices", None)
        if not isinstance(choices, list) or not choices:
            raise HalfAnswerError("an answer without choices")
        if len(choices) != n:
            raise RefusedError(f"the server gives {len(choices)} samples where {n} were asked for")
        usage = completion.usage
        counted = usage.completion_tokens if usage is not None and n == 1 else None
        in_order = sorted(choices, key=lambda choice: getattr(choice, "index", None) or 0)
        return [self._said(choice, counted) for choice in in_order]

    def _said(self, choice: CompletionChoice, counted: int | None) -> Said:
        text: Any = getattr(choice, "text", None)
        reason: Any = getattr(choice, "finish_reason", None)
        if not isinstance(text, str) or reason not in ("stop", "length"):
            raise HalfAnswerError(f"an answer that ends without a reason ({reason})")
        finished = reason == "stop"
        tokens, log_probs, likeliest = _token_values(choice)
        if finished:
            text = next((text.removesuffix(end) for end in self._visible if text.endswith(end)), text)
        whole = bool(tokens) and not (finished and tokens[-1] not in self._ends)
        if not all(map(math.isfinite, log_probs)):
            raise InputError("the server's log-probs are NaN or infinite: the model's weights are broken there")
        num_tokens = len(tokens) if whole else counted
        if num_tokens is None:
            num_tokens = len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) + finished
        answer = Answer(text, math.fsum(log_probs) if whole else None, num_tokens, finished)
        return Said(answer, tokens, log_probs, likeliest)


def _token_values(choice: CompletionChoice) -> tuple[list[str], list[float], dict[str, float]]:
    """Tokens, their log-probs and the likeliest first ones; nothing where the server does not give them all."""
    found: Any = choice.logprobs
    content = getattr(found, "content", None)
    if content:  # llama.cpp gives the chat interface's form
        tokens, log_probs = [str(each["token"]) for each in content], [each["logprob"] for each in content]
        first = {each["token"]: each["logprob"] for each in content[0].get("top_logprobs", ())}
    else:
        tokens, log_probs = (list(getattr(found, name, None) or ()) for name in ("tokens", "token_logprobs"))
        first = next(iter(getattr(found, "top_logprobs", None) or ()), {}) or {}
    if len(tokens) != len(log_probs) or any(value is None for value in log_probs):
        return [], [], {}
    return tokens, [float(value) for value in log_probs], dict(first)


def prompt_tokens(completion: Completion) -> int | None:
    """How many tokens the server made of the prompt, as far as it says so."""
    return completion.usage.prompt_tokens if completion.usage is not None else None
