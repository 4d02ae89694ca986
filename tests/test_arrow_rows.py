"""Rows of Arrow's tables: what ``load_dataset`` gives for the same file, without the nulls that Arrow fills in."""

from __future__ import annotations

import datetime
import decimal
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Json, List, Value, load_dataset

from dft_lightning.data import HubRows, LocalRows
from dft_lightning.data.rows.forms import Reading
from dft_lightning.data.rows.reading import read_messages
from dft_lightning.data.rows.values import BrokenValue
from dft_lightning.errors import InputError

USER, ANSWER = {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "Five."}


def rows_of(source):
    return [row for _, row in source.rows()]


def places(tmp_path, dataset):
    """The same rows in each of the places that Arrow's rows come from."""
    folder = tmp_path / "hub"
    folder.mkdir()
    dataset.to_parquet(folder / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    yield LocalRows(folder / "rows.parquet")
    yield LocalRows(tmp_path / "saved")
    yield HubRows(str(folder))
    yield HubRows(str(folder), streaming=True)


def as_json(*texts):
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts))


TYPES = {
    "large text": pa.array(["a", None], pa.large_string()),
    "text view": pa.array(["a", "b"], pa.string_view()),
    "dictionary": pa.array(["a", "b"]).dictionary_encode(),
    "date": pa.array([datetime.date(2026, 1, 2)] * 2),
    "time": pa.array([datetime.datetime(2026, 1, 2, 3, 4, 5, 6)] * 2, pa.timestamp("us", "UTC")),
    "duration": pa.array([datetime.timedelta(hours=1)] * 2),
    "decimal": pa.array([decimal.Decimal("1.50"), decimal.Decimal("2.25")]),
    "bytes": pa.array([b"\xff", b""]),
    "half": pa.array(np.array([0.5, 1.5], np.float16)),
    "lists": pa.array([[1, None], []], pa.large_list(pa.int8())),
    "three": pa.array([[1, 2, 3]] * 2, pa.list_(pa.int32(), 3)),
    "json": as_json('[{"a": null}]', '"Five."'),
    "jsons": pa.ListArray.from_arrays([0, 2, 2], as_json('{"a":1}', "[]")),
    "structs of json": pa.StructArray.from_arrays([as_json("1", '"1"')], ["x"]),
}


@pytest.mark.parametrize("name", TYPES)
def test_parquet_files_have_what_load_dataset_gives(tmp_path, name):
    table = pa.table({"prompt": ["a", "b"], "completion": ["c", "d"], "x": TYPES[name]})
    pq.write_table(table, tmp_path / "rows.parquet")
    if name == "dictionary":  # which load_dataset does not take
        expected = [{"prompt": "a", "completion": "c", "x": "a"}, {"prompt": "b", "completion": "d", "x": "b"}]
    else:
        expected = list(load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train"))
    found = rows_of(LocalRows(tmp_path / "rows.parquet"))
    assert found == expected
    assert [type(row["x"]) for row in found] == [type(row["x"]) for row in expected]
    assert len(read_messages(LocalRows(tmp_path / "rows.parquet"), Reading())) == 2  # whatever is in x


BYTES = pa.struct({"a": pa.int8(), "b": pa.int8()})


def test_types_that_only_arrow_has(tmp_path):
    """A map is an object; a date beyond Python's, broken JSON and bytes that are no text matter where they are read."""
    rows = pa.table(
        {
            "prompt": ["a"],
            "completion": ["b"],
            "map": pa.array([[("k", {"a": 1, "b": None})]], pa.map_(pa.string(), BYTES)),
            "day": pa.array([2**30], pa.date32()),
            "days": pa.array([[2**30]], pa.list_(pa.date32())),
            "json": as_json('{"a": '),
        }
    )
    pq.write_table(rows, tmp_path / "rows.parquet")
    (row,) = rows_of(LocalRows(tmp_path / "rows.parquet"))
    assert row["map"] == {"k": {"a": 1}}
    for name in ("day", "days", "json"):
        assert isinstance(row[name], BrokenValue)
    assert len(read_messages(LocalRows(tmp_path / "rows.parquet"), Reading())) == 1
    renamed = LocalRows(tmp_path / "rows.parquet", rename_columns={"completion": "was", "json": "completion"})
    with pytest.raises(InputError, match="row 1: completion: expected a string, got a value that cannot be read"):
        read_messages(renamed, Reading())


CONTENTS = [
    [USER, ANSWER],
    [USER, {**ANSWER, "content": [{"type": "text", "text": "Five."}]}],
]


@pytest.mark.parametrize("feature", [Json(), List(Json())], ids=str)
def test_messages_of_the_feature_json(tmp_path, feature):
    dataset = Dataset.from_dict({"messages": CONTENTS}, features=Features({"messages": feature}))
    for source in places(tmp_path, dataset):
        assert [row["messages"] for row in rows_of(source)] == CONTENTS, source
        assert read_messages(source, Reading()).messages == [[USER, ANSWER]] * 2, source


def test_a_stream_that_does_not_say_its_types(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": turns} for turns in CONTENTS]))
    source = HubRows(str(tmp_path), streaming=True)
    assert read_messages(source, Reading()).messages == [[USER, ANSWER]] * 2


def call(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def schema(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    {
        "messages": [USER, call("weather", city="Oslo"), {"role": "tool", "content": "9"}, ANSWER],
        "tools": [schema("weather", city={"type": "string", "enum": ["Oslo"]})],
    },
    {
        "messages": [USER, call("add", a=1, b={"deep": [{"x": 1}, {"y": 2}]})],
        "tools": [schema("add", a={"type": "integer"}, b={"type": "object"}), schema("none")],
    },
]


def test_nulls_that_arrow_fills_in_are_dropped_at_every_depth(tmp_path):
    dataset = Dataset.from_list(TOOLS)
    assert dataset[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["a"] is None
    for source in places(tmp_path, dataset):
        found = list(read_messages(source, Reading()))
        assert [each.messages for each in found] == [row["messages"] for row in TOOLS], source
        assert [each.tools for each in found] == [row["tools"] for row in TOOLS], source


def test_a_null_that_somebody_wrote_stays(tmp_path):
    """In a JSON file, and in a column whose values are JSON."""
    rows = [{"messages": [USER, call("add", a=None, b=[None]), {"role": "tool", "content": "9"}, ANSWER]}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    dataset = Dataset.from_dict({"messages": [row["messages"] for row in rows]}, Features({"messages": List(Json())}))
    for source in (LocalRows(tmp_path / "rows.jsonl"), *places(tmp_path, dataset)):
        assert read_messages(source, Reading()).messages == [row["messages"] for row in rows], source


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow"])
def test_a_stored_format_is_set_aside(tmp_path, kind):
    dataset = Dataset.from_list(
        [{"messages": [USER, ANSWER], "weight": 0.5, "extra": [1, 2]}] * 3,
        features=Features(
            {
                "messages": [{"role": Value("string"), "content": Value("string")}],
                "weight": Value("float64"),
                "extra": List(Value("int64")),
            }
        ),
    )
    formatted = dataset.with_format(kind, columns=["weight"])
    formatted.save_to_disk(tmp_path / "one")
    DatasetDict({"train": formatted}).save_to_disk(tmp_path / "several")
    for source in (LocalRows(tmp_path / "one"), LocalRows(tmp_path / "several", "train")):
        assert rows_of(source) == list(dataset)
        assert read_messages(source, Reading()).messages == [[USER, {**ANSWER, "weight": 0.5}]] * 3


def test_batches_of_a_table_are_bounded_by_their_bytes(tmp_path, monkeypatch):
    from dft_lightning.data.rows import arrow

    sizes = []
    real = arrow.rows_of_batches

    def counted(batches):
        return real(sizes.append(len(batch)) or batch for batch in batches)

    monkeypatch.setattr(arrow, "rows_of_batches", counted)
    for text, most in (("a", 1024), (400_000 * "a", 41)):
        rows = Dataset.from_dict({"prompt": [text + str(i) for i in range(100)], "completion": ["b"] * 100})
        rows.to_parquet(tmp_path / "rows.parquet")
        rows.save_to_disk(tmp_path / f"saved{most}")
        for source in (LocalRows(tmp_path / "rows.parquet"), LocalRows(tmp_path / f"saved{most}")):
            sizes.clear()
            assert [row["prompt"] for row in rows_of(source)] == rows["prompt"][:]
            assert max(sizes) <= most
