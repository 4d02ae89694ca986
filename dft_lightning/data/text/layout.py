"""Where a template puts the contents of messages, which a rendering tells for others of the same roles."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dft_lightning.data.rows.turns import Message
from dft_lightning.data.text.rendering import weight_of
from dft_lightning.data.text.span_weights import Span
from dft_lightning.errors import InputError

Masked = tuple[str, list[Span]]


class Layouts:
    """Texts and spans of conversations of roles and contents alone, by the layout of their roles.

    A template that only copies contents has the layout's text, whatever they are. Of others the text is rendered and
    must be the layout's. What it was made from (generation prompts, the conversation up to each turn) is rendered for a
    sample of the first rows, and for all that templates treat otherwise: with white space around a content, without
    any, or with a word that the template looks for.

    Args:
        masked: text and spans of messages, by the template.
        text: text of messages, by the template; ``None`` where it only copies contents.
        words: that the template looks for.
    """

    def __init__(
        self,
        masked: Callable[[list[Message]], Masked],
        text: Callable[[list[Message]], str] | None = None,
        words: Iterable[str] = (),
    ) -> None:
        self._masked = masked
        self._text = text
        self._words = re.compile("|".join(re.escape(word) for word in words if word) or "(?!)")
        self._layouts: dict[tuple[str, ...], _Layout | None] = {}
        self._tried: Counter[tuple[str, ...]] = Counter()

    def fill(self, messages: list[Message]) -> Masked | None:
        """What the template makes of them; ``None`` where a layout does not say."""
        if any(len(message) > 2 and not message.keys() <= _LAID_OUT for message in messages):
            return None
        roles = tuple(
            message["role"] if message.get("weight") != 0 else f"{message['role']} left out" for message in messages
        )
        if roles not in self._layouts:
            self._layouts[roles] = _Layout.find(messages, self._masked)
        layout = self._layouts[roles]
        if layout is None:
            return None
        if self._text is None:
            return layout.fill(messages)
        if not self._usual(messages):
            return None
        filled = layout.fill(messages)
        if self._tried[roles] < _SAMPLE:
            self._tried[roles] += 1
            found = self._masked(messages)
            if found != filled:
                self._layouts[roles] = None
            return found
        return filled if filled[0] == self._text(messages) else None

    def _usual(self, messages: list[Message]) -> bool:
        contents = [message["content"] for message in messages]
        return all(
            content and not (content[0].isspace() or content[-1].isspace() or self._words.search(content))
            for content in contents
        )


@dataclass(frozen=True)
class _Layout:
    """Where a template puts the contents of messages of certain roles.

    Attributes:
        pieces: text and, in between, the messages' positions.
        spans: as position in ``pieces`` and characters into it, start and end of each learnt passage.
        learnt: positions of the messages that are learnt.
    """

    pieces: list[str | int]
    spans: list[tuple[tuple[int, int], tuple[int, int]]]
    learnt: list[int]

    @classmethod
    def find(cls, messages: Sequence[Message], render: Callable[[list[Message]], Masked]) -> _Layout | None:
        """From contents that stand for others; ``None`` where they are not in the text once and in order."""
        probe = [{**message, "content": f"{_PROBE}{i}{_PROBE}"} for i, message in enumerate(messages)]
        try:
            text, spans = render(probe)
        except InputError:
            return None  # for the real contents to say
        parts = re.split(f"{_PROBE}([0-9]+){_PROBE}", text)
        if [int(i) for i in parts[1::2]] != list(range(len(messages))):
            return None
        pieces: list[str | int] = [int(part) if i % 2 else part for i, part in enumerate(parts)]
        starts = [0]
        for i, part in enumerate(parts):
            starts.append(starts[-1] + len(part) + (2 * len(_PROBE) if i % 2 else 0))

        def locate(place: int) -> tuple[int, int]:
            piece = max(i for i, start in enumerate(starts[:-1]) if start <= place)
            return piece, place - starts[piece]

        located = [(locate(span.start), locate(span.end)) for span in spans]
        if any(isinstance(pieces[piece], int) and offset for pair in located for piece, offset in pair):
            return None  # a border within a content
        learnt = [i for i, message in enumerate(messages) if weight_of(message)]
        return cls(pieces, located, learnt) if len(learnt) == len(spans) else None

    def fill(self, messages: Sequence[Message]) -> Masked:
        """The text with the messages' own contents, and its spans."""
        texts = [piece if isinstance(piece, str) else messages[piece]["content"] for piece in self.pieces]
        starts = [0]
        for text in texts:
            starts.append(starts[-1] + len(text))
        spans = [
            Span(starts[first] + a, starts[last] + b, weight_of(messages[i]))
            for ((first, a), (last, b)), i in zip(self.spans, self.learnt, strict=True)
        ]
        return "".join(texts), spans


_LAID_OUT = {"role", "content", "weight"}
_SAMPLE = 50
_PROBE = "\uf8f0"  # of a private area, which templates have no opinion on
