"""Which tokens spans of text have, by the bytes of byte-level tokens: without asking a tokenizer for offsets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from unicodedata import is_normalized

import numpy as np
from tokenizers.normalizers import NFC

from dft_lightning.data.text.span_weights import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Border = tuple[int, int, float]


class ByteLevel:
    """Where spans lie among the tokens of a tokenizer whose tokens are bytes, in vocabulary order of GPT-2's alphabet.

    The bytes of the tokens, one after the other, are those of the text; that is checked for each text. Offsets cost
    the tokenizer a fifth of its time.

    Args:
        tokenizer: one whose decoder is ``ByteLevel``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        vocabulary = tokenizer.get_vocab()
        self._lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
        for token, index in vocabulary.items():
            self._lengths[index] = len(token)  # a character of the alphabet stands for a byte
        for index, added in tokenizer.added_tokens_decoder.items():
            self._lengths[index] = len(added.content.encode())
        self._normalizer = tokenizer.backend_tokenizer.normalizer

    @staticmethod
    def fits(tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether a tokenizer's tokens are bytes, and none are put in.

        A space before a word may make up for one that an added token takes: all between them would be displaced.
        """
        backend = tokenizer.backend_tokenizer
        puts_in = backend.pre_tokenizer and re.search(
            rb'"add_prefix_space": *true', backend.pre_tokenizer.__getstate__()
        )
        return type(backend.decoder).__name__ == "ByteLevel" and not puts_in

    def borders(self, ids: np.ndarray[Any, Any], text: str, spans: Sequence[Span]) -> list[Border] | None:
        """First token, one past the last token, and weight of each span; these are in order and apart.

        ``None`` where the text was changed before it was split: its offsets have to be asked for.
        """
        ascii_only = text.isascii()
        ends = self._lengths[ids].cumsum()
        size = len(text) if ascii_only else len(text.encode())
        if not len(ends) or ends[-1] != size or not (ascii_only or self._is_normal(text)):
            return None
        places = [place for span in spans for place in (span.start, span.end)]
        if not ascii_only:
            pieces = zip([0, *places], places, strict=False)
            places = list(accumulate(len(text[start:end].encode()) for start, end in pieces))
        found = []
        for span, start, end in zip(spans, places[::2], places[1::2], strict=True):
            first = int(ends.searchsorted(start, side="right"))
            last = int(ends.searchsorted(end, side="left")) + 1
            found.append((first, last if end > start else first, span.weight))
        return found

    def _is_normal(self, text: str) -> bool:
        """Whether normalizing leaves a text as it is. Python tells that of Qwen's NFC in a hundredth of the time; where
        its Unicode is older, and a sign it does not know is composed, the lengths differ."""
        if isinstance(self._normalizer, NFC):
            return is_normalized("NFC", text)
        return self._normalizer is None or self._normalizer.normalize_str(text) == text
