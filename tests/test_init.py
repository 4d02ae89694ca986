"""A config for one's own rows: for rows of every form, it is written, read and run."""

from __future__ import annotations

import csv
import json
import re
import sys

import pytest
import yaml

from conftest import ROOT, TINY_LLAMA
from dft_lightning.cli.commands import run
from dft_lightning.fit import main

TURNS = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
# Each form, and two rows' columns as people have them.
FORMS = {
    "prompt_completion": {"prompt": "1+1=", "completion": "1+1+0=2c0|2"},
    "alpaca": {"instruction": "1+1=", "input": "", "output": "2"},
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]},
    "preference": {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
    "text": {"text": "1+1=2"},
    "question, answer": {"question": "1+1=", "answer": "2"},
    "Problem, Solution": {"Problem": "1+1=", "Solution": "2", "id": 7},
}


def written(tmp_path, row, *args, rows=12, name="rows.jsonl"):
    """The config that ``init`` writes for rows, and its path."""
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(row) for _ in range(rows)))
    output = tmp_path / "config.yaml"
    given = [str(path), "--model", str(tmp_path / "model"), "--output", str(output), *args]
    assert run("init", given) == 0
    return yaml.safe_load(output.read_text()), output


def refused(capsys, *args) -> str:
    assert run("init", [str(arg) for arg in args]) == 2
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize("form", FORMS)
def test_what_it_writes_trains_and_tests(tmp_path, form, capsys):
    test = tmp_path / "test.jsonl"
    test.write_text("\n".join(json.dumps(FORMS[form]) for _ in range(3)))
    config, path = written(tmp_path, FORMS[form], "--test", str(test))
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in said[1:]] == ["inspect", "fit", "test"]
    tiny = tmp_path / "tiny.yaml"
    model = {"model": {**TINY_LLAMA, "vocab_size": 20}, "optimizer": {"lr": 1e-3}}
    trainer = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "max_epochs": 1}
    data = {"text": {"tokenizer": "asset://arithmetic-base"}}
    trainer |= {"default_root_dir": str(tmp_path / "runs"), "enable_progress_bar": False}
    tiny.write_text(yaml.safe_dump({"model": model, "data": data, "trainer": trainer}))
    args = ["--config", str(path), "--config", str(tiny)]
    assert main(["fit", *args]).trainer.global_step > 0
    values = main(["test", *args, "--ckpt_path", "last"]).trainer.callback_metrics
    assert "test/nll" in values
    assert ("test/chrf" in values) == (form != "text")
    assert (config["trainer"]["max_epochs"], config["model"]["loss"]) == (3, "DFTLoss")


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"question": "a", "answer": "b"}, {"prompt_column": "question", "completion_column": "answer"}),
        ({"Problem": "a", "Solution": "b"}, {"prompt_column": "Problem", "completion_column": "Solution"}),
        ({"input": "a", "output": "b", "n": 1}, {"prompt_column": "input", "completion_column": "output"}),
        ({"prompt": "a", "completion": "b"}, None),
    ],
)
def test_columns_are_named_where_they_are_not_the_known_ones(tmp_path, row, columns):
    config, _ = written(tmp_path, row)
    assert config["data"].get("rows") == columns


def test_columns_can_be_named(tmp_path):
    row = {"frage": "a", "antwort": "b"}
    config, _ = written(tmp_path, row, "--prompt_column", "frage", "--completion_column", "antwort")
    assert config["data"]["rows"] == {"prompt_column": "frage", "completion_column": "antwort"}


@pytest.mark.parametrize(
    ("answer", "extractor"), [("so\n#### 7", "HashAnswer"), (r"\boxed{7}", "BoxedAnswer"), ("it is 7", None)]
)
def test_an_extractor_is_named_whose_mark_all_answers_have(tmp_path, answer, extractor):
    config, path = written(tmp_path, {"prompt": "a", "completion": answer})
    assert config["model"]["evaluation"].get("answer_extractor") == extractor
    assert ("# answer_extractor: LastNumber" in path.read_text()) == (extractor is None)


def test_sizes_suit_the_rows_and_the_model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 96}')
    few, _ = written(tmp_path, FORMS["alpaca"], rows=3)
    many, _ = written(tmp_path, FORMS["alpaca"], "--overwrite", rows=600)
    sizes = [[each["data"][key] for key in ("batch_size", "global_batch_size")] for each in (few, many)]
    assert sizes == [[1, 1], [8, 32]]
    assert [each["data"]["validation_fraction"] for each in (few, many)] == [0.25, 0.05]
    assert many["data"]["text"]["max_length"] == 96


def test_other_files(tmp_path):
    path = tmp_path / "my rows: 1.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion"], *[["1+1=", "2"]] * 5])
    assert run("init", [str(path), "--model", "m", "--output", str(tmp_path / "a b.yaml")]) == 0
    config = yaml.safe_load((tmp_path / "a b.yaml").read_text())
    assert config["data"]["train"] == str(path)
    assert config["trainer"]["default_root_dir"] == "runs/my rows: 1"
    assert f"--config '{tmp_path / 'a b.yaml'}'" in (tmp_path / "a b.yaml").read_text()


def test_what_is_wrong_is_said_and_nothing_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.jsonl").write_text('{"a": "1", "b": "2"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "1", "completion": "2"}\n{"prompt": "1"}\n')
    (tmp_path / "good.jsonl").write_text('{"prompt": "1", "completion": "2"}\n')
    message = refused(capsys, "odd.jsonl")
    assert message.startswith("error: odd.jsonl: cannot tell the row form from the columns ['a', 'b']")
    assert message.endswith("give --prompt_column and --completion_column")
    assert "no column 'c'; there are a, b" in refused(capsys, "odd.jsonl", "--prompt_column", "c")
    assert "row 2: completion" in refused(capsys, "bad.jsonl")
    assert "no such file" in refused(capsys, "none.jsonl")
    assert "not given: rows" in refused(capsys)
    assert "init takes one file" in refused(capsys, "good.jsonl", "bad.jsonl")
    assert "row 2: completion" in refused(capsys, "good.jsonl", "--test", "bad.jsonl")
    assert not list(tmp_path.glob("*.yaml"))
    (tmp_path / "good.yaml").write_text("mine")
    assert "good.yaml is there already" in refused(capsys, "good.jsonl")
    assert (tmp_path / "good.yaml").read_text() == "mine"


def test_on_a_terminal_it_asks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text('{"prompt": "1", "completion": "2"}\n' * 4)
    asked = iter(["good.jsonl", ""])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(asked))
    assert run("init", []) == 0
    config = yaml.safe_load((tmp_path / "good.yaml").read_text())
    assert (config["data"]["train"], config["model"]["model"]) == ("good.jsonl", "HuggingFaceTB/SmolLM2-135M-Instruct")


def test_the_guide_shows_what_it_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guide = (ROOT / "docs" / "own_rows.md").read_text(encoding="utf-8")
    row = json.dumps({"question": "1+1=", "answer": "2"}) + "\n"
    (tmp_path / "train.jsonl").write_text(row * 7473)
    (tmp_path / "test.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert run("init", ["train.jsonl", "--test", "test.jsonl", "--model", model]) == 0
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    assert (tmp_path / "train.yaml").read_text() == shown
