"""Which tokens spans of text have, by the bytes of byte-level tokens: without asking a tokenizer for offsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dft_lightning.data.template import Span

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
        self._normalizes = tokenizer.backend_tokenizer.normalizer is not None

    @staticmethod
    def fits(tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether a tokenizer's tokens are bytes."""
        return type(tokenizer.backend_tokenizer.decoder).__name__ == "ByteLevel"

    def borders(self, ids: np.ndarray[Any, Any], text: str, spans: Sequence[Span]) -> list[Border] | None:
        """First token, one past the last token, and weight of each span.

        ``None`` where the text may have been changed before it was split: its offsets have to be asked for.
        """
        ascii_only = text.isascii()
        ends = self._lengths[ids].cumsum()
        size = len(text) if ascii_only else len(text.encode())
        if (self._normalizes and not ascii_only) or not len(ends) or ends[-1] != size:
            return None
        found = []
        for span in spans:
            start, end = (span.start, span.end)
            if not ascii_only:
                start, end = len(text[:start].encode()), len(text[:end].encode())
            first = int(ends.searchsorted(start, side="right"))
            last = int(ends.searchsorted(end, side="left")) + 1
            found.append((first, last if end > start else first, span.weight))
        return found
