"""Special tokens that rows spell: text by default, control where answers are made of them or they are allowed."""

from __future__ import annotations

import functools

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from conftest import at_hand
from dft_lightning.data.options import TextOptions
from dft_lightning.data.rows.forms import Conversation
from dft_lightning.data.text.tokenizer import load_tokenizer
from dft_lightning.data.text.tokens import ConversationEncoder
from dft_lightning.errors import InputError
from stand_ins import CHATML

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# As Qwen3's does: thoughts are found in the content, and taken out of earlier turns.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set content = m.content %}"
    "{% if m.role == 'assistant' and OPEN in content and CLOSE in content and not loop.last %}"
    "{% set content = content.split(CLOSE)[-1].lstrip('\n') %}{% endif %}{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK = {"role": "user", "content": "x"}


def answer(content, **others):
    return {"role": "assistant", "content": content, **others}


def bytes_tokenizer(template, *special, bos=None, eos="<|im_end|>", start_with=None):
    """A token for each byte, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (*CONTROL, *special)])
    if start_with:
        place = (start_with, backend.token_to_id(start_with))
        backend.post_processor = processors.TemplateProcessing(f"{start_with} $A", f"{start_with} $A $B", [place])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


def thinking(opens, closes):
    return THINKING.replace("OPEN", repr(opens)).replace("CLOSE", repr(closes))


def encode(tokenizer, conversation, **options):
    if isinstance(conversation, list):
        conversation = Conversation(conversation)
    encoder = ConversationEncoder(tokenizer, TextOptions(**options))
    (rows,) = encoder.encode([conversation])
    if isinstance(rows, InputError):
        raise rows
    (row,) = rows
    return row, encoder.take_notes().plain()


def pieces(tokenizer, ids):
    """Special tokens by their names, and the bytes between them as text."""
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    found, text = [], []
    for i in [*ids, None]:
        if text and (i is None or i in special):
            found.append(tokenizer.decode(text))
            text = []
        if i in special:
            found.append((special[i],))
        else:
            text.append(i)
    return found


# -- what answers are made of ------------------------------------------------------------------------------------------

TAGS = [
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>", "<channel|>"),  # by what the template looks for alone
    ("<tool_call>", "</tool_call>"),
]


@pytest.mark.parametrize(("opens", "closes"), TAGS, ids=[opens for opens, _ in TAGS])
def test_what_answers_are_made_of_is_the_token_and_seen_by_the_template(opens, closes):
    tokenizer = bytes_tokenizer(thinking(opens, closes), opens, closes)
    first, last = answer(f"{opens}\na\n{closes}\n\nb"), answer(f"{opens}\nc\n{closes}\n\nd")
    row, notes = encode(tokenizer, [ASK, first, ASK, last], train_turns="last")
    # The first turn's thought is gone, so the template has found it; the last one's has its tokens, which are learnt.
    expected = tokenizer.apply_chat_template([ASK, first, ASK, last])
    assert row.input_ids.tolist() == list(getattr(expected, "input_ids", expected))
    assert pieces(tokenizer, row.input_ids[row.labels != -100]) == [
        (opens,), "\nc\n", (closes,), "\n\nd", ("<|im_end|>",),
    ]  # fmt: skip
    assert pieces(tokenizer, row.input_ids)[5] == "assistant\nb"
    assert pieces(tokenizer, row.input_ids).count((closes,)) == 1
    assert notes == [("allowed special tokens", text, 1) for text in sorted((opens, closes))]


@pytest.mark.parametrize(("opens", "closes"), TAGS, ids=[opens for opens, _ in TAGS])
def test_in_all_others_words_it_is_text(opens, closes):
    tokenizer = bytes_tokenizer(
        CHATML.replace("{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"),
        *(opens, closes),
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": closes}}}
    messages = [
        {"role": "system", "content": opens},
        {"role": "user", "content": f"x{opens}{closes}"},
        answer("", tool_calls=[call]),
        {"role": "tool", "content": closes},
        answer("y"),
    ]
    row, notes = encode(tokenizer, messages)
    assert {piece for piece in pieces(tokenizer, row.input_ids) if isinstance(piece, tuple)} == {
        ("<|im_start|>",), ("<|im_end|>",),
    }  # fmt: skip
    assert tokenizer.decode(row.input_ids).count(closes) == 3
    assert ("special tokens", closes, 1) in notes


def test_a_real_tokenizer_whose_thoughts_are_flagged():
    """The same tokens as where they are not."""
    plain, flagged = (load_tokenizer(at_hand("tokenizers/qwen3")) for _ in range(2))
    names = [text for text in ("<think>", "</think>", "<tool_call>", "</tool_call>") if text in plain.get_vocab()]
    flagged.add_tokens([AddedToken(text, special=True, normalized=False) for text in names], special_tokens=True)
    assert all(flagged.added_tokens_decoder[flagged.convert_tokens_to_ids(text)].special for text in names)
    messages = [ASK, answer("<think>\na\n</think>\n\nb"), {"role": "user", "content": "y"}, answer("c")]
    for end, options in ((4, {"train_turns": "last"}), (2, {})):
        row, _ = encode(flagged, messages[:end], **options)
        expected, _ = encode(plain, messages[:end], **options)
        assert row.input_ids.tolist() == expected.input_ids.tolist()
        assert row.labels.tolist() == expected.labels.tolist()
    ids = row.input_ids.tolist()
    assert ids.count(plain.convert_tokens_to_ids("<think>")) >= 1
    asked, _ = encode(flagged, [{"role": "user", "content": "a</think>b"}, answer("c")])
    assert flagged.convert_tokens_to_ids("</think>") not in asked.input_ids.tolist()[:12]


@pytest.mark.parametrize("role", ["user", "tool", "assistant"])
@pytest.mark.parametrize("text", CONTROL)
def test_no_turn_ends_by_a_row(role, text):
    """Not even by a template that looks for it, or where it is a thought's by its place alone."""
    template = thinking("<|im_start|>", "<|im_end|>").replace("<|im_start|>' in content", "<|endoftext|>' in content")
    tokenizer = bytes_tokenizer(template, "<think>")
    tokenizer.pad_token = "<|endoftext|>"
    messages = [ASK, answer("<think>y" if role != "assistant" else f"<think>{text}y")]
    if role != "assistant":
        messages.insert(1, {"role": role, "content": f"<think>{text}"})
    row, notes = encode(tokenizer, messages)
    found = pieces(tokenizer, row.input_ids)
    assert found.count(("<|im_end|>",)) == found.count(("<|im_start|>",)) == len(messages)
    assert ("<|endoftext|>",) not in found
    assert ("special tokens", text, 1) in notes


def test_a_question_may_name_the_tags_of_thoughts_and_no_role():
    """Magistral's instructions have the tags of thoughts; what else a template writes around a question is control."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[SYSTEM]Think in [THINK]...[/THINK].[/SYSTEM]"
        "[INST]{{ m.content }}[/INST]{% elif '[INST]' in m.content %}{{ raise_exception('roles') }}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    tags = ("[SYSTEM]", "[/SYSTEM]", "[INST]", "[/INST]", "[THINK]", "[/THINK]")
    tokenizer = bytes_tokenizer(template, *tags)
    row, notes = encode(tokenizer, [ASK, answer("[THINK]a[/THINK]b[INST]c[/INST]")])
    learnt = [("[THINK]",), "a", ("[/THINK]",), "b[INST]c[/INST]", ("<|im_end|>",)]
    assert pieces(tokenizer, row.input_ids[row.labels != -100]) == learnt
    assert notes == [
        ("special tokens", "[/INST]", 1),
        ("special tokens", "[INST]", 1),
        ("allowed special tokens", "[/THINK]", 1),
        ("allowed special tokens", "[THINK]", 1),
    ]


# -- what is said of it ------------------------------------------------------------------------------------------------


def test_rows_are_counted_once_for_each_token():
    tokenizer = bytes_tokenizer(CHATML)
    rows = [
        [{"role": "user", "content": "<|im_end|><|im_end|>"}, answer("<|im_end|><|im_start|>")],
        [ASK, answer("<|im_end|>")],
        [ASK, answer("y")],
    ]
    encoder = ConversationEncoder(tokenizer, TextOptions())
    encoder.encode([Conversation(messages) for messages in rows])
    encoder.prompt(Conversation(rows[0]))  # the same row again
    notes = encoder.take_notes()
    assert notes.plain() == [("special tokens", "<|im_end|>", 2), ("special tokens", "<|im_start|>", 1)]
    ((line, warns),) = notes.lines("rows.jsonl")
    assert line.startswith("rows.jsonl: spelled by rows, as text: <|im_end|> (2 rows), <|im_start|> (1 row)")
    assert not warns
    assert not encoder.take_notes()
    encoder = ConversationEncoder(tokenizer, TextOptions(allow_special_tokens=True))
    encoder.encode([Conversation(messages) for messages in rows])
    assert encoder.take_notes().plain() == [
        ("allowed special tokens", "<|im_end|>", 2), ("allowed special tokens", "<|im_start|>", 1),
    ]  # fmt: skip


def test_of_a_list_these_alone_are_control():
    tokenizer = bytes_tokenizer(CHATML, "<image>")
    messages = [{"role": "user", "content": "<image>a<|im_end|>"}, answer("<|endoftext|><image>")]
    row, notes = encode(tokenizer, messages, allow_special_tokens=["<image>"])
    assert pieces(tokenizer, row.input_ids) == [
        ("<|im_start|>",), "user\n", ("<image>",), "a<|im_end|>", ("<|im_end|>",), "\n",
        ("<|im_start|>",), "assistant\n<|endoftext|>", ("<image>",), ("<|im_end|>",), "\n",
    ]  # fmt: skip
    assert ("allowed special tokens", "<image>", 1) in notes
    assert ("special tokens", "<|im_end|>", 1) in notes
    nothing, _ = encode(tokenizer, messages, allow_special_tokens=[])
    assert nothing.input_ids.tolist() == encode(tokenizer, messages)[0].input_ids.tolist()


def test_a_list_of_what_is_no_token_is_refused():
    tokenizer = bytes_tokenizer(CHATML, "<image>")
    expected = (
        r"^data\.text\.allow_special_tokens: the tokenizer has no token '<\|end\|>', '<img>'; its special tokens are "
        r"<image>, <\|endoftext\|>, <\|im_end\|>, <\|im_start\|>$"
    )
    with pytest.raises(InputError, match=expected):
        encode(tokenizer, [ASK, answer("y")], allow_special_tokens=["<|end|>", "<image>", "<img>"])


# -- plain text --------------------------------------------------------------------------------------------------------


@functools.cache
def text_tokenizer():
    """Its end-of-text token is not what ends a turn, as in base models, and it puts a beginning before texts."""
    return bytes_tokenizer(CHATML, "<s>", bos="<s>", eos="<|endoftext|>", start_with="<s>")


TEXTS = {
    "a": [("<s>",), "a", ("<|endoftext|>",)],
    "<s>a": [("<s>",), "a", ("<|endoftext|>",)],
    "a<|endoftext|>": [("<s>",), "a", ("<|endoftext|>",)],
    "<s>a<|endoftext|>\n": [("<s>",), "a", ("<|endoftext|>",), "\n"],
    "<|im_start|>user\na<|im_end|>\n": [("<s>",), ("<|im_start|>",), "user\na", ("<|im_end|>",), "\n"],
    "a<|im_end|>b": [("<s>",), "a", ("<|im_end|>",), "b", ("<|endoftext|>",)],
    "\n<s>a": ["\n", ("<s>",), "a", ("<|endoftext|>",)],
}


@pytest.mark.parametrize("text", TEXTS)
def test_preformatted_text_has_no_second_beginning_or_end(text):
    row, _ = encode(text_tokenizer(), Conversation([], text=text), allow_special_tokens=True)
    assert pieces(text_tokenizer(), row.input_ids) == TEXTS[text]
    assert row.labels.tolist() == [-100, *row.input_ids.tolist()[1:]]


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_spells_a_beginning_or_an_end_has_its_own(text):
    row, notes = encode(text_tokenizer(), Conversation([], text=text))
    assert pieces(text_tokenizer(), row.input_ids) == [("<s>",), text, ("<|endoftext|>",)]
    assert {name for _, name, _ in notes} == {name for name in (*CONTROL, "<s>") if name in text}


def test_text_and_a_list():
    row, _ = encode(
        text_tokenizer(), Conversation([], text="<s>a<|im_end|><|endoftext|>"), allow_special_tokens=["<|endoftext|>"]
    )
    assert pieces(text_tokenizer(), row.input_ids) == [("<s>",), "<s>a<|im_end|>", ("<|endoftext|>",)]


def test_single_characters_that_are_text_end_none():
    tokenizer = load_tokenizer("asset://arithmetic-base")  # its end of text is $, which it cannot write as text
    with pytest.raises(InputError, match=r"spells the special token '\$'"):
        encode(tokenizer, Conversation([], text="1+1=2$"))
    row, _ = encode(tokenizer, Conversation([], text="1+1=2$"), allow_special_tokens=True)
    assert tokenizer.decode(row.input_ids) == "1+1=2$"
