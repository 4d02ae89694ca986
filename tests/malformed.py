"""Rows of every form, and what a malformed one must end in."""

from __future__ import annotations

import json

import pytest

from dft_lightning import InstructionDataModule
from dft_lightning.data.rows.sources import RowSource
from dft_lightning.errors import InputError
from small_runs import data_options

USER, REPLY = {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}
GOOD = {
    "pairs": {"prompt": "1+1=", "completion": "2"},
    "alpaca": {"instruction": "1+1=", "input": "", "output": "2"},
    "messages": {"messages": [USER, REPLY]},
    "sharegpt": {"conversations": [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]},
    "preference": {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
    "text": {"text": "1+1=2"},
}
PAIR = json.dumps(GOOD["pairs"])
BIG = 10_000_000


def pair(**columns):
    return {**GOOD["pairs"], **columns}


def turns(*messages):
    return {"messages": list(messages)}


def calls(value):
    return turns(USER, {"role": "assistant", "tool_calls": value})


def arguments(text):
    return calls([{"function": {"name": "f", "arguments": text}}])


def shares(*messages):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in messages]}


def nested(depth):
    return "[" * depth + "]" * depth


def line(row):
    """A row given as JSON's object, or as what stands in the file."""
    text = row if isinstance(row, (str, bytes)) else json.dumps(row)
    return text if isinstance(text, bytes) else text.encode()


def load(source, **options):
    """The data module after ``prepare_data``."""
    data = InstructionDataModule(
        source if isinstance(source, RowSource) else str(source),
        **data_options(**{"tokenizer": "asset://arithmetic-base", **options}),
    )
    data.prepare_data()
    return data


def refusal(source, **options):
    """The message of the one error that these rows must end in."""
    with pytest.raises(InputError) as error:
        load(source, **options)
    assert type(error.value) is InputError
    assert len(str(error.value)) < 3000
    return str(error.value)


def refused_or_skipped(path, row, expected, **options):
    """The second of two rows is bad: named, or left out and counted."""
    message = refusal(path, **options)
    assert message.startswith(f"{path}: 1 of 2 rows are bad\n  row {row}: ")
    assert expected in message
    data = load(path, on_bad_rows="skip", **options)
    assert (data.splits.counts["train"].rows, data.splits.counts["train"].bad, data.splits.counts["train"].dropped) == (
        2,
        1,
        0,
    )
    assert len(data.splits.lengths("train")) == 1
