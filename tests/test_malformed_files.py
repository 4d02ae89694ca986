"""Malformed files, tables, templates, options and mixtures: one InputError that names them, also with ``skip``."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from dft_lightning import CausalLMModule, InstructionDataModule
from dft_lightning.data import HubRows, MixedRows
from dft_lightning.errors import InputError
from dft_lightning.fit import main
from malformed import (
    GOOD,
    PAIR,
    load,
    nested,
    refusal,
    refused_or_skipped,
)
from small_runs import TINY_ARITHMETIC, arithmetic_data, data_options, trainer

pytestmark = pytest.mark.timeout(60)

# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_bad_rows", ["raise", "skip"])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.jsonl", b"", "no rows"),
        ("rows.jsonl", b"\n \n\r\n\t\n", "no rows"),
        ("rows.jsonl", f"{PAIR}\n{PAIR}".encode("utf-16"), "2 of 2 rows are bad\n  row 1: not UTF-8 text"),
        ("rows.jsonl", PAIR.replace(" ", "\n").encode(), "row 1: broken JSON"),
        ("rows.json", b"", "broken JSON at character 1"),
        ("rows.json", b"\n\n", "broken JSON"),
        ("rows.json", b"[]", "no rows"),
        ("rows.json", b"null", "expected a list of objects, got null"),
        ("rows.json", f"[{PAIR},\n{PAIR[:-4]}".encode(), "broken JSON at line 2"),
        ("rows.json", f"[{PAIR}] and so on".encode(), "Extra data"),
        ("rows.json", f"[{PAIR}]".encode("utf-16"), "not UTF-8 text"),
        ("rows.json", f"[{PAIR}".encode() + b', "\xff"]', "not UTF-8 text: invalid start byte at byte 42"),
        ("rows.json", b'[{"prompt": "1", "prompt": "2"}]', "the key 'prompt' is there twice"),
        ("rows.json", nested(100_000).encode(), "JSON that cannot be read: maximum recursion depth"),
        ("rows.csv", b"", "no rows"),
        ("rows.csv", b"\n\n\n", "no rows"),
        ("rows.csv", b"prompt,completion\n", "no rows"),
        ("rows.csv", b",\n1,2\n", "the column '' is there twice"),
        ("rows.csv", b" \n1\n", "row"),
        ("rows.csv", b"prompt,completion,prompt\n1,2,3\n", "the column 'prompt' is there twice"),
        ("rows.csv", b'prompt,completion\n1,2\n"3,4\n5,6\n', "broken CSV in the row that begins in line 3"),
        ("rows.csv", b'prompt,completion\n1,2\n"3"4,5\n', "broken CSV in the row that begins in line 3"),
        ("rows.csv", b"prompt,completion\n1,2\n\xff,4\n", "begins in line 3: not UTF-8 text"),
        ("rows.csv", "prompt,completion\n1,2\n".encode("utf-16"), "begins in line 1: not UTF-8 text"),
        ("rows.csv", b"prompt,completion\r1,2\r", "broken CSV in the row that begins in line 1"),
        ("rows.csv", b",".join(b"c%d" % i for i in range(20_000)) + b",c9\n1\n", "the column 'c9' is there twice"),
        ("rows.parquet", b"", "cannot be read as Parquet"),
        ("rows.parquet", b"PAR1" * 5, "cannot be read as Parquet"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, name, content, expected, on_bad_rows):
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(path, on_bad_rows=on_bad_rows)
    assert message.startswith(f"{path}: ")
    assert expected in message


NOT_TEXT = pa.Array.from_buffers(  # Arrow takes a writer's word that it is UTF-8
    pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"1\xff")]
)
TABLES = {
    "binary column": ({"prompt": [b"1", b"2"], "completion": ["2", "3"]}, "row 1: prompt: expected a string, got byte"),
    "nulls": ({"prompt": pa.array([None, None], pa.string()), "completion": ["2", "3"]}, "row 1: prompt: null"),
    "booleans": ({"prompt": [True, False], "completion": ["2", "3"]}, "row 1: prompt: expected a string, got bool"),
    "no UTF-8": (
        {"prompt": NOT_TEXT, "completion": ["2", "3"]},
        "row 2: prompt: expected a string, got a value that cannot be read ('utf-8' codec can't decode byte 0xff",
    ),
    "no date": (
        {"prompt": pa.array([2**30], pa.date32()), "completion": ["2"]},
        "row 1: prompt: expected a string, got a value that cannot be read (days=10737418",
    ),
    "a date": ({"prompt": pa.array([1], pa.date32()), "completion": ["2"]}, "prompt: expected a string, got date"),
    "other columns": ({"a": ["1"]}, "row 1: cannot tell the row form from the columns ['a']"),
}


@pytest.mark.parametrize("name", TABLES)
def test_bad_tables(tmp_path, name):
    """In Parquet and as a saved dataset, whose values may be such as Python has none for."""
    columns, expected = TABLES[name]
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "rows.parquet")
    Dataset(table).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        message = refusal(path)
        bad = f"{message.count('row ')} of {len(table)} rows are bad\n" if name != "other columns" else ""
        assert message.startswith(f"{path}: {bad}")
        assert expected in message


def test_tables_cut_short_and_columns_there_twice(tmp_path):
    path = tmp_path / "rows.parquet"
    text = pa.array(["1", "2"])
    pq.write_table(pa.Table.from_arrays([text, text, text], ["prompt", "completion", "prompt"]), path)
    assert refusal(path) == f"{path}: the column 'prompt' is there twice"
    pq.write_table(pa.table({"prompt": text, "completion": text}), path)
    content = path.read_bytes()
    for size in (3, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert refusal(path).startswith(f"{path}: cannot be read as Parquet")
    middle = len(content) // 4
    path.write_bytes(content[:4] + b"\xff" * middle + content[4 + middle :])
    assert refusal(path).startswith(f"{path}: cannot be read as Parquet")


@pytest.mark.parametrize("file", ["*.arrow", "state.json", "dataset_info.json"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_saved_datasets_cut_short(tmp_path, file, share):
    Dataset.from_list([GOOD["pairs"]] * 3000).save_to_disk(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob(file)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert refusal(tmp_path / "saved").startswith(f"{tmp_path / 'saved'}: cannot be read as a saved dataset")


def test_folders(tmp_path):
    (tmp_path / "notes.txt").write_text("none")
    assert "a folder without a .jsonl" in refusal(tmp_path)
    (tmp_path / "a.jsonl").write_text(PAIR)
    (tmp_path / "b.jsonl").write_text('{"prompt": "1"}')
    refused_or_skipped(tmp_path, "b.jsonl:1", "completion: missing")
    for name, content in (("c.json", b"[{"), ("c.csv", b'prompt,completion\n"1'), ("c.parquet", b"PAR1")):
        (tmp_path / name).write_bytes(content)
        assert refusal(tmp_path, on_bad_rows="skip").startswith(f"{tmp_path / name}: ")
        (tmp_path / name).unlink()
    assert refusal(tmp_path / "none.jsonl") == f"{tmp_path / 'none.jsonl'}: no such file"
    assert "neither a local file nor a dataset" in refusal(tmp_path / "none")


def test_hub_rows_that_break_off(tmp_path):
    (tmp_path / "rows.jsonl").write_text(f"{PAIR}\n{{broken")
    for streaming in (False, True):
        assert refusal(HubRows(str(tmp_path), streaming=streaming)).startswith(f"{tmp_path}/train: ")


# -- tokenizers and templates ------------------------------------------------------------------------------------------

CONTENT = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ raise_exception('not this one') }}", "the chat template is broken: not this one"),
        ("{{ 1 / 0 }}", "the chat template is broken: division by zero"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "the chat template is broken: Range too big"),
        ("{{ messages[0].content + 1 }}", "the chat template is broken: can only concatenate str"),
        ("{{ nothing.at_all }}", "the chat template is broken: 'nothing' is undefined"),
        ("{{ messages[7].content }}", "the chat template is broken"),
        ("{{ messages.__class__.__mro__ }}", "the chat template is broken"),
        ("{% for m in messages %}", "the chat template is broken: Unexpected end of template"),
        ("{{ messages", "the chat template is broken"),
        ("{% include 'other' %}", "the chat template is broken"),
        ("", "the chat template leaves out what the assistant says"),
        ("{{ messages[0].content }}", "the chat template leaves out what the assistant says"),
        ("none.jinja", "data.text.chat_template: no such file: none.jinja"),
    ],
)
def test_templates_that_are_broken(tmp_path, template, expected):
    (tmp_path / "rows.jsonl").write_text(PAIR)
    assert expected in refusal(tmp_path / "rows.jsonl", chat_template=template)


def test_a_template_file_that_is_not_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text(PAIR)
    path = tmp_path / "own.jinja"
    path.write_bytes(CONTENT.encode("utf-16"))
    message = refusal(tmp_path / "rows.jsonl", chat_template=str(path))
    assert message.startswith(f"data.text.chat_template: {path} cannot be read: ")


def test_ids_above_the_vocabulary():
    with pytest.raises(
        InputError, match="data.text.tokenizer has token ids up to 18, but the model's embedding has 12"
    ):
        trainer().fit(CausalLMModule({**TINY_ARITHMETIC, "vocab_size": 12}), datamodule=arithmetic_data())


# -- options and mixtures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"on_bad_rows": "ignore"}, "on_bad_rows must be one of raise, skip, got 'ignore'"),
        ({"form": "csv"}, "form must be one of"),
        ({"train_turns": "first"}, "train_turns must be one of"),
        ({"packing": "ffd", "max_length": 8}, "packing must be one of"),
        ({"packing": "bfd"}, "packing needs max_length"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_length": -5}, "max_length must be at least 1"),
        ({"num_workers": -1}, "num_workers must not be negative"),
        ({"validation_fraction": float("nan")}, "validation_fraction must lie in"),
        ({"validation_fraction": 1.0}, "validation_fraction must lie in"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size must be at least 1"),
    ],
)
def test_options(options, expected):
    with pytest.raises(ValueError, match=expected):
        InstructionDataModule("rows.jsonl", **data_options(**options))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"a": 1}, "weights are of"),
        ({"a": 1, "c": 1}, "weights are of"),
        ({"a": 1, "b": -1}, "weights must be finite and not negative"),
        ({"a": 1, "b": float("nan")}, "weights must be finite and not negative"),
        ({"a": 0, "b": 0}, "weights: none is above 0"),
    ],
)
def test_weights_of_mixtures(weights, expected):
    with pytest.raises(ValueError, match=expected):
        MixedRows({"a": "a.jsonl", "b": "b.jsonl"}, weights=weights)


@pytest.mark.parametrize("weights", [None, {"a": 1, "b": 1}])
def test_rows_of_mixtures(tmp_path, weights):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text(f"{PAIR}\n{PAIR}")
    mixture = MixedRows({"a": str(a), "b": str(b)}, weights, stopping_strategy="all_exhausted")
    assert refusal(mixture, on_bad_rows="skip") == f"{b}: no such file"
    b.write_text("\n\n")
    assert refusal(mixture, on_bad_rows="skip") == f"b ({b}): no rows"
    b.write_text('{"a": 1}')
    assert "a + b: row b:1: cannot tell the row form from the columns ['a']" in refusal(mixture)
    b.write_text('{"prompt": "1"}\n' + PAIR)
    mixture = MixedRows({"a": str(a), "b": str(b)})
    refused = refusal(mixture)
    assert "row b:1: " in refused
    assert load(mixture, on_bad_rows="skip").splits.counts["train"].bad == 1


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "options", "expected"),
    [
        ("rows.jsonl", f"{PAIR}\n{{", [], "1 of 2 rows are bad\n  row 2: broken JSON at character 2"),
        ("rows.json", "[{", ["--data.rows.on_bad_rows", "skip"], "broken JSON at character 3"),
        ("rows.jsonl", PAIR, ["--data.text.chat_template", "{{ 1 / 0 }}"],
         "the chat template is broken: division by zero"),
        ("rows.jsonl", PAIR, ["--data.text.max_length", "0"], "max_length must be at least 1, got 0"),
        ("rows.jsonl", f'{PAIR}\n{{"prompt": "1"}}', ["--data.streaming", "{}", "--data.num_workers", "1"],
         "row 2: completion: missing"),
    ],
)  # fmt: skip
def test_the_command_ends_in_one_message(capfd, tmp_path, name, content, options, expected):
    (tmp_path / name).write_text(content)
    model = json.dumps({**TINY_ARITHMETIC})
    args = ["fit", "--model.model", model, "--data.train", str(tmp_path / name), "--trainer.accelerator", "cpu"]
    args += ["--data.text.tokenizer", "asset://arithmetic-base", "--trainer.max_steps", "4", "--data.batch_size", "1"]
    args += ["--trainer.default_root_dir", str(tmp_path / "runs"), "--trainer.enable_progress_bar", "false"]
    with pytest.raises(SystemExit) as error:
        main([*args, *options])
    assert error.value.code == 2
    out = capfd.readouterr().err
    assert out.count("error: ") == 1
    assert expected in out[out.index("error: ") :]
    assert "Traceback" not in out
