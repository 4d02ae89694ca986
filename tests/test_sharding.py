"""FSDP2 and FSDP1 on two gloo processes: the same numbers as one process, and what is refused."""

from __future__ import annotations

import json
import math
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from commands import export
from conftest import ROOT
from dft_lightning import CausalLMModule
from dft_lightning.distributed import ShardingOptions
from dft_lightning.distributed.shard_loading import allocate_shards, read_shards
from dft_lightning.distributed.strategies import data_parallel_mesh, on_first_rank
from dft_lightning.errors import InputError
from dft_lightning.models.loading import empty_causal_lm, load_causal_lm
from sharded_runs import ALONE, LLAMA, LORA, MEMORY_CASES, VARIANTS, one_step, seeded_run, three_steps, training_memory
from small_runs import run_limited, run_processes, run_script
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
    save_llama(folder / "lora" / "base", True, 97)
    save_llama(folder / "lora" / "other", True, 97, initializer_range=0.03)
    run_processes("sharded_runs.py", str(folder), *PARTS, timeout=400)
    return folder


PARTS = (
    "lora",
    "generation",
    "again",
    "buffers",
    "checkpoints",
    "variants",
    "behaviour",
    "options",
    "loading",
    "training",
    "exporting",
)
LOADED = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8, "num_key_value_heads": 2}


def test_three_steps_from_a_checkpoint(two_processes):
    """Tied and untied, with vocabularies that two ranks share evenly and not, read by shards and whole."""
    found = torch.load(two_processes / "checkpoints" / "out.pt")
    assert len(found) == 8
    for (name, load), (losses, gradients) in found.items():
        alone = three_steps(two_processes / "checkpoints" / name, 4)
        for step in range(3):
            assert relative(gradients[step], alone.gradients[step]) < 1e-10, (name, load, step)
        assert losses.tolist() == pytest.approx(alone.losses, rel=1e-6), (name, load)


def test_every_head_and_option_gives_the_gradient_of_one_process(two_processes):
    found = torch.load(two_processes / "variants" / "out.pt")
    assert {strategy for strategy, _ in found} == {"ddp", "fsdp1", "fsdp2"}
    for (strategy, name), (gradient, decayed) in found.items():
        alone, decayed_alone = one_step(16, 1, VARIANTS[name][1], {})
        assert decayed == decayed_alone, (strategy, name)
        # Under FSDP1, Lightning's 32-true computes float64 parameters in float32.
        assert relative(gradient, alone) < (1e-6 if strategy == "fsdp1" else 1e-10), (strategy, name)


def test_an_adapter_on_two_processes(two_processes):
    pytest.importorskip("peft", reason="the peft extra is not installed")
    base, found = two_processes / "lora" / "base", torch.load(two_processes / "lora" / "out.pt")
    alone = three_steps(base, 4, peft=LORA)
    for name in ("ddp", "shards", "whole"):
        for step in range(3):
            assert relative(found[name][step], alone.gradients[step]) < 1e-10, (name, step)
    # One file with the adapter alone, which goes on on two processes, on one, and as a model.
    halfway, last = (torch.load(two_processes / "lora" / f"epoch={n}.ckpt", weights_only=True) for n in (0, 1))
    assert (halfway["global_step"], last["global_step"]) == (2, 4)
    assert last["state_dict"].keys() == found["after"].keys() == found["resumed"].keys()
    for name, value in last["state_dict"].items():
        assert "lora_" in name
        assert torch.equal(value, found["after"][name]), name
        assert torch.equal(value, found["resumed"][name]), name
        assert not torch.equal(value, halfway["state_dict"][name]), name
    module = CausalLMModule.load_from_checkpoint(two_processes / "lora" / "epoch=1.ckpt")
    merged = AutoModelForCausalLM.from_pretrained(two_processes / "lora" / "merged")
    ids = torch.arange(60).reshape(4, 15)
    with torch.no_grad():
        assert (module(ids) - merged(ids).logits).abs().max() < 1e-5
    assert ["trained on another base" in message for message in found["refused"]] == [True, True]  # on both ranks
    assert {dtype for name, dtype in found["dtypes"].items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in found["dtypes"].items() if "lora_" not in name} == {torch.bfloat16}


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
    """Bit for bit, with dropout, shuffling and accumulation, on each layout."""
    assert torch.equal(*behaviour["twice ddp"])
    assert torch.equal(*behaviour["twice fsdp2"])
    assert torch.equal(seeded_run(), seeded_run())


def test_checkpoints_hold_the_weights(behaviour):
    for distributed in (True, False):
        before, after = behaviour[f"checkpoint {distributed}"]
        assert before == after


def test_a_resumed_run_has_its_own_options(two_processes):
    """Learning rates to the bit where they are as they were, and otherwise those of a cosine by hand."""
    found = torch.load(two_processes / "options" / "out.pt")
    assert len(found) == 12
    for (name, run), (rates, groups, peaks) in found.items():
        peak = 0.002 if run == "other" else 0.01
        first = 0 if run == "whole" else 2
        assert rates == pytest.approx([peak * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(first, 4)]), name
        assert rates == found[name, "whole"][0][2:] or run != "same", name
        betas, decay = ((0.8, 0.9), 0.5) if run == "other" else ((0.9, 0.95), 0.01)
        assert [tuple(group["betas"]) for group in groups] == [betas, betas], (name, run)
        assert [group["weight_decay"] for group in groups] == [decay, 0.0], (name, run)
        assert [group["initial_lr"] for group in groups] == peaks == [peak, peak], (name, run)


def test_a_sharded_model_is_exported_whole(behaviour, two_processes, tmp_path):
    """By the command from a folder of shards and from one file, and by the callback, under FSDP2 and FSDP1."""
    found = []
    for distributed in (True, False):
        source, output = two_processes / "behaviour" / f"distributed-{distributed}.ckpt", tmp_path / str(distributed)
        assert source.is_dir() == distributed
        assert export(["--checkpoint", str(source), "--output", str(output)]) == 0
        found += [output, two_processes / "behaviour" / f"exported-{distributed}"]
    first, *others = [load_file(folder / "model.safetensors") for folder in found]
    assert first["transformer.wte.weight"].shape == (20, 16)
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)

    folders = [two_processes / "generation" / f"exported-{name}" for name in ("fsdp1", "fsdp2")]
    fsdp1, fsdp2 = [load_file(folder / "model.safetensors") for folder in folders]
    assert fsdp1.keys() == fsdp2.keys() == first.keys()
    for name in fsdp1:
        torch.testing.assert_close(fsdp1[name], fsdp2[name], rtol=0, atol=1e-6)


def test_ranks_that_have_answered_wait_for_the_others(two_processes):
    found = torch.load(two_processes / "generation" / "out.pt")
    for lengths in (found["fsdp1"], found["fsdp2"]):
        assert max(lengths[:2]) <= 3
        assert max(lengths[2:]) > 3
    # Two blocks and what is around them, gathered once whatever the tokens, and whether all ranks have room.
    assert found["fsdp2 collectives"] == [*3 * ["_allgather_base_"], "allreduce_"]


def test_nothing_is_left_of_an_earlier_call(two_processes):
    """Gradients of half a step that an interrupted fit left, and weights that a validation had gathered."""
    found = torch.load(two_processes / "again" / "out.pt")
    alone, _ = one_step(16, 1, {}, {})
    for strategy in ("ddp", "fsdp2"):
        assert relative(found[strategy, "gradient"], alone) < 1e-10
        assert torch.equal(found[strategy, True], found[strategy, False])
    assert relative(found["fsdp2", True], found["ddp", True]) < 1e-10


def test_rotary_frequencies_stay_exact(two_processes):
    exact = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
    for name, frequencies in torch.load(two_processes / "buffers" / "out.pt").items():
        assert frequencies.dtype == torch.float32, name
        torch.testing.assert_close(frequencies, exact, rtol=1e-6, atol=0)


def test_no_rank_loads_more_than_its_shard_and_one_block(two_processes):
    found = torch.load(two_processes / "loading" / "out.pt")
    block = 8 * (4 * 64 * 64 + 3 * 64 * 192 + 2 * 64)
    assert found["shards"]["kept"] == found["whole"]["kept"] == 4 * block + 8 * (512 * 64 + 64) / 2
    assert found["shards"]["peak"] <= found["shards"]["kept"] + block
    assert found["whole"]["peak"] > 2 * found["whole"]["kept"]  # what the account would have shown


def test_an_export_holds_a_tensor_at_a_time(two_processes):
    """Largest first of all is the embedding; and while rank 0 writes, the others do not wait beyond their patience."""
    found = torch.load(two_processes / "exporting" / "out.pt")
    # A tensor, what it is gathered into, and the tensors before them that gloo's threads have not yet let go. How many
    # these are is up to the system: 0 to 2.5 times the largest were seen.
    assert found["largest"] <= found["peak"] < found["total"] / 2
    written = load_file(two_processes / "exporting" / "model" / "model.safetensors")
    assert written.keys() <= found["state"].keys()
    assert len(written) == 8 * 9 + 2
    assert all(torch.equal(written[name], found["state"][name]) for name in written)
    assert sorted(path.name for path in (two_processes / "exporting").iterdir() if path.is_dir()) == ["model"]
    assert found["message"].startswith("key: [Errno 2] No such file")


@pytest.mark.parametrize("problem", [None, "no room"])
def test_what_ends_while_others_are_told_that_it_goes_on_is_not_lost(problem, monkeypatch):
    """A thread that ends between what rank 0 has seen of it and what it says."""
    monkeypatch.setattr("dft_lightning.distributed.strategies._NOW_AND_THEN", 0.0)
    ends, said = threading.Event(), []

    def action():
        ends.wait()
        if problem is not None:
            raise OSError(problem)

    def broadcast(value):
        said.append(list(value))
        assert len(said) < 20, "it ended, and nobody hears of it"
        ends.set()
        time.sleep(0.05)
        return list(value)

    trainer = SimpleNamespace(is_global_zero=True, strategy=SimpleNamespace(broadcast=broadcast))
    with pytest.raises(InputError, match="^key: no room") if problem else nullcontext():
        on_first_rank(trainer, action, "key: ", long=True)
    assert said == [[], [problem]]


def test_the_memory_estimate_is_what_the_allocator_measures(two_processes, tmp_path):
    """To a quarter, on one rank and on two, with and without gradient checkpointing of each kind."""
    alone = [training_memory(tmp_path / "trace.json", 1, *case) for case in (*MEMORY_CASES, *ALONE)]
    for measured, estimated in [*torch.load(two_processes / "training" / "out.pt"), *alone]:
        assert estimated == pytest.approx(measured, rel=0.25)


def test_the_memory_table_is_the_one_in_the_docs(capsys, tmp_path):
    empty_model = run_script("benchmarks/memory_table.py")["empty_model"]
    tables = capsys.readouterr().out.split("\n\n")
    assert len(tables) == 2
    for printed in tables:
        assert printed.startswith("| model |")
        assert printed.strip() + "\n" in (ROOT / "docs" / "sharding.md").read_text()
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaConfig(hidden_size=1024, vocab_size=8000, intermediate_size=4096, num_hidden_layers=2).save_pretrained(
        tmp_path
    )
    run_script("benchmarks/memory_table.py", tmp_path)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(tmp_path))
    gradients = 4 * sum(parameter.numel() for parameter in model.parameters()) / 2**30
    (own,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {tmp_path} | 1 |")]
    assert own.split(" | ")[3] == f"{gradients:.1f}"
    billions = {name: sum(p.numel() for p in empty_model(name).parameters()) for name in BILLIONS}
    assert {name: round(count / 1e9, 2) for name, count in billions.items()} == BILLIONS


# As their model cards have it.
BILLIONS = {
    "Qwen2.5-Math-1.5B": 1.54,
    "LLaMA-3.2-3B": 3.21,
    "DeepSeekMath-7B": 6.91,
    "Qwen2.5-Math-7B": 7.62,
    "LLaMA-3.1-8B": 8.03,
}


@pytest.fixture
def reads(tmp_path):
    """Reads a checkpoint folder into a model as a rank would, on this one."""

    def read(**options):
        model, files = empty_causal_lm(str(tmp_path), **options)
        allocate_shards(model, torch.device("cpu"))
        model.tie_weights()  # plain tensors, unlike shards, do not stay tied when they are given memory
        read_shards(model, files)
        return model

    return read


def assert_reads(model, expected):
    state = model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name
    frequencies = [name for name, _ in expected.named_buffers()]
    for name in frequencies:
        assert torch.equal(model.get_buffer(name), expected.get_buffer(name)), name


def test_checkpoints_in_several_files(tmp_path, reads):
    from transformers import AutoModelForCausalLM

    save_llama(tmp_path, False, 96)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    expected.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_reads(reads(), expected)
    for file in tmp_path.glob("model-*.safetensors"):  # one file comes before an index of others, as in transformers
        file.unlink()
    save_file(expected.state_dict(), tmp_path / "model.safetensors")
    assert_reads(reads(), expected)


def test_a_checkpoint_of_the_backbone_with_buffers_that_are_computed(tmp_path, reads):
    """As the hub's GPT-2: no prefix, and causal masks among the weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    expected = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=32))
    expected.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 32, 32)}, file)
    model = reads()
    assert_reads(model, expected)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_tied_weight_saved_under_either_name_or_both(tmp_path, reads):
    from transformers import AutoModelForCausalLM

    save_llama(tmp_path, True, 96)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, "lm_head.weight": embedding}, file)
    assert_reads(reads(), expected)
    save_file({**tensors, "lm_head.weight": embedding, "model.embed_tokens.weight": embedding.clone()}, file)
    assert_reads(reads(), expected)


def test_auto_is_the_dtype_of_the_checkpoint(tmp_path, reads):
    save_llama(tmp_path, True, 96)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    content = json.loads(config.read_text())
    del content["dtype"]
    config.write_text(json.dumps(content))
    assert {p.dtype for p in reads(dtype="auto").parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_causal_lm(str(tmp_path), dtype="auto").parameters()} == {torch.bfloat16}
    assert {p.dtype for p in reads(dtype="float64").parameters()} == {torch.float64}


def test_options_from_python_are_checked():
    for options in ({"load": "shard"}, {"param_dtype": "float16"}):
        with pytest.raises(ValueError, match=f"sharding.{next(iter(options))} must be one of"):
            CausalLMModule(LLAMA, sharding=options)
    # A checkpoint of a sharded run, looked at without a trainer.
    module = CausalLMModule({**LLAMA, "vocab_size": 20}, sharding={"cpu_offload": True})
    module.configure_model()
    assert module.model is not None


def test_tensors_in_parallel_are_refused():
    """Lightning's default on one node."""
    strategy = ModelParallelStrategy()
    strategy._device_mesh = {"data_parallel": None, "tensor_parallel": SimpleNamespace(size=lambda: 8)}
    trainer = SimpleNamespace(strategy=strategy, world_size=8, precision="bf16-mixed")
    with pytest.raises(InputError, match="over 8 processes .* set data_parallel_size: 8 and tensor_parallel_size: 1"):
        data_parallel_mesh(trainer, ShardingOptions())


def test_what_is_refused(tmp_path):
    folder = tmp_path / "refusals"
    save_llama(folder / "twice", True, 96)
    file = folder / "twice" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    save_llama(folder / "renamed", True, 96)
    save_llama(folder / "shape", True, 96)
    save_llama(folder / "bin", True, 96)
    (folder / "bin" / "model.safetensors").unlink()
    for name, change in (("renamed", "model.layers.0.mlp.up.weight"), ("shape", "model.layers.0.mlp.up_proj.weight")):
        file = folder / name / "model.safetensors"
        tensors = load_file(file)
        taken = tensors.pop("model.layers.0.mlp.up_proj.weight")
        save_file({**tensors, change: taken[:-1].contiguous() if name == "shape" else taken}, file)
    run_limited([str(ROOT / "tests" / "sharded_runs.py"), str(tmp_path), "refusals"], timeout=150)  # on one process
    found = json.loads((folder / "out.json").read_text())
    for name, words in REFUSALS.items():
        assert words in found[name], name
    assert set(found) == set(REFUSALS)


REFUSALS = {
    "tied twice": "the config ties lm_head.weight to model.embed_tokens.weight, and the checkpoint has another value",
    "fsdp1 class": "auto_wrap_policy: GPT2LMHeadModel has no module of Conv2d; its repeated blocks are transformers.",
    "no strategy": "these options are of ModelParallelStrategy (FSDP2), and this is SingleDeviceStrategy",
    "another class": "'transformers.LlamaConfig' is no module class",
    "no such path": "'transformers.Nothing' is no module class",
    "no such block": "GPT2LMHeadModel has no module of torch.nn.Conv2d",
    "no list": "Linear has no ModuleList of repeated layers: name their class in model.sharding.blocks",
    "several dtypes": "these are of torch.bfloat16, torch.float32: set model.loading.dtype",
    "fp16": "16-mixed needs a gradient scaler, and ModelParallelStrategy (FSDP2) has none: use bf16-mixed, or FSDPSt",
    "a second model": "AnchoredLoss needs a second model, and FSDPStrategy (FSDP1) shards one alone: use ModelParallel",
    "flat parameters": "use_orig_params: false makes one parameter of matrices, norms and biases",
    "wrapped once": "nothing was refused",
    "wrapped twice": "FSDPStrategy (FSDP1) wraps a module once: make a new one",
    "another layout": "the checkpoint has no model.layers.0.mlp.up_proj.weight (1 such tensors)",
    "no safetensors": "has no safetensors files; set model.sharding.load: whole",
    "another shape": "the checkpoint's model.layers.0.mlp.up_proj.weight is [31, 16], and the model's [32, 16]",
    "inference mode": "cannot be trained afterwards: make the Trainer with inference_mode=False",
}
