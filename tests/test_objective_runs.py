"""Every objective in training: the same gradients however a step is split, packed, and shared by two processes."""

from __future__ import annotations

import pytest
import torch

from commands import score
from conftest import shared
from dft_lightning import CausalLMModule
from dft_lightning.data.tokenizer import load_tokenizer
from objective_runs import LORA, OBJECTIVES, ROWS, SPLITS, steps
from small_runs import TINY_ARITHMETIC, run_two_processes

pytestmark = pytest.mark.timeout(300)


def scored(folder, rows=ROWS):
    """Rows with the log-probs of a base that lies in the folder."""
    arguments = [
        f"--model.model={folder / 'base'}", "--model.loading.dtype=float64", "--data.train.class_path=ArithmeticRows",
        f"--data.train.init_args.num_rows={rows}", "--data.train.init_args.max_digits=7",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", f"--output={folder / 'scored'}",
    ]  # fmt: skip
    assert score(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A GPT-2 of random weights: it computes in float64 throughout."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    module = CausalLMModule({**TINY_ARITHMETIC, "initializer_range": 0.3}, loading={"dtype": "float64"})
    module.configure_model()
    module.model.save_pretrained(folder / "base")
    load_tokenizer("asset://arithmetic-base").save_pretrained(folder / "base")
    return scored(folder)


@pytest.fixture(scope="module")
def alone(tiny):
    """Gradients of one process and one batch a step."""
    found = {name: steps(tiny, loss, "a batch") for name, loss in OBJECTIVES.items()}
    return {**found, "adapter": steps(tiny, OBJECTIVES["anchored"], "a batch", peft=LORA)}


def assert_same(gradients, expected, tolerance=1e-10):
    for step, (own, theirs) in enumerate(zip(gradients, expected, strict=True)):
        assert float((own - theirs).norm() / theirs.norm()) < tolerance, step
        assert float(theirs.norm()) > 0


@pytest.mark.parametrize("split", list(SPLITS)[1:])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_split_gives_the_same_steps(tiny, alone, name, split):
    assert_same(steps(tiny, OBJECTIVES[name], split), alone[name])


def test_objectives_differ(alone):
    """Each is one of its own, so that none stood in for another."""
    gradients = {name: gradients[1] for name, gradients in alone.items() if name != "adapter"}
    names = list(gradients)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert float((gradients[name] - gradients[other]).norm() / gradients[other].norm()) > 1e-4, (name, other)


@pytest.fixture(scope="module")
def on_two_processes(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "gradients.pt"
    run_two_processes("objective_runs.py", str(tiny), str(out))
    return torch.load(out)


def test_two_processes_give_the_same_steps(on_two_processes, alone):
    """Under DDP and FSDP2; of what FSDP2 does not shard, a second model, the adapter's own base."""
    strategies = set()
    for (name, strategy, split), gradients in on_two_processes.items():
        assert_same(gradients, alone["adapter" if split == "adapter" else name])
        strategies.add((name, strategy))
    assert len(strategies) == 2 * len(OBJECTIVES)


@pytest.mark.parametrize("name", ["iw sequence", "anchored"])
def test_twenty_steps_of_a_real_model(tmp_path, name):
    """stories260K, packed micro-batches beside one padded batch; its norms go through float32. The other objectives
    differ from these in what tests above try."""
    (tmp_path / "base").symlink_to(shared("models/stories260K"))
    folder = scored(tmp_path, rows=6)
    plain = steps(folder, OBJECTIVES[name], "a batch", count=20)
    packed = steps(folder, OBJECTIVES[name], "packing and accumulation", count=20)
    assert_same(packed[:1], plain[:1], tolerance=1e-6)
    assert_same(packed, plain, tolerance=1e-2)  # training amplifies float32's last bits
