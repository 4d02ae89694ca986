"""LoRA: the adapter alone is trained and saved, its product is what it says, and what is not supported is refused."""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, pipeline

from commands import export
from dft_lightning import CausalLMModule, DFTLoss, HuggingFaceExport
from dft_lightning.distributed.strategies import check_adapter_strategy, check_wrapped
from dft_lightning.errors import InputError
from dft_lightning.models.fingerprints import hash_weights
from dft_lightning.models.loading import load_causal_lm
from dft_lightning.models.lora.adapter import base_name
from dft_lightning.models.lora.options import lora_values
from dft_lightning.modules.size import training_size
from family_configs import tiny_config
from small_runs import TINY_ARITHMETIC, arithmetic_data, trainer

peft = pytest.importorskip("peft", reason="the peft extra is not installed")

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 20}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
PEFT = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
IDS = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of a model whose ends are not tied."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(5)
    load_causal_lm({**LLAMA, "tie_word_embeddings": False}).save_pretrained(folder)
    return folder


def made(base, peft=PEFT, **options):
    options = {"optimizer": {"lr": 1e-2}, "schedule": {"decay": "constant"}, "loss": DFTLoss(), **options}
    return CausalLMModule(str(base), peft=peft, **options)


def eight_bits(lr):
    return {"class_path": "AdamW8bit", "init_args": {"lr": lr}}


def fit(module, steps=3, ckpt_path=None, callbacks=(), **options):
    run = trainer(max_steps=steps, callbacks=list(callbacks), **options)
    data = arithmetic_data(16, batch_size=4, shuffle=False)
    run.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return run


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A module after three steps, and its checkpoint."""
    path = tmp_path_factory.mktemp("run") / "a.ckpt"
    torch.manual_seed(0)
    module = made(base)
    fit(module).save_checkpoint(path)
    return path, module


def log_probs(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


def of_module(module, ids=IDS):
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        return module.token_output(batch).log_prob.reshape(len(ids), -1)


def merged_by_hand(base, state, scale, dtype):
    """The base with ``scale * B A`` added to its weights (transposed where the layer is a Conv1D)."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    weights = model.state_dict()
    for name in [name for name in state if "lora_A" in name]:
        product = scale * state[name.replace("lora_A", "lora_B")].to(dtype) @ state[name].to(dtype)
        target = weights[name.removeprefix("model.").replace("lora_A.default.", "")]
        target += product.T if target.shape != product.shape or "c_" in name else product
    return model


def test_the_adapter_alone_is_trained_and_saved(run, base):
    path, module = run
    before = load_file(base / "model.safetensors")
    after = {base_name(name): value for name, value in module.model.state_dict().items() if base_name(name)}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert len(state) == 2 * 2 * 2  # A and B, two modules, two layers
    assert all(re.search(r"lora_[AB]\.default\.weight$", name) for name in state)
    assert all(value.abs().max() > 0 for value in state.values())  # B began as 0


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"r": 2, "lora_alpha": 16, "target_modules": ["c_attn", "c_fc"]}, 8.0),
        ({"r": 4, "target_modules": ["c_proj"], "use_rslora": True}, 4.0),  # LoraConfig's alpha, 8, by the root of r
    ],
    ids=["plain", "rank-stabilised"],
)
def test_the_function_is_that_of_the_product_added_to_the_weights(tmp_path, options, scale):
    folder = tmp_path / "base"
    load_causal_lm(TINY_ARITHMETIC, dtype="float64").save_pretrained(folder)
    module = made(folder, {**options, "fan_in_fan_out": True}, loading={"dtype": "float64"})
    fit(module)
    reference = merged_by_hand(folder, module.state_dict(), scale, torch.float64).double()
    assert (of_module(module) - log_probs(reference)).abs().max() < 1e-10
    assert (of_module(module) - log_probs(AutoModelForCausalLM.from_pretrained(folder))).abs().max() > 1e-3


def test_what_is_trained_is_said_at_the_start(base, capsys, caplog):
    with caplog.at_level("INFO"):
        fit(made(base), steps=1)
    said = next(record.getMessage() for record in caplog.records if "training" in record.getMessage())
    trained = 2 * (4 * (16 + 16) + 4 * (32 + 16))  # two layers of q_proj and down_proj
    total = trained + sum(tensor.numel() for tensor in load_file(base / "model.safetensors").values())
    assert f"training {trained:,} of {total:,} parameters ({100 * trained / total:.3g}%)" in said
    assert f"weights {total * 4 / 2**20:.4g} MiB, gradients {trained * 4 / 2**20:.4g} MiB" in said


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.0, "use_dora": True}], ids=["lora", "dora"])
def test_a_run_that_was_stopped_goes_on(base, tmp_path, options):
    # Stopped between two epochs of rows in their order, so that both see the same.
    rows = arithmetic_data(8, batch_size=4, shuffle=False)
    first, second = made(base, {**PEFT, **options}), made(base, {**PEFT, **options})
    each_epoch = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
    whole = trainer(max_steps=4, enable_checkpointing=True, callbacks=[each_epoch])
    whole.fit(first, datamodule=rows)
    torch.manual_seed(99)  # another start, which the checkpoint replaces
    resumed = trainer(max_steps=4)
    resumed.fit(second, datamodule=rows, ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert resumed.global_step == 4
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_checkpoint_is_loaded_by_itself(run):
    path, module = run
    loaded = CausalLMModule.load_from_checkpoint(path)
    assert torch.equal(of_module(loaded.eval()), of_module(module.eval()))


def exported(path, output, *options):
    assert export(["--checkpoint", str(path), "--output", str(output), *options]) == 0
    return output


def test_exported_as_peft_reads_it(run, base, tmp_path):
    path, module = run
    folder = exported(path, tmp_path / "adapter")
    assert sorted(file.name for file in folder.glob("*adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not (folder / "config.json").exists()
    saved = load_file(folder / "adapter_model.safetensors")
    of_file = {
        "model." + name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): tensor
        for name, tensor in saved.items()
    }
    assert of_file.keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in of_file.items())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(base), 4, 12)
    by_peft = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    by_transformers = AutoModelForCausalLM.from_pretrained(folder)
    for model in (by_peft, by_transformers):
        assert (log_probs(model) - of_module(module)).abs().max() < 1e-5
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"A LoRA adapter for LlamaForCausalLM, `{base}`, with {2 * 4 * (32 + 48)} parameters" in card


def test_exported_as_one_model(run, base, tmp_path):
    path, module = run
    folder = exported(path, tmp_path / "merged", "--merge")
    assert not list(folder.glob("adapter*"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (log_probs(model) - of_module(module)).abs().max() < 1e-5
    reference = merged_by_hand(base, module.state_dict(), 3.0, torch.float64).state_dict()
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.allclose(value.double(), reference[name], rtol=0, atol=1e-7), name
    assert pipeline("text-generation", str(folder))("1+1=", max_new_tokens=3)[0]["generated_text"].startswith("1+1=")


def test_layers_that_share_a_weight_are_not_merged(tmp_path, capsys):
    """Zamba's attention blocks do; only where both have an adapter."""
    base, path = tmp_path / "base", tmp_path / "a.ckpt"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("zamba")).save_pretrained(base)
    fit(made(base, {"r": 2, "target_modules": "all-linear"}), steps=1).save_checkpoint(path)
    assert export(["--checkpoint", str(path), "--output", str(tmp_path / "no"), "--merge"]) == 2
    said = capsys.readouterr().err
    assert "layers.1.shared_transf.self_attn.q_proj and model.layers.3.shared_transf.self_attn.q_proj share one" in said
    assert not (tmp_path / "no").exists()
    exported(path, tmp_path / "adapter")
    module = made(base, {"r": 2, "target_modules": ["layers.1.mamba_decoder.mamba.in_proj", "linear"]})
    fit(module, steps=1).save_checkpoint(path)
    model = AutoModelForCausalLM.from_pretrained(exported(path, tmp_path / "merged", "--merge"))
    assert (log_probs(model.eval()) - of_module(module.eval())).abs().max() < 1e-5


def test_a_base_that_moved_or_is_another(run, base, tmp_path, capsys):
    path, module = run
    moved, other = tmp_path / "moved", tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(moved)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 1.01
    model.save_pretrained(other)
    folder = exported(path, tmp_path / "merged", "--merge", "--base", str(moved))
    assert (log_probs(AutoModelForCausalLM.from_pretrained(folder)) - of_module(module)).abs().max() < 1e-5
    adapter = exported(path, tmp_path / "adapter", "--base", str(moved))
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(moved)
    capsys.readouterr()
    assert export(["--checkpoint", str(path), "--output", str(tmp_path / "no"), "--merge", "--base", str(other)]) == 2
    assert "trained on another base: model.layers.1.mlp.up_proj.weight differs" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert export(["--checkpoint", str(path), "--output", str(tmp_path / "no"), "--base", str(tmp_path / "empty")]) == 2
    assert "--base: " in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    with pytest.raises(InputError, match="trained on another base"):
        fit(made(other), ckpt_path=path)


def test_at_the_end_of_fit(base, tmp_path):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    module = made(base)
    fit(module, callbacks=[HuggingFaceExport(str(adapter)), HuggingFaceExport(str(merged), merge=True)])
    for folder in (adapter, merged):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert (log_probs(model) - of_module(module)).abs().max() < 1e-5
    with pytest.raises(InputError, match="merge: this run trains the whole model"):
        fit(CausalLMModule(str(base)), callbacks=[HuggingFaceExport(str(tmp_path / "c"), merge=True)])


class WithNorm(CausalLMModule):
    """Trains the last norm beside the adapter."""

    def build_parameter_groups(self):
        self.model.model.norm.requires_grad_(True)
        return super().build_parameter_groups()


def test_what_is_trained_beside_the_adapter_is_not_lost(base, tmp_path, capsys):
    module = WithNorm(str(base), peft=PEFT, optimizer={"lr": 1e-2}, schedule={"decay": "constant"})
    path = tmp_path / "a.ckpt"
    fit(module).save_checkpoint(path)
    norm = module.model.model.norm.weight
    assert not torch.equal(norm, torch.ones_like(norm))
    assert export(["--checkpoint", str(path), "--output", str(tmp_path / "a")]) == 2
    assert "model.norm.weight (1 such tensors) was trained beside the adapter" in capsys.readouterr().err
    folder = exported(path, tmp_path / "merged", "--merge")
    assert torch.equal(load_file(folder / "model.safetensors")["model.norm.weight"], norm)
    loaded = WithNorm.load_from_checkpoint(path)
    assert torch.equal(of_module(loaded.eval()), of_module(module.eval()))


def test_a_norm_that_was_trained_and_frozen_again_is_not_lost(base, tmp_path):
    module, path = (
        WithNorm(str(base), peft=PEFT, optimizer={"lr": 1e-2}, schedule={"decay": "constant"}),
        tmp_path / "a.ckpt",
    )
    run = fit(module)
    module.model.model.norm.requires_grad_(False)
    run.save_checkpoint(path)
    assert torch.equal(
        torch.load(path, weights_only=True)["state_dict"]["model.model.norm.weight"], module.model.model.norm.weight
    )


def test_what_is_trained_beside_an_adapter_in_half_precision_is_in_float32(base):
    options = {**PEFT, "modules_to_save": ["up_proj"]}
    module = made(base, options, loading={"dtype": "bfloat16"}, optimizer={"lr": 1e-5})
    module.configure_model()
    copies = {name: p.detach().clone() for name, p in module.named_parameters() if "modules_to_save" in name}
    fit(module, precision="bf16-mixed")
    assert len(copies) == 2
    for name, parameter in module.named_parameters():
        if name in copies:
            assert parameter.dtype == torch.float32
            assert not torch.equal(parameter, copies[name].float())
            moved = (parameter != copies[name]).float().mean()
            assert moved > 0.9  # in bfloat16 hardly one would
    with pytest.raises(InputError, match=r"up_proj.* updates would be rounded away there: set trainer\.precision"):
        fit(made(base, options, loading={"dtype": "bfloat16"}))


def test_a_merge_into_a_half_precision_base_is_rounded_once(base, tmp_path):
    module = made(base, loading={"dtype": "bfloat16"}, optimizer={"lr": 1e-3})
    fit(module, precision="bf16-mixed").save_checkpoint(tmp_path / "a.ckpt")
    weights = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).state_dict()
    state, name = module.state_dict(), "model.layers.1.self_attn.q_proj.weight"
    adapter = {part: state[f"model.{name}".replace("q_proj", f"q_proj.lora_{part}.default")].double() for part in "AB"}
    expected = weights[name].double() + 3.0 * adapter["B"] @ adapter["A"]
    in_float32 = load_file(
        exported(tmp_path / "a.ckpt", tmp_path / "f", "--merge", "--dtype", "float32") / "model.safetensors"
    )
    assert (in_float32[name].double() - expected).abs().max() < 1e-7
    as_trained = load_file(exported(tmp_path / "a.ckpt", tmp_path / "b", "--merge") / "model.safetensors")
    assert torch.equal(as_trained[name], in_float32[name].bfloat16())
    assert not torch.equal(as_trained[name], weights[name])


def test_a_base_that_training_rounded_is_merged_rounded(base, tmp_path):
    module = made(base)
    fit(module, precision="bf16-true").save_checkpoint(tmp_path / "a.ckpt")
    merged = load_file(exported(tmp_path / "a.ckpt", tmp_path / "b", "--merge") / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], module.model.lm_head.weight)


def test_adapters_with_magnitudes_are_exported(base, tmp_path):
    module, path = made(base, {**PEFT, "use_dora": True}), tmp_path / "a.ckpt"
    fit(module).save_checkpoint(path)
    merged = AutoModelForCausalLM.from_pretrained(exported(path, tmp_path / "merged", "--merge"))
    folder = exported(path, tmp_path / "adapter")
    assert any(name.endswith("lora_magnitude_vector") for name in load_file(folder / "adapter_model.safetensors"))
    for model in (merged, peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)):
        assert (log_probs(model) - of_module(module)).abs().max() < 1e-5


def test_any_module_that_wraps_it_loads_the_adapter(run, base):
    _, module = run
    other = made(base)
    other.configure_model()
    other.load_state_dict(module.state_dict())  # strictly: nothing that was saved is missing
    assert torch.equal(of_module(other.eval()), of_module(module.eval()))
    wrapper = torch.nn.Sequential(made(base))
    wrapper[0].configure_model()
    wrapper.load_state_dict({f"0.{name}": value for name, value in module.state_dict().items()})
    assert torch.equal(of_module(wrapper[0].eval()), of_module(module.eval()))
    state = module.state_dict()
    state.popitem()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"model\..*lora_"):
        other.load_state_dict(state)


class SaysNothing(CausalLMModule):
    def on_save_checkpoint(self, checkpoint):
        pass


def test_an_adapter_without_a_record_is_resumed_with_a_warning(base, tmp_path):
    module = SaysNothing(str(base), peft=PEFT)
    fit(module).save_checkpoint(tmp_path / "a.ckpt")
    again = SaysNothing(str(base), peft=PEFT)
    with pytest.warns(match="neither alpha nor base are compared"):
        fit(again, ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(of_module(again), of_module(module))


def test_another_optimizer_than_the_checkpoints_is_refused(base, run):
    pytest.importorskip("bitsandbytes", reason="the bitsandbytes extra is not installed")
    with pytest.raises(InputError, match=r"model\.optimizer: .*AdamW8bit here, and the checkpoint's run had .*AdamW,"):
        fit(made(base, optimizer=eight_bits(1e-2)), ckpt_path=run[0], steps=5)


def test_ddp_sees_what_is_frozen_and_freed(base):
    ddp = SimpleNamespace(strategy=DDPStrategy())
    with pytest.raises(InputError, match=r"norm\.weight \(1 parameters\) was frozen or freed after DDP"):
        check_wrapped(ddp, ["norm.weight"])
    check_wrapped(SimpleNamespace(strategy=ModelParallelStrategy()), ["norm.weight"])
    seen = {}

    class Watch(pl.Callback):
        def setup(self, trainer, module, stage):
            trainer.strategy.setup_before = trainer.strategy.setup
            trainer.strategy.setup = lambda t: (
                seen.update(freed=module.model.model.norm.weight.requires_grad),
                trainer.strategy.setup_before(t),
            )

    fit(WithNorm(str(base), peft=PEFT), callbacks=[Watch()])
    assert seen == {"freed": True}  # before the strategy wraps anything


def test_adapters_of_a_half_precision_base_are_in_float32(base, tmp_path):
    module = made(base, loading={"dtype": "bfloat16"})
    run = fit(module, precision="bf16-mixed")
    dtypes = (
        {p.dtype for name, p in module.named_parameters() if p.requires_grad},
        {p.dtype for name, p in module.named_parameters() if not p.requires_grad},
    )
    assert dtypes == ({torch.float32}, {torch.bfloat16})
    run.save_checkpoint(tmp_path / "a.ckpt")
    # The base is the same one in float32.
    fit(made(base), ckpt_path=tmp_path / "a.ckpt", steps=4)


def test_a_copy_of_the_head_is_trained_with_the_full_head(base, tmp_path):
    module = made(base, {**PEFT, "modules_to_save": ["lm_head"]}, loading={"head": "full"})
    path = tmp_path / "a.ckpt"
    fit(module).save_checkpoint(path)
    assert "model.lm_head.modules_to_save.default.weight" in torch.load(path, weights_only=True)["state_dict"]
    merged = AutoModelForCausalLM.from_pretrained(exported(path, tmp_path / "merged", "--merge"))
    of_base = AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.PeftModel.from_pretrained(of_base, exported(path, tmp_path / "adapter"))
    for model in (merged, adapted):
        assert (log_probs(model) - of_module(module)).abs().max() < 1e-5


def test_a_config_of_pefts_own_says_the_same(base):
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    assert lora_values(config) == {"r": 4, "lora_alpha": 12, "target_modules": ["down_proj", "q_proj"]}
    assert made(base, config).hparams["peft"] == lora_values(config)
    assert lora_values(peft.LoraConfig(r=2)) == {"r": 2}  # of no task
    with pytest.raises(InputError, match=r"model\.peft\.task_type is not supported"):
        lora_values(peft.LoraConfig(task_type="SEQ_CLS"))


def test_runs_are_told_apart_by_their_base_too(base, tmp_path):
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    model.save_pretrained(other)
    hashes = []
    for folder in (base, base, other):
        torch.manual_seed(0)
        module = made(folder)
        module.configure_model()
        hashes.append(hash_weights(module))
    assert hashes[0] == hashes[1] != hashes[2]


REFUSED = {
    "unknown": ({"lora_alpa": 8}, {}, "model.peft: LoraConfig has no lora_alpa; did you mean lora_alpha"),
    "not supported": ({"trainable_token_indices": [1]}, {}, "model.peft.trainable_token_indices is not supported"),
    "a method's config": ({"lora_ga_config": {}}, {}, "model.peft.lora_ga_config is not supported"),
    "parameters": ({"target_parameters": ["mlp"]}, {}, "model.peft.target_parameters is not supported"),
    "changes the base": ({"init_lora_weights": "pissa"}, {}, "init_lora_weights: 'pissa' is not supported"),
    "no such module": ({"target_modules": ["query"]}, {}, "model.peft: .*query"),
    "rank 0": ({"r": 0}, {}, "model.peft.r: expected a whole number from 1, got 0"),
    "half a rank": ({"r": 8.5}, {}, "model.peft.r: expected a whole number from 1, got 8.5"),
    "alpha nan": ({"lora_alpha": float("nan")}, {}, "model.peft.lora_alpha: expected a number above 0, got nan"),
    "modules by number": ({"modules_to_save": 5}, {}, "model.peft.modules_to_save: expected a list of names, got 5"),
    "a pattern of text": ({"alpha_pattern": {"q_proj": "x"}}, {}, "alpha_pattern: expected names with numbers above 0"),
    "no expression": ({"target_modules": "("}, {}, "model.peft: missing \\), unterminated subpattern"),
    "half of the names": (
        {"target_modules": ["q_proj", "foo"]},
        {},
        "target_modules: LlamaForCausalLM has no module foo",
    ),
    "no copy": ({"modules_to_save": ["foo"]}, {}, "model.peft.modules_to_save: LlamaForCausalLM has no module foo"),
    "nothing to exclude": ({"exclude_modules": ["foo"]}, {}, "exclude_modules: LlamaForCausalLM has no module foo"),
    "no such rank": ({"rank_pattern": {"k_proj": 2}}, {}, "rank_pattern: no module with an adapter is meant by k_proj"),
    "no such layer": ({"layers_to_transform": [0, 9]}, {}, "layers_to_transform: LlamaForCausalLM has no layer 9"),
    "a bias for nothing": ({"lora_bias": True}, {}, "model.peft.lora_bias: .*q_proj has no bias"),
    "on the head": ({"target_modules": ["lm_head"]}, {}, "leave it out of the adapter .*model.loading.head: full"),
    "a list": ([8], {}, "model.peft: expected the options of a LoraConfig, got list"),
    "bits of what is trained": (
        None,
        {"loading": {"quantization_config": {"load_in_4bit": True}}},
        "set peft as well",
    ),
}


@pytest.mark.parametrize(("options", "others", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(base, options, others, message):
    values = {**PEFT, **options} if isinstance(options, dict) else options
    with pytest.raises(ValueError, match=message):
        made(base, values, **others).configure_model()


def test_a_base_that_a_checkpoint_would_lose_is_refused():
    with pytest.raises(ValueError, match="an adapter needs a pretrained model"):
        CausalLMModule(LLAMA, peft=PEFT)


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_one_of_two_tied_ends_is_refused(tmp_path, options):
    load_causal_lm({**LLAMA, "tie_word_embeddings": True}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="ties its embedding to its output layer"):
        made(tmp_path, {**PEFT, **options}, loading={"head": "full"}).configure_model()


def test_what_every_adapters_config_says_is_taken(base):
    assert (
        made(base, {**PEFT, "task_type": "CAUSAL_LM", "peft_type": "LORA"}).hparams["peft"]["task_type"] == "CAUSAL_LM"
    )
    assert lora_values({"r": 2, "megatron_core": "megatron.core", "trainable_token_indices": None})  # peft's defaults
    with pytest.raises(InputError, match=r"model\.peft\.task_type is not supported"):
        made(base, {**PEFT, "task_type": "SEQ_CLS"})


def test_without_the_extra(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=re.escape("pip install 'dft-lightning[peft]'")):
        made(base)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=re.escape("pip install 'dft-lightning[bitsandbytes]'")):
        load_causal_lm(base, quantization_config={"load_in_4bit": True})


def test_strategies_that_cannot_are_refused():
    run = SimpleNamespace(strategy=ModelParallelStrategy(save_distributed_checkpoint=False))
    check_adapter_strategy(run, quantized=False)
    with pytest.raises(InputError, match=r"ModelParallelStrategy \(FSDP2\) does not shard quantized weights"):
        check_adapter_strategy(run, quantized=True)
    run.strategy = ModelParallelStrategy()
    with pytest.raises(InputError, match="set save_distributed_checkpoint: false"):
        check_adapter_strategy(run, quantized=False)
    run.strategy = FSDPStrategy()
    with pytest.raises(InputError, match=r"not supported under FSDPStrategy \(FSDP1\)"):
        check_adapter_strategy(run, quantized=False)


def test_checkpoints_of_other_runs(run, base, tmp_path, capsys):
    path, _ = run
    with pytest.raises(InputError, match="holds an adapter alone: set model.peft"):
        fit(CausalLMModule(str(base)), ckpt_path=path)
    for change, message in (
        ({"lora_alpha": 16}, "has lora_alpha 12, and model.peft.lora_alpha is 16"),
        ({"target_modules": ["q_proj"]}, r"has, and the model has not, model\.layers\.0\.mlp\.down_proj"),
        ({"target_modules": ["q_proj", "down_proj", "k_proj"]}, r"lacks model\.layers\.0\.self_attn\.k_proj"),
    ):
        with pytest.raises(InputError, match=message):
            fit(made(base, {**PEFT, **change}), ckpt_path=path)
    whole = tmp_path / "whole.ckpt"
    fit(CausalLMModule(str(base))).save_checkpoint(whole)
    with pytest.raises(InputError, match="holds a whole model and no adapter"):
        fit(made(base), ckpt_path=whole)
    capsys.readouterr()
    for option in (["--merge"], ["--base", str(base)]):
        assert export(["--checkpoint", str(whole), "--output", str(tmp_path / "out"), *option]) == 2
        assert "has no adapter, it holds the whole model: leave it out" in capsys.readouterr().err


FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_a_base_in_four_bits(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the bitsandbytes extra is not installed")
    folder, path = tmp_path / "base", tmp_path / "a.ckpt"
    # As wide as a block of the quantization.
    load_causal_lm({**LLAMA, "hidden_size": 64, "intermediate_size": 64}).save_pretrained(folder)
    module = made(folder, loading={"quantization_config": FOUR_BITS}, optimizer=eight_bits(0.1))
    run = fit(module)
    assert isinstance(module.model.model.layers[0].self_attn.k_proj, bitsandbytes.nn.Linear4bit)
    assert type(run.optimizers[0]) is bitsandbytes.optim.AdamW8bit
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    total = trained + sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert training_size(module, []).startswith(f"training {trained:,} of {total:,} parameters")
    run.save_checkpoint(path)
    assert all("lora_" in name for name in torch.load(path, weights_only=True)["state_dict"])
    again = made(folder, loading={"quantization_config": FOUR_BITS}, optimizer=eight_bits(0.1))
    fit(again, ckpt_path=path)  # at its end already
    assert torch.equal(of_module(again), of_module(module))
    # Another base is known by what is not in 4 bits.
    other = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        other.model.norm.weight *= 1.5
    other.save_pretrained(tmp_path / "other")
    wrong = ["--merge", "--base", str(tmp_path / "other")]
    assert export(["--checkpoint", str(path), "--output", str(tmp_path / "no"), *wrong]) == 2
    # Merged, it goes on the base as it was before it was rounded to 4 bits.
    merged = exported(path, tmp_path / "merged", "--merge")
    unrounded = made(folder)
    fit(unrounded, ckpt_path=None, steps=0)
    unrounded.load_state_dict(module.state_dict(), strict=False)
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert not hasattr(model.config, "quantization_config")
    assert (log_probs(model) - of_module(unrounded)).abs().max() < 1e-5


def test_widths_that_bits_do_not_divide(base):
    pytest.importorskip("bitsandbytes", reason="the bitsandbytes extra is not installed")
    with pytest.raises(InputError, match=r"widths that 64 divides, and model\.layers\.0\..* has 16"):
        load_causal_lm(base, quantization_config=FOUR_BITS)


def test_eight_bit_states_are_of_every_run(base):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the bitsandbytes extra is not installed")
    run = fit(CausalLMModule(str(base), optimizer=eight_bits(1e-3)))
    assert type(run.optimizers[0]) is bitsandbytes.optim.AdamW8bit


@pytest.mark.parametrize(
    ("options", "message"),
    [({"load_in_4bit": "yes"}, "load_in_4bit"), ({"four": 4}, "has no four"), ({}, "set load_in_4bit: true or")],
)
def test_options_of_bits_are_checked(base, options, message):
    pytest.importorskip("bitsandbytes", reason="the bitsandbytes extra is not installed")
    with pytest.raises(InputError, match=f"model.loading.quantization_config: .*{message}"):
        load_causal_lm(base, quantization_config=options)
