"""Each example runs, as its first lines say."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT))

TINY_RUN = [
    "--config", str(ROOT / "configs" / "quickstart.yaml"),
    "--trainer.max_steps", "1",
    "--trainer.callbacks", "[]",
    "--trainer.enable_progress_bar", "false",
    "--data.train.num_rows", "4",
    "--data.validation.num_rows", "2",
]  # fmt: skip


def test_own_loss(tmp_path):
    from examples.own_loss import ClippedDFT

    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]])
    p = logits.softmax(-1)[:, 0]
    weight = torch.tensor([0.5, float(p[1])])
    value = ClippedDFT(floor=0.5, reduction="none")(logits, torch.tensor([0, 0]))
    torch.testing.assert_close(value, -weight * p.log())


def test_own_module(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "own_module.py"), "fit", *TINY_RUN]
    result = subprocess.run(
        [*command, "--trainer.default_root_dir", str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr[-2000:]

    from examples.own_module import FrozenEmbeddings

    module = FrozenEmbeddings("asset://arithmetic-base")
    module.configure_model()
    groups = module.build_parameter_groups()
    trained = {id(p) for group in groups for p in group["params"]}
    assert id(module.model.get_input_embeddings().weight) not in trained
    assert trained


def test_plain_pytorch():
    from examples.plain_pytorch import train

    losses = train()
    assert len(losses) == 20
    assert all(value == value for value in losses)


def test_transformers_trainer(tmp_path):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    from examples.transformers_trainer import train

    assert 0 < train(str(tmp_path)) < 0.2  # p log p near p = 1/64: about 0.065


def test_make_arithmetic_base(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.make_arithmetic_base import make

    small = ["--trainer.max_steps", "1", "--trainer.callbacks", "[]", "--data.train.num_rows", "4"]
    make(str(tmp_path / "base"), *small, "--trainer.default_root_dir", str(tmp_path / "runs"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert 250_000 < model.num_parameters() < 350_000
    assert len(AutoTokenizer.from_pretrained(tmp_path / "base")) == 19
