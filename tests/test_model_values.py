"""What a model is made of, and what it cannot do: the right model, or one message before anything is computed."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, BartConfig, CLIPTextConfig, MoshiConfig, MptConfig, Qwen3MoeConfig

from conftest import TINY_LLAMA
from dft_lightning import CausalLMModule
from dft_lightning.errors import InputError
from dft_lightning.models.loading import load_causal_lm

SIZES = {key: value for key, value in TINY_LLAMA.items() if key != "model_type"}
EXPERTS = {**SIZES, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
FALCON = {"model_type": "falcon", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}


def built(model, **options):
    module = CausalLMModule(model, **options)
    module.configure_model()
    return module.model


# -- values that a class does not list, and those that nothing reads ---------------------------------------------------


@pytest.mark.parametrize("as_object", [True, False])
def test_a_value_that_the_models_code_reads_is_taken(as_object):
    """Without it a head has 16 / 4 values."""
    values = {**EXPERTS, "head_dim": 16}
    model = built(Qwen3MoeConfig(**values) if as_object else {"model_type": "qwen3_moe", **values})
    assert model.model.layers[0].self_attn.q_proj.out_features == 4 * 16
    assert built({"model_type": "qwen3_moe", **EXPERTS}).model.layers[0].self_attn.q_proj.out_features == 16


def test_a_value_of_each_layer_is_taken():
    values = {**SIZES, "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 0}
    values |= {"layer_types": ["sliding_attention", "full_attention"]}
    model = built({"model_type": "gemma4_text", **values})
    assert model.model.layers[0].self_attn.q_proj.out_features == 4 * 8


@pytest.mark.parametrize(
    ("values", "unknown"),
    [
        ({"model_type": "qwen3_moe", **EXPERTS, "head_dims": 16}, "head_dims"),
        ({"model_type": "qwen3_moe", **EXPERTS, "head_dim": 16, "hidden_sze": 8, "x": 1}, "hidden_sze, x"),
        ({"model_type": "gpt2", "head_dim": 16}, "head_dim"),  # another model's code reads it
        (
            {"model_type": "llama", **SIZES, "num_attention_heads": 3, "heads": 4},
            "heads",
        ),  # beside a value that is wrong
        (Qwen3MoeConfig(**EXPERTS, head_dims=16), "head_dims"),
    ],
    ids=str,
)
def test_a_value_that_nothing_reads_is_refused(values, unknown):
    with pytest.raises(InputError, match=rf"^model.model: \w+Config has no {unknown}$"):
        built(values)


# -- a config object ---------------------------------------------------------------------------------------------------

OBJECTS = {
    "a config within": MptConfig(
        d_model=16, n_heads=2, n_layers=1, vocab_size=20, attn_config={"qk_ln": False, "clip_qkv": 3.0}
    ),
    "labels by number": BartConfig(
        d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8, vocab_size=20
    ),
    "an infinite number": AutoConfig.for_model(
        "mamba2", hidden_size=16, num_heads=4, head_dim=8, num_hidden_layers=1, vocab_size=20, state_size=4, n_groups=1
    ),
}


def without(values, *keys):
    """Values of a config and of those within it but for some."""
    return {
        key: without(value, *keys) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in keys
    }


@pytest.mark.parametrize("config", OBJECTS.values(), ids=OBJECTS)
def test_a_config_object_is_what_its_file_would_be(config, tmp_path):
    """The model of it has the values that the config's own file has."""
    config.save_pretrained(tmp_path)
    expected = AutoConfig.from_pretrained(tmp_path)
    made = built(config)
    own, wanted = (without(of.to_dict(), "dtype", "_name_or_path") for of in (made.config, expected))
    for key in wanted.keys() - {"is_decoder", "is_encoder_decoder", "architectures"}:  # the class sets those
        assert own[key] == wanted[key], key
    assert torch.isfinite(made(input_ids=torch.arange(8)[None]).logits).all()


def test_a_config_object_that_cannot_be_is_refused():
    with pytest.raises(
        InputError, match=r"^model: a MoshiConfig cannot be made again of its values \(audio_vocab_size"
    ):
        CausalLMModule(MoshiConfig(hidden_size=16, vocab_size=20))
    with pytest.raises(InputError, match=r"^model.model: no clip_text_model can be made of these values: Unrecognized"):
        built(CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))


# -- what a model cannot do --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "ctrl", "n_embd": 16, "dff": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 32},
        {"model_type": "openai-gpt", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 32},
    ],
    ids=lambda values: values["model_type"],
)
def test_gradient_checkpointing_where_there_is_none(values):
    with pytest.raises(
        InputError, match=r"^model.loading.gradient_checkpointing: \w+ does not support it .*: set false$"
    ):
        built(values, loading={"gradient_checkpointing": True})


def test_gradient_checkpointing_of_a_model_of_ones_own():
    class Own(CausalLMModule):
        def build_model(self):
            return torch.nn.Linear(2, 2)

    module = Own("own", loading={"gradient_checkpointing": True})
    with pytest.raises(InputError, match=r"^model.loading.gradient_checkpointing: Linear does not support it"):
        module.configure_model()


@pytest.mark.parametrize("from_folder", [True, False])
def test_documents_on_a_model_that_chooses_among_attentions_of_its_own(tmp_path, from_folder):
    load_causal_lm(FALCON).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"^model.loading.attn_implementation: .*none called documents: set sdpa or eager$"
    ):
        load_causal_lm(str(tmp_path) if from_folder else FALCON, attn_implementation="documents")
    load_causal_lm(str(tmp_path) if from_folder else FALCON, attn_implementation="sdpa")
