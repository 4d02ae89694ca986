"""Weights of parts of turns, and the thoughts that are not learnt: against sums by characters."""

from __future__ import annotations

import random
import re

import pytest

from dft_lightning.data.text.span_weights import Span, weighted, without_empty_thoughts


def by_characters(text, spans, weights):
    """The weight of every character, from each pattern alone and for each character by itself."""
    found = [0.0] * len(text)
    for span in spans:
        for place in range(span.start, span.end):
            factor = span.weight
            for pattern, weight in weights:
                matches = re.finditer(pattern, text[span.start : span.end])
                factor *= weight if any(m.start() <= place - span.start < m.end() for m in matches) else 1
            found[place] = factor
    return found


def test_weights_multiply_character_by_character():
    draw = random.Random(0)
    patterns = [re.compile(p) for p in ("a+", "ab", "b", "^.", "c$", "", "(?<=a)b", "[^c]*")]
    for _ in range(300):
        text = "".join(draw.choices("abc", k=12))
        borders = sorted(draw.sample(range(13), 4))
        spans = [Span(*borders[:2], draw.choice([1.0, 0.5])), Span(*borders[2:], 2.0)]
        weights = [(pattern, draw.choice([0.0, 0.5, 3.0])) for pattern in draw.sample(patterns, 3)]
        pieces = weighted(text, spans, weights)
        found = [0.0] * len(text)
        for piece in pieces:
            assert piece.weight
            assert piece.start < piece.end
            for place in range(piece.start, piece.end):
                assert not found[place]
                found[place] = piece.weight
        assert found == by_characters(text, spans, weights)
        assert pieces == sorted(pieces, key=lambda piece: piece.start)


@pytest.mark.parametrize(
    ("prompt", "turn", "learnt"),
    [
        ("", "<think>\n\n</think>\n\nYes.", "Yes."),
        ("", "\n<think></think>\nYes.", "Yes."),
        ("", "[THINK][/THINK]Yes.", "Yes."),
        ("", "<|START_THINKING|> <|END_THINKING|>Yes.", "Yes."),
        ("<|channel>thought\n", "<channel|>Yes.", "Yes."),
        ("<think>\n", "\n</think>\n\n  Yes.", "  Yes."),  # the answer keeps its own white space
        ("<think>\n\n</think>\n\n", "\nYes.", "\nYes."),
        ("<think></think>", "\n\nYes.", "\n\nYes."),
        ("", "<think>\nNo?\n</think>\n\nYes.", "<think>\nNo?\n</think>\n\nYes."),
        ("", "Write <think></think>.", "Write <think></think>."),
        ("", "<think></thinking>Yes.", "<think></thinking>Yes."),
        ("<think>\nNo?", "\n</think>\n\nYes.", "\n</think>\n\nYes."),
        ("", "<think></think>", ""),
    ],
)
def test_empty_thoughts_go(prompt, turn, learnt):
    spans = without_empty_thoughts(f"{prompt}{turn}$", [Span(len(prompt), len(prompt + turn), 0.5)])
    assert [f"{prompt}{turn}$"[span.start : span.end] for span in spans] == [learnt] * bool(learnt)
    assert all(span.weight == 0.5 for span in spans)
