"""Messages to tokens and labels: which tokens are targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dft_lightning.data.messages import Message
from dft_lightning.data.tokenizer import end_of_turn
from dft_lightning.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
Span = tuple[int, int]


class ConversationEncoder:
    """Turns conversations into ``input_ids`` and ``labels`` through the tokenizer's chat template.

    Targets are the tokens of every assistant turn up to and including its end-of-turn token, whatever the padding
    token is; with ``train_on_prompts`` every token is. A token that straddles the border counts as a target. The
    first token of a row is never one: nothing predicts it.

    Args:
        tokenizer: fast, with a chat template.
        max_length: rows longer than this keep their first ``max_length`` tokens.
        train_on_prompts: learn the prompts too.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, train_on_prompts: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.train_on_prompts = train_on_prompts
        turn_end = end_of_turn(tokenizer)
        self._turn_end = turn_end[0] if turn_end else None

    def encode(self, conversations: Sequence[list[Message]]) -> list[dict[str, Any]]:
        """``input_ids``, ``labels`` and whether the row was ``truncated``, for each conversation."""
        return self.encode_rendered([self.render(messages) for messages in conversations])

    def encode_rendered(self, rendered: Sequence[tuple[str, list[Span]]]) -> list[dict[str, Any]]:
        """As :meth:`encode`, from what :meth:`render` returned for each conversation."""
        encoded = self.tokenizer([text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True)
        rows = []
        for (_, spans), ids, offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            labels = list(ids) if self.train_on_prompts else _labels(ids, offsets, spans)
            labels[:1] = [IGNORE_INDEX]
            rows.append(
                {
                    "input_ids": ids[: self.max_length],
                    "labels": labels[: self.max_length],
                    "truncated": self.max_length is not None and len(ids) > self.max_length,
                }
            )
        return rows

    def render(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """Text of a conversation, and the character spans that are learnt.

        Raises:
            InputError: the template does not render a turn as the generation prompt and a continuation, or rewrites
                earlier turns when later ones follow.
        """
        full = self._apply(messages)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prefix = self._apply(messages[:i], add_generation_prompt=True)
            through = self._apply(messages[: i + 1])
            _check_prefix(prefix, through, f"turn {i + 1} does not begin with the generation prompt")
            _check_prefix(through, full, f"turn {i + 1} is rendered otherwise once more turns follow")
            spans.append((len(prefix), self._end(through, len(prefix))))
        return full, spans

    def prompt(self, messages: list[Message]) -> tuple[str, list[int]]:
        """Text and token ids of what generation starts from: all but a final assistant turn."""
        before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        text = self._apply(before, add_generation_prompt=True)
        return text, self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _apply(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise InputError(f"the chat template refuses a conversation of roles {roles}: {error}") from error

    def _end(self, text: str, start: int) -> int:
        """What the template puts after the end-of-turn token (a line break, often) is not learnt."""
        if self._turn_end is None:
            return len(text)
        found = text.rfind(self._turn_end, start)
        return len(text) if found < 0 else found + len(self._turn_end)


def _labels(ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    labels = [IGNORE_INDEX] * len(ids)
    remaining = iter(spans)
    span = next(remaining, None)
    for i, (start, end) in enumerate(offsets):
        while span is not None and start >= span[1]:
            span = next(remaining, None)
        if span is None:
            break
        if end > span[0]:
            labels[i] = ids[i]
    return labels


def _check_prefix(prefix: str, text: str, problem: str) -> None:
    if text.startswith(prefix):
        return
    same = next((i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), min(len(prefix), len(text)))
    raise InputError(
        f"the chat template cannot be masked exactly: {problem}. At character {same} it has "
        f"{prefix[same : same + 40]!r} there and {text[same : same + 40]!r} in the whole; "
        "set data.chat_template to one that keeps earlier turns as they are, or use single-turn rows"
    )
