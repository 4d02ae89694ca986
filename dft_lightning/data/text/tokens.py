"""Conversations to tokens with labels, weights and reference log-probs."""

from __future__ import annotations

import copy
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dft_lightning.data.notes import Notes
from dft_lightning.data.options import TextOptions
from dft_lightning.data.rows.references import LOG_PROB, aligned_reference
from dft_lightning.data.text.byte_level import Border, ByteLevel
from dft_lightning.data.text.span_weights import Span
from dft_lightning.data.text.template import ChatTemplate, Rendered
from dft_lightning.data.text.time_limit import limited
from dft_lightning.errors import InputError
from dft_lightning.losses.base import IGNORE_INDEX

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

    from dft_lightning.data.rows.forms import Conversation


_DEFAULTS = TextOptions()


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
        messages: how many messages of its conversation the row has; ``None`` for all.
    """

    input_ids: np.ndarray[Any, np.dtype[np.int32]]
    labels: np.ndarray[Any, np.dtype[np.int32]]
    weights: np.ndarray[Any, np.dtype[np.float32]] | None
    truncated: bool
    reference_log_prob: np.ndarray[Any, np.dtype[np.float32]] | None = None
    messages: int | None = None

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
        return replace(self, input_ids=self.input_ids[kept], labels=self.labels[kept], weights=weights, truncated=True)

    def part_of(self, conversation: Conversation) -> Conversation:
        """The conversation as far as the row has it."""
        return replace(conversation, messages=conversation.messages[: self.messages])


class ConversationEncoder:
    """Turns conversations into tokens and labels through the tokenizer's chat template.

    Targets are the tokens of every assistant turn up to and including its end-of-turn token, whatever the padding
    token is; with a ``prompt_weight`` those of all others, too. A turn of weight 0 has none. The first token of a row
    is never one: nothing predicts it.

    A token with characters of several weights has the one furthest from 0: one that straddles the border between prompt
    and answer is a target, as what it has of the answer is learnt nowhere else. Not so an added token, which is where
    its own text is, however much white space around it it takes (``lstrip`` and ``rstrip``, such as Phi-3's).

    Args:
        tokenizer: fast, with a chat template.
        options: of the data module.
        piece_length: what longer rows will be cut into pieces of; their reference log-probs must be of such pieces.
        one_row: make one row of each conversation, see :class:`~dft_lightning.data.text.template.ChatTemplate`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: TextOptions = _DEFAULTS,
        piece_length: int | None = None,
        one_row: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.max_length = options.max_length
        self.piece_length = piece_length
        self.one_row = one_row
        self.template = ChatTemplate(tokenizer, options, one_row)
        self._added = frozenset(tokenizer.added_tokens_decoder)
        self._backend = _with_whole_offsets(tokenizer.backend_tokenizer)
        self._byte_level = ByteLevel(tokenizer) if ByteLevel.fits(tokenizer) else None

    def encode(self, conversations: Sequence[Conversation]) -> list[list[EncodedRow] | InputError]:
        """The rows of each conversation, one or more (see ``TextOptions.train_turns``), or what is wrong with it."""
        pairs = zip(self.encode_whole(conversations), conversations, strict=True)
        return [rows if isinstance(rows, InputError) else attempt(self._kept, (rows, pair)) for rows, pair in pairs]

    def _kept(self, pair: tuple[list[EncodedRow], Conversation]) -> list[EncodedRow]:
        """What is left of whole rows, with their reference log-probs."""
        rows, conversation = pair
        log_prob, fingerprint = conversation.reference_log_prob, conversation.reference_fingerprint
        if log_prob is None or fingerprint is None:
            return [row.cut(self.max_length) for row in rows]
        if len(rows) > 1:
            raise InputError(
                f"{LOG_PROB}: of one row, and {len(rows)} are made of the conversation here, one of each turn: set "
                "data.text.train_turns: last, and run score again"
            )
        (row,) = rows
        found = aligned_reference(log_prob, fingerprint, row.input_ids, row.labels, self.max_length, self.piece_length)
        return [replace(row.cut(self.max_length), reference_log_prob=found)]

    def take_notes(self) -> Notes:
        """What has been noted of the rows encoded since the last call."""
        found, self.template.notes = self.template.notes, Notes()
        return found

    def encode_whole(self, conversations: Sequence[Conversation]) -> list[list[EncodedRow] | InputError]:
        """All tokens of each conversation's rows, without reference log-probs, or what is wrong with it."""
        with limited():
            rendered = [attempt(self.template.rows, conversation) for conversation in conversations]
        texts = [row for rows in rendered if isinstance(rows, list) for row in rows]
        encoded = iter(self._encode_plain([row for row in texts if row.mark is None]))
        return [
            rows if isinstance(rows, InputError) else _whole([self._encoded(row, encoded) for row in rows])
            for rows in rendered
        ]

    def _encoded(self, rendered: Rendered, plain: Iterator[EncodedRow]) -> EncodedRow | InputError:
        row = next(plain) if rendered.mark is None else attempt(self._encode_marked, rendered)
        return (
            row
            if rendered.messages is None or isinstance(row, InputError)
            else replace(row, messages=rendered.messages)
        )

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
        ids, *_ = self.template.special_tokens.encode(rendered.text, [], rendered.mark)
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
        places = [(span.start, span.end) for span in rendered.spans]
        found = [(_first_token(encoding, *pair), _last_token(encoding, *pair)) for pair in places]
        return self._bordered(encoding.ids, encoding.offsets, rendered.text, places, found, rendered.spans)

    def _encode_marked(self, rendered: Rendered) -> EncodedRow:
        assert rendered.mark is not None
        borders = [place for span in rendered.spans for place in (span.start, span.end)]
        ids, offsets, text, moved = self.template.special_tokens.encode(rendered.text, borders, rendered.mark)
        places = list(zip(moved[::2], moved[1::2], strict=True))
        starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
        found = [(bisect_right(ends, start), bisect_left(starts, end)) for start, end in places]
        return self._bordered(ids, offsets, text, places, found, rendered.spans)

    def _bordered(
        self,
        ids: list[int],
        offsets: list[tuple[int, int]],
        text: str,
        places: list[tuple[int, int]],
        found: list[tuple[int, int]],
        spans: list[Span],
    ) -> EncodedRow:
        """With the tokens of each place in the text, but for added ones of which it has the white space alone."""
        borders = []
        for (start, end), (first, last), span in zip(places, found, spans, strict=True):
            if first < last and ids[first] in self._added:
                begin, stop = offsets[first]
                first += begin < start and begin + len(text[begin:stop].rstrip()) <= start
            if first < last and ids[last - 1] in self._added:
                begin, stop = offsets[last - 1]
                last -= stop > end and stop - len(text[begin:stop].lstrip()) >= end
            borders.append((first, last, span.weight))
        return self._labelled(np.array(ids, np.int32), borders)

    def _labelled(self, input_ids: np.ndarray[Any, Any], borders: Sequence[Border]) -> EncodedRow:
        """Tokens ``start`` to ``end`` of each border are learnt with its weight; of several, that furthest from 0."""
        labels = np.full_like(input_ids, IGNORE_INDEX)
        if all(weight == 1 for _, _, weight in borders):
            for start, end, _ in borders:
                labels[start:end] = input_ids[start:end]
            labels[:1] = IGNORE_INDEX
            return EncodedRow(input_ids, labels, None, truncated=False)
        weights = np.zeros(len(input_ids), np.float32)
        for start, end, weight in borders:
            inside = weights[start:end]
            inside[np.abs(inside) < abs(weight)] = weight
        weights[:1] = 0
        labels[weights != 0] = input_ids[weights != 0]
        return EncodedRow(input_ids, labels, weights, truncated=False)


def _whole(rows: list[EncodedRow | InputError]) -> list[EncodedRow] | InputError:
    """Rows of a conversation, or the first thing that is wrong with one."""
    good = [row for row in rows if not isinstance(row, InputError)]
    return good if len(good) == len(rows) else next(row for row in rows if isinstance(row, InputError))


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
