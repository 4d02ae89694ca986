"""Rows in memory, forms of one's own, and what is neither."""

from __future__ import annotations

import datetime
import json
import sys

import lightning
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Json, List, Value

from dft_lightning.component import to_plain
from dft_lightning.data import ArithmeticRows, InstructionDataModule, MemoryRows, MixedRows, RowForm, RowSource
from dft_lightning.data.options import RowOptions
from dft_lightning.data.rows.checks import BadRow
from dft_lightning.data.rows.forms import Reading
from dft_lightning.data.rows.reading import RowReader, read_messages
from dft_lightning.data.rows.sources import as_source
from dft_lightning.errors import InputError
from dft_lightning.fit import main
from small_runs import TINY_ARITHMETIC

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": None}}}
PAIR = {"prompt": "1+1=", "completion": "2"}
ROWS = [{"messages": [USER, ANSWER], "id": 1}, {"messages": [USER, {**ANSWER, "tool_calls": [CALL]}], "id": 2}]


def messages(value, split="train", **options):
    return read_messages(as_source(value, split), Reading(RowOptions(**options))).messages


def test_a_list_of_dicts_is_taken_as_it_is():
    assert messages(ROWS) == messages(tuple(ROWS)) == [row["messages"] for row in ROWS]  # with the null in it
    source = as_source([PAIR, {"prompt": 3}, [PAIR], None, {**PAIR, 4: datetime.date(2026, 1, 1)}], "test")
    assert source.name == "data.test"
    with pytest.raises(InputError) as error:
        read_messages(source, Reading())
    assert str(error.value).splitlines() == [
        "data.test: 3 of 5 rows are bad",
        "  row 2: completion: missing",
        "  row 3: expected a dict of columns, got list",
        "  row 4: expected a dict of columns, got NoneType",
    ]
    with pytest.raises(InputError, match="data.validation: no rows"):
        messages([], "validation")


def generated():
    yield from ROWS


FEATURES = Features({"messages": List(Json()), "id": Value("int64")})
DATASETS = {
    "json": Dataset.from_list(ROWS, features=FEATURES),
    "formatted": Dataset.from_list(ROWS, features=FEATURES).with_format("numpy", columns=["id"]),
    "indices": Dataset.from_list([ROWS[1], ROWS[0]], features=FEATURES).select([1, 0]),
    "of a generator": IterableDataset.from_generator(generated),
    "of a generator, typed": IterableDataset.from_generator(generated, features=FEATURES),
    "stream": Dataset.from_list(ROWS, features=FEATURES).to_iterable_dataset(),
    "filtered stream": Dataset.from_list(ROWS, features=FEATURES).to_iterable_dataset().filter(lambda row: True),
    "mapped generator": IterableDataset.from_generator(generated).map(lambda row: row),
}


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_have_what_was_put_in(name):
    for _ in range(2):  # again and again
        assert messages(DATASETS[name]) == [row["messages"] for row in ROWS]


def test_a_transform_of_its_owners_makes_the_rows():
    dataset = Dataset.from_list([{"question": "Hi", "n": n} for n in range(3)])
    dataset.set_transform(lambda rows: {"prompt": rows["question"], "completion": [f"{n}." for n in rows["n"]]})
    assert [turns[1]["content"] for turns in messages(dataset)] == ["0.", "1.", "2."]


def test_structs_of_a_dataset_have_no_filled_in_nulls():
    rows = [{"messages": [USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]}
            for arguments in ({"a": 1}, {"b": {"c": "x"}}, {"b": {"d": 2}})]  # fmt: skip
    dataset = Dataset.from_list(rows)
    stream, typed = (
        dataset.to_iterable_dataset(),
        IterableDataset.from_generator(lambda: rows, features=dataset.features),
    )
    for each in (dataset, stream, stream.filter(lambda row: True), stream.map(lambda row: row), typed):
        found = [turns[1]["tool_calls"][0]["function"]["arguments"] for turns in messages(each)]
        assert found == [{"a": 1}, {"b": {"c": "x"}}, {"b": {"d": 2}}]


@pytest.mark.parametrize("kind", [DatasetDict, IterableDatasetDict])
def test_a_dict_of_datasets_is_asked_for_the_split(kind):
    datasets = {split: Dataset.from_list([{**PAIR, "prompt": split}]) for split in ("train", "test")}
    if kind is IterableDatasetDict:
        datasets = {split: dataset.to_iterable_dataset() for split, dataset in datasets.items()}
    for split in ("train", "test"):
        assert messages(kind(datasets), split)[0][0]["content"] == split
    with pytest.raises(InputError, match="data.validation: no split 'validation' there, but 'train', 'test'"):
        messages(kind(datasets), "validation")


@pytest.mark.parametrize("value", [3, {"prompt": "Hi"}, iter(ROWS), {1}, b"rows.jsonl", InstructionDataModule, True])
def test_anything_else_is_named(value):
    expected = "data.train: expected the path of a file or folder, .* a list of dicts or a Dataset of datasets, got "
    with pytest.raises(InputError, match=expected + type(value).__name__):
        as_source(value, "train")


def test_rows_in_memory_are_known_by_their_content():
    known = [as_source(value, "train").identity() for value in (ROWS, ROWS[:1], Dataset.from_list([PAIR]))]
    assert len({json.dumps(each) for each in known}) == 3
    assert as_source([dict(row) for row in ROWS], "test").identity() == known[0]
    assert as_source([{**PAIR, "x": lambda: 1}], "train").identity() is None
    assert as_source(IterableDataset.from_generator(generated), "train").identity() is None
    rows = [dict(PAIR)]
    source = as_source(rows, "train")
    before = source.identity()
    rows[0]["completion"] = 2
    assert source.identity() != before


def test_rows_in_memory_are_parts_of_a_mixture():
    mixture = MixedRows({"mine": [PAIR], "theirs": Dataset.from_list([PAIR] * 2), "made": ArithmeticRows(1)})
    assert [number for number, _ in mixture.rows()] == ["mine:1", "theirs:1", "theirs:2", "made:1"]
    assert mixture.identity() is not None


def test_a_data_module_takes_rows_in_memory():
    options = {"text": {"tokenizer": "asset://arithmetic-base"}, "batch_size": 2}
    for train in ([PAIR] * 3, Dataset.from_list([PAIR] * 3)):
        data = InstructionDataModule(train, **options)
        data.setup("fit")
        assert data.splits.counts["train"].rows == 3
        assert next(iter(data.train_dataloader()))["input_ids"].shape == (2, 7)


# -- forms of one's own ------------------------------------------------------------------------------------------------


class Quiz(RowForm):
    """A row of a question and a list of answers."""

    def __init__(self, greeting: str = "") -> None:
        self.greeting = greeting

    def read(self, row):
        if not row["answers"]:
            raise ValueError("answers: none")
        if row["answers"] == ["?"]:
            raise BadRow("answers: unknown")
        if row["answers"] == ["text"]:
            return {"text": row["question"], "extra": 1}
        turns = [{"role": "user", "content": self.greeting + row["question"]}]
        answer = {"role": "assistant", "content": row["answers"][0]}
        return {"messages": [*turns, answer], "weight": row.get("points"), "images": row.get("pictures")}


def reader(form):
    return RowReader(MemoryRows([]), Reading(RowOptions(form=form)))


def test_a_form_of_ones_own():
    found = reader(Quiz("So: "))
    conversation = found.convert(0, {"question": "Hi", "answers": ["Hello"], "points": 2, "id": 7, "label": False})
    assert conversation.messages == [{"role": "user", "content": "So: Hi"}, {**ANSWER, "weight": 2.0}]
    assert found.convert(0, {"question": "Hi", "answers": ["text"]}).text == "Hi"  # each row in a form of its own
    assert found.convert(0, {"question": "Hi", "answers": ["a"], "pictures": ["a.png"]}).messages
    assert sorted(found.notes[0].plain()) == [("steering", "images", 1), ("unread", "extra", 1)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "Hi", "answers": []}, "answers: none"),
        ({"question": "Hi", "answers": ["?"]}, "answers: unknown"),
        ({"question": "Hi"}, "Quiz.read: KeyError: 'answers'"),
        ({"question": "Hi", "answers": [True]}, "messages[1].content: expected a string, got bool"),
    ],
)
def test_rows_that_a_form_of_ones_own_refuses(row, expected):
    problem = reader(Quiz()).convert(0, row)
    assert isinstance(problem, BadRow)
    assert str(problem) == expected


def test_forms_that_return_no_row():
    class Nothing(RowForm):
        def read(self, row):
            return row.get("x")

    assert str(reader(Nothing()).convert(0, {"x": [1]})) == "Nothing.read: expected an object of columns, got list"
    assert "cannot tell the row form" in str(reader(Nothing()).convert(0, {"x": {"a": 1}}))
    with pytest.raises(InputError, match="RowForm must define read"):
        RowForm()


def test_what_score_has_written_stays():
    row = {"question": "Hi", "answers": ["Hello"], "reference_log_prob": [-1.0], "reference_fingerprint": "f"}
    assert reader(Quiz()).convert(0, row).reference_fingerprint == "f"


def test_a_form_of_a_checkpoint_is_made_again():
    options = RowOptions(form=Quiz("So: "))
    plain = to_plain(options)
    assert plain["form"] == {"class_path": f"{Quiz.__module__}.Quiz", "init_args": {"greeting": "So: "}}
    again = RowOptions(**plain)
    assert type(again.form) is sys.modules[Quiz.__module__].Quiz
    assert again.form.greeting == "So: "
    with pytest.raises(InputError, match="form must be one of auto"):
        RowOptions(form="quiz")
    with pytest.raises(TypeError, match="is not a subclass of RowForm"):
        RowOptions(form={"class_path": "dft_lightning.data.ArithmeticRows"})


def test_the_command_takes_a_form_of_ones_own(tmp_path, capfd):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "1+1=", "answers": ["2"]}))
    form = {"class_path": f"{Quiz.__module__}.Quiz", "init_args": {"greeting": "1+"}}
    config = {"data": {"rows": {"form": form}, "train": str(tmp_path / "rows.jsonl"), "batch_size": 1}}
    (tmp_path / "form.yaml").write_text(yaml.safe_dump(config))
    args = ["fit", "--config", str(tmp_path / "form.yaml"), "--data.text.tokenizer", "asset://arithmetic-base"]
    args += ["--model.model", json.dumps(TINY_ARITHMETIC), "--trainer.accelerator", "cpu", "--trainer.max_steps", "1"]
    args += ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(tmp_path / "run")]
    main(args)
    (checkpoint,) = (tmp_path / "run").rglob("*.ckpt")
    data = InstructionDataModule.load_from_checkpoint(checkpoint)
    assert (type(data.rows.form), data.rows.form.greeting) == (Quiz, "1+")
    data.setup("fit")
    assert data.splits.counts["train"].rows == 1
    main([*args, "--data.rows.form", f"{Quiz.__module__}.Quiz", "--data.rows.form.greeting", "2+"])
    for wrong in ("no_such.Form", "quiz"):
        with pytest.raises(SystemExit):
            main([*args, "--data.rows.form", wrong])
        assert "error: data.rows.form: " in capfd.readouterr().err


# -- what a checkpoint holds of them ---------------------------------------------------------------------------------


class Listed(RowSource):
    def __init__(self, answers):
        self.answers = answers

    def rows(self):
        return ((i, {"prompt": "1", "completion": answer}) for i, answer in enumerate(self.answers, start=1))


class Remembering(RowForm):
    def __init__(self, made):
        self.made = made

    def read(self, row):
        return self.made(row)


def checkpoint_of(folder, *args, **options):
    """A checkpoint of a data module that is made in Python."""
    data = InstructionDataModule(*args, **{"text": {"tokenizer": "asset://arithmetic-base"}, **options})
    content = {"datamodule_hyper_parameters": dict(data.hparams), "state_dict": {}}
    torch.save({**content, "pytorch-lightning_version": lightning.__version__}, folder / "data.ckpt")
    return folder / "data.ckpt"


def test_a_checkpoint_holds_sources(tmp_path):
    for source in (ArithmeticRows(3), MixedRows({"a": Listed(["1", "2", "3"])}), Listed(["7"] * 3)):
        data = InstructionDataModule.load_from_checkpoint(checkpoint_of(tmp_path, source))
        data.setup("fit")
        assert len(data.splits.tokenized("train")) == 3


@pytest.mark.parametrize("given", [[{"text": "1"}] * 101, Listed(["1"] * 101), MixedRows({"a": Listed(["1"] * 101)})])
def test_rows_that_a_checkpoint_does_not_hold_are_not_taken_from_it(tmp_path, given):
    path = checkpoint_of(tmp_path, given)
    with pytest.raises(InputError, match="data.train: not saved: 101 items.*give the rows themselves"):
        InstructionDataModule.load_from_checkpoint(path).setup("fit")
    data = InstructionDataModule.load_from_checkpoint(path, train=given)
    data.setup("fit")
    assert len(data.splits.tokenized("train")) == 101


@pytest.mark.parametrize(
    ("group", "options"),
    [
        ("rows", {"prompt_suffix": "1" * 20_001}),
        ("rows", {"form": Remembering(lambda row: row)}),
        ("text", {"chat_template_kwargs": {"documents": ["1"] * 101}}),
    ],
)
def test_options_that_a_checkpoint_does_not_hold_are_not_made_up(tmp_path, group, options):
    (name,) = options
    path = checkpoint_of(tmp_path, ArithmeticRows(3), **{group: options})
    with pytest.raises(InputError, match=rf"InstructionDataModule.{group}.{name}.*: not saved: .*: pass it to "):
        InstructionDataModule.load_from_checkpoint(path)
    loaded = InstructionDataModule.load_from_checkpoint(path, **{group: options})
    assert getattr(getattr(loaded, group), name) == options[name]
