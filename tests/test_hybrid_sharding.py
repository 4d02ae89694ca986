"""HSDP on four gloo processes, two replicas of two shards: the numbers of one process."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from dft_lightning import CausalLMModule, DFTLoss
from dft_lightning.distributed import ShardingOptions
from dft_lightning.distributed.strategies import data_parallel_mesh
from dft_lightning.errors import InputError
from dft_lightning.models.head import ends_apart
from hybrid_runs import SHARDING, one_step, steps, three_steps, weights, with_reference
from sharded_runs import LLAMA
from small_runs import TINY_ARITHMETIC, GradientRecorder, arithmetic_data, run_processes, trainer
from test_normalization import relative
from test_sharding import save_llama

PARTS = ("checkpoints", "options", "collectives", "order", "resume", "reference")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    for part in PARTS:
        (folder / part).mkdir()
    for tied in (True, False):
        save_llama(folder / "checkpoints" / f"{'tied' if tied else 'untied'}-vocabulary-97", tied, 97)
    save_llama(folder / "reference" / "base", True, 97)
    save_llama(folder / "reference" / "other", False, 97, initializer_range=0.3)
    run_processes("hybrid_runs.py", str(folder), *PARTS, number=4, timeout=140)
    return SimpleNamespace(folder=folder, **{part: torch.load(folder / part / "out.pt") for part in PARTS})


def test_three_clipped_steps_from_a_checkpoint(found):
    assert len(found.checkpoints) == 4
    for (name, load), (gradients, clipped, places, shapes) in found.checkpoints.items():
        alone = three_steps(found.folder / "checkpoints" / name, 4)
        for own, expected in zip([*gradients, *clipped], [*alone.gradients, *alone.clipped], strict=True):
            assert relative(own, expected) < 1e-10, (name, load)
        assert all(gradient.norm() < 0.00501 for gradient in clipped)
        assert gradients[0].norm() > 0.01
        assert places == {"(Replicate(), Shard(dim=0))"}
        assert shapes[0] == shapes[2]
        assert shapes[1] == shapes[3]
        assert shapes[0] != shapes[1]  # 97 rows
        for first, second, parameter in zip(*shapes[:2], alone.parameters(), strict=True):
            assert first[0] + second[0] == parameter.shape[0]


def test_every_option_gives_the_gradient_of_one_process(found):
    alone = one_step(8, {})
    assert found.options.keys() == SHARDING.keys()
    for name, gradient in found.options.items():
        assert relative(gradient, alone) < 1e-10, name


def test_replicas_exchange_shares_of_the_gradient_alone(found):
    """Blocks are gathered as often, within a replica; each group's share is summed over replicas once a step."""
    one, two = found.collectives[1], found.collectives[2]
    same = {name for name in one if "allreduce" not in name}
    assert {name: one[name] for name in same} == {name: two[name] for name in same}
    groups = 3  # two blocks, and embedding, head and last norm
    assert two["allreduce_"] - one["allreduce_"] == groups


def test_the_heads_gradient_is_reduced_before_the_blocks(found):
    """Where it is not the embedding's as well, which is the last to be there."""
    reduced, blocks, _ = found.order[True]
    assert reduced[:2] == blocks[::-1]
    assert len(reduced) == 3
    reduced, blocks, (embedding, head) = found.order[False]
    assert reduced[0] == head
    assert reduced[1:3] == blocks[::-1]
    assert embedding in reduced[3:]
    assert len(reduced) == 5


def test_a_run_goes_on_from_its_shards_and_from_a_file(found, tmp_path):
    whole = found.resume["whole"]
    alone = steps(4, None, {})
    assert relative(whole, weights(alone)) < 1e-5
    for name in ("shards", "file"):
        assert torch.equal(found.resume[name], whole), name
        assert relative(found.resume[f"{name}, one replica"], whole) < 1e-6, name
    exported = load_file(found.folder / "resume" / "exported" / "model.safetensors")
    for name, value in alone.lightning_module.model.state_dict().items():
        if name in exported:
            assert relative(exported[name], value) < 1e-4, name
    assert relative(steps_from_file(found.folder / "resume" / "file.ckpt"), whole) < 1e-5


def steps_from_file(path):
    """On one process, from the checkpoint of four."""
    return weights(steps(4, path, {}))


def test_a_reference_is_sharded_like_the_model(found):
    """Gradients of one process, by shards and replicas, with either head, of the start and of another model."""
    own = with_reference(found.folder / "reference")
    gradients = {key: value for key, value in found.reference.items() if isinstance(key, tuple)}
    assert len(gradients) == 7
    for (name, way), of_steps in gradients.items():
        alone = three_steps(found.folder / "reference" / "base", 4, own=own[name]).gradients
        for step in range(3):
            assert relative(of_steps[step], alone[step]) < 1e-10, (name, way, step)


def test_a_reference_takes_its_share_of_memory_and_its_gathers(found):
    """Half of each block on two shards, each of which is gathered once a micro-batch, and nothing is reduced."""
    in_shards, all_of_them, parts = found.reference["held"]
    assert (in_shards, all_of_them) == (2 * 9, 2 * 9 + 2)  # all but embedding, which is the head, and norm
    assert parts == {0.5}
    own, without = (Counter(found.reference[name]) for name in ("with", "without"))
    assert own - without == {"_allgather_base_": 2}


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_a_sharded_reference_has_the_models_precision(found, precision):
    dtypes, gradient = found.reference[precision]
    assert dtypes == {"torch.bfloat16" if precision == "bf16-true" else "torch.float32"}
    folder = found.folder / "reference"
    own = {**with_reference(folder)["another"], "loading": {}}
    alone = three_steps(folder / "base", 4, own=own, precision=precision).gradients[0]
    assert relative(gradient, alone) < 0.03


@pytest.mark.parametrize(
    ("ranks", "replicas", "possible"), [(8, 3, [1, 2, 4]), (4, 4, [1, 2]), (2, 2, [1]), (6, 4, [1, 2, 3])]
)
def test_replicas_that_leave_nothing_to_shard_over(ranks, replicas, possible):
    strategy = ModelParallelStrategy(ranks, 1)
    ones = SimpleNamespace(size=lambda: 1)
    strategy._device_mesh = {"tensor_parallel": ones, "data_parallel": SimpleNamespace(size=lambda: ranks)}
    trainer = SimpleNamespace(strategy=strategy, precision="32-true", world_size=ranks)
    with pytest.raises(InputError, match=f"model.sharding.replicas: {replicas} .* of {ranks} processes") as error:
        data_parallel_mesh(trainer, ShardingOptions(replicas=replicas))
    assert str(possible) in str(error.value)


def test_ends_that_share_a_weight_are_no_groups_of_their_own():
    def llama(tied):
        return LlamaForCausalLM(LlamaConfig(**{**LLAMA, "model_type": None}, vocab_size=20, tie_word_embeddings=tied))

    apart = llama(False)
    assert ends_apart(apart) == [apart.model.embed_tokens, apart.lm_head]
    assert ends_apart(llama(True)) == []
    apart.extra = torch.nn.Linear(16, 20, bias=False)
    apart.extra.weight = apart.model.embed_tokens.weight
    assert ends_apart(apart) == []


def test_blocks_by_class_path_may_be_the_ends():
    blocks = ["torch.nn.Embedding", "transformers.models.gpt2.modeling_gpt2.GPT2Block"]
    model = {**TINY_ARITHMETIC, "tie_word_embeddings": False}
    gradients = []
    for sharding in ({}, {"blocks": blocks}):
        torch.manual_seed(0)
        module = GradientRecorder(model, loss=DFTLoss(), loading={"dtype": "float64"}, sharding=sharding)
        run = trainer(devices=1, strategy=ModelParallelStrategy(1, 1))
        try:
            run.fit(module, datamodule=arithmetic_data(4, batch_size=2, shuffle=False))
        finally:
            torch.distributed.destroy_process_group()  # which forks would take along
        gradients.append(module.gradients[0])
    assert relative(*gradients) < 1e-12


def test_no_replica_is_no_number_of_them():
    with pytest.raises(ValueError, match="sharding.replicas must be at least 1, got 0"):
        CausalLMModule("asset://arithmetic-base", sharding={"replicas": 0})
