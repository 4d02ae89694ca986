"""The same rows, in every form, say the same wherever they come from."""

from __future__ import annotations

import csv
import functools
import gzip
import json
import random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset

from conftest import at_hand
from dft_lightning import InstructionDataModule
from dft_lightning.data import HubRows, LocalRows, MemoryRows
from dft_lightning.data.rows.forms import Conversation, Reading
from dft_lightning.data.rows.reading import RowReader
from dft_lightning.data.text.tokenizer import load_tokenizer


def words(draw, most=6):
    return " ".join(
        draw.choices(["Oslo", "é中", "{x}", "  a", "007", "NA", "null", 'q"q', "l\u2028l"], k=draw.randint(1, most))
    )


def arguments(draw):
    names = draw.sample(["city", "day", "deep"], draw.randint(1, 3))
    values = {"city": words(draw), "day": draw.randint(0, 9), "deep": {draw.choice("xy"): [{draw.choice("uv"): 1}]}}
    return {name: values[name] for name in names}


def call(draw):
    return {"type": "function", "function": {"name": draw.choice("fg"), "arguments": arguments(draw)}}


def tool(draw):
    properties = {name: {"type": "string", "enum": [name]} for name in draw.sample(["a", "b", "c"], 2)}
    return {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}


def said(draw, role="assistant", **keys):
    return {"role": role, "content": words(draw), **keys}


def messages(draw):
    turns = [said(draw, "system")] if draw.random() < 0.5 else []
    for _ in range(draw.randint(1, 3)):
        turns += [said(draw, "user"), said(draw, tool_calls=[call(draw), call(draw)]), said(draw, "tool", name="f")]
        turns.append(said(draw, **draw.choice([{}, {"weight": 0.5}, {"loss": False}, {"reasoning_content": "so"}])))
    row = {"messages": turns, "id": draw.randint(0, 99)}
    return row | draw.choice([{}, {"tools": [tool(draw), tool(draw)]}, {"weight": 2.5}])


def parts(draw):
    content = [{"type": "text", "text": words(draw), **draw.choice([{}, {"weight": 0.5}])} for _ in range(2)]
    asked = {"role": "user", "content": [{"type": "text", "text": words(draw)}]}
    return {"messages": [asked, {"role": "assistant", "content": content}]}


def pairs(draw):
    return {"prompt": words(draw), "completion": words(draw)} | draw.choice([{}, {"system": words(draw)}])


def alpaca(draw):
    row = {"instruction": words(draw), "input": draw.choice(["", words(draw)]), "output": words(draw)}
    return row | draw.choice([{}, {"history": [[words(draw), words(draw)] for _ in range(2)]}])


def numbers(draw):
    return {"prompt": words(draw), "completion": draw.randint(0, 99), "reward": draw.random()}


def sharegpt(draw):
    calls = [{"name": "f", "arguments": arguments(draw)} for _ in range(2)]
    turns = [("human", words(draw)), ("function_call", json.dumps(calls)), ("observation", "3"), ("gpt", words(draw))]
    row = {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}
    return row | {"tools": json.dumps([tool(draw)["function"]]), "system": words(draw)}


def preference(draw):
    return {"prompt": [said(draw, "user")], "chosen": [said(draw)], "rejected": [said(draw)], "score": draw.random()}


def begun(draw):
    kwargs = {"chat_template_kwargs": {draw.choice("ab"): draw.randint(0, 9)}}
    return {"prompt": [said(draw, "user"), said(draw)], "completion": words(draw)} | draw.choice([{}, kwargs])


def text(draw):
    return {"text": words(draw)}


FORMS = [messages, parts, pairs, alpaca, numbers, sharegpt, preference, begun, text]


def places(folder, rows):
    """Where the rows are put, and the sources that read them there."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines)
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(rows, _schema(rows)), folder / "arrow.parquet")
    dataset = Dataset(pa.Table.from_pylist(rows, _schema(rows)))
    dataset.to_parquet(folder / "datasets.parquet")
    dataset.with_format("numpy").save_to_disk(folder / "saved")
    for name in ("rows.jsonl", "rows.json", "rows.jsonl.gz", "arrow.parquet", "datasets.parquet", "saved"):
        yield LocalRows(folder / name)
    for ending, name in (("jsonl", "rows.jsonl"), ("parquet", "datasets.parquet")):
        (folder / ending).mkdir()
        (folder / ending / name).write_bytes((folder / name).read_bytes())
        yield HubRows(str(folder / ending))
        yield HubRows(str(folder / ending), streaming=True)
    for given in (rows, dataset, dataset.to_iterable_dataset(), IterableDataset.from_generator(lambda: iter(rows))):
        yield MemoryRows(given)
    if all(isinstance(value, (str, float)) for row in rows for value in row.values()):
        columns = list(dict.fromkeys(name for row in rows for name in row))
        with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        yield LocalRows(folder / "rows.csv")


def _schema(rows):
    """That of all rows: Arrow looks at the first row's keys alone."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return pa.schema([(name, pa.array([row.get(name) for row in rows]).type) for name in columns])


def said_by(source):
    reader = RowReader(source, Reading())
    found = [conversation for _, _, conversation in reader.read()]
    assert all(isinstance(each, Conversation) for each in found), (source, found)
    return found, sorted(reader.notes[0].plain())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_rows_say_the_same_wherever_they_come_from(tmp_path, form):
    draw = random.Random(form.__name__)
    rows = [form(draw) for _ in range(30)]
    (first, *others) = [(source, *said_by(source)) for source in places(tmp_path, rows)]
    assert len(others) >= 13
    for source, conversations, notes in others:
        assert conversations == first[1], source
        assert notes == first[2], source


@functools.cache
def tokenizer():
    return load_tokenizer(at_hand("tokenizers/qwen3"))


class Data(InstructionDataModule):
    """With a tokenizer that is loaded once."""

    def build_tokenizer(self):
        return tokenizer()


def tokens_of(source, **options):
    data = Data(source, batch_size=1, text={"prompt_weight": 0.5}, batches={"shuffle": False}, **options)
    data.setup("fit")
    if options:
        return data.train_dataloader()
    table = data.splits.tokenized("train")
    return [table[name][:] for name in ("input_ids", "labels", "weights", "position")]


@pytest.mark.parametrize("form", [parts, text])
def test_their_tokens_labels_and_weights_are_the_same(tmp_path, monkeypatch, form):
    """From each place, tokenised without what the cache has of another, and as a stream.

    Without calls: the keys of a struct of Arrow stand in one order for all rows.
    """
    draw = random.Random(form.__name__)
    rows = [form(draw) for _ in range(6)]
    found = []
    for number, source in enumerate(places(tmp_path, rows)):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / f"cache{number}"))
        found.append(tokens_of(source))
    assert all(each == found[0] for each in found[1:])
    assert len(found[0][0]) >= len(rows)
    streamed = zip(tokens_of(LocalRows(tmp_path / "rows.jsonl"), streaming={}), *found[0][:3], strict=False)
    for batch, ids, labels, weights in streamed:
        assert batch["input_ids"].tolist() == [ids]
        assert batch["labels"].tolist() == [labels]
        if weights is not None:
            assert batch["token_weight"].tolist() == [pytest.approx(weights)]
