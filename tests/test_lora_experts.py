"""LoRA on mixtures of experts, whose experts are one parameter: trained, resumed, exported and merged as by peft."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from commands import export
from dft_lightning import CrossEntropyLoss
from dft_lightning.errors import InputError
from dft_lightning.models.loading import load_causal_lm
from small_runs import arithmetic_data, trainer
from test_lora import IDS, LLAMA, exported, log_probs, made, of_module

peft = pytest.importorskip("peft", reason="the peft extra is not installed")
pytestmark = pytest.mark.skipif(
    find_spec("peft.utils.transformers_weight_conversion") is None,
    reason="this peft does not adapt experts by all-linear",
)

ALL = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"}
SMALL = {**LLAMA, "num_experts_per_tok": 2, "initializer_range": 0.3, "tie_word_embeddings": False, "pad_token_id": 0}
DEEPSEEK = {
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
DEEPSEEK |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK |= {"num_key_value_heads": 4, "n_shared_experts": 1}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 8},
    "deepseek_v3": DEEPSEEK,
    "olmoe": {"num_experts": 4},
    "qwen3_next": {
        **LINEAR,
        "num_experts": 4,
        "moe_intermediate_size": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "minimax_m2": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4},  # its experts are no linear layers to peft
}
ROUTERS = {"llama4_text": {"num_local_experts": 2}, "phimoe": {"num_local_experts": 4}}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A folder of a family's model in float64, made once."""
    folders = {}

    def of(kind):
        if kind not in folders:
            torch.manual_seed(3)
            folders[kind] = tmp_path_factory.mktemp(kind)
            values = {**SMALL, "model_type": kind, **{**FAMILIES, **ROUTERS}[kind]}
            load_causal_lm(values, dtype="float64").save_pretrained(folders[kind])
        return folders[kind]

    return of


def by_peft(folder, options=ALL):
    """peft alone on the same base."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", FAMILIES)
def test_experts_are_adapted_as_by_peft(kind, folder_of):
    """The same parameters, and the same gradient where A and B are none of them 0."""
    module = made(folder_of(kind), ALL, loading={"dtype": "float64"}, loss=CrossEntropyLoss())
    module.configure_model()
    reference = by_peft(folder_of(kind))
    own, theirs = trained(module.model), trained(reference.base_model.model)
    for model in (module.model, reference.base_model.model):
        model.set_experts_implementation("eager")  # the default is not of float64
    assert {name: p.shape for name, p in own.items()} == {name: p.shape for name, p in theirs.items()}
    assert any(".experts.lora_A" in name for name in own) == (kind != "granitemoe")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.normal_(std=0.3)
            theirs[name].data = parameter.double().clone()
            parameter.data = parameter.double()
    loss = module.token_output({"input_ids": IDS, "labels": IDS}, normalizer=1.0).loss
    gradients = torch.autograd.grad(loss, list(own.values()))
    logits = reference.train()(input_ids=IDS, use_cache=False).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum")
    of_peft = torch.autograd.grad(expected, [theirs[name] for name in own])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for name, gradient, wanted in zip(own, gradients, of_peft, strict=True):
        assert wanted.abs().max() > 0, name
        assert (gradient - wanted).norm() < 1e-6 * wanted.norm(), name  # their norms compute in float32


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_trained_resumed_exported_and_merged(kind, folder_of, tmp_path):
    folder = folder_of(kind)
    rows = arithmetic_data(8, batch_size=4, shuffle=False)
    module, second = (made(folder, ALL, loading={"gradient_checkpointing": flag}) for flag in (False, True))
    each_epoch = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
    trainer(max_steps=4, enable_checkpointing=True, callbacks=[each_epoch]).fit(module, datamodule=rows)
    assert module.state_dict().keys() == {f"model.{name}" for name in trained(module.model)}
    torch.manual_seed(99)  # another start, which the checkpoint replaces
    trainer(max_steps=4).fit(second, datamodule=rows, ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    path = tmp_path / "epoch=1.ckpt"
    own = of_module(module.eval())
    before = log_probs(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert (own - before).abs().max() > 1e-2
    adapter = exported(path, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (log_probs(peft.PeftModel.from_pretrained(base, adapter).eval()) - own).abs().max() < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(exported(path, tmp_path / "merged", "--merge"))
    reference = by_peft(folder)
    reference.base_model.model.load_state_dict(
        {name.removeprefix("model."): value.double() for name, value in module.state_dict().items()}, strict=False
    )
    by_hand = reference.merge_and_unload().float()
    assert (log_probs(merged) - log_probs(by_hand.eval())).abs().max() < 1e-5
    assert (log_probs(merged) - own).abs().max() < 1e-4


def test_an_adapter_that_peft_would_not_find_again_is_refused(tmp_path, capsys):
    """peft renames some of Laguna's tensors when it loads them, and leaves those layers as they were."""
    if "laguna" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such model")
    values = {**SMALL, "model_type": "laguna", "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 8}
    load_causal_lm(values | {"num_attention_heads_per_layer": None}).save_pretrained(tmp_path / "base")
    module = made(tmp_path / "base", ALL)
    run = trainer()
    run.fit(module, datamodule=arithmetic_data(4, batch_size=4))
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert export(["--checkpoint", str(tmp_path / "a.ckpt"), "--output", str(tmp_path / "adapter")]) == 2
    assert (
        "is not found again when peft loads the adapter of a LagunaForCausalLM: export with" in capsys.readouterr().err
    )
    assert not (tmp_path / "adapter").exists()
    merged = AutoModelForCausalLM.from_pretrained(exported(tmp_path / "a.ckpt", tmp_path / "merged", "--merge"))
    assert (log_probs(merged) - of_module(module.eval())).abs().max() < 1e-4


def test_names_of_single_experts_mean_all_of_them(folder_of):
    """As in adapters of before experts were one parameter; a name that no model has is found all the same."""
    options = {**ALL, "target_modules": ["q_proj", "w1", "w2", "w3"], "rank_pattern": {"q_proj": 1, "down_proj": 3}}
    module = made(folder_of("mixtral"), options)
    module.configure_model()
    shapes = {name: p.shape for name, p in trained(module.model).items()}
    assert shapes == {
        name: p.shape for name, p in trained(by_peft(folder_of("mixtral"), options).base_model.model).items()
    }
    assert shapes["model.layers.0.mlp.experts.lora_A.default.weight"] == (4 * 3, 32)


REFUSED = {
    "a misspelt name": ({"target_modules": ["q_proj", "w1", "w2", "w3", "w4"]}, "MixtralForCausalLM has no module w4"),
    "a pattern": ({"rank_pattern": {"up": 2}}, "rank_pattern: no module with an adapter is meant by up$"),
    "half of a pair": ({"target_modules": ["q_proj", "w1"]}, "w1 without also targeting w3"),
    "dropout": ({"lora_dropout": 0.1}, "does not work with lora_dropout.*list target_modules without the experts'"),
    "one layer": (
        {"target_modules": ["w1", "w2", "w3"], "layers_to_transform": [1]},
        r"layers_to_transform: peft adapts model.layers.0\S* all the same",
    ),
    "without": ({"exclude_modules": ["experts"]}, r"exclude_modules: peft adapts \S+experts.\S+ all the same"),
    "by regex": ({"exclude_modules": r".*\.gate"}, r"exclude_modules: peft adapts \S+gate.weight all the same"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(folder_of, options, message):
    with pytest.raises(InputError, match=message):
        made(folder_of("mixtral"), {**ALL, **options}).configure_model()


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_router_that_returns_more_than_a_product_is_named(kind, folder_of):
    """The way out that the message says is one."""
    with pytest.raises(InputError, match=r"peft cannot adapt model.layers.0\S+router, as \w+Router") as refused:
        made(folder_of(kind), ALL).configure_model()
    way_out = re.search(r"set model.peft.exclude_modules: \[(\w+)\]$", str(refused.value))
    module = made(folder_of(kind), {**ALL, "exclude_modules": [way_out[1]]})
    trainer().fit(module, datamodule=arithmetic_data(4, batch_size=4))
    assert all(p.isfinite().all() for p in trained(module.model).values())
    assert any(p.abs().max() > 0 for name, p in trained(module.model).items() if "lora_B" in name)


def test_a_linear_layer_with_a_forward_of_its_own_is_adapted(tmp_path):
    """Falcon's."""
    values = {"model_type": "falcon", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    load_causal_lm({**values, "vocab_size": 20, "tie_word_embeddings": False}).save_pretrained(tmp_path)
    module = made(tmp_path, ALL)
    module.configure_model()
    assert len(trained(module.model)) == 2 * 4


def test_what_peft_says_of_mamba_comes_with_the_way_out(tmp_path):
    values = {
        "model_type": "falcon_mamba",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "state_size": 4,
        "vocab_size": 20,
    }
    load_causal_lm(values).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"incompatible with Mamba.*name it in model.peft.exclude_modules\)$"):
        made(tmp_path, {**ALL, "target_modules": ["x_proj", "out_proj"]}).configure_model()
    made(tmp_path, {**ALL, "exclude_modules": ["out_proj"]}).configure_model()
