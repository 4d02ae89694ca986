"""FSDP2 and FSDP1 on two gloo processes: the same numbers as one process, and what is refused."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from conftest import ROOT
from sharded_runs import LLAMA, MEMORY_CASES, VARIANTS, one_step, three_steps, training_memory
from small_runs import run_two_processes
from test_normalization import relative


def save_llama(folder, tied, vocabulary, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    values = {**LLAMA, **options, "vocab_size": vocabulary, "tie_word_embeddings": tied}
    del values["model_type"]
    LlamaForCausalLM(LlamaConfig(**values)).save_pretrained(folder)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A folder with what every part of sharded_runs left, of one launch."""
    folder = tmp_path_factory.mktemp("sharded")
    for part in PARTS:
        (folder / part).mkdir()
    for tied in (True, False):
        for vocabulary in (96, 97):
            name = f"{'tied' if tied else 'untied'}-vocabulary-{vocabulary}"
            save_llama(folder / "checkpoints" / name, tied, vocabulary)
    save_llama(folder / "loading" / "model", True, 512, **LOADED)
    run_two_processes("sharded_runs.py", str(folder), *PARTS, timeout=400)
    return folder


PARTS = ("checkpoints", "variants", "behaviour", "loading", "training")
LOADED = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8, "num_key_value_heads": 2}


def test_three_steps_from_a_checkpoint(two_processes):
    """Tied and untied, with vocabularies that two ranks share evenly and not, read by shards and whole."""
    found = torch.load(two_processes / "checkpoints" / "out.pt")
    assert len(found) == 8
    for (name, load), (losses, gradients) in found.items():
        alone = three_steps(two_processes / "checkpoints" / name, 4)
        for step in range(3):
            assert relative(gradients[step], alone.gradients[step]) < 1e-10, (name, load, step)
        # A micro-batch's sum over a power of two, which is half as large on half the rows.
        assert losses.tolist() == pytest.approx([2 * loss for loss in alone.losses], rel=1e-6), (name, load)


def test_every_head_and_option_gives_the_gradient_of_one_process(two_processes):
    found = torch.load(two_processes / "variants" / "out.pt")
    assert {strategy for strategy, _ in found} == {"fsdp1", "fsdp2"}
    for (strategy, name), (gradient, decayed) in found.items():
        alone, decayed_alone = one_step(16, 1, VARIANTS[name][1], {})
        assert decayed == decayed_alone, (strategy, name)
        # Under FSDP1, Lightning's 32-true computes float64 parameters in float32.
        assert relative(gradient, alone) < {"fsdp2": 1e-10, "fsdp1": 1e-6}[strategy], (strategy, name)


@pytest.fixture
def behaviour(two_processes):
    return torch.load(two_processes / "behaviour" / "out.pt")


def test_precision(behaviour):
    """bf16-mixed: float32 shards, gradients and optimizer state, bfloat16 inside a block; and half of each matrix."""
    found = {
        name: {k: v for k, v in behaviour[name].items() if k in ("parameters", "state", "block")} for name in PRECISIONS
    }
    for name, (kept, computed) in PRECISIONS.items():
        assert found[name] == {"parameters": [kept], "state": [kept], "block": computed}
        assert behaviour[name]["shards"]["model.transformer.wte.weight"] == [10, 16]
    full = behaviour["32-true"]["gradient"]
    for name in ("bf16-mixed", "bf16-true"):
        assert 1e-6 < relative(behaviour[name]["gradient"], full) < 0.03
    assert behaviour["bf16-mixed"]["gradient"].dtype == torch.float32


PRECISIONS = {
    "32-true": ("torch.float32", "torch.float32"),
    "bf16-mixed": ("torch.float32", "torch.bfloat16"),
    "bf16-true": ("torch.bfloat16", "torch.bfloat16"),
}


def test_the_same_seed_gives_the_same_run(behaviour):
    """Bit for bit, with dropout, shuffling and accumulation."""
    assert torch.equal(*behaviour["twice"])


def test_checkpoints_hold_the_weights(behaviour):
    for distributed in (True, False):
        before, after = behaviour[f"checkpoint {distributed}"]
        assert before == after


def test_no_rank_loads_more_than_its_shard_and_one_block(two_processes):
    found = torch.load(two_processes / "loading" / "out.pt")
    block = 8 * (4 * 64 * 64 + 3 * 64 * 192 + 2 * 64)
    assert found["shards"]["kept"] == found["whole"]["kept"] == 4 * block + 8 * (512 * 64 + 64) / 2
    assert found["shards"]["peak"] <= found["shards"]["kept"] + block
    assert found["whole"]["peak"] > 2 * found["whole"]["kept"]  # what the account would have shown


def test_the_memory_estimate_is_what_the_allocator_measures(two_processes, tmp_path):
    """To a quarter, on one rank and on two, with and without gradient checkpointing."""
    alone = [training_memory(tmp_path / "trace.json", 1, *case) for case in MEMORY_CASES]
    for measured, estimated in [*torch.load(two_processes / "training" / "out.pt"), *alone]:
        assert estimated == pytest.approx(measured, rel=0.25)


def test_the_memory_table_is_the_one_in_the_docs():
    spec = importlib.util.spec_from_file_location("memory_table", ROOT / "benchmarks" / "memory_table.py")
    memory_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory_table)
    billions = {name: sum(p.numel() for p in memory_table.empty_model(name).parameters()) for name in BILLIONS}
    assert {name: round(count / 1e9, 2) for name, count in billions.items()} == BILLIONS
    assert memory_table.table() in (ROOT / "docs" / "sharding.md").read_text()


# As their model cards have it.
BILLIONS = {
    "Qwen2.5-Math-1.5B": 1.54,
    "LLaMA-3.2-3B": 3.21,
    "DeepSeekMath-7B": 6.91,
    "Qwen2.5-Math-7B": 7.62,
    "LLaMA-3.1-8B": 8.03,
}


def test_what_is_refused(tmp_path):
    folder = tmp_path / "refusals"
    save_llama(folder / "renamed", True, 96)
    save_llama(folder / "shape", True, 96)
    save_llama(folder / "bin", True, 96)
    (folder / "bin" / "model.safetensors").unlink()
    from safetensors.torch import load_file, save_file

    for name, change in (("renamed", "model.layers.0.mlp.up.weight"), ("shape", "model.layers.0.mlp.up_proj.weight")):
        file = folder / name / "model.safetensors"
        tensors = load_file(file)
        taken = tensors.pop("model.layers.0.mlp.up_proj.weight")
        save_file({**tensors, change: taken[:-1].contiguous() if name == "shape" else taken}, file)
    run_two_processes("sharded_runs.py", str(tmp_path), "refusals")
    found = json.loads((folder / "out.json").read_text())
    for name, words in REFUSALS.items():
        assert words in found[name], name
    assert set(found) == set(REFUSALS)


REFUSALS = {
    "no strategy": "these options are of ModelParallelStrategy (FSDP2), and this is SingleDeviceStrategy",
    "another class": "'transformers.LlamaConfig' is no module class",
    "no such path": "'transformers.Nothing' is no module class",
    "no such block": "GPT2LMHeadModel has no module of torch.nn.Conv2d",
    "no list": "Linear has no ModuleList of repeated layers: name their class in model.sharding.blocks",
    "several dtypes": "these are of torch.bfloat16, torch.float32: set model.dtype",
    "fp16": "16-mixed needs a gradient scaler, and ModelParallelStrategy (FSDP2) has none: use bf16-mixed, or FSDPSt",
    "flat parameters": "use_orig_params: false makes one parameter of matrices, norms and biases",
    "wrapped once": "nothing was refused",
    "wrapped twice": "FSDPStrategy (FSDP1) wraps a module once: make a new one",
    "another layout": "the checkpoint has no model.layers.0.mlp.up_proj.weight (1 such tensors)",
    "no safetensors": "has no safetensors files; set model.sharding.load: whole",
    "another shape": "the checkpoint's model.layers.0.mlp.up_proj.weight is [31, 16], and the model's [32, 16]",
    "inference mode": "cannot be trained afterwards: make the Trainer with inference_mode=False",
}
