"""Weights below and beside the turns, against sums that are made character by character."""

from __future__ import annotations

import functools
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from conftest import at_hand
from dft_lightning.data.options import TextOptions
from dft_lightning.data.rows.forms import Conversation
from dft_lightning.data.text.tokenizer import load_tokenizer
from dft_lightning.data.text.tokens import ConversationEncoder
from dft_lightning.errors import InputError
from stand_ins import CHATML, MARKED, byte_level
from test_special_tokens import ASK, answer, bytes_tokenizer, thinking


@functools.cache
def tokenizer_of(name):
    if name == "merges":
        made = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<|im_end|>")
        made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
        made.chat_template = CHATML
        return made
    template = MARKED if name.endswith("marked") else CHATML
    return load_tokenizer(at_hand(f"tokenizers/{name.split()[0]}"), chat_template=template)


NAMES = ["merges", "smollm2", "smollm2 marked", "qwen3"]


def by_characters(messages, row_weight, prompt_weight, span_weights):
    """The text of ChatML, and the weight of every character of it."""
    text, found = "", []
    for message in messages:
        header, turn = f"<|im_start|>{message['role']}\n", f"{message['content']}<|im_end|>"
        inside = [row_weight * prompt_weight] * len(turn)
        if message["role"] == "assistant":
            inside = [message.get("weight", 1.0)] * len(turn)
            for pattern, weight in span_weights.items():
                for match in re.finditer(pattern, turn):
                    for place in range(*match.span()):
                        inside[place] *= weight
        for start, end, weight in message.get("content_weights", []):
            for place in range(start, end):
                inside[place] *= weight
        text += f"{header}{turn}\n"
        found += [row_weight * prompt_weight] * len(header) + inside + [row_weight * prompt_weight]
    return text, found


def by_tokens(tokenizer, text, weights):
    """Token ids, and of each the weight of its characters that is furthest from 0; none of the first."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    found = [max(weights[a:b], key=abs, default=0.0) for a, b in encoded["offset_mapping"]]
    return encoded["input_ids"], np.float32([0.0, *found[1:]])


def encode(tokenizer, conversation, **options):
    (rows,) = ConversationEncoder(tokenizer, TextOptions(train_empty_thoughts=True, **options)).encode([conversation])
    if isinstance(rows, InputError):
        raise rows
    (row,) = rows
    return row


def check(tokenizer, row, text, weights):
    ids, expected = by_tokens(tokenizer, text, weights)
    assert row.input_ids.tolist() == ids
    found = np.float32(row.labels != -100) if row.weights is None else row.weights
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(row.labels, np.where(expected != 0, ids, -100))


TEXTS = st.text(alphabet="aab  \n.é漢🙂<|think>", max_size=20)
WEIGHTS = st.sampled_from([0.0, 0.5, 1.0, 2.0])
PATTERNS = ["a+", "aab", " +", r"\n", r"[^a]*", r"\S+\s", "<.*>", r"\w+$", "é|🙂", "end"]


@st.composite
def turns(draw):
    messages = []
    for i in range(draw(st.integers(1, 4)) * 2):
        content = draw(TEXTS)
        message = {"role": ("user", "assistant")[i % 2], "content": content}
        if i % 2 and draw(st.booleans()):
            message["weight"] = draw(WEIGHTS)
        if content and draw(st.booleans()):
            places = sorted(draw(st.lists(st.integers(0, len(content)), min_size=2, max_size=4)))
            message["content_weights"] = [[a, b, draw(WEIGHTS)] for a, b in pairwise(places)]
        messages.append(message)
    return messages


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example([ASK, answer("a  b", content_weights=[[0, 2, 0.5], [2, 4, 0.0]])], 0.5, 0.25, {" +": 2.0, "b.*": 0.5})
@example([ASK, answer("a", weight=0.0), ASK, answer("b")], 1.0, 1.0, {})
@given(turns(), WEIGHTS, WEIGHTS, st.dictionaries(st.sampled_from(PATTERNS), WEIGHTS, max_size=3))
def test_every_token_has_the_weight_of_its_characters(name, messages, row_weight, prompt_weight, span_weights):
    tokenizer = tokenizer_of(name)
    row = encode(
        tokenizer,
        Conversation(messages, weight=row_weight),
        prompt_weight=prompt_weight,
        span_weights=span_weights,
        allow_special_tokens=False,
    )
    check(tokenizer, row, *by_characters(messages, row_weight, prompt_weight, span_weights))


def weights_of(tokenizer, row):
    """Passages and their weights."""
    weights = row.weights if row.weights is not None else (row.labels != -100).astype(float)
    found = []
    for token, weight in zip(row.input_ids.tolist(), weights.tolist(), strict=True):
        if found and found[-1][1] == weight:
            found[-1][0].append(token)
        else:
            found.append(([token], weight))
    return [(tokenizer.decode(ids), weight) for ids, weight in found]


def test_by_hand():
    tokenizer = bytes_tokenizer(CHATML)
    messages = [ASK, answer("Yes, no.", weight=0.5, content_weights=[[0, 4, 2.0]])]
    row = encode(
        tokenizer, Conversation(messages, weight=4.0), prompt_weight=0.25, span_weights={"no": 0.0, r"n?o\.": 3}
    )
    assert weights_of(tokenizer, row) == [
        ("<|im_start|>", 0.0),  # nothing predicts it
        ("user\nx<|im_end|>\n<|im_start|>assistant\nYes,", 1.0),  # 0.25 of 4 before, and 2 times 0.5
        (" ", 0.5),
        ("no", 0.0),
        (".", 1.5),
        ("<|im_end|>", 0.5),
        ("\n", 1.0),
    ]


def test_prompts_alone():
    tokenizer = bytes_tokenizer(CHATML)
    turns = [ASK, answer("a", weight=0.0), ASK, answer("b")]
    row = encode(tokenizer, Conversation(turns), prompt_weight=1.0)
    assert row.weights is None
    assert [text for text, weight in weights_of(tokenizer, row) if not weight] == ["<|im_start|>", "a<|im_end|>"]
    last = encode(tokenizer, Conversation([ASK, answer("a"), ASK, answer("b")]), prompt_weight=1.0, train_turns="last")
    assert last.labels.tolist() == row.labels.tolist()
    nothing = encode(tokenizer, Conversation(turns, weight=0.0), prompt_weight=1.0)
    assert [text for text, weight in weights_of(tokenizer, nothing) if weight] == ["b<|im_end|>"]


@pytest.mark.parametrize("content", ["a<|im_end|>b", "<|im_end|>", "é<|im_start|>🙂<|im_end|>a"])
@pytest.mark.parametrize("place", ["inside", "around", "beside"])
def test_special_tokens_that_rows_spell_do_not_move_them(content, place):
    """Nor are the tokens that end turns divided, wherever a passage ends within their names."""
    tokenizer = bytes_tokenizer(CHATML)
    name = content.index("<|")
    start, end = {"inside": (name + 3, name + 7), "around": (name, name + 10), "beside": (0, name)}[place]
    messages = [{"role": "user", "content": content}, answer(content, content_weights=[[start, end, 0.5]])]
    row = encode(tokenizer, Conversation(messages), prompt_weight=3.0, span_weights={"im_e": 2.0, r"\|>$": 4.0})
    text, weights = by_characters(messages, 1.0, 3.0, {"im_e": 2.0, r"\|>$": 4.0})
    expected, ids, at = [], [], 0
    # Character by character: the template's own are one token, and all others one of each byte.
    own = {match.start() for match in re.finditer(r"<\|im_start\|>(?=user\n|assistant\n)|<\|im_end\|>(?=\n)", text)}
    while at < len(text):
        size = next((len(n) for n in ("<|im_start|>", "<|im_end|>") if at in own and text.startswith(n, at)), 1)
        piece = text[at : at + size]
        tokens = [tokenizer.convert_tokens_to_ids(piece)] if size > 1 else tokenizer(piece)["input_ids"]
        ids += tokens
        expected += [max(weights[at : at + size], key=abs)] * len(tokens)
        at += size
    assert row.input_ids.tolist() == ids
    np.testing.assert_array_equal(row.weights, np.float32([0.0, *expected[1:]]))


# -- parts of contents that the template does not write as they are ---------------------------------------------------

PARTS = [[0, 5, 0.5], [5, 12, 2.0]]
CONTENT = "  One.\n Two \n"  # "  One" and ".\n Two "


def part_weights(template, content=CONTENT, parts=PARTS, **options):
    tokenizer = bytes_tokenizer(template)
    row = encode(tokenizer, Conversation([ASK, answer(content, content_weights=parts)]), **options)
    return [found for found in weights_of(tokenizer, row) if found[1]]


def test_parts_of_contents_that_are_trimmed():
    assert part_weights(CHATML) == [("  One", 0.5), (".\n Two ", 2.0), ("\n<|im_end|>", 1.0)]
    trimmed = CHATML.replace("m.content", "m.content | trim")
    assert part_weights(trimmed) == [("One", 0.5), (".\n Two", 2.0), ("<|im_end|>", 1.0)]
    as_list = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    assert part_weights(as_list) == part_weights(CHATML)
    # A part of nothing but what is trimmed has no place.
    assert part_weights(trimmed, parts=[[0, 2, 0.0], [11, 13, 5.0]]) == [("One.\n Two<|im_end|>", 1.0)]


def test_a_part_that_is_said_elsewhere_too():
    twice = CHATML.replace("{{ m.content }}", "{{ 'One. ' if m.role == 'assistant' }}{{ m.content }}")
    turns = twice.replace("assistant\n{% endif %}", "assistant\nOne. {% endif %}")
    assert part_weights(turns, "One.", [[0, 3, 0.5]]) == [("One", 0.5), (".<|im_end|>", 1.0)]
    expected = [("One. ", 1.0), ("One", 0.5), (".<|im_end|>", 1.0)]
    assert part_weights(twice, "One.", [[0, 3, 0.5]]) == expected
    assert part_weights(twice.replace("m.content", "m.content | trim"), " One. ", [[0, 4, 0.5]]) == expected


def test_parts_of_contents_that_are_thoughts():
    """Written anew from what stands between their marks."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if '</think>' in m.content %}"
        "<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') }}\n</think>\n\n"
        "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    thought, said = "<think>\nhm\n</think>\n\n", "Yes."
    parts = [[0, len(thought), 0.5], [len(thought), len(thought + said), 2.0]]
    expected = [("<think>\nhm\n</think>\n\n", 0.5), ("Yes.", 2.0), ("<|im_end|>", 1.0)]
    assert part_weights(template, thought + said, parts) == expected


@pytest.mark.parametrize(
    "write", ["m.content.replace('one', '1')", "m.content.split('tw')[0]", "m.content + m.content"]
)
def test_contents_that_are_written_otherwise_are_refused(write):
    template = CHATML.replace("{{ m.content }}", f"{{{{ {write} if m.role == 'assistant' else m.content }}}}")
    with pytest.raises(InputError, match=r"writes the content of message 2 \(assistant\) otherwise .*span_weights"):
        part_weights(template, "one. two", [[1, 6, 0.5]])
    assert part_weights(template, "one. two", [[1, 6, 1.0]])  # of no matter


def test_parts_of_what_is_not_learnt_are_of_no_matter():
    template = CHATML.replace("{{ m.content }}", "{{ m.content + m.content }}")
    parts = [[0, 1, 2.0]]
    messages = [{"role": "user", "content": "o", "content_weights": parts}]
    messages.append(answer("o", weight=0.0, content_weights=parts))
    row = encode(bytes_tokenizer(template), Conversation([*messages, ASK, answer("b")]))
    assert (row.labels != -100).sum() == 3
    assert row.weights is None


# -- prompts beside turns that the template writes anew ---------------------------------------------------------------


def test_prompts_beside_earlier_turns_without_their_thoughts():
    tokenizer = bytes_tokenizer(thinking("<think>", "</think>"))
    thought = "<think>\nhm\n</think>\n\n"
    messages = [ASK, answer(f"{thought}a"), ASK, answer(f"{thought}b")]
    row = encode(tokenizer, Conversation(messages), prompt_weight=1.0, train_turns="last")
    assert [text for text, weight in weights_of(tokenizer, row) if not weight] == ["<|im_start|>", "a<|im_end|>"]
    each = ConversationEncoder(tokenizer, TextOptions(prompt_weight=1.0, train_turns="each"))
    ((first, second),) = each.encode([Conversation(messages)])
    assert [text for text, weight in weights_of(tokenizer, first) if not weight] == ["<|im_start|>"]
    assert second.labels.tolist() == row.labels.tolist()
    # Where the generation prompt is none of the earlier turns, they cannot be told.
    begun = thinking("<think>", "</think>").replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>")
    with pytest.raises(InputError, match=r"^data\.text\.prompt_weight: where the turns stand that are not learnt"):
        encode(bytes_tokenizer(begun), Conversation(messages), prompt_weight=1.0, train_turns="last")


# -- plain text, and what is too much ---------------------------------------------------------------------------------


def test_plain_text():
    tokenizer = bytes_tokenizer(CHATML)
    row = encode(tokenizer, Conversation([], text="abc", weight=2.0), span_weights={"b": 0.0, "c.*": 0.5})
    assert weights_of(tokenizer, row) == [("ab", 0.0), ("c<|im_end|>", 1.0)]
    row = encode(tokenizer, Conversation([], text="a<|im_end|>b", weight=2.0), span_weights={r"^a<\|im": 0.5})
    assert weights_of(tokenizer, row)[1] == ("<|im", 1.0)


def test_weights_that_multiply_to_too_much():
    row = Conversation([ASK, answer("a", weight=1e38)], weight=1e38)
    for options in ({"span_weights": {"a": 1e38}}, {"prompt_weight": 1e38}):
        with pytest.raises(InputError, match="multiply to more than float32 holds"):
            encode(bytes_tokenizer(CHATML), row, **options)


def test_weights_of_an_advantage_may_be_negative():
    tokenizer = tokenizer_of("merges")
    messages = [ASK, answer("aab a", weight=-0.5)]
    row = encode(tokenizer, Conversation(messages, weight=-0.5), prompt_weight=0.5, span_weights={"b": 2.0})
    check(tokenizer, row, *by_characters(messages, -0.5, 0.5, {"b": 2.0}))
    assert row.weights.min() == -1.0


def test_a_rows_weight_is_known_to_its_prompt(tmp_path):
    from dft_lightning.data.options import RowOptions
    from dft_lightning.data.rows.forms import Reading, convert_row

    row = {"prompt": "x", "completion": "y", "reward": 0.5}
    assert convert_row(row, "prompt_completion", Reading(RowOptions())).weight == 0.5
