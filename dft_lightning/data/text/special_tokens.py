"""Special tokens that rows spell are text, not control, but for those that are allowed and those that answers are for.

A row that says ``<|im_end|>`` would otherwise end its turn there. Before the template sees it, a character of a private
area goes into each such word (or before it, where it is a single character); what comes out unmarked is the template's
own. Then the text is encoded by a copy of the tokenizer that knows its special tokens under names no text has: the
template's are written by those names, the row's as they are, and so they are split like any other words.

Some tokenizers flag as special what an assistant itself writes: ``[THINK]``, ``<think>``, ``<tool_call>``. In the
contents of assistant messages these are left as they are: the template finds them, and the model learns the token.
"""

from __future__ import annotations

import dataclasses
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from dft_lightning.data.text.template_reads import sought
from dft_lightning.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

    from dft_lightning.data.rows.forms import Conversation

_MARKS = ("\U000f0000", "\U000f0001", "\U000f0002")
_NAME = "\U0010fff0"
_SHOWN = 20
# [THINK], <|START_THINKING|>, <|begin_of_thought|>, </think>, <reasoning>, <tool_call>, [TOOL_CALLS], <|function_call|>
_OF_ANSWERS = re.compile(r"think|thought|reasoning|(tool|function)[_▁ ]?calls?(?![a-z])", re.IGNORECASE)


def special_tokens(tokenizer: PreTrainedTokenizerBase, turn_end: str | None) -> dict[int, str]:
    """The tokens, by id, that are control: those that the tokenizer flags as special, and what ends a turn."""
    ends = set(tokenizer(turn_end or "", add_special_tokens=False)["input_ids"])
    added = tokenizer.added_tokens_decoder.items()
    return {i: token.content for i, token in added if token.content and (token.special or i in ends)}


class SpecialTokens:
    """The special tokens of a tokenizer, in rows and in templates.

    Args:
        tokenizer: a fast one.
        turn_end: what the template ends turns with: it is control, though the tokenizer may not call it special.
        allowed: whether rows may spell all of them as control, or those that they may.
        asked: what the template makes of a question: the special tokens in it are no words of the assistant's, but for
            those of thoughts and tool calls, which instructions may name.

    Raises:
        InputError: one that is allowed is none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        turn_end: str | None = None,
        allowed: bool | Sequence[str] = False,
        asked: str = "",
    ) -> None:
        self._tokenizer = tokenizer
        texts = set(special_tokens(tokenizer, turn_end).values())
        self.texts = sorted(texts, key=len, reverse=True)
        known = "|".join(map(re.escape, self.texts)) or "(?!)"
        self._pattern = re.compile(known)
        # By the mark in use: a row may have the others as its own text, before a special token of the template's.
        self._unmarked = {mark: re.compile(f"(?<!{mark})(?:{known})|{mark}") for mark in _MARKS}
        names = [] if isinstance(allowed, bool) else allowed
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        unknown = [name for name in names if name not in added]
        if unknown:
            raise InputError(
                f"data.text.allow_special_tokens: the tokenizer has no token {', '.join(map(repr, unknown))}; its "
                f"special tokens are {', '.join(sorted(texts)[:_SHOWN])}{', ...' if len(texts) > _SHOWN else ''}"
            )
        self.allowed = frozenset(texts if allowed is True else names)
        ends_of_turns = set(self._pattern.findall(turn_end or ""))
        self.answers = self.allowed | self._of_answers(tokenizer, ends_of_turns, set(self._pattern.findall(asked)))

    def _of_answers(self, tokenizer: PreTrainedTokenizerBase, ends: set[str], asked: set[str]) -> set[str]:
        """Those that assistants write: of thoughts and tool calls by their name, and what templates look for."""
        named = {text for text in self.texts if _OF_ANSWERS.search(text)}
        templates = tokenizer.chat_template
        sources = templates.values() if isinstance(templates, dict) else [templates or ""]
        looked_for = {text for source in sources for text in sought(source)} & set(self.texts)
        roles = {"bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"}
        control = {str(token) for role, token in tokenizer.special_tokens_map.items() if role in roles}
        return (named | looked_for - asked) - control - ends

    def spelled(self, conversation: Conversation) -> tuple[set[str], set[str]] | None:
        """The special tokens that a conversation spells: as text, and as control. ``None`` where there are none."""
        if not self._spelled(conversation):
            return None
        as_text, as_control = set(), set()
        for allowed, text in self._passages(conversation):
            found = set(self._pattern.findall(text))
            as_text |= found - allowed
            as_control |= found & allowed
        return as_text, as_control

    def _passages(self, conversation: Conversation) -> Iterator[tuple[frozenset[str], str]]:
        """Every text, with the special tokens that are control there."""
        for message in conversation.messages:
            for key, value in message.items():
                allowed = self._allowed(message, key)
                if allowed is not None:
                    yield from ((allowed, text) for text in _strings(value))
        yield from ((self.allowed, text) for text in _strings([conversation.tools, conversation.text]))

    def _allowed(self, message: dict[str, Any], key: str) -> frozenset[str] | None:
        """The special tokens that are control in an item of a message; ``None`` where it is no text."""
        if key == "role":
            return None
        return self.answers if key == "content" and message["role"] == "assistant" else self.allowed

    def mark(self, conversation: Conversation) -> tuple[str, Conversation]:
        """The marking character, and the conversation with the special tokens marked that are text there."""
        everything = "".join(_strings(conversation))
        mark = next((mark for mark in _MARKS if mark not in everything), None)
        if mark is None or _NAME in everything:
            raise InputError(f"special tokens beside the private characters {(*_MARKS, _NAME)}: take either out")

        def marking(allowed: frozenset[str] | None) -> Callable[[str], str]:
            if allowed is None:
                return lambda text: text

            def marked(found: re.Match[str]) -> str:  # within the word, so that it is none; a character has no within
                word = found[0]
                return word if word in allowed else f"{word[0]}{mark}{word[1:]}" if len(word) > 1 else f"{mark}{word}"

            return lambda text: self._pattern.sub(marked, text)

        return mark, dataclasses.replace(
            conversation,
            messages=[
                {key: _map_strings(item, marking(self._allowed(message, key))) for key, item in message.items()}
                for message in conversation.messages
            ],
            tools=_map_strings(conversation.tools, marking(self.allowed)),
            text=_map_strings(conversation.text, marking(self.allowed)),
        )

    def is_control(self, word: str | None) -> bool:
        """Whether a row may spell a word of special tokens as control."""
        return bool(word) and self.allowed.issuperset(self._pattern.findall(word or ""))

    def _spelled(self, conversation: Conversation) -> bool:
        search = self._pattern.search
        if conversation.tools is None and conversation.text is None:  # most rows: flat messages, walked at once
            values = [value for message in conversation.messages for value in message.values()]
            if all(type(value) is str or type(value) is float for value in values):
                return any(type(value) is str and search(value) for value in values)
        return any(search(text) for text in _strings(conversation))

    def check_marks(self, text: str, mark: str) -> None:
        """A template that writes the mark in another way has hidden it."""
        if json.dumps(mark)[1:-1] in text:
            raise InputError("the chat template escapes special tokens that the row spells: take them out of the row")

    def encode(
        self, text: str, borders: list[int], mark: str
    ) -> tuple[list[int], list[tuple[int, int]], str, list[int]]:
        """Token ids of a marked text, their places in the text as it was encoded, that text, and the borders in it.

        Raises:
            InputError: the tokenizer has no other way to write a special token that the row spells.
        """
        places, growth, pieces, done = [0], [0], [], 0
        for found in self._unmarked[mark].finditer(text):
            control = found[0] != mark
            pieces += [text[done : found.start()], f"{_NAME}{found[0]}" if control else ""]
            done = found.end()
            places.append(found.start())  # what lies behind has moved by so much
            growth.append(growth[-1] + (len(_NAME) if control else -len(mark)))
        named = "".join([*pieces, text[done:]])
        moved = [border + growth[max(bisect_left(places, border) - 1, 0)] for border in borders]
        encoding = self._copy.encode(named, add_special_tokens=False)
        return self._original_ids(encoding, named.count(_NAME)), encoding.offsets, named, moved

    def _original_ids(self, encoding: Encoding, controls: int) -> list[int]:
        known = {self._ids[token] for token in self._controls}
        if sum(token in self._controls for token in encoding.ids) != controls:
            raise InputError(
                "the row spells a special token, and this tokenizer changes texts before it looks for those, so that "
                "they cannot be told apart: take it out, or set data.text.allow_special_tokens: true"
            )
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if self._ids.get(token, token) in known and token not in self._controls:
                raise InputError(
                    f"the row spells the special token {self._tokenizer.convert_ids_to_tokens(token)!r}, which this "
                    f"tokenizer cannot write as text (characters {start} to {end}): take it out, or set "
                    "data.text.allow_special_tokens: true to let rows use it"
                )
        return [self._ids.get(token, token) for token in encoding.ids]

    @cached_property
    def _copy(self) -> Tokenizer:
        from tokenizers import Tokenizer

        content = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in content["added_tokens"]:
            if token["content"] in self.texts:
                token["content"] = _NAME + token["content"]
        content |= {"post_processor": None, "truncation": None, "padding": None}
        return Tokenizer.from_str(json.dumps(content))

    @cached_property
    def _controls(self) -> set[int]:
        """Ids in the copy of the special tokens."""
        return {self._id(_NAME + text) for text in self.texts}

    @cached_property
    def _ids(self) -> dict[int, int]:
        """Ids in the tokenizer by those in the copy, of all added tokens: a new name may move those after it."""
        added = [(i, token.content) for i, token in self._tokenizer.added_tokens_decoder.items() if token.content]
        return {self._id(_NAME + text if text in self.texts else text): i for i, text in added}

    def _id(self, text: str) -> int:
        return int(cast(int, self._copy.token_to_id(text)))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_copy", "_controls", "_ids")}


def _strings(value: Any) -> list[str]:
    """Every text in a conversation."""
    if dataclasses.is_dataclass(value):
        value = [getattr(value, name) for name in ("messages", "tools", "text")]
    if isinstance(value, str):
        return [value]
    items = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in _strings(item)]


def _map_strings(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    return [_map_strings(item, change) for item in value] if isinstance(value, list) else value
