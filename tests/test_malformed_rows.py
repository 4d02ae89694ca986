"""Malformed rows: named with their file, number and column, or skipped and counted; never another end."""

from __future__ import annotations

import json

import pytest

from conftest import at_hand
from dft_lightning.data import arithmetic_tokenizer
from dft_lightning.errors import InputError
from malformed import (
    BIG,
    GOOD,
    PAIR,
    REPLY,
    USER,
    arguments,
    calls,
    line,
    load,
    nested,
    pair,
    refusal,
    refused_or_skipped,
    shares,
    turns,
)

pytestmark = pytest.mark.timeout(60)

# -- rows --------------------------------------------------------------------------------------------------------------

NOT_READ = {
    "broken UTF-8": (b'{"prompt": "\xe2\x28\xa1", "completion": "2"}', "not UTF-8 text: invalid continuation byte"),
    "UTF-16": (PAIR.encode("utf-16"), "not UTF-8 text: invalid start byte at byte 1"),
    "Latin-1": ('{"prompt": "é", "completion": "2"}'.encode("latin-1"), "not UTF-8 text"),
    "cut short": (PAIR[:-5], "broken JSON at character"),
    "cut within a name": ('{"pro', "broken JSON at character 2: Unterminated string"),
    "trailing garbage": (f"{PAIR} and so on", "broken JSON at character 39: Extra data"),
    "two on a line": (PAIR + PAIR, "Extra data"),
    "a comma after the last": (PAIR[:-1] + ",}", "broken JSON"),
    "single quotes": (PAIR.replace('"', "'"), "broken JSON at character 2"),
    "NUL bytes": (b"\0" * 64, "broken JSON at character 1"),
    "NUL in a string": (b'{"prompt": "1\0", "completion": "2"}', "Invalid control character"),
    "a key twice": ('{"prompt": "1", "prompt": "2", "completion": "2"}', "the key 'prompt' is there twice"),
    "an inner key twice": (PAIR[:-1] + ', "x": {"a": 1, "a": 1}}', "the key 'a' is there twice"),
    "many keys": ("{" + "".join(f'"c{i}": 1, ' for i in range(20_000)) + '"c9": 1}', "the key 'c9' is there twice"),
    "null": ("null", "expected an object, got null"),
    "number": ("3", "expected an object, got a number"),
    "string": ('"1+1=2"', "expected an object, got a string"),
    "list": (f"[{PAIR}]", "expected an object, got a list"),
    "nested deeply": (nested(100_000), "JSON that cannot be read: maximum recursion depth"),
    "many digits": (PAIR[:-1] + f', "x": {"1" * 10_000}}}', "JSON that cannot be read: Exceeds the limit"),
}
PAIRS = {
    "no completion": ({"prompt": "1"}, "completion: missing"),
    "other columns": ({"question": "1", "answer": "2"}, "completion: missing"),
    "no columns": ({}, "completion: missing"),
    "null prompt": (pair(prompt=None), "prompt: null"),
    "null completion": (pair(completion=None), "completion: null"),
    "blank completion": (pair(completion=" \n"), "completion: empty"),
    "NaN as prompt": (pair(prompt=float("nan")), "prompt: expected a string, got nan"),
    "infinity as completion": (pair(completion=float("inf")), "completion: expected a string, got inf"),
    "boolean as prompt": (pair(prompt=True), "prompt: expected a string, got bool"),
    "object as prompt": (pair(prompt=USER), "prompt: expected a string, got dict"),
    "list as completion": (pair(completion=["2"]), "completion[0]: expected an object with role and content, got str"),
    "nested lists": (pair(prompt=[[USER]]), "prompt[0]: expected an object with role and content, got list"),
    "empty list": (pair(prompt=[]), "prompt: expected a list of at least one message"),
    "object after messages": (pair(prompt=[USER], completion=REPLY), "completion: expected a string, got dict"),
    "NUL as text": (pair(completion="2\0"), "completion: a NUL at character 1"),
    "half a surrogate pair": (pair(prompt="1\ud83d"), "prompt: half a surrogate pair at character 1"),
    "special token": (pair(completion="2$3"), "the row spells the special token '$'"),
    "special token and marks": (
        pair(prompt="$\U000f0000\U000f0001\U000f0002"), "special tokens beside the private characters",
    ),
    "megabytes of the wrong type": (pair(prompt=[BIG * "1"]), "prompt[0]: expected an object with role and content"),
    "NaN weight": (pair(weight=float("nan")), "weight: expected a number from 0 to 3.4e38, got nan"),
    "infinite weight": (pair(weight=float("inf")), "weight: expected a number from 0 to 3.4e38, got inf"),
    "negative weight": (pair(weight=-1), "weight: expected a number from 0 to 3.4e38, got -1"),
    "weight beyond float32": (pair(weight=1e39), "weight: expected a number from 0 to 3.4e38, got 1e+39"),
    "weight beyond float64": (pair(weight=10**400), "weight: expected a number from 0 to 3.4e38, got 1000"),
    "boolean weight": (pair(weight=True), "weight: expected a number, got bool"),
    "text as weight": (pair(weight="much"), "weight: expected a number, got 'much'"),
    "list as weight": (pair(weight=[1]), "weight: expected a number, got list"),
    "empty weight": (pair(weight=""), "weight: expected a number, got ''"),
}  # fmt: skip
FORMS = {
    "instruction": ("alpaca", {"instruction": True, "output": "2"}, "instruction: expected a string, got bool"),
    "input": ("alpaca", {"instruction": "1", "input": ["1"], "output": "2"}, "input: expected a string, got list"),
    "output": ("alpaca", {"instruction": "1", "output": {}}, "output: expected a string, got dict"),
    "no output": ("alpaca", {"instruction": "1"}, "output: missing"),
    "messages of null": ("messages", {"messages": None}, "messages: missing"),
    "messages of text": ("messages", {"messages": "1+1=2"}, "messages: expected a list of at least one message"),
    "messages of an object": ("messages", {"messages": USER}, "messages: expected a list of at least one message"),
    "messages of lists": ("messages", turns([USER, REPLY]), "messages[0]: expected an object with role and content"),
    "null message": ("messages", turns(USER, None), "messages[1]: expected an object with role and content"),
    "unknown role": ("messages", turns({"role": "robot", "content": ""}), "messages[0].role: expected one of system"),
    "role in megabytes": ("messages", turns({"role": BIG * "u", "content": ""}), "messages[0].role: expected one of"),
    "role of a list": ("messages", turns({"role": ["user"], "content": "1"}, REPLY), "got ['user']"),
    "no role": ("messages", turns({"content": "1"}, REPLY), "messages[0].role: expected one of"),
    "no content": ("messages", turns(USER, {"role": "assistant"}), "messages[1].content: expected a string, got None"),
    "empty content": ("messages", turns(USER, {**REPLY, "content": ""}), "messages[1].content: empty"),
    "content of a boolean": ("messages", turns({**USER, "content": True}, REPLY), "messages[0].content: expected a"),
    "content with an image": (
        "messages", turns({**USER, "content": [{"type": "image"}]}, REPLY),
        "messages[0].content[0]: expected a part of type text, got 'image'",
    ),
    "part without text": (
        "messages", turns({**USER, "content": [{"type": "text"}]}, REPLY), "messages[0].content[0].text: expected a str"
    ),
    "assistant first": ("messages", turns(REPLY, USER, REPLY), "cannot begin with the assistant"),
    "no assistant": ("messages", turns(USER, USER), "messages: no assistant message to learn from"),
    "weight of a message": ("messages", turns(USER, {**REPLY, "weight": -1}), "messages[1].weight: expected a number"),
    "weights' product": (
        "messages", {**turns(USER, {**REPLY, "weight": 1e30}), "weight": 1e30}, "message and row together: expected",
    ),
    "surrogate in a key": (
        "messages", '{"messages": [{"role": "user", "content": "1", "\\ud83d": 1}]}', "messages[0]: half a surrogate",
    ),
    "thought nested 400 deep": (
        "messages", f'{{"messages": [{{"role": "user", "content": "1", "reasoning": {nested(400)}}}]}}', "than 100",
    ),
    "tools nested 800 deep": (
        "messages", f'{{"messages": {json.dumps([USER, REPLY])}, "tools": [{{"a": {nested(800)}}}]}}', "more than 100",
    ),
    "calls of text": ("messages", calls("f()"), "messages[1].tool_calls: expected a list, got str"),
    "call of null": ("messages", calls([None]), "messages[1].tool_calls[0]: expected an object, got NoneType"),
    "call of nothing": ("messages", calls([{}]), "messages[1].tool_calls[0].function: expected an object with name"),
    "call without name": ("messages", calls([{"function": {}}]), "function.name: expected a string, got NoneType"),
    "broken arguments": ("messages", arguments('{"a": '), "function.arguments: broken JSON at character 7"),
    "argument twice": ("messages", arguments('{"a": 1, "a": 2}'), "function.arguments: the key 'a' is there twice"),
    "list as arguments": ("messages", arguments("[1]"), "function.arguments: expected an object, got list"),
    "nested arguments": ("messages", arguments(nested(100_000)), "function.arguments: JSON that cannot be read"),
    "call of the user": ("messages", turns({**USER, "tool_calls": [{}]}, REPLY), "tool_calls: of a message of role"),
    "broken tools": ("messages", {**turns(USER, REPLY), "tools": "[{"}, "tools: broken JSON at character 3"),
    "tools of text": ("messages", {**turns(USER, REPLY), "tools": ["f"]}, "tools: expected a list of function schemas"),
    "conversations of text": ("sharegpt", {"conversations": "1"}, "conversations: expected a list of at least one"),
    "unknown speaker": ("sharegpt", shares(("bot", "1")), "conversations[0].from: expected one of system, human"),
    "null value": ("sharegpt", shares(("human", None), ("gpt", "2")), "conversations[0].value: expected a string"),
    "gpt first": ("sharegpt", shares(("gpt", "2"), ("human", "1")), "cannot begin with the assistant"),
    "broken function call": ("sharegpt", shares(("human", "1"), ("function_call", "f(")), "value: broken JSON"),
    "system of a number": ("sharegpt", {**GOOD["sharegpt"], "system": 1}, "system: expected a string, got int"),
    "chosen of a boolean": ("preference", {"prompt": "1", "chosen": True}, "chosen: expected a string, got bool"),
    "chosen of null": ("preference", {"prompt": "1", "chosen": None}, "chosen: null"),
    "chosen of another prompt": (
        "preference",
        {"prompt": "1", "chosen": [{"role": "user", "content": "2"}, {"role": "assistant", "content": "3"}]},
        "chosen[0].role: user, and chosen has not the messages of prompt",
    ),
    "chosen alone": ("preference", {"chosen": "2"}, "prompt: missing (chosen is a text"),
    "chosen of nothing": ("preference", {"chosen": []}, "chosen: expected a list of at least one message"),
    "text of a list": ("text", {"text": ["1"]}, "text: expected a string, got list"),
    "blank text": ("text", {"text": " "}, "text: empty"),
    "text with a NUL": ("text", {"text": "1\0"}, "text: a NUL at character 1"),
}  # fmt: skip
ROWS = {**{name: ("pairs", *case) for name, case in (NOT_READ | PAIRS).items()}, **FORMS}


@pytest.mark.parametrize("name", ROWS)
def test_bad_rows_are_named_or_skipped(tmp_path, name):
    form, row, expected = ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([line(GOOD[form]), line(row).replace(b"\n", b" ")]))
    refused_or_skipped(path, 2, expected)


@pytest.mark.parametrize("name", ["no columns", "cut short", "null", "nested deeply"])
def test_a_bad_first_row_is_named_or_skipped(tmp_path, name):
    """Also where the rows' form is told by the first one."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line(ROWS[name][1]) + b"\n" + line(GOOD["text"]))
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert "row 1: " in message
    data = load(path, on_bad_rows="skip")
    assert (data.splits.counts["train"].rows, data.splits.counts["train"].bad) == (2, 1)


@pytest.mark.parametrize(
    ("name", "text", "row", "expected"),
    [
        ("rows.csv", "prompt,completion\n1,2\n1\n", 3, "1 fields, and the first line names 2 columns"),
        ("rows.csv", "prompt,completion\n1,2,3\n1,2\n", 2, "3 fields, and the first line names 2 columns"),
        ("rows.csv", 'prompt,completion\n"1\n+1",2\n1,\n', 4, "completion: empty"),
        ("rows.csv", "prompt,completion,weight\n1,2,1\n1,2,-inf\n", 3, "weight: expected a number from 0"),
        ("rows.csv", "prompt,completion,weight\n1,2,1\n1,2,\n", 3, "weight: expected a number, got ''"),
        ("rows.csv", 'messages,tools\n1,2\n"[]",\n', None, "2 of 2 rows are bad\n  row 2: messages: expected a list"),
        ("rows.json", f"[{PAIR}, [[{PAIR}]]]", 2, "expected an object, got a list"),
        ("rows.json", f'[{PAIR}, {{"prompt": "1"}}]', 2, "completion: missing"),
    ],
)
def test_bad_rows_of_csv_and_json(tmp_path, name, text, row, expected):
    path = tmp_path / name
    path.write_text(text)
    if row is None:
        assert expected in refusal(path)
    else:
        refused_or_skipped(path, row, expected)


@pytest.mark.parametrize("depth", range(850, 1000, 10))
def test_no_depth_of_nesting_ends_otherwise(tmp_path, depth):
    """Python's limit on recursion is met while reading, while converting, or while the value is quoted."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{PAIR}\n{{"prompt": [{{"role": {nested(depth)}}}], "completion": "2"}}')
    refused_or_skipped(path, 2, "row 2: ")


# -- rows that are none in the end -------------------------------------------------------------------------------------


def test_megabytes_in_one_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(pair(completion=20_000 * "1+")))
    counts = load(path, max_length=64).splits.counts["train"]
    assert (counts.rows, counts.truncated, counts.dropped) == (1, 1, 0)
    path.write_text(json.dumps(pair(prompt=BIG * "\n")))  # one token of the arithmetic tokenizer
    assert load(path, max_length=64).splits.counts["train"].truncated == 0
    path.write_text(PAIR + "\n" + BIG * "[")
    refused_or_skipped(path, 2, "JSON that cannot be read")


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        (pair(weight=0), {}, "no row has a target"),
        (turns(USER, {**REPLY, "weight": 0}), {}, "no row has a target"),
        (pair(prompt=50 * "1"), {"max_length": 20}, "no row has a target left within max_length 20"),
        (pair(), {"max_length": 1}, "no row has a target left within max_length 1"),
        ({"prompt": [USER], "completion": [USER]}, {}, "prompt: no assistant message to learn from"),
    ],
)
def test_rows_of_ignored_tokens_alone(tmp_path, row, options, expected):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line(row))
    assert expected in refusal(path, **options)
    if "target" in expected:  # beside a good one they are counted
        path.write_bytes(line(row) + b"\n" + line(GOOD["messages" if "messages" in row else "pairs"]))
        if options.get("max_length") != 1:
            assert load(path, **options).splits.counts["train"].dropped == 1


# -- rows that a template or tokenizer refuses -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("raise_exception('no 7')", "the chat template refuses a conversation of roles ['user', 'assistant']: no 7"),
        ("1 / 0", "the chat template fails: ZeroDivisionError: division by zero"),
        ("nothing.at_all", "the chat template refuses"),
        ("m.content.nothing()", "the chat template refuses"),
    ],
)
def test_templates_that_fail_on_a_row(tmp_path, condition, expected):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{PAIR}\n{json.dumps(pair(prompt='7'))}")
    text = "{% for m in messages %}{% if '7' in m.content %}{{ " + condition + " }}{% endif %}"
    text += "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    refused_or_skipped(path, 2, expected, chat_template=text)


def test_special_tokens_as_control_and_as_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(pair(completion="2$3")))
    assert load(path, allow_special_tokens=True).splits.counts["train"].bad == 0
    tokenizer = str(at_hand("tokenizers/smollm2"))
    path.write_text(f"{PAIR}\n{json.dumps(pair(completion='2<|im_end|>'))}")
    for allowed, more in ((False, 0), (True, 1)):
        data = load(path, tokenizer=tokenizer, allow_special_tokens=allowed, shuffle=False)
        data.setup("fit")
        end = next(iter(data.train_dataloader()))["labels"] == data.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert end.sum(1).tolist() == [1, 1 + more]
    # U+10FFF0 begins the names under which the tokenizer's copy knows its special tokens.
    path.write_text(f"{PAIR}\n{json.dumps(pair(completion='2' + chr(0x10FFF0) + '<|im_end|>'))}")
    refused_or_skipped(path, 2, "special tokens beside the private characters", tokenizer=tokenizer)


def test_plain_text_needs_an_end_token(tmp_path):
    tokenizer = arithmetic_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_bytes(line(GOOD["text"]))
    message = refusal(tmp_path / "rows.jsonl", tokenizer=str(tmp_path / "tokenizer"))
    assert "row 1: plain text ends in the end-of-text token, which the tokenizer has none of" in message


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.jsonl", f'{PAIR}\n{{"prompt": "1"}}', "row 2: completion: missing"),
        ("rows.jsonl", f"{PAIR}\n{{", "row 2: broken JSON"),
        ("rows.jsonl", f"{PAIR}\n{json.dumps(pair(completion='$'))}", "row 2: the row spells the special token"),
        ("rows.jsonl", '{"a": 1}', "row 1: cannot tell the row form"),
        ("rows.jsonl", "\n", "has none with a target"),
        ("rows.json", "[{", "broken JSON"),
        ("rows.csv", 'prompt,completion\n"1', "broken CSV"),
    ],
)
def test_streams(tmp_path, name, content, expected):
    """What is wrong comes as a batch, so that a loader's worker ends in no traceback."""
    path = tmp_path / name
    path.write_text(content)
    data = load(path, streaming={}, batch_size=1, num_workers=int(name == "rows.json"), shuffle=False)
    data.setup("fit")
    with pytest.raises(InputError) as error:
        any(data.on_before_batch_transfer(batch, 0) is None for batch in data.train_dataloader())
    assert str(error.value).startswith(f"{path}: ")
    assert expected in str(error.value)
    assert "Traceback" not in str(error.value)


def test_a_stream_skips_and_counts(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{}}\n{PAIR}\n{{"prompt": 1}}\n{{\n{PAIR}')
    data = load(path, streaming={}, batch_size=2, shuffle=False, on_bad_rows="skip")
    data.setup("fit")
    with pytest.warns(UserWarning, match="row 1: cannot tell the row form"):
        data.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert data._stream.bad == 3
    path.write_text("{\n{")
    with pytest.raises(InputError, match="has 2 bad ones and no other: row 1: broken JSON"):
        data.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)
