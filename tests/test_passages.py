"""Which characters and tokens are learnt, by templates that make it hard to tell. What is expected is written out."""

from __future__ import annotations

import re

import pytest
from tokenizers import AddedToken, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dft_lightning.data.options import TextOptions
from dft_lightning.data.rows.forms import Conversation
from dft_lightning.data.text import layout
from dft_lightning.data.text.template import ChatTemplate
from dft_lightning.data.text.template_source import copies_contents, has_marks, marks_in_place
from dft_lightning.data.text.tokens import ConversationEncoder, attempt
from dft_lightning.errors import InputError
from stand_ins import CHATML, MARKED, byte_level
from test_special_tokens import ASK, answer, bytes_tokenizer

TURNS = [ASK, answer("Yes."), ASK, answer("No.")]


def learnt(template, messages=TURNS, **options):
    """By row."""
    rows = ChatTemplate(bytes_tokenizer(template), TextOptions(**options)).rows(Conversation(messages))
    return [[row.text[span.start : span.end] for span in row.spans] for row in rows]


# -- marks -------------------------------------------------------------------------------------------------------------

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
MARKED_TURN = (
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}"
)
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LOOP = "{% for m in messages %}TURN{% endfor %}"
# Ways to write a turn elsewhere first, where transformers' places are those of another text.
ELSEWHERE = {
    "macro": "{% macro turn(m) %}TURN{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "set": "{% for m in messages %}{% set turn %}TURN{% endset %}{{ turn }}{% endfor %}",
    "set of all": "{% set all %}{% for m in messages %}TURN{% endfor %}{% endset %}{{ all }}",
    "filter": "{% for m in messages %}{% filter replace('#', '+') %}TURN{% endfilter %}{% endfor %}",
    "call": (
        "{% macro say() %}{{ caller() }}{% endmacro %}"
        "{% for m in messages %}{% call say() %}TURN{% endcall %}{% endfor %}"
    ),
    "recursive": "{% for m in messages recursive %}TURN{% endfor %}",
    "trimmed": "{% for m in messages %}{% set turn %}TURN{% endset %}{{ turn | trim }}{{ '\n' }}{% endfor %}",
}


@pytest.mark.parametrize("way", ELSEWHERE)
@pytest.mark.parametrize("dashes", [("", ""), ("-", "-"), ("-", ""), ("", "-")])
def test_marks_in_what_is_written_elsewhere_first(way, dashes):
    marked = MARKED_TURN.replace("{% gen", f"{{%{dashes[0]} gen").replace("{% endgen", f"{{%{dashes[1]} endgen")
    template = ELSEWHERE[way].replace("TURN", marked) + PROMPT
    assert has_marks(template)
    assert not marks_in_place(template)
    assert learnt(template) == [["Yes.<|im_end|>", "No.<|im_end|>"]]
    assert learnt(template, [ASK, answer(" 1\n")]) == [[" 1\n<|im_end|>"]]
    plain = ELSEWHERE[way].replace("TURN", TURN) + PROMPT
    found = ChatTemplate(bytes_tokenizer(template)).rows(Conversation(TURNS))
    assert [row.text for row in found] == [ChatTemplate(bytes_tokenizer(plain)).rows(Conversation(TURNS))[0].text]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% filter upper %}TURN{% endfilter %}{% endfor %}",
        "{% for m in messages %}{% set turn %}TURN{% endset %}{{ turn | length }}{% endfor %}",
        "{% for m in messages %}{% set turn %}TURN{% endset %}{{ turn[:-8] }}{% endfor %}",
        "{% for m in messages %}{% set turn %}TURN{% endset %}{{ turn | reverse }}{% endfor %}",
        "{% for m in messages %}{% set turn %}TURN{% endset %}{{ turn | replace('Yes.<', 'Y<') }}{% endfor %}",
        "{% for m in messages %}{% set turn %}{% generation %} {{ m.content }} {% endgeneration %}{% endset %}"
        "{{ turn | trim }}{% endfor %}",
    ],
)
def test_marks_that_cannot_be_followed_are_refused_or_right(template):
    """Never is anything else learnt than what was marked."""
    found = attempt(lambda whole: learnt(whole, [ASK, answer("Yes.")]), template.replace("TURN", MARKED_TURN) + PROMPT)
    if isinstance(found, InputError):
        assert re.search(
            r"({% generation %}|leaves out what the assistant says).*set data\.text\.chat_template", str(found)
        )
    else:
        assert found in ([["Yes.<|im_end|>"]], [["Y<|im_end|>"]])


def test_a_private_character_of_a_row_is_no_mark():
    template = ELSEWHERE["macro"].replace("TURN", MARKED_TURN) + PROMPT
    for content in ("\uf8f4", "a\uf8f4b\uf8f5c", "\uf8f5"):
        with pytest.raises(InputError, match="cannot be followed"):
            learnt(template, [ASK, answer(content)])
    assert learnt(MARKED, [ASK, answer("a\uf8f4b\uf8f5c")]) == [["a\uf8f4b\uf8f5c<|im_end|>"]]


def test_the_tag_in_a_comment_or_a_text_marks_nothing():
    assert not has_marks("{# by {% generation %} #}" + CHATML)
    assert learnt("{# by {% generation %} #}" + CHATML) == [["Yes.<|im_end|>", "No.<|im_end|>"]]
    assert not has_marks("{% autoescape false %}" + CHATML + "{% endautoescape %}")


def test_a_marked_row_begins_with_its_prompt():
    """What the prompt has of a block is not learnt, in no turn; and a row that has another beginning is refused."""
    header = MARKED_TURN.replace("<|im_start|>{{ m.role }}\n{% if", "{% if").replace(
        "{% generation %}", "{% generation %}<|im_start|>assistant\n"
    )
    header = header.replace("{% else %}", "{% else %}<|im_start|>{{ m.role }}\n")
    assert learnt(LOOP.replace("TURN", header) + PROMPT) == [["Yes.<|im_end|>", "No.<|im_end|>"]]
    thinks = LOOP.replace("TURN", MARKED_TURN) + PROMPT.replace("assistant\n", "assistant\n<think>")
    with pytest.raises(InputError, match=r"turn 4 does not begin with the generation prompt.* it has '<think>' there"):
        learnt(thinks)
    with pytest.raises(InputError, match=r"turn 2 does not begin with the generation prompt"):
        learnt(thinks, [*TURNS[:2], ASK, answer("No.", weight=0.0)])
    assert learnt(thinks, [ASK, answer("<think>hm</think>")]) == [["hm</think><|im_end|>"]]
    assert learnt(thinks, [ASK, answer("No.", weight=0.0)]) == [[]]


# In two pieces apart from each other, and of the last turn alone.
PIECES = LOOP.replace(
    "TURN",
    MARKED_TURN.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last").replace(
        "{{ m.content }}<|im_end|>{% endgeneration %}",
        "{{ m.content.split('|')[0] }}{% endgeneration %}|{% generation %}{{ m.content.split('|')[1] }}<|im_end|>"
        "{% endgeneration %}",
    ),
)


def test_passages_of_the_last_turn_are_not_taken_for_one_of_each():
    """Though they are as many as the turns; and earlier turns make rows of their own."""
    first, second = answer("A|B", weight=0.5), answer("C|D", weight=2.0)
    for earlier in (ASK, answer("A|B", weight=0.0)):
        template = ChatTemplate(bytes_tokenizer(PIECES + PROMPT))
        (row,) = template.rows(Conversation([ASK, earlier, ASK, second]))
        assert [(row.text[s.start : s.end], s.weight) for s in row.spans] == [("C", 2.0), ("D<|im_end|>", 2.0)]
    found = ChatTemplate(bytes_tokenizer(PIECES + PROMPT)).rows(Conversation([ASK, first, ASK, second]))
    assert [[(row.text[s.start : s.end], s.weight) for s in row.spans] for row in found] == [
        [("A", 0.5), ("B<|im_end|>", 0.5)],
        [("C", 2.0), ("D<|im_end|>", 2.0)],
    ]
    assert learnt(PIECES + PROMPT, [ASK, answer("A|B"), ASK, answer("C|D")], train_turns="last") == [
        ["C", "D<|im_end|>"]
    ]


def test_pieces_that_cannot_be_told_apart_are_refused():
    """Two of the second turn, one of the third, none of the first, which is not learnt."""
    third = PIECES.replace("and loop.last %}", "and loop.index == 4 %}").replace(
        "{% else %}", "{% elif loop.last %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    )
    turns = [ASK, answer("A|B", weight=0.0), ASK, answer("C|D"), ASK, answer("E")]
    with pytest.raises(
        InputError, match=r"marks pieces of assistant messages .* give them one weight, or set data\.text"
    ):
        learnt(third + PROMPT, turns)


@pytest.mark.parametrize(
    ("when", "rows"),
    [("loop.last", [["Yes.<|im_end|>"], ["No.<|im_end|>"]]), ("loop.first", "nothing of turn 2"), ("false", "nothing")],
)
def test_turns_that_are_not_marked_are_not_lost(when, rows):
    marks = MARKED_TURN.replace("m.role == 'assistant'", f"m.role == 'assistant' and {when}")
    template = LOOP.replace("TURN", marks) + PROMPT
    if isinstance(rows, list):
        assert learnt(template) == rows
        return
    for turns in (TURNS, TURNS[:2]):
        with pytest.raises(InputError, match=rf"marks {rows}.* set data\.text\.chat_template"):
            learnt(template, turns)


@pytest.mark.parametrize(
    "turn",
    [
        "{% generation %}TURN{% endgeneration %}",
        "{% if loop.first %}{% generation %}TURN{% endgeneration %}{% else %}TURN{% endif %}",
    ],
    ids=["all", "the question"],
)
def test_marks_of_what_others_say_are_refused(turn):
    template = LOOP.replace("TURN", turn.replace("TURN", TURN)) + PROMPT
    with pytest.raises(InputError, match=r"marks more than an assistant's turn.* set data\.text\.chat_template"):
        learnt(template)


@pytest.mark.parametrize("marked", ["default", "tool_use"])
def test_of_several_templates_each_is_masked_in_its_own_way(marked):
    tools = [{"type": "function", "function": {"name": "look", "description": "x", "parameters": {"type": "object"}}}]
    tokenizer = bytes_tokenizer(CHATML)
    tokenizer.chat_template = {
        name: (MARKED if name == marked else CHATML).replace("{% for", "{{ tools | tojson if tools }}{% for", 1)
        for name in ("default", "tool_use")
    }
    for given in (None, tools):
        (row,) = ChatTemplate(tokenizer).rows(Conversation(TURNS, given))
        assert [row.text[s.start : s.end] for s in row.spans] == ["Yes.<|im_end|>", "No.<|im_end|>"]
        assert ("look" in row.text) == bool(given)


def test_a_turn_is_learnt_through_its_end():
    """Though the block leaves out that, and a line break before."""
    for between in ("", "{{ '\n' }}", "{{ ' \n\n' }}"):
        marks = MARKED_TURN.replace("<|im_end|>{% endgeneration %}", f"{{% endgeneration %}}{between}<|im_end|>")
        white = between[4:-4].replace("\\n", "\n")
        assert learnt(LOOP.replace("TURN", marks) + PROMPT) == [[f"Yes.{white}<|im_end|>", f"No.{white}<|im_end|>"]]


# -- layouts -----------------------------------------------------------------------------------------------------------

# Each with what a row of white space and tags has, which another row's layout has not.
FOOLING = {
    "get": LOOP.replace("TURN", TURN.replace("m.content", "m.get('content') | trim")),
    "values": LOOP.replace(
        "TURN", TURN.replace("{{ m.content }}", "{% for v in m.values() %}{{ v | trim if not loop.first }}{% endfor %}")
    ),
    "filter": LOOP.replace("TURN", TURN.replace("{{ m.content }}", "{% filter trim %}{{ m.content }}{% endfilter %}")),
    "set": LOOP.replace(
        "TURN", TURN.replace("{{ m.content }}", "{% set c %}{{ m.content }}{% endset %}{{ c | trim }}")
    ),
    "call": "{% macro say() %}{{ caller() | trim }}{% endmacro %}"
    + LOOP.replace("TURN", TURN.replace("{{ m.content }}", "{% call say() %}{{ m.content }}{% endcall %}")),
    "macro": "{% macro say(c) %}{{ c | trim }}{% endmacro %}"
    + LOOP.replace("TURN", TURN.replace("{{ m.content }}", "{{ say(m.content) }}")),
    "before": LOOP.replace(
        "TURN",
        TURN.replace(
            "{{ m.content }}", "{{ m.content if not loop.previtem else (m | attr('get'))('content') | trim }}"
        ),
    ),
}


@pytest.mark.parametrize("way", FOOLING)
def test_layouts_are_not_fooled(way, monkeypatch):
    template = FOOLING[way] + PROMPT
    assert not copies_contents(template)
    assert copies_contents(LOOP.replace("TURN", TURN) + PROMPT)
    monkeypatch.setattr(layout, "_SAMPLE", 1)
    found = ChatTemplate(bytes_tokenizer(template))
    for content in ("Yes.", "Yes.", " Yes.", "No.\n", "\t", "Yes."):
        asked, answered = {"role": "user", "content": "x"}, answer(content)
        (row,) = found.rows(Conversation([asked, answered]))
        assert row.text == f"<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n{content.strip()}<|im_end|>\n"
        assert [row.text[span.start : span.end] for span in row.spans] == [f"{content.strip()}<|im_end|>"]


def test_a_text_that_is_not_its_layouts_is_found_in_every_row(monkeypatch):
    monkeypatch.setattr(layout, "_SAMPLE", 1)
    found = ChatTemplate(bytes_tokenizer(LOOP.replace("TURN", TURN.replace("m.content", "m.content[:20]")) + PROMPT))
    for content in ("Yes.", "No.", "Well, no. " * 3 + "Yes."):
        (row,) = found.rows(Conversation([ASK, answer(content)]))
        assert [row.text[span.start : span.end] for span in row.spans] == [f"{content[:20]}<|im_end|>"]


def test_a_sample_of_rows_tells_prompts_that_depend_on_contents():
    """Their text is the layout's, but not what generation starts from."""
    asks = PROMPT.replace("assistant\n", "assistant\n{{ '<think>' if messages[-1].content | length > 2 }}")
    template = ChatTemplate(bytes_tokenizer(LOOP.replace("TURN", TURN) + asks))
    (row,) = template.rows(Conversation([ASK, answer("Yes.")]))
    assert [row.text[span.start : span.end] for span in row.spans] == ["Yes.<|im_end|>"]
    with pytest.raises(InputError, match="turn 2 does not begin with the generation prompt"):
        template.rows(Conversation([{**ASK, "content": "longer"}, answer("Yes.")]))
    # A word that the template looks for is enough, however many rows went before.
    asks = PROMPT.replace("assistant\n", "assistant\n{{ '<think>' if '/think' in messages[-1].content }}")
    template = ChatTemplate(bytes_tokenizer(LOOP.replace("TURN", TURN) + asks))
    for _ in range(60):
        template.rows(Conversation([ASK, answer("Yes.")]))
    with pytest.raises(InputError, match="turn 2 does not begin with the generation prompt"):
        template.rows(Conversation([{**ASK, "content": "well /think on"}, answer("Yes.")]))


# -- tokens ------------------------------------------------------------------------------------------------------------


def stripping(**options):
    """A tokenizer whose header tokens take white space with them, as Phi-3's do, and a template of such."""
    made = byte_level(special=("<|end|>", "<|endoftext|>"))
    made.add_special_tokens(
        [AddedToken(f"<|{role}|>", special=True, normalized=False, **options) for role in ("user", "assistant")]
    )
    template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", chat_template=template)


@pytest.mark.parametrize("spelled", ["", "<|user|>"], ids=["", "special tokens in rows"])
@pytest.mark.parametrize("content", ["x = 1", "    x = 1", "\n\nx", " "])
def test_a_token_of_the_prompt_is_no_target(content, spelled):
    """Though it takes the answer's white space."""
    tokenizer = stripping(rstrip=True)
    ((row,),) = ConversationEncoder(tokenizer).encode(
        [Conversation([{**ASK, "content": "x" + spelled}, answer(content)])]
    )
    tokens = tokenizer.convert_ids_to_tokens(row.input_ids[row.labels != -100].tolist())
    if content.strip():
        assert tokenizer.decode(row.labels[row.labels != -100].tolist()) == f"{content.lstrip()}<|end|>"
    assert "<|assistant|>" not in tokens
    assert tokens[-1] == "<|end|>"
    header = row.input_ids.tolist().index(tokenizer.convert_tokens_to_ids("<|assistant|>"))
    assert row.labels[header] == -100
    assert (row.labels[header + 1 :][: len(tokens)] != -100).all()


@pytest.mark.parametrize("white", [1, 2, 3])
def test_a_space_before_a_text_does_not_make_up_for_one_that_a_token_takes(white):
    """Two are put in, before words behind added tokens, and some are taken: the sizes may agree."""
    tokenizer = stripping(rstrip=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("\n", "")
    turns = [ASK, answer(" " * white + "a")]
    ((row,),) = ConversationEncoder(tokenizer).encode([Conversation(turns)])
    assert tokenizer.convert_ids_to_tokens(row.labels[row.labels != -100].tolist()) in (
        ["Ġa", "<|end|>"],
        ["Ġ", "a", "<|end|>"],
    )


def test_a_token_of_the_next_turn_is_no_target():
    """Though it takes white space of the answer before it; there is no token that ends turns here."""
    tokenizer = stripping(lstrip=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>\n", "")
    turns = [ASK, answer("Yes. \n"), ASK, answer("No.")]
    ((row,),) = ConversationEncoder(tokenizer).encode([Conversation(turns)])
    assert tokenizer.decode(row.labels[row.labels != -100].tolist()) == "Yes.No."


def test_an_ordinary_token_that_straddles_the_border_is_a_target():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<|im_end|>", chat_template=CHATML)
    ((row,),) = ConversationEncoder(tokenizer).encode([Conversation([ASK, answer("   \n\n  x")])])
    (first, *_) = tokenizer.convert_ids_to_tokens(row.labels[row.labels != -100].tolist())
    assert first.startswith("ĊĠ")  # the line break of the header with the answer's spaces
