"""A transformers model given as an object: trained as it is, saved by its config, or refused at once."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from conftest import TINY_LLAMA
from dft_lightning import AnchoredLoss, CausalLMModule, DFTLoss, InstructionDataModule
from dft_lightning.assets import resolve
from dft_lightning.errors import InputError
from dft_lightning.export import export

BASE = resolve("asset://arithmetic-base")
ROWS = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(1, 5)]
PLAIN = {name: value for name, value in TINY_LLAMA.items() if name != "model_type"}


def base(**options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BASE, **options)


def small() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**PLAIN))


def fitted(module, folder, *, steps=2, ckpt_path=None, **options) -> tuple[pl.Trainer, Path]:
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        inference_mode=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    data = InstructionDataModule(ROWS, batch_size=2, **options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer, Path(trainer.checkpoint_callback.best_model_path)


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_object_is_trained_saved_by_its_config_and_exported(tmp_path):
    model, by_name = base(), CausalLMModule(BASE, DFTLoss(), {"lr": 1e-3})
    module = CausalLMModule(model, DFTLoss(), {"lr": 1e-3})
    assert "_name_or_path" not in module.hparams["model"]
    _, checkpoint = fitted(module, tmp_path / "object")  # with the tokenizer beside its folder
    assert module.model is model
    fitted(by_name, tmp_path / "name")
    assert same(module.model, by_name.model)
    again = CausalLMModule.load_from_checkpoint(checkpoint)
    again.configure_model()
    assert again.model is not model
    assert same(again.model, model)
    tested = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    data = InstructionDataModule(test=ROWS, batch_size=2)  # whose tokenizer is where the object came from
    (values,) = tested.test(again, datamodule=data, verbose=False)
    assert "test/nll" in values
    export(checkpoint, tmp_path / "exported")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "exported"), model)
    assert (tmp_path / "exported" / "tokenizer.json").is_file()
    assert f"trained from `{BASE}`" in (tmp_path / "exported" / "README.md").read_text()


def test_a_run_goes_on_with_another_object(tmp_path):
    first, resumed, whole = (CausalLMModule(base(), DFTLoss(), {"lr": 1e-3}, {"decay": "constant"}) for _ in range(3))
    _, checkpoint = fitted(first, tmp_path / "first")
    fitted(resumed, tmp_path / "on", steps=4, ckpt_path=checkpoint)
    fitted(whole, tmp_path / "whole", steps=4)
    assert same(resumed.model, whole.model)
    assert not same(resumed.model, first.model)


def test_a_model_made_in_python_needs_a_tokenizer_of_its_own(tmp_path):
    with pytest.raises(InputError, match=r"data\.text\.tokenizer is not set, and the model has no name"):
        fitted(CausalLMModule(small()), tmp_path)
    module = CausalLMModule(small())
    _, checkpoint = fitted(module, tmp_path, text={"tokenizer": BASE})
    export(checkpoint, tmp_path / "exported")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "exported"), module.model)
    assert "trained from a model in memory" in (tmp_path / "exported" / "README.md").read_text()


def test_dropout_is_on_and_dtype_and_attention_are_the_object_s():
    model = base(dtype=torch.bfloat16, attn_implementation="eager")
    assert not model.training
    module = CausalLMModule(model)
    assert module.loading == module.loading.__class__(dtype="bfloat16", attn_implementation="eager")
    assert module.hparams["loading"]["dtype"] == "bfloat16"
    module.configure_model()
    assert module.model.training
    again = CausalLMModule(**module.hparams)
    again.configure_model()
    assert (again.model.dtype, again.model.config._attn_implementation) == (torch.bfloat16, "eager")
    assert CausalLMModule(base()).hparams["loading"] == CausalLMModule(BASE).hparams["loading"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "bfloat16"),
        ("attn_implementation", "eager"),
        ("revision", "main"),
        ("trust_remote_code", True),
        ("quantization_config", {"load_in_8bit": True}),
    ],
)
def test_options_of_loading_are_refused_beside_an_object(name, value):
    peft = {"r": 2, "target_modules": "all-linear"} if name == "quantization_config" else None
    with pytest.raises(InputError, match=rf"^loading\.{name}: .* is for a model that is loaded, .*: load it so"):
        CausalLMModule(small(), loading={name: value}, peft=peft)
    CausalLMModule(small(), loading={"dtype": "float32", "attn_implementation": "sdpa", "head": "full"})


def test_an_adapter_on_an_object_asks_for_its_base(tmp_path):
    peft = {"r": 2, "target_modules": "all-linear"}
    module = CausalLMModule(base(), peft=peft, optimizer={"lr": 1e-2})
    _, checkpoint = fitted(module, tmp_path)
    with pytest.raises(ValueError, match="give a name as model, or the model itself"):
        CausalLMModule.load_from_checkpoint(checkpoint)
    again = CausalLMModule.load_from_checkpoint(checkpoint, model=base())
    again.configure_model()
    assert same(again, module)
    other = base()
    other.get_parameter("model.layers.0.mlp.up_proj.weight").data.mul_(1.1)
    with pytest.raises(InputError, match="trained on another base"):
        CausalLMModule.load_from_checkpoint(checkpoint, model=other)
    with pytest.raises(InputError, match="does not say what its adapter was trained on: give --base"):
        export(checkpoint, tmp_path / "none", merge=True)
    export(checkpoint, tmp_path / "merged", merge=True, base=BASE)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
        torch.testing.assert_close(merged, module.model.eval()(tokens).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="has an adapter"):
        CausalLMModule(module.model, peft=peft)


def test_the_reference_is_a_copy_of_the_object(tmp_path):
    model = base()
    before = copy.deepcopy(model.state_dict())
    module = CausalLMModule(model, AnchoredLoss(), {"lr": 1e-2})
    _, checkpoint = fitted(module, tmp_path)
    reference = module._reference._model
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    fitted(CausalLMModule(base(), AnchoredLoss()), tmp_path / "on", steps=3, ckpt_path=checkpoint)
    with pytest.raises(InputError, match="compares with another reference"):
        fitted(CausalLMModule(model, AnchoredLoss()), tmp_path / "other", steps=3, ckpt_path=checkpoint)


def test_copies_and_subclasses_have_the_object_once():
    class Own(CausalLMModule):
        def __init__(self, model, own=1, **options):
            super().__init__(model, **options)

    for given in (small(), LlamaConfig(**PLAIN)):
        assert Own(given).hparams["model"]["hidden_size"] == PLAIN["hidden_size"]

    class Otherwise(CausalLMModule):
        def __init__(self, model=None):
            super().__init__(TINY_LLAMA if model is None else BASE)

    assert [Otherwise(given).hparams["model"] for given in (None, 3)] == [None, 3]
    module = CausalLMModule(small())
    module.configure_model()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.model is other.build_model()
        assert other.model is not module.model
        assert same(other.model, module.model)


def test_folders_as_paths_and_configs_that_were_read():
    class Name(str):
        pass

    for given in (Path(BASE), Name(BASE)):
        module = CausalLMModule(given)
        assert type(module.hparams["model"]) is str
        assert module.hparams["model"] == BASE
    assert CausalLMModule(base().config).hparams["model"]["vocab_size"] == base().config.vocab_size


def adapted():
    import peft

    return peft.get_peft_model(small(), peft.LoraConfig(target_modules="all-linear"))


def adapted_in_place():
    import peft

    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), small())


def on_meta():
    with torch.device("meta"):
        return small()


def quantized():
    model = small()
    model.quantization_method = "bitsandbytes"
    return model


TINY_T5 = T5Config(d_model=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=32)
TINY_BERT = BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: None, "got NoneType$"),
        (lambda: 5, "got int$"),
        (lambda: [BASE], "got list$"),
        (lambda: b"gpt2", "got bytes$"),
        (lambda: LlamaForCausalLM, "got the class LlamaForCausalLM$"),
        (lambda: InstructionDataModule(ROWS), "got InstructionDataModule$"),
        (lambda: type("Pipeline", (), {"model": small()})(), "got Pipeline: give its .model"),
        (lambda: torch.nn.Linear(2, 2), "got Linear: override build_model"),
        (lambda: torch.compile(small()), "got OptimizedModule: override build_model"),
        (lambda: LlamaModel(LlamaConfig(**PLAIN)), "got LlamaModel, which predicts no next token"),
        (lambda: LlamaForSequenceClassification(LlamaConfig(**PLAIN)), "which predicts no next token"),
        (lambda: BertForMaskedLM(TINY_BERT), "got BertForMaskedLM, which predicts no next token"),
        (lambda: T5ForConditionalGeneration(TINY_T5), "which predicts no next token"),
        (adapted, "PeftModel.* has an adapter: give its base"),
        (adapted_in_place, "LlamaForCausalLM has an adapter: give its base"),
        (on_meta, "has no weights"),
        (quantized, r"is quantized: give its name, with loading\.quantization_config and peft"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_at_once(make, message):
    with pytest.raises(InputError, match=message):
        CausalLMModule(make())
