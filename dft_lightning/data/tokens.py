"""Conversations to tokens with labels, weights and reference log-probs."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dft_lightning.data.byte_level import Border, ByteLevel
from dft_lightning.data.references import aligned_reference
from dft_lightning.data.template import ChatTemplate, Rendered, TrainTurns
from dft_lightning.errors import InputError
from dft_lightning.losses.base import IGNORE_INDEX

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

    from dft_lightning.data.forms import Conversation


@dataclass(frozen=True)
class EncodedRow:
    """Tokens of a row.

    Attributes:
        input_ids: ``[T]``, int32.
        labels: ``[T]``, int32: the token itself where it is learnt, -100 elsewhere.
        weights: ``[T]``, float32, of the learnt tokens (0 elsewhere); ``None`` where all are 1.
        truncated: whether tokens were cut off.
        reference_log_prob: ``[T]``, float32, of the targets under a reference model (0 elsewhere); ``None`` where the
            row has none.
    """

    input_ids: np.ndarray[Any, np.dtype[np.int32]]
    labels: np.ndarray[Any, np.dtype[np.int32]]
    weights: np.ndarray[Any, np.dtype[np.float32]] | None
    truncated: bool
    reference_log_prob: np.ndarray[Any, np.dtype[np.float32]] | None = None

    @property
    def has_target(self) -> bool:
        """Whether any token is learnt."""
        return bool((self.labels != IGNORE_INDEX).any())

    def cut(self, max_length: int | None) -> EncodedRow:
        """The first ``max_length`` tokens of a whole row; ``None`` for all."""
        if max_length is None or len(self.input_ids) <= max_length:
            return self
        kept = slice(0, max_length)
        weights = None if self.weights is None else self.weights[kept]
        return EncodedRow(self.input_ids[kept], self.labels[kept], weights, truncated=True)


class ConversationEncoder:
    """Turns conversations into tokens and labels through the tokenizer's chat template.

    Targets are the tokens of every assistant turn up to and including its end-of-turn token, whatever the padding
    token is; with ``train_on_prompts`` every token is. A turn of weight 0 has none. A token that straddles the border
    counts as a target. The first token of a row is never one: nothing predicts it.

    Args:
        tokenizer: fast, with a chat template.
        max_length: rows longer than this keep their first ``max_length`` tokens.
        train_on_prompts: learn the prompts too, with weight 1.
        train_turns: learn ``"all"`` assistant turns or the ``"last"`` alone.
        template_kwargs: further variables of the chat template.
        allow_special_tokens: let rows spell special tokens as control, not as text.
        piece_length: what longer rows will be cut into pieces of; their reference log-probs must be of such pieces.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        train_on_prompts: bool = False,
        train_turns: TrainTurns = "all",
        template_kwargs: dict[str, Any] | None = None,
        allow_special_tokens: bool = False,
        piece_length: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.piece_length = piece_length
        self.train_on_prompts = train_on_prompts
        self.template = ChatTemplate(tokenizer, train_turns, template_kwargs, allow_special_tokens)
        self._backend = _with_whole_offsets(tokenizer.backend_tokenizer)
        self._byte_level = ByteLevel(tokenizer) if ByteLevel.fits(tokenizer) else None

    @property
    def options(self) -> list[Any]:
        """All that tokens depend on beside the tokenizer and the rows."""
        template = self.template
        return [
            self.max_length,
            self.piece_length,
            self.train_on_prompts,
            template.train_turns,
            template.template_kwargs,
            template.allow_special_tokens,
        ]

    def encode(self, conversations: Sequence[Conversation]) -> list[EncodedRow | InputError]:
        """The tokens of each conversation, or what is wrong with it."""
        pairs = zip(self.encode_whole(conversations), conversations, strict=True)
        return [row if isinstance(row, InputError) else self._kept(row, conversation) for row, conversation in pairs]

    def _kept(self, row: EncodedRow, conversation: Conversation) -> EncodedRow | InputError:
        """What is left of a whole row, with its reference log-probs."""
        log_prob, fingerprint = conversation.reference_log_prob, conversation.reference_fingerprint
        kept = row.cut(self.max_length)
        if log_prob is None or fingerprint is None:
            return kept
        try:
            found = aligned_reference(
                log_prob, fingerprint, row.input_ids, row.labels, self.max_length, self.piece_length
            )
        except InputError as error:
            return error
        return replace(kept, reference_log_prob=found)

    def encode_whole(self, conversations: Sequence[Conversation]) -> list[EncodedRow | InputError]:
        """All tokens of each conversation, without its reference log-probs, or what is wrong with it."""
        rendered = [attempt(self.template.render, conversation) for conversation in conversations]
        plain = [found for found in rendered if isinstance(found, Rendered) and found.mark is None]
        encoded = iter(self._encode_plain(plain))
        rows: list[EncodedRow | InputError] = []
        for found in rendered:
            if isinstance(found, InputError):
                rows.append(found)
            else:
                rows.append(next(encoded) if found.mark is None else attempt(self._encode_marked, found))
        return rows

    def _encode_plain(self, rendered: list[Rendered]) -> list[EncodedRow]:
        """Rows that spell no special tokens."""
        if self._byte_level is None:
            encodings = self._encode_all([found.text for found in rendered])
            return [self._row(*pair) for pair in zip(encodings, rendered, strict=True)]
        rows = []
        fast = self._ready_backend().encode_batch_fast([found.text for found in rendered], add_special_tokens=False)
        for encoding, found in zip(fast, rendered, strict=True):
            ids = np.array(encoding.ids, np.int32)
            borders = self._byte_level.borders(ids, found.text, found.spans)
            if borders is None:
                rows.append(self._row(self._encode_all([found.text])[0], found))
            else:
                rows.append(self._labelled(ids, borders))
        return rows

    def prompt(self, conversation: Conversation) -> tuple[str, list[int]]:
        """Text and token ids of what generation starts from: all but a final assistant turn.

        Raises:
            InputError: the template refuses the conversation.
        """
        rendered = self.template.prompt(conversation)
        if rendered.mark is None:
            return rendered.text, self._encode_all([rendered.text])[0].ids if rendered.text else []
        ids, _, _ = self.template.special_tokens.encode(rendered.text, [], rendered.mark)
        return rendered.text.replace(rendered.mark, ""), ids

    def _encode_all(self, texts: list[str]) -> list[Encoding]:
        return list(self._ready_backend().encode_batch(texts, add_special_tokens=False))

    def _ready_backend(self) -> Tokenizer:
        backend = self._backend
        if backend.truncation is not None or backend.padding is not None:  # left over from a call of the tokenizer
            backend.no_truncation()
            backend.no_padding()
        return backend

    def _row(self, encoding: Encoding, rendered: Rendered) -> EncodedRow:
        borders = [
            (
                _first_token(encoding, span.start, span.end),
                _last_token(encoding, span.start, span.end),
                span.weight,
            )
            for span in rendered.spans
        ]
        return self._labelled(np.array(encoding.ids, np.int32), borders)

    def _encode_marked(self, rendered: Rendered) -> EncodedRow:
        assert rendered.mark is not None
        places = [place for span in rendered.spans for place in (span.start, span.end)]
        ids, offsets, moved = self.template.special_tokens.encode(rendered.text, places, rendered.mark)
        borders = []
        for span, start, end in zip(rendered.spans, moved[::2], moved[1::2], strict=True):
            inside = [i for i, (a, b) in enumerate(offsets) if b > start and a < end]
            borders.append((inside[0], inside[-1] + 1, span.weight) if inside else (0, 0, span.weight))
        return self._labelled(np.array(ids, np.int32), borders)

    def _labelled(self, input_ids: np.ndarray[Any, Any], borders: Sequence[Border]) -> EncodedRow:
        """Tokens ``start`` to ``end`` of each border are learnt with its weight."""
        labels = input_ids.copy() if self.train_on_prompts else np.full_like(input_ids, IGNORE_INDEX)
        for start, end, _ in borders:
            labels[start:end] = input_ids[start:end]
        labels[:1] = IGNORE_INDEX
        weights = None
        if any(weight != 1 for _, _, weight in borders):
            weights = (labels != IGNORE_INDEX).astype(np.float32)
            for start, end, weight in borders:
                weights[max(start, 1) : end] = weight
        return EncodedRow(input_ids, labels, weights, truncated=False)


def attempt(function: Any, argument: Any) -> Any:
    """What a function returns, or the :class:`InputError` that it raises."""
    try:
        return function(argument)
    except InputError as error:
        return error


def _with_whole_offsets(backend: Tokenizer) -> Tokenizer:
    """A tokenizer whose tokens own their white space, or a turn that begins with some would not be learnt whole."""
    processor = backend.post_processor
    if processor is None or not re.search(rb'"trim_offsets": *true', processor.__getstate__()):
        return backend
    backend = copy.deepcopy(backend)
    backend.post_processor = None  # which is otherwise for texts that special tokens are put around
    return backend


def _first_token(encoding: Encoding, start: int, end: int) -> int:
    """The first token of characters ``start`` to ``end``; the number of tokens where they have none."""
    for place in range(start, end):  # characters that a tokenizer drops have no token
        token = encoding.char_to_token(place)
        if token is not None:
            return int(token)
    return len(encoding)


def _last_token(encoding: Encoding, start: int, end: int) -> int:
    """One past the last token of characters ``start`` to ``end``; 0 where they have none."""
    for place in range(end - 1, start - 1, -1):
        token = encoding.char_to_token(place)
        if token is not None:
            token = int(token)
            # Several tokens may make one character.
            while token + 1 < len(encoding) and (encoding.token_to_chars(token + 1) or (end, end))[0] < end:
                token += 1
            return token + 1
    return 0
