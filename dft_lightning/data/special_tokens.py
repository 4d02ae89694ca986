"""Special tokens that rows spell are text, not control.

A row that says ``<|im_end|>`` would otherwise end its turn there. Before the template sees it, a character of a private
area goes into each such word (or before it, where it is a single character); what comes out unmarked is the template's
own. Then the text is encoded by a copy of the tokenizer that knows its special tokens under names no text has: the
template's are written by those names, the row's as they are, and so they are split like any other words.
"""

from __future__ import annotations

import dataclasses
import json
import re
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from dft_lightning.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

    from dft_lightning.data.forms import Conversation

_MARKS = ("\U000f0000", "\U000f0001", "\U000f0002")
_NAME = "\U0010fff0"


class SpecialTokens:
    """The special tokens of a tokenizer, in rows and in templates.

    Args:
        tokenizer: a fast one.
        turn_end: what the template ends turns with: it is control, though the tokenizer may not call it special.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turn_end: str | None = None) -> None:
        self._tokenizer = tokenizer
        ends = set(tokenizer(turn_end or "", add_special_tokens=False)["input_ids"])
        added = tokenizer.added_tokens_decoder.items()
        texts = {token.content for i, token in added if token.content and (token.special or i in ends)}
        self.texts = sorted(texts, key=len, reverse=True)
        known = "|".join(map(re.escape, self.texts)) or "(?!)"
        self._pattern = re.compile(known)
        # By the mark in use: a row may have the others as its own text, before a special token of the template's.
        self._unmarked = {mark: re.compile(f"(?<!{mark})(?:{known})") for mark in _MARKS}

    def mark(self, conversation: Conversation) -> tuple[str | None, Conversation]:
        """The conversation with its special tokens marked, and the marking character; ``None`` if it has none."""
        if not self._spelled(conversation):
            return None, conversation
        everything = "".join(_strings(conversation))
        mark = next((mark for mark in _MARKS if mark not in everything), None)
        if mark is None or _NAME in everything:
            raise InputError(f"special tokens beside the private characters {(*_MARKS, _NAME)}: take either out")

        def marked(text: str) -> str:  # within the word, so that it is none; a single character has no within
            return self._pattern.sub(
                lambda found: f"{found[0][0]}{mark}{found[0][1:]}" if len(found[0]) > 1 else f"{mark}{found[0]}", text
            )

        return mark, dataclasses.replace(
            conversation,
            messages=[
                {key: item if key == "role" else _map_strings(item, marked) for key, item in message.items()}
                for message in conversation.messages
            ],
            tools=_map_strings(conversation.tools, marked),
            text=_map_strings(conversation.text, marked),
        )

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

    def encode(self, text: str, borders: list[int], mark: str) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        """Token ids of a marked text, their places, and the borders, in the text that has no marks.

        Raises:
            InputError: the tokenizer has no other way to write a special token that the row spells.
        """
        pieces, moved = [], []
        for start, end in zip([0, *borders], [*borders, len(text)], strict=True):
            pieces.append(self._named(text[start:end], mark))
            moved.append(sum(map(len, pieces)))
        encoding = self._copy.encode("".join(pieces), add_special_tokens=False)
        return self._original_ids(encoding, "".join(pieces).count(_NAME)), encoding.offsets, moved[:-1]

    def _named(self, text: str, mark: str) -> str:
        return self._unmarked[mark].sub(lambda found: f"{_NAME}{found[0]}", text).replace(mark, "")

    def _original_ids(self, encoding: Encoding, controls: int) -> list[int]:
        known = {self._ids[token] for token in self._controls}
        if sum(token in self._controls for token in encoding.ids) != controls:
            raise InputError(
                "the row spells a special token, and this tokenizer changes texts before it looks for those, so that "
                "they cannot be told apart: take it out, or set data.allow_special_tokens: true"
            )
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if self._ids.get(token, token) in known and token not in self._controls:
                raise InputError(
                    f"the row spells the special token {self._tokenizer.convert_ids_to_tokens(token)!r}, which this "
                    f"tokenizer cannot write as text (characters {start} to {end}): take it out, or set "
                    "data.allow_special_tokens: true to let rows use it"
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
