"""The whole flow from random messages: to tokens, labels and weights, to packed, joined and padded batches, and back.

What tokens must be learnt is found by bytes: every token of these tokenizers is a known string of bytes, and the test
writes each template's text itself. So nothing here relies on the character offsets that the encoder goes by.
"""

from __future__ import annotations

import functools
import json
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from conftest import ROOT, at_hand
from dft_lightning import InstructionDataModule
from dft_lightning.data.options import TextOptions
from dft_lightning.data.rows.forms import Conversation
from dft_lightning.data.text.tokenizer import load_tokenizer
from dft_lightning.data.text.tokens import ConversationEncoder
from dft_lightning.errors import InputError
from small_runs import data_options
from stand_ins import CHATML, MARKED, SMOLLM, byte_level

sys.path.insert(0, str(ROOT / "docs"))

import make_chat_templates as docs

settings.register_profile(
    "flow", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
FLOW = settings.get_profile("flow")

# -- tokenizers, and what their templates write ------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Text that a template writes: a special token, or else as any other; and its weight, 0 where it is not learnt."""

    text: str
    control: bool = False
    weight: float = 0.0


def chatml(messages, default=None):
    if default and messages[0]["role"] != "system":
        messages = [default, *messages]
    for message in messages:
        weight = message.get("weight", 1.0) if message["role"] == "assistant" else 0.0
        yield Piece("<|im_start|>", control=True)
        yield Piece(f"{message['role']}\n")
        yield Piece(message["content"], weight=weight)
        yield Piece("<|im_end|>", control=True, weight=weight)
        yield Piece("\n")


def plain(messages, bos, eos):
    """For tokenizers without a template of their own."""
    if bos:
        yield Piece(bos, control=True)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            yield Piece(f"{message['content']}\n")
            continue
        weight = message.get("weight", 1.0)
        yield Piece(message["content"], weight=weight)
        yield Piece(eos, control=True, weight=weight)
        if i + 1 < len(messages):
            yield Piece("\n")


def tiny(template):
    """Byte-level BPE of a few merges; one of its special tokens is a single character."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(["<|im_start|>", "<|im_end|>", "☼"]),
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "☼"],
    )
    tokenizer.chat_template = template
    return tokenizer


def in_shared(name, **options):
    return load_tokenizer(at_hand(docs.OWN[name]), **options)


MAKERS = {
    "tiny": (lambda: tiny(CHATML), chatml),
    "tiny marked": (lambda: tiny(MARKED), chatml),
    "smollm2": (lambda: in_shared("smollm2"), functools.partial(chatml, default=SMOLLM)),
    "gpt2": (lambda: docs.own_tokenizer(at_hand(), "gpt2"), functools.partial(plain, bos="", eos="<|endoftext|>")),
    "qwen3 marked": (lambda: in_shared("qwen3", chat_template=MARKED), chatml),
    "stories260K": (lambda: in_shared("stories260K"), functools.partial(plain, bos="<s>", eos="</s>")),
}


@functools.cache
def tokenizer_of(name):
    return MAKERS[name][0]()


@functools.cache
def encoder_of(name):
    return ConversationEncoder(tokenizer_of(name))


@functools.cache
def bytes_of_tokens(name):
    """The bytes of each token, by id."""
    tokenizer = tokenizer_of(name)
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    added = {i: token.content.encode() for i, token in tokenizer.added_tokens_decoder.items()}

    def of(i, token):
        if i in added:
            return added[i]
        if name != "stories260K":
            return bytes(letters[letter] for letter in token)
        if token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    return {i: of(i, token) for token, i in tokenizer.get_vocab().items()}


def normalized(name, text):
    """What a tokenizer makes of a text before it splits it."""
    if name == "qwen3 marked":
        # A token of its own, found before that, and not composed with what follows it.
        return "<think>".join(unicodedata.normalize("NFC", part) for part in text.split("<think>"))
    return text.replace("▁", " ") if name == "stories260K" else text


@functools.cache
def known_bytes(name):
    """Without those that SmolLM2 has no token for, of planes of Unicode that are hardly used: it drops them."""
    return {content[0] for content in bytes_of_tokens(name).values() if len(content) == 1}


def as_bytes(name, pieces):
    """All bytes of a text, the weight of each, the stretches of the learnt turns, and the special tokens by place."""
    text, weights, turns, controls = b"", [], [], {}
    begins = True
    for piece in pieces:
        content = piece.text.encode() if piece.control else normalized(name, piece.text).encode()
        content = bytes(byte for byte in content if byte in known_bytes(name))
        if name == "stories260K" and begins and content and not piece.control:
            content = b" " + content  # SentencePiece's, before whatever is between two special tokens
            assert not piece.weight
        begins = piece.control or (begins and not content)
        if piece.control:
            controls[len(text)] = piece.text
        if piece.weight and piece.control:
            turns[-1] = (turns[-1][0], len(text) + len(content))
        elif piece.weight:
            turns.append((len(text), len(text) + len(content)))
        text += content
        weights += [piece.weight] * len(content)
    return text, np.array(weights), turns, controls


# -- random conversations ----------------------------------------------------------------------------------------------

# Among them: marks of this package's own, a space of SentencePiece's, what Unicode composes, and control characters.
WORDS = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "</s>", "<s>", "☼", "<think>", "assistant\n", "user", "{{ x }}"]
WORDS += [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u2028", "\x85", "\x1b[31m", "the cat", "said: ", "{% generation %}"]
WORDS += ["👩‍👩‍👧", "🙂", "e\u0301", "\u0301", "\u0338", "漢字", "\u1100\u1161", "\u212b", "▁"]
WORDS += ["\uf8f0", "\uf8f00\uf8f0", "\U000f0000"]
_CHARACTERS = st.characters(exclude_categories=("Cs",), exclude_characters="\0\U0010fff0")
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(_CHARACTERS, max_size=3), max_size=6).map("".join)
ANSWERS = TEXTS.map(lambda text: text if text.strip() else f"{text}x")
WEIGHTS = st.sampled_from([None, None, 0, 0.5, 1.0, 3.0])


def exchange(asked, answered):
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


@st.composite
def conversations(draw):
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXTS)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXTS)})
        answer = {"role": "assistant", "content": draw(ANSWERS)}
        weight = draw(WEIGHTS)
        messages.append(answer if weight is None else {**answer, "weight": weight})
    return messages


# -- to tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_learnt_is_what_the_assistant_says(name):
    tokenizer, encoder = tokenizer_of(name), encoder_of(name)
    layout, tokens = MAKERS[name][1], bytes_of_tokens(name)
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}

    @settings(FLOW, max_examples=15)
    @example([exchange("", "<|im_end|>\U000f0000")])  # a mark of this package before the template's own token
    @example([exchange("", "<think>\u0338")])
    @example([exchange("", "\n\nx")])  # GPT-2's first token straddles the border
    @given(st.lists(conversations(), min_size=1, max_size=6))
    def check(drawn):
        for messages, rows in zip(drawn, encoder.encode([Conversation(each) for each in drawn]), strict=True):
            (row,) = rows
            text, weights, turns, controls = as_bytes(name, layout(messages))
            of_tokens = [tokens[i] for i in row.input_ids.tolist()]
            assert b"".join(of_tokens) == text
            stops = np.cumsum([len(content) for content in of_tokens])
            starts = stops - [len(content) for content in of_tokens]
            found = {
                a: special[i] for a, i in zip(starts.tolist(), row.input_ids.tolist(), strict=True) if i in special
            }
            assert found == controls  # what rows spell is text

            # A token that straddles a border is learnt; the first of a row is not.
            expected = np.array([weights[a:b].max() for a, b in zip(starts, stops, strict=True)])
            expected[0] = 0
            assert row.labels.tolist() == np.where(expected > 0, row.input_ids, -100).tolist()
            weighed = (row.labels != -100).astype(float) if row.weights is None else row.weights
            assert weighed.tolist() == expected.tolist()

            # And as text: each turn, after a bit of its header at the most.
            for start, stop in turns:
                learnt = [i for i, (a, b) in enumerate(zip(starts, stops, strict=True)) if i and a < stop and b > start]
                said = tokenizer.decode(row.input_ids[learnt], clean_up_tokenization_spaces=False)
                begun = int(starts[learnt[0]])
                answer = text[max(start, begun) : stop].decode(errors="replace")
                if name == "stories260K":  # drops the space that a text begins with
                    said, answer = said.lstrip(" "), answer.lstrip(" ")
                assert said.endswith(answer)
                assert text[:start].decode(errors="replace").endswith(said.removesuffix(answer))

    check()


# -- to batches and back -----------------------------------------------------------------------------------------------


class Data(InstructionDataModule):
    """With a tokenizer of this process."""

    made: Any = None

    def build_tokenizer(self):
        return self.made


def batches_of(path, tokenizer, **options):
    data = Data(str(path), **data_options(shuffle=False, **options))
    data.made = tokenizer
    data.setup("fit")
    return data, list(data.train_dataloader())


def targets(batches):
    """How often each token is to be learnt with each weight."""
    found: Counter[tuple[int, float]] = Counter()
    for batch in batches:
        learnt = batch["labels"] != -100
        ids = batch["input_ids"][learnt].tolist()
        assert ids == batch["labels"][learnt].tolist()
        weights = batch["token_weight"][learnt].tolist() if "token_weight" in batch else [1.0] * len(ids)
        found.update(zip(ids, weights, strict=True))
    return found


def documents(batches, padding):
    """Each document's ids, labels and weights, from where its positions begin; those of padding are counted."""
    found = []
    for batch in batches:
        weights = batch.get("token_weight", np.ones(batch["labels"].shape))
        tokens = 0
        for ids, labels, row_weights, positions in zip(
            batch["input_ids"], batch["labels"], weights, batch["position_ids"], strict=True
        ):
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
            for start, stop in pairwise(starts):
                assert positions[start:stop].tolist() == list(range(stop - start))
                document = tuple(each[start:stop].tolist() for each in (ids, labels, row_weights))
                if stop - start > 1:
                    tokens += stop - start
                    found.append(document)
                else:
                    assert document[:2] == ([padding], [-100])
        assert batch["layout"].num_tokens == tokens
    return found


def as_documents(rows):
    """Rows as batches have them."""
    ones = [row.weights if row.weights is not None else np.ones(len(row.labels)) for row in rows]
    return [
        (row.input_ids.tolist(), row.labels.tolist(), weights.tolist()) for row, weights in zip(rows, ones, strict=True)
    ]


def check_same(found, expected):
    """The same ids and labels, and the same weights where a token is learnt; the rest have none to lose."""
    assert len(found) == len(expected)
    for (ids, labels, weights), (other_ids, other_labels, other_weights) in zip(found, expected, strict=True):
        assert ids == other_ids
        assert labels == other_labels
        learnt = [i for i, label in enumerate(labels) if label != -100]
        assert [weights[i] for i in learnt] == [other_weights[i] for i in learnt]


def test_batches_have_the_rows_however_they_are_made(tmp_path_factory):
    tokenizer, encoder = tokenizer_of("tiny"), encoder_of("tiny")
    path = tmp_path_factory.mktemp("flow") / "rows.jsonl"
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    @settings(FLOW, max_examples=12)
    @given(st.lists(conversations(), min_size=1, max_size=8), st.integers(2, 120), st.integers(1, 4), st.integers(0, 2))
    def check(drawn, max_length, batch_size, seed):
        lines = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in drawn]
        path.write_bytes("\n".join(lines).encode())
        options = {"batch_size": batch_size, "seed": seed}
        rows = [row for (row,) in encoder.encode([Conversation(each) for each in drawn]) if row.has_target]
        cut_off = ConversationEncoder(tokenizer, TextOptions(max_length=max_length)).encode(
            [Conversation(each) for each in drawn]
        )
        cut_off = [row for (row,) in cut_off if row.has_target]
        if not rows:
            with pytest.raises(InputError, match="no row has a target"):
                batches_of(path, tokenizer, **options)
            return

        _, padded = batches_of(path, tokenizer, **options)
        unpadded = [
            tuple(each[mask == 1].tolist() for each in (ids, labels, weights))
            for batch in padded
            for ids, labels, weights, mask in zip(
                batch["input_ids"],
                batch["labels"],
                batch.get("token_weight", batch["labels"] * 0 + 1.0),
                batch["attention_mask"],
                strict=True,
            )
        ]
        check_same(unpadded, as_documents(rows))
        _, joined = batches_of(path, tokenizer, padding_free=True, **options)
        assert all(len(batch["labels"]) == 1 for batch in joined)
        check_same(documents(joined, padding), as_documents(rows))
        assert targets(joined) == targets(padded)

        data, split = batches_of(path, tokenizer, packing="bfd_split", max_length=max_length, **options)
        assert all(batch["labels"].shape[1] <= max_length for batch in split)
        places = [piece for pack in range(len(data.packs)) for piece in data.packs[pack]]
        pieces = [tuple(each[a:b] for each in as_documents(rows)[i]) for i, a, b in places]
        pieces = [(ids, [-100, *labels[1:]], weights) for ids, labels, weights in pieces]
        check_same(documents(split, padding), pieces)
        assert targets(split) == targets(padded)

        if not cut_off:
            return
        _, short = batches_of(path, tokenizer, max_length=max_length, **options)
        data, packed = batches_of(path, tokenizer, packing="bfd", max_length=max_length, **options)
        assert all(batch["labels"].shape[1] <= max_length for batch in packed)
        order = [row for pack in range(len(data.packs)) for row, _, _ in data.packs[pack]]
        assert sorted(order) == list(range(len(cut_off)))
        check_same(documents(packed, padding), [as_documents(cut_off)[row] for row in order])
        assert targets(packed) == targets(short)

    check()
