"""Columns and keys of rows: those that mean something are read, and what nobody reads is said."""

from __future__ import annotations

import datetime
import decimal
import json
from dataclasses import asdict

import pytest

from dft_lightning.data.notes import Notes
from dft_lightning.data.options import RowOptions
from dft_lightning.data.rows.checks import BadRow
from dft_lightning.data.rows.forms import Conversation, Reading
from dft_lightning.data.rows.reading import RowReader, dump_conversation, load_conversation
from dft_lightning.data.rows.sources import RowSource
from dft_lightning.sampling.prompts import question_of

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}
ADD = {"name": "add", "arguments": {"a": 1}}
CALL = {"type": "function", "function": ADD}
SCHEMA = {"name": "add", "parameters": {"type": "object", "properties": {}}}


class Rows(RowSource):
    def __init__(self, rows=()):
        self.given = rows

    def rows(self):
        return iter(enumerate(self.given, start=1))


def reader(last_turn="any", **options):
    return RowReader(Rows(), Reading(RowOptions(**options), last_turn))


def read(row, last_turn="any", **options):
    found = reader(last_turn, **options).convert(0, row)
    assert isinstance(found, Conversation), found
    assert load_conversation(dump_conversation(found)) == found
    return found


def refusal(row, last_turn="any", **options):
    found = reader(last_turn, **options).convert(0, row)
    assert isinstance(found, BadRow), found
    return str(found)


def noted(*rows, **options):
    found = reader(**options)
    for row in rows:
        assert isinstance(found.convert(0, row), Conversation)
    return sorted(found.notes[0].plain())


def turns(*messages, **columns):
    return {"messages": list(messages), **columns}


def shares(*pairs, **columns):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in pairs], **columns}


# -- whether a turn is learnt ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["loss", "train"])
@pytest.mark.parametrize(
    ("values", "weight"),
    [
        ({"": False}, 0),
        ({"": 0}, 0),
        ({"": True}, None),
        ({"": None}, None),
        ({"": True, "weight": 0.5}, 0.5),
        ({"": False, "weight": 0}, 0),
    ],
)
def test_a_turn_says_whether_it_is_learnt(key, values, weight):
    values = {name or key: value for name, value in values.items()}
    first = read(turns(USER, {**ANSWER, **values}, USER, ANSWER)).messages[1]
    assert first == (ANSWER if weight is None else {**ANSWER, "weight": weight})
    shared = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", **values}]}
    assert read(shared).messages == [USER, first]
    assert read(turns(USER, {**ANSWER, **values}, weight=4)).messages[1]["weight"] == (
        4 if weight is None else 4 * weight
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"loss": False, "weight": 1}, "messages[1].loss: false, and its weight is 1: leave one out"),
        ({"train": True, "weight": 0}, "messages[1].train: true, and its weight is 0: leave one out"),
        ({"loss": True, "train": False}, "messages[1].train: false, and its weight is 1: leave one out"),
        ({"loss": "no"}, "messages[1].loss: expected true or false, got 'no'"),
        ({"train": 0.5}, "messages[1].train: expected true or false, got 0.5"),
        ({"loss": [False]}, "messages[1].loss: expected true or false, got list"),
    ],
)
def test_turns_that_contradict_themselves(values, expected):
    assert refusal(turns(USER, {**ANSWER, **values})) == expected


@pytest.mark.parametrize("values", [{"loss": True}, {"train": 1}, {"weight": 0.5}])
def test_turns_of_others_cannot_be_learnt_which_is_said(values):
    row = turns({**USER, **values}, ANSWER)
    assert read(row).messages == [USER, ANSWER]
    assert noted(row) == [("steering", "a weight of messages of role user", 1)]
    assert noted(turns({**USER, **dict.fromkeys(values, 0)}, ANSWER)) == []


def part(text, **keys):
    return {"type": "text", "text": text, **keys}


def test_parts_have_weights_by_their_characters():
    content = [part("Hel", weight=1), part("lo", weight=0.5), part(" you"), part("", weight=3), part("!", train=False)]
    assert read(turns(USER, {**ANSWER, "content": content})).messages[1] == {
        "role": "assistant",
        "content": "Hello you!",
        "content_weights": [[3, 5, 0.5], [9, 10, 0.0]],
    }
    assert read(turns(USER, {**ANSWER, "content": [part("Hello", weight=1)]})).messages == [USER, ANSWER]
    asked = [part("Hi", weight=0)]
    assert read(turns({**USER, "content": asked}, ANSWER)).messages == [USER, ANSWER]
    row = turns({**USER, "content": [part("Hi", weight=1, cache_control={"type": "ephemeral"}, text_id=None)]}, ANSWER)
    assert noted(row) == [
        ("steering", "a weight of messages of role user", 1),
        ("unread", "messages[].content[].cache_control", 1),
    ]
    wrong = [part("Hello", weight=1, loss=False)]
    assert refusal(turns(USER, {**ANSWER, "content": wrong})).startswith("messages[1].content[0].loss: false, and")


# -- what stands before a turn -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [USER], "completion": "Hello"},
        {"instruction": "Hi", "output": "Hello"},
        {"prompt": "Hi", "chosen": "Hello"},
        turns(USER, ANSWER),
        shares(("human", "Hi"), ("gpt", "Hello")),
    ],
)
def test_a_column_system_is_the_system_message(row):
    assert read({**row, "system": "Be brief."}, system_prompt="Another.").messages == [SYSTEM, USER, ANSWER]
    for nothing in (None, "", " \n"):
        assert read({**row, "system": nothing}).messages == [USER, ANSWER]
    assert refusal({**row, "system": 3}) == "system: expected a string, got int"
    assert read({**row, "system": None}, system_prompt="Be brief.").messages == [SYSTEM, USER, ANSWER]


def test_two_system_messages_are_one_or_a_bad_row():
    assert read(turns(SYSTEM, USER, ANSWER, system="Be brief.")).messages == [SYSTEM, USER, ANSWER]
    expected = "system: another than the message of role system: leave one out"
    assert refusal(turns(SYSTEM, USER, ANSWER, system="Be long.")) == expected
    assert refusal({"prompt": [SYSTEM, USER], "completion": "Hello", "system": "Be long."}) == expected
    shared = shares(("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello"), system="Be long.")
    assert refusal(shared) == expected


PAIRS = [["1?", "one"], ["2?", 2]]
BEFORE = [
    {"role": "user", "content": "1?"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "2?"},
    {"role": "assistant", "content": "2"},
]


@pytest.mark.parametrize("row", [{"instruction": "Hi", "output": "Hello"}, {"prompt": "Hi", "completion": "Hello"}])
def test_history_is_the_turns_before(row):
    for history in (PAIRS, json.dumps(PAIRS), [tuple(pair) for pair in PAIRS]):
        assert read({**row, "history": history, "system": "Be brief."}).messages == [SYSTEM, *BEFORE, USER, ANSWER]
    for nothing in (None, [], "", "[]"):
        assert read({**row, "history": nothing}).messages == [USER, ANSWER]
    for wrong, expected in (
        (["1?"], "history[0]: expected a pair of texts"),
        ([["1?"]], "history[0]: expected a pair of texts"),
        ([["1?", None]], "history[0][1]: expected a string, got NoneType"),
        ([["1?", " "]], "history[0][1]: empty"),
        ({"a": 1}, "history: expected a list of pairs of texts, got dict"),
        ("[", "history: broken JSON"),
    ):
        assert refusal({**row, "history": wrong}).startswith(expected)


def test_a_history_that_is_not_read_is_said():
    row = {"prompt": [USER], "completion": "Hello", "history": PAIRS}
    assert read(row).messages == [USER, ANSWER]
    assert noted(row) == [("steering", "history", 1)]
    assert noted(turns(USER, ANSWER, history=PAIRS)) == [("steering", "history", 1)]


def test_a_rows_own_variables_of_the_template():
    for given in ({"enable_thinking": False, "docs": [1]}, '{"enable_thinking": false, "docs": [1]}'):
        found = read(turns(USER, ANSWER, chat_template_kwargs=given))
        assert found.template_kwargs == {"enable_thinking": False, "docs": [1]}
    for nothing in (None, {}, "", "{}"):
        assert read(turns(USER, ANSWER, chat_template_kwargs=nothing)).template_kwargs is None
    for wrong, expected in (
        ([1], "chat_template_kwargs: expected an object, got list"),
        ("{", "chat_template_kwargs: broken JSON"),
        ({"x": b"1"}, "chat_template_kwargs.x: expected text, a number, a list or an object, got bytes"),
        ({"messages": []}, "chat_template_kwargs.messages: is none of the template's own variables"),
    ):
        assert refusal(turns(USER, ANSWER, chat_template_kwargs=wrong)).startswith(expected)


# -- tools and calls ---------------------------------------------------------------------------------------------------

CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "3"}


@pytest.mark.parametrize(
    "tools", [[SCHEMA], [{"type": "function", "function": SCHEMA}], [{"type": "function", **SCHEMA}]]
)
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_tools_are_what_templates_read(tools, column):
    for given in (tools, json.dumps(tools)):
        found = read({**shares(("human", "Hi"), ("gpt", "Hello")), column: given})
        assert found.tools == [{"type": "function", "function": SCHEMA}]
    other = [{"type": "web_search", "name": "x"}, {"strange": 1}]
    assert read(turns(USER, ANSWER, tools=other)).tools == other
    assert refusal(turns(USER, ANSWER, tools=tools, functions=tools)) == "functions: beside tools: leave one out"


@pytest.mark.parametrize(
    ("value", "calls"),
    [
        (json.dumps(ADD), [CALL]),
        (ADD, [CALL]),
        (
            json.dumps([ADD, {"name": "none"}]),
            [CALL, {"type": "function", "function": {"name": "none", "arguments": {}}}],
        ),
        ([ADD, ADD], [CALL, CALL]),
        (json.dumps({"name": "add", "arguments": '{"a": 1}'}), [CALL]),
        (json.dumps([{"id": "7", **CALL}]), [{"id": "7", **CALL}]),
    ],
)
def test_turns_of_calls(value, calls):
    """ShareGPT's and ms-swift's: a turn whose text is a call, or several."""
    expected = [USER, {**CALLED, "tool_calls": calls}, RESULT, ANSWER]
    shared = [("human", "Hi"), ("function_call", value), ("observation", "3"), ("gpt", "Hello")]
    assert read(shares(*shared)).messages == expected
    row = turns(USER, {"role": "tool_call", "content": value}, {"role": "tool_response", "content": "3"}, ANSWER)
    assert read(row).messages == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[]", "conversations[1].value: empty"),
        ("[1]", "conversations[1].value[0]: expected an object with name and arguments"),
        ('[{"arguments": {}}]', "conversations[1].value[0].name: expected a string, got NoneType"),
        ("3", "conversations[1].value: expected an object with name and arguments"),
        (None, "conversations[1].value: expected an object with name and arguments"),
    ],
)
def test_bad_turns_of_calls(value, expected):
    assert refusal(shares(("human", "Hi"), ("function_call", value))) == expected


def test_the_older_function_call():
    called = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}}
    result = {"role": "function", "name": "add", "content": "3"}
    found = read(turns(USER, called, result, ANSWER)).messages
    assert found == [USER, CALLED, {**RESULT, "name": "add"}, ANSWER]
    assert noted(turns(USER, called, result, ANSWER)) == []
    assert refusal(turns(USER, {**called, "tool_calls": [CALL]})).startswith(
        "messages[1].function_call: beside tool_calls"
    )
    assert (
        refusal(turns({**USER, "function_call": ADD}, ANSWER)) == "messages[0].tool_calls: of a message of role 'user'"
    )


# -- two turns in a row ------------------------------------------------------------------------------------------------


def said(text, **keys):
    return {"role": "assistant", "content": text, **keys}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([said("A."), said("B.")], [said("A.\nB.")]),
        ([said("A. "), said("B."), said("\nC.")], [said("A. B.\nC.")]),
        ([said("A."), CALLED], [said("A.", tool_calls=[CALL])]),
        ([CALLED, CALLED], [said("", tool_calls=[CALL, CALL])]),
        ([said("A."), said("B.", reasoning_content="so")], [said("A.\nB.", reasoning_content="so")]),
        ([said("A.", weight=0), said("B.")], [said("A.\nB.", content_weights=[[0, 2, 0.0]])]),
        ([said("A.", weight=0), said("B.", loss=False)], [said("A.\nB.", weight=0.0)]),
        ([said("A."), said("B.", weight=2)], [said("A.\nB.", weight=2.0, content_weights=[[0, 2, 0.5]])]),
        (
            [said([part("A"), part(".", weight=3)], weight=0.5), said([part("B", weight=0), part(".")])],
            [said("A.\nB.", content_weights=[[0, 1, 0.5], [1, 2, 1.5], [3, 4, 0.0]])],
        ),
    ],
)
def test_turns_in_a_row_are_one(messages, expected):
    row = turns(USER, *messages, USER, ANSWER)
    assert read(row).messages == [USER, *expected, USER, ANSWER]
    assert noted(row) == [("joined", "assistant messages in a row", 1)]


@pytest.mark.parametrize(
    "messages",
    [
        [CALLED, ANSWER],  # the text follows the calls
        [said("A.", reasoning_content="so"), said("B.", reasoning_content="thus")],
        [said("A."), said("B.", weight=0.0)],  # what ends the turn is not learnt
        [{**CALLED, "weight": 0.0}, CALLED],
    ],
)
def test_turns_in_a_row_that_stay_two(messages):
    assert read(turns(USER, *messages, USER, ANSWER)).messages == [USER, *messages, USER, ANSWER]


# -- numbers, lists and beginnings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "text"),
    [(39, "39"), (0.5, "0.5"), (39.0, "39.0"), (-0.1, "-0.1"), (1e22, "1e+22"), (10**20, "1" + 20 * "0")],
)
def test_answers_that_are_numbers_are_read_as_json_writes_them(number, text):
    answer = {"role": "assistant", "content": text}
    for row, columns in (
        ({"prompt": "Hi", "completion": number}, ["completion"]),
        ({"instruction": "Hi", "output": number}, ["output"]),
        ({"prompt": [USER], "chosen": number}, ["chosen"]),
        (turns(USER, {"role": "assistant", "content": number}), ["messages[].content"]),
        (shares(("human", "Hi"), ("gpt", number)), ["conversations[].value"]),
    ):
        assert read(row).messages == [USER, answer]
        assert noted(row) == [("numbers", column, 1) for column in columns]
    assert read({"question": 1, "target": number}, prompt_column="question", completion_column="target").messages == [
        {"role": "user", "content": "1"},
        answer,
    ]
    assert read({"text": number}).text == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, True, decimal.Decimal(1), [], {}])
def test_answers_that_are_no_text_and_no_number(value):
    expected = ("completion: expected", "completion: null")
    assert refusal({"prompt": "Hi", "completion": value}).startswith(expected)


@pytest.mark.parametrize(
    "lists",
    [
        {"from": ["human", "gpt"], "value": ["Hi", "Hello"]},
        {"role": ["user", "assistant"], "content": ["Hi", "Hello"]},
        {"role": ["user", "assistant"], "content": ["Hi", "Hello"], "weight": [None, 1]},
    ],
)
def test_an_object_of_lists_is_a_list_of_messages(lists):
    assert read({"conversations": lists}).messages == [USER, ANSWER]
    assert read({"messages": lists}).messages == [USER, ANSWER]
    longer = {**lists, "weight": [1, 1, 1]}
    assert refusal({"messages": longer}).startswith("messages: expected lists of one length, got 2 of")
    assert refusal({"messages": {"role": "user"}}) == "messages: expected a list of at least one message"


def test_a_beginning_of_the_assistants_is_continued():
    begun = {"role": "assistant", "content": "Hel"}
    expected = {**ANSWER, "content_weights": [[0, 3, 0.0]], "prefix_length": 3}
    for completion in ("lo", [{"role": "assistant", "content": "lo"}]):
        row = {"prompt": [USER, begun], "completion": completion}
        assert read(row).messages == [USER, expected]
        assert read(row, "assistant").messages == [USER, expected]
        assert read({**row, "weight": 2}).messages == [USER, {**expected, "weight": 2.0}]
    assert read({"prompt": [USER, begun], "chosen": "lo"}).messages == [USER, expected]
    several = {"prompt": [USER, begun], "completion": [{"role": "assistant", "content": "lo"}, USER, ANSWER]}
    del expected["prefix_length"]  # it is the last turn's alone
    assert read(several).messages == [USER, expected, USER, ANSWER]
    asked = read({"prompt": [USER, begun]}, "optional").messages
    assert asked == [USER, {**begun, "weight": 0.0, "prefix_length": 3}]
    called = {"prompt": [USER, CALLED], "completion": "Hello"}
    assert read(called).messages == [USER, {**CALLED, "weight": 0.0}, ANSWER]
    both = {"prompt": [USER, {**begun, "thinking": "a"}], "completion": [{**ANSWER, "thinking": "b"}]}
    assert refusal(both).startswith("thinking: of the prompt's last message and of the answer, which continues it")


def test_a_row_that_is_sampled_keeps_its_beginning_and_variables():
    begun, rest = {"role": "assistant", "content": "Hel"}, {"tools": [SCHEMA], "chat_template_kwargs": {"a": 1}}
    row = {"prompt": [USER, begun], "completion": "lo", **rest, "weight": 2}
    found = read(row)
    question = question_of(found, RowOptions())
    assert question == {"prompt": [USER, begun], **rest, "tools": found.tools}
    assert found.answer == "lo"
    again = read({**question, "completion": "lo", "weight": 2})
    assert again == found
    assert question_of(read({"prompt": "Hi", "completion": "Hello"}), RowOptions()) == {"prompt": "Hi"}
    assert question_of(read({"prompt": [USER, begun]}, "optional"), RowOptions()) == {"prompt": [USER, begun]}


def test_rows_that_end_in_a_call_have_nothing_to_compare():
    row = turns(USER, CALLED)
    assert read(row).messages == [USER, CALLED]
    assert refusal(row, "assistant") == "messages: ends in a tool call, which is no text to score against"
    assert refusal({"prompt": [USER, said("Hel")], "completion": [CALLED]}, "assistant").startswith("prompt: ends in a")
    assert read(turns(USER, {**CALLED, "content": "So:"}), "assistant").messages[1]["content"] == "So:"


# -- what is not read --------------------------------------------------------------------------------------------------


def test_columns_that_are_not_read_are_counted():
    rows = [
        {"prompt": "Hi", "completion": "Hello", "id": 1, "label": False, "images": [], "source": None},
        {"prompt": "Hi", "completion": "Hello", "id": 2, "images": ["a.png"], "day": datetime.date(2026, 1, 1)},
        {"prompt": "Hi", "completion": "Hello", "id": b"3", "rejected": "No", "reward": 0.5, "system": ""},
    ]
    assert noted(*rows) == [
        ("steering", "images", 1),
        ("steering", "label", 1),
        ("steering", "rejected", 1),
        ("unread", "day", 1),
        ("unread", "id", 3),
        ("weighted by", "reward", 1),
    ]
    assert noted({**rows[2], "weight": 1}, weight_column="weight") == [
        ("steering", "rejected", 1),
        ("unread", "id", 1),
        ("unread", "reward", 1),
    ]
    assert noted({"text": "Hi", "tools": [SCHEMA], "system": "x", "prompt": "x"}, form="text") == [
        ("steering", "system", 1),
        ("steering", "tools", 1),
        ("unread", "prompt", 1),
    ]
    assert noted(turns(USER, ANSWER, tools=[SCHEMA], chat_template_kwargs={"a": 1}, system="Be brief.")) == []


def test_keys_of_messages_that_only_a_template_may_read():
    odd = {"id": 7, "when": datetime.datetime(2026, 1, 1), "raw": b"1", "price": decimal.Decimal("1.5"), "none": None}
    known = {"name": "a", "reasoning_content": "so", "thinking": "t", "reasoning": "r"}
    row = turns({**USER, **odd}, {**ANSWER, **known, "loss_scale": 0.5, "id": 8, "empty": []})
    assert read(row).messages == [{**USER, "id": 7}, {**ANSWER, **known, "loss_scale": 0.5, "id": 8, "empty": []}]
    assert noted(row, row) == [
        ("left to the template", "messages[].id", 2),
        ("steering", "messages[].loss_scale", 2),
        ("unread", "messages[].price", 2),
        ("unread", "messages[].raw", 2),
        ("unread", "messages[].when", 2),
    ]
    assert refusal(turns(USER, {**ANSWER, "thinking": b"1"})).startswith("messages[1].thinking: expected text")


def test_what_is_said_of_columns():
    notes = Notes([("unread", f"c{i}", 1) for i in range(25)] + [("steering", "a\n\ud83d\x1b[0m", 2)])
    unread, steering = notes.lines("rows.jsonl")
    assert unread[0].endswith("c19 (1 row) and 5 others")
    assert steering == ("rows.jsonl: not read, though it steers other trainers: a \\ud83d\\x1b[0m (2 rows)", True)
    assert notes.lines("a", counted=False)[1][0].endswith("trainers: a \\ud83d\\x1b[0m")
    many = Notes()
    for i in range(5000):
        many.add("unread", [f"c{i}"])
    assert len(many.plain()) == 1001
    assert sum(count for *_, count in many.plain()) == 5000


def test_each_part_of_a_mixture_has_its_own_notes():
    found = reader()
    for part, column in ((0, "a"), (1, "b"), (1, "b")):
        found.convert(part, {"prompt": "Hi", "completion": "Hello", column: 1})
    assert {part: notes.plain() for part, notes in found.notes.items()} == {
        0: [("unread", "a", 1)],
        1: [("unread", "b", 2)],
    }


def test_a_conversation_survives_its_bytes():
    found = read(turns(USER, {**ANSWER, "weight": 0.5}, chat_template_kwargs={"a": [1]}, tools=[SCHEMA]))
    assert asdict(load_conversation(dump_conversation(found))) == asdict(found)
