"""Each example runs, as its first lines say."""

from __future__ import annotations

import json
import re

import pytest
import torch

from conftest import ROOT
from dft_lightning.metrics import ExpressionValue
from small_runs import run_script

TINY_RUN = [
    "--config", str(ROOT / "configs" / "quickstart.yaml"),
    "--trainer.max_steps", "1",
    "--trainer.callbacks", "[]",
    "--trainer.enable_progress_bar", "false",
    "--data.train.num_rows", "4",
    "--data.validation.num_rows", "2",
]  # fmt: skip


def test_own_loss():
    ClippedDFT = run_script("examples/own_loss.py")["ClippedDFT"]
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]])
    p = logits.softmax(-1)[:, 0]
    weight = torch.tensor([0.5, float(p[1])])
    value = ClippedDFT(floor=0.5, reduction="none")(logits, torch.tensor([0, 0]))
    torch.testing.assert_close(value, -weight * p.log())


def test_own_module(tmp_path):
    script = run_script("examples/own_module.py", "fit", *TINY_RUN, "--trainer.default_root_dir", tmp_path)
    (logged,) = tmp_path.rglob("metrics.csv")
    assert "val/loss" in logged.read_text()
    module = script["FrozenEmbeddings"]("asset://arithmetic-base")
    module.configure_model()
    groups = module.build_parameter_groups()
    trained = {id(p) for group in groups for p in group["params"]}
    assert id(module.model.get_input_embeddings().weight) not in trained
    assert trained


def test_plain_pytorch(capsys):
    run_script("examples/plain_pytorch.py")
    losses = re.findall(r"^step (\d+): DFT loss (\d\.\d{4})$", capsys.readouterr().out, re.MULTILINE)
    assert [int(step) for step, _ in losses] == list(range(20))
    assert 0 < float(losses[0][1]) < 0.2  # p log p near p = 1/64: about 0.065


def test_transformers_trainer(tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    monkeypatch.chdir(tmp_path)
    run_script("examples/transformers_trainer.py")
    (loss,) = re.findall(r"^training loss (\d\.\d{4})$", capsys.readouterr().out, re.MULTILINE)
    assert 0 < float(loss) < 0.2  # as above


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_trl_trainer(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl", reason="TRL is not installed")
    monkeypatch.chdir(tmp_path)
    run_script("examples/trl_trainer.py")
    nll, loss = map(float, re.findall(r"nll (\d\.\d{4}), DFT loss (\d\.\d{4})", capsys.readouterr().out)[0])
    assert 0 < loss < nll < 1  # the base half knows it


def test_word_problems(tmp_path, capsys):
    """A third of the expressions is made wrong by value, and a part of the rows is a part of all."""
    rows = [{"Body": f"Ann has {a} pens.", "Question": "How many?", "Equation": f"( {a}.0 + 1.5 )"} for a in range(90)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    example = run_script("examples/word_problems.py", path)
    WordProblems = example["WordProblems"]
    assert "'completion': '0 + 1.5'" in capsys.readouterr().out
    right, wrong = (
        [row["completion"] for _, row in WordProblems(str(path), wrong=share).rows()] for share in (0.0, 1 / 3)
    )
    values = [[ExpressionValue().extract(each) for each in found] for found in (right, wrong)]
    assert 20 <= sum(a != b for a, b in zip(*values, strict=True)) <= 40
    assert None not in values[0]
    part = [row["completion"] for _, row in WordProblems(str(path), wrong=1 / 3, first=30, count=20).rows()]
    assert part == wrong[30:50]
    # Of a question to be repeated one word is wrong, in the same rows.
    repeated = [row for _, row in example["RepeatedQuestions"](str(path), wrong=1 / 3).rows()]
    assert [row["completion"] != "How many?" for row in repeated] == [a != b for a, b in zip(right, wrong, strict=True)]
    assert all(row["prompt"].endswith(":\nHow many?") for row in repeated)
    differing = [
        sum(a != b for a, b in zip(row["completion"].split(), ("How", "many?"), strict=True)) for row in repeated
    ]
    assert set(differing) == {0, 1}
    path.write_text(json.dumps({"question": "1+1?", "answer": "It is 2.\n#### 2"}))
    assert list(example["Solutions"](str(path)).rows()) == [(1, {"prompt": "1+1?", "completion": "It is 2.\n#### 2"})]


def test_make_arithmetic_base(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small = ["--trainer.max_steps", "1", "--trainer.callbacks", "[]", "--data.train.num_rows", "4"]
    small += ["--trainer.default_root_dir", tmp_path / "runs"]
    run_script("examples/make_arithmetic_base.py", "--output", tmp_path / "base", *small)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert 250_000 < model.num_parameters() < 350_000
    assert len(AutoTokenizer.from_pretrained(tmp_path / "base")) == 19
