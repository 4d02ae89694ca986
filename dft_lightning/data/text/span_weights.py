"""What is learnt of a text, and weights of parts of it by regular expressions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Weights = Sequence[tuple[re.Pattern[str], float]]


@dataclass(frozen=True)
class Span:
    """Characters ``start`` to ``end`` of a text, learnt with a weight."""

    start: int
    end: int
    weight: float = 1.0


def weighted(text: str, spans: Sequence[Span], weights: Weights, mark: str | None = None) -> list[Span]:
    """Spans divided where patterns are found in them; what several find has the product of their weights.

    A pattern sees the text of one span at a time: nothing is found across a border, and ``^`` is where it begins.

    Args:
        text: that the spans are of.
        spans: in order, and apart from each other.
        weights: patterns, each with a weight.
        mark: a character that no pattern is to see.

    Returns:
        The spans in order, without those of weight 0 and those of nothing.

    Example:
        >>> weighted("an Oslo!", [Span(3, 8)], [(re.compile("Oslo"), 2.0)])
        [Span(start=3, end=7, weight=2.0), Span(start=7, end=8, weight=1.0)]
    """
    return multiplied(spans, [found for span in spans for found in _found(text, span, weights, mark)])


def _found(text: str, span: Span, weights: Weights, mark: str | None) -> Iterator[Span]:
    inside = text[span.start : span.end]
    places = unmarked_places(inside, mark)
    seen = inside.replace(mark, "") if mark else inside
    for pattern, weight in weights:
        for match in pattern.finditer(seen):
            if match.end() > match.start():
                yield Span(span.start + places[match.start()], span.start + places[match.end() - 1] + 1, weight)


def unmarked_places(text: str, mark: str | None) -> Sequence[int]:
    """Where the characters of a text stand that are not the mark, and its end."""
    if not mark or mark not in text:
        return range(len(text) + 1)
    return [*(i for i, character in enumerate(text) if character != mark), len(text)]


def multiplied(spans: Sequence[Span], factors: Sequence[Span]) -> list[Span]:
    """Spans divided at the borders of others, with the product of the weights that lie over each piece.

    Args:
        spans: in order, and apart from each other.
        factors: in any order, some over others.

    Returns:
        The pieces in order, without those of weight 0 and those of nothing.

    Example:
        >>> multiplied([Span(0, 9)], [Span(3, 9, 2.0), Span(1, 4, 0.0)])
        [Span(start=0, end=1, weight=1.0), Span(start=4, end=9, weight=2.0)]
    """
    changes = sorted((place, i) for i, factor in enumerate(factors) for place in {factor.start, factor.end})
    active: dict[int, float] = {}
    pieces: list[Span] = []
    next_change = 0
    for span in spans:
        place = span.start
        while place < span.end:
            while next_change < len(changes) and changes[next_change][0] <= place:
                i = changes[next_change][1]
                if active.pop(i, None) is None and factors[i].end > factors[i].start:
                    active[i] = factors[i].weight
                next_change += 1
            end = min(span.end, changes[next_change][0]) if next_change < len(changes) else span.end
            weight = span.weight * math.prod(active.values())
            if weight:
                pieces.append(Span(place, end, weight))
            place = end
    return pieces


# -- empty thoughts --------------------------------------------------------------------------------------------------

_THOUGHTS = (  # what begins and ends them in the formats of models
    (r"<(?P<tag>[\w:]*think\w*|thoughts?|reasoning)>", r"</(?P=tag)>"),  # Qwen, DeepSeek, GLM, Nemotron, Seed
    (r"\[THINK\]", r"\[/THINK\]"),  # Mistral
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Cohere
    (r"<\|channel>thought", r"<channel\|>"),  # Gemma
    (r"<\|channel\|>analysis<\|message\|>", r"<\|end\|>"),  # GPT-OSS
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),  # Apertus
    ("◁think▷", "◁/think▷"),  # Kimi
)
_EMPTY = re.compile(r"\s*(?:" + "|".join(rf"{begin}\s*({end})" for begin, end in _THOUGHTS) + r")\n{0,2}")
_FIRST = re.compile(r"\s*(?:" + "|".join(rf"{begin}\s*(\S.*?)\s*{end}" for begin, end in _THOUGHTS) + ")", re.DOTALL)
_BEGUN = re.compile("(?:" + "|".join(begin for begin, _ in _THOUGHTS) + r")\s*\Z")
_LONGEST = 80  # characters of what begins thoughts, with the white space after it


def thoughts(content: str) -> tuple[int, int] | None:
    """Where the thoughts stand that a content begins with; ``None`` where it begins with none, or with empty ones.

    Example:
        >>> thoughts("<think>1 + 1</think>2")
        (7, 12)
    """
    found = _FIRST.match(content)
    return found.span(found.lastindex or 0) if found else None


def without_empty_thoughts(text: str, spans: Sequence[Span]) -> list[Span]:
    """Spans without the thoughts that they begin with, where these are nothing but white space.

    With them goes the white space before them and the empty line after. They may have been begun by the prompt, before
    the span: then what ends them goes.

    Example:
        >>> without_empty_thoughts("<think></think>2", [Span(0, 16)])
        [Span(start=15, end=16, weight=1.0)]
    """
    return [Span(start, span.end, span.weight) for span in spans if (start := _thoughtless(text, span)) < span.end]


def _thoughtless(text: str, span: Span) -> int:
    """Where a span begins after empty thoughts."""
    before = text[max(0, span.start - _LONGEST) : span.start]
    opened = _BEGUN.search(before)
    start = span.start if opened is None else span.start - len(before) + opened.start()
    found = _EMPTY.match(text, start, span.end)
    return found.end() if found and found.end(found.lastindex or 0) > span.start else span.start
