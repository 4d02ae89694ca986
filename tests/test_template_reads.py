"""What a chat template leaves out, which variables it reads, and the day that it writes."""

from __future__ import annotations

import datetime
import pickle
from types import SimpleNamespace

import pytest

from dft_lightning.data.options import TextOptions
from dft_lightning.data.rows.forms import Conversation
from dft_lightning.data.text import rendering
from dft_lightning.data.text.template import ChatTemplate
from dft_lightning.data.text.tokens import ConversationEncoder
from dft_lightning.errors import InputError
from stand_ins import CHATML, MARKED
from test_special_tokens import ASK, answer, bytes_tokenizer

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Oslo"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "It.", "parameters": {"type": "object"}}}]


def encoder_of(template, **options):
    return ConversationEncoder(bytes_tokenizer(template), TextOptions(**options))


def notes(template, *conversations, **options):
    encoder = encoder_of(template, **options)
    for row in encoder.encode(conversations):
        assert not isinstance(row, InputError), row
    return encoder.take_notes().plain()


def text(template, conversation, **options):
    return ChatTemplate(bytes_tokenizer(template), TextOptions(**options)).rows(conversation)[0].text


# -- what is left out --------------------------------------------------------------------------------------------------

WRITES = CHATML.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content | trim }}</think>{% endif %}{{ m.content }}",
)
LAST = WRITES.replace("if m.reasoning_content", "if m.reasoning_content and loop.last")  # as Qwen3's
ESCAPES = WRITES.replace("m.reasoning_content | trim", "m.reasoning_content | tojson")
WITH_CALLS = WRITES.replace("if m.reasoning_content", "if m.reasoning_content and m.tool_calls")
THOUGHT = answer("Yes.", reasoning_content=' "hm"\n')


@pytest.mark.parametrize("template", [WRITES, LAST, ESCAPES])
def test_thoughts_that_are_written_are_not_named(template):
    assert notes(template, Conversation([ASK, THOUGHT])) == []


@pytest.mark.parametrize("template", [CHATML, MARKED, WITH_CALLS])
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_that_are_left_out_are_named_with_the_way_out(template, key):
    row = Conversation([ASK, answer("Yes.", **{key: "hm"})])
    encoder = encoder_of(template)
    encoder.encode([row, Conversation([ASK, answer("Yes.")]), row])
    ((line, warns),) = encoder.take_notes().lines("rows.jsonl")
    assert line == (
        f"rows.jsonl: the chat template leaves out {key} (2 rows): set data.text.chat_template to one that writes them "
        "(a thought may also stand in the content, as <think>...</think>)"
    )
    assert warns


def test_rows_of_the_same_roles_and_other_columns():
    with_tools = "{{ tools | tojson }}" + ESCAPES.replace("if m.reasoning_content", "if m.reasoning_content and tools")
    left_out, written = Conversation([ASK, THOUGHT]), Conversation([ASK, THOUGHT], TOOLS)
    assert notes(with_tools, left_out, written) == [("dropped", "reasoning_content", 1)]
    assert notes(with_tools.replace("and tools", "and not tools"), left_out, written) == [
        ("dropped", "reasoning_content", 1)
    ]


def test_of_earlier_turns_only_learnt_thoughts_are_asked_for():
    """Templates of thinking models take them out."""
    other = answer("Yes.", reasoning_content="well")
    earlier = [ASK, {**other, "weight": 0.0}, ASK, THOUGHT]
    assert notes(LAST, Conversation(earlier)) == []
    marked = LAST.replace(
        "{{ m.content }}<",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<",
    )
    assert ("dropped", "reasoning_content", 1) in notes(marked, Conversation([ASK, other, ASK, THOUGHT]))


def test_thoughts_that_say_what_the_answer_does_are_named_too():
    assert notes(CHATML, Conversation([ASK, answer("It is Oslo.", reasoning_content="Oslo")])) == [
        ("dropped", "reasoning_content", 1)
    ]
    assert notes(CHATML, Conversation([ASK, answer("Oslo", reasoning_content=" \n")])) == []


def test_thoughts_within_contents_that_a_marked_template_takes_out_are_named():
    """Of a learnt turn before others: what is left is written."""
    marked = MARKED.replace(
        "{% generation %}{{ m.content }}",
        "{% generation %}{{ m.content.split('</think>')[-1] if not loop.last else m.content }}",
    )
    turns = [ASK, answer("<think>\nwell\n</think>1"), ASK, answer("<think>hm</think>2")]
    assert notes(marked, Conversation(turns)) == [("dropped", "thoughts in contents", 1)]
    turns[1] = answer("<think>\n</think>1")
    assert notes(marked, Conversation(turns)) == []
    turns[1] = answer("<think>hm</think>1", weight=0.0)
    assert notes(marked, Conversation(turns)) == []
    upper = CHATML.replace("{{ m.content }}", "{{ m.content | replace('well', 'WELL') }}")
    assert notes(upper, Conversation([ASK, answer("<think>so well</think>1")])) == []


def test_tools_that_are_left_out_are_named():
    row = Conversation([{"role": "user", "content": "weather"}, answer("weather")], TOOLS)
    assert notes(CHATML, row, row) == [("dropped", "tools", 2)]
    assert notes("{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML, row) == []
    # By their names alone, or for a part of the rows.
    named = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    assert notes(named + CHATML, row) == []
    system = "{% if messages[0].role == 'system' %}" + named + "{% endif %}" + CHATML
    assert notes(system, row, Conversation([{"role": "system", "content": "x"}, *row.messages], TOOLS)) == [
        ("dropped", "tools", 1)
    ]


@pytest.mark.parametrize("role", ["system", "tool", "assistant"])
def test_contents_that_are_left_out_are_named(role):
    call = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}
    messages = [{"role": "system", "content": "Be brief."}, ASK, call, {"role": "tool", "content": 'a "b"\nc'}]
    messages.append(answer("Wet."))
    write = "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ m.content | tojson }}"
    whole = CHATML.replace("{{ m.content }}", write)
    assert notes(whole, Conversation(messages)) == []
    leaves = "m.role == 'assistant' and m.tool_calls" if role == "assistant" else f"m.role == '{role}'"
    without = whole.replace("{{ m.content | tojson }}", f"{{% if not ({leaves}) %}}{{{{ m.content }}}}{{% endif %}}")
    assert notes(without, Conversation(messages)) == [("dropped", f"content of {role} messages", 1)]


def test_a_conversation_of_many_steps_is_probed_by_one_rendering(monkeypatch):
    encoder = encoder_of(MARKED)
    steps = [ASK, answer("Yes.", reasoning_content="hm")] * 60
    before = []
    render = rendering.Rendering._render
    monkeypatch.setattr(rendering.Rendering, "_render", lambda self, *a, **k: before.append(1) or render(self, *a, **k))
    encoder.encode([Conversation(steps)])
    assert len(before) <= 3
    assert encoder.take_notes().plain() == [("dropped", "reasoning_content", 1)]


# -- variables ---------------------------------------------------------------------------------------------------------

STYLED = "{% if style is defined %}[{{ style }}]{% endif %}{% if loud %}!{% endif %}" + CHATML


def test_a_rows_own_variables_are_for_the_row():
    turns = [ASK, answer("y")]
    template = ChatTemplate(bytes_tokenizer(STYLED), TextOptions(chat_template_kwargs={"style": "a", "loud": True}))
    rows = [None, {"style": "b"}, None, {"loud": False}, {"style": "b"}, {}]
    found = [Conversation(turns, template_kwargs=own) for own in rows]
    expected = ["[a]!", "[b]!", "[a]!", "[a]", "[b]!", "[a]!"]
    for row, beginning in zip(found, expected, strict=True):
        assert template.rows(row)[0].text == beginning + text(CHATML, Conversation(turns))
        assert template.prompt(row).text == beginning + template.prompt(Conversation(turns)).text[len("[a]!") :]
    assert template.notes.plain() == []


def test_many_rows_with_variables_of_their_own():
    template = ChatTemplate(bytes_tokenizer(STYLED), TextOptions())
    for i in range(250):
        (found,) = template.rows(Conversation([ASK, answer("y")], template_kwargs={"style": i}))
        assert found.text.startswith(f"[{i}]<|im_start|>")
    assert len(template._variants) <= 100


def test_variables_that_are_not_read_are_named():
    row = Conversation([ASK, answer("y")])
    own = Conversation([ASK, answer("y")], template_kwargs={"style": "b", "stile": "c"})
    assert notes(STYLED, row, own) == [("unread variables", "stile", 1)]
    assert notes(STYLED, row, own, chat_template_kwargs={"lout": True, "loud": True}) == [
        ("unread variables", "lout", 2), ("unread variables", "stile", 1),
    ]  # fmt: skip
    encoder = encoder_of(STYLED)
    for _ in range(2):  # notes that were taken are gone
        encoder.encode([row, own])
        assert encoder.take_notes().plain() == [("unread variables", "stile", 1)]
    # One that is set in the template where it is not given is read.
    assert notes("{% set style = style | default('x') %}" + STYLED, own) == [("unread variables", "stile", 1)]
    assert notes("{% set stile = 'x' %}style" + CHATML, own) == [
        ("unread variables", "stile", 1), ("unread variables", "style", 1),
    ]  # fmt: skip
    marked = MARKED.replace("{% generation %}", "{% generation %}{{ style }}")
    assert notes(marked, own) == [("unread variables", "stile", 1)]


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "chat_template"])
def test_variables_that_every_template_is_given_are_refused(name):
    with pytest.raises(InputError, match=rf"^data\.text\.chat_template_kwargs: {name}: .*leave it out"):
        encoder_of(CHATML, chat_template_kwargs={name: []})
    (row,) = encoder_of(CHATML).encode([Conversation([ASK, answer("y")], template_kwargs={name: []})])
    assert str(row).startswith(f"chat_template_kwargs: {name}: ")


# -- the day -----------------------------------------------------------------------------------------------------------

DAY = datetime.date(2024, 2, 29)
LLAMA = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today Date: {{ date_string }}\n\n" + CHATML
)
DATED = {
    "always": (LLAMA, "Today Date: 29 Feb 2024\n\n"),
    "without a system message": (
        "{% set today = strftime_now('%Y-%m-%d') %}{% if messages[0].role != 'system' %}{{ today }}{% endif %}"
        + CHATML,
        "2024-02-29",
    ),
    "if it can": ("{% if strftime_now is defined %}{{ strftime_now('%A') }}{% endif %}" + CHATML, "Thursday"),
    "by the hour": ("{{ strftime_now('%d/%m %H:%M:%S') }}" + CHATML, "29/02 00:00:00"),
    "marked": ("{{ strftime_now('%j') }}" + MARKED, "060"),
}
TURNS = Conversation([ASK, answer("y")])


class Clock(datetime.date):
    today_is = DAY

    @classmethod
    def today(cls):
        return cls.today_is


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(rendering, "datetime", SimpleNamespace(date=Clock))
    monkeypatch.setattr(Clock, "today_is", DAY)
    return Clock


@pytest.mark.parametrize("name", DATED)
def test_the_day_is_one_for_all_rows(clock, monkeypatch, name):
    template, beginning = DATED[name]
    encoder = encoder_of(template)
    assert encoder.template.date == DAY
    monkeypatch.setattr(clock, "today_is", DAY + datetime.timedelta(1))  # a run over midnight
    expected = beginning + text(CHATML, TURNS)
    assert encoder.template.rows(TURNS)[0].text == expected
    assert encoder.template.prompt(TURNS).text.startswith(beginning)
    assert pickle.loads(pickle.dumps(encoder.template)).rows(TURNS)[0].text == expected
    assert text(template, TURNS) != expected
    assert text(template, TURNS, date="2024-02-29") == expected
    pinned = ChatTemplate(bytes_tokenizer(template), TextOptions(date="2024-02-29"))
    assert pinned.date == DAY


def test_others_are_told_their_own_day():
    """The template is compiled once in a process, for all who render it."""
    encoder = encoder_of(LLAMA, date="1999-12-31")
    assert encoder.template.rows(TURNS)[0].text.startswith("Today Date: 31 Dec 1999")
    today = datetime.datetime.now().strftime("%d %b %Y")
    found = bytes_tokenizer(LLAMA).apply_chat_template(TURNS.messages, tokenize=False)
    assert found.startswith("Today Date: ")
    assert today in found or datetime.datetime.now().strftime("%d %b %Y") in found  # at midnight
    assert encoder.template.rows(TURNS)[0].text.startswith("Today Date: 31 Dec 1999")


@pytest.mark.parametrize(
    ("template", "options"),
    [
        (CHATML, {}),
        (CHATML.replace("{% for", "strftime_now {# strftime_now('%d') #}{% for"), {}),
        (LLAMA, {"chat_template_kwargs": {"date_string": "26 Jul 2024"}}),
    ],
    ids=["none", "in words alone", "a variable's"],
)
def test_templates_that_write_no_day(template, options):
    assert encoder_of(template, **options).template.date is None
    with pytest.raises(InputError, match=r"^data\.text\.date: the chat template writes no day"):
        encoder_of(template, date="2024-02-29", **options)


def test_a_rows_own_day_is_for_the_row():
    template = ChatTemplate(bytes_tokenizer(LLAMA), TextOptions(date="2024-02-29"))
    own = Conversation(TURNS.messages, template_kwargs={"date_string": "yesterday"})
    assert template.rows(own)[0].text.startswith("Today Date: yesterday\n")
    assert template.rows(TURNS)[0].text.startswith("Today Date: 29 Feb 2024\n")


def test_a_day_that_no_probe_finds_is_refused_and_not_kept():
    hidden = "{% if 'when' in messages[0].content %}{{ strftime_now('%d') }}{% endif %}" + CHATML
    encoder = encoder_of(hidden)
    assert encoder.template.date is None
    other, row = encoder.encode([TURNS, Conversation([{"role": "user", "content": "when?"}, answer("now")])])
    assert not isinstance(other, InputError)
    assert str(row).startswith("the chat template writes the day into rows of this kind")
