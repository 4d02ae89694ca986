"""CausalLMModule with the fused head: the model's own numbers, found or refused."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conftest import TINY_LLAMA, TINY_QWEN2, at_hand
from dft_lightning import CausalLMModule, CrossEntropyLoss, DFTLoss, FocalLoss
from dft_lightning.errors import InputError
from dft_lightning.models import head as head_module
from dft_lightning.models.loading import load_causal_lm
from small_runs import TINY_GPT2, trainer
from test_module import loader

# A wide initialisation: logits must be large enough that a missed scale or cap shows.
SMALL = {**TINY_LLAMA, "initializer_range": 0.5}
RECURRENT = {"model_type": "recurrent_gemma", "logits_soft_cap": 2.0, "w_init_variance_scale": 9.0}
RECURRENT |= {key: value for key, value in TINY_LLAMA.items() if key not in ("model_type", "max_position_embeddings")}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
GEMMA4 = {**LAYERS, "head_dim": 4, "global_head_dim": 4, "final_logit_softcapping": 2.0}
UNTIED = {key: value for key, value in SMALL.items() if key != "tie_word_embeddings"}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
LATENT |= {"num_key_value_heads": 4}
ATTENTION = {"layer_types": ["attention", "attention"], "mamba_n_heads": 2}
XLSTM = {"vocab_size": 97, "output_logit_soft_cap": 2.0, "max_inference_chunksize": 64}
GEMMA3N = {**LAYERS, "head_dim": 4, "final_logit_softcapping": 2.0, "num_kv_shared_layers": 0, "laurel_rank": 4}
GEMMA3N |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "altup_num_inputs": 2}
GEMMA3N |= {"activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [32, 32]}
ROPE = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
ROPE |= {"layer_types": ["full_attention"] * 2}
ARCHITECTURES = {
    "llama": SMALL,
    "llama, untied": {**SMALL, "tie_word_embeddings": False},
    "qwen2": {**SMALL, "model_type": "qwen2"},
    "qwen3": {**SMALL, "model_type": "qwen3", "head_dim": 4},
    "gemma2": {**SMALL, "model_type": "gemma2", "head_dim": 4, "final_logit_softcapping": 2.0},
    "gemma3_text": {**SMALL, "model_type": "gemma3_text", "head_dim": 4, "final_logit_softcapping": 2.0},
    "gemma3, no cap": {**SMALL, "model_type": "gemma3_text", "head_dim": 4},
    "mistral": {**SMALL, "model_type": "mistral"},
    "cohere": {**SMALL, "model_type": "cohere", "logit_scale": 0.3},
    "cohere2": {**SMALL, "model_type": "cohere2", "logit_scale": 0.3},
    "granite": {**SMALL, "model_type": "granite", "logits_scaling": 3.0},
    "gpt2": {**TINY_GPT2, "initializer_range": 0.5},
    "phi": {**SMALL, "model_type": "phi", "tie_word_embeddings": False},  # its head has a bias
    "phi3": {**SMALL, "model_type": "phi3", "pad_token_id": 0},
    "olmo2": {**SMALL, "model_type": "olmo2"},
    "nanochat": {**SMALL, "model_type": "nanochat", "final_logit_softcapping": 2.0},
    "falcon_h1": {**SMALL, "model_type": "falcon_h1", "lm_head_multiplier": 0.3, "mamba_d_ssm": 16, "mamba_n_heads": 2},
    "recurrent_gemma": RECURRENT,
    "vaultgemma": {**SMALL, "model_type": "vaultgemma", "head_dim": 4, "final_logit_softcapping": 2.0},
    "granitemoe": {**SMALL, "model_type": "granitemoe", "logits_scaling": 3.0},
    "beam": {**SMALL, "model_type": "beam", "head_dim": 4, "final_logit_softcapping": 2.0},
    "cohere2_moe": {**SMALL, "model_type": "cohere2_moe", "num_experts": 2, "logit_scale": 0.3},
    "cohere_compass_text": {**SMALL, "model_type": "cohere_compass_text", **ROPE, "logit_scale": 0.3},
    "cohere_compass_text, no scale": {**SMALL, "model_type": "cohere_compass_text", **ROPE},
    "gemma4_text": {**SMALL, "model_type": "gemma4_text", **GEMMA4, "hidden_size_per_layer_input": 0},
    "gemma4_unified_text": {**SMALL, "model_type": "gemma4_unified_text", **GEMMA4},
    "granite_swa": {**SMALL, "model_type": "granite_swa", "logits_scaling": 3.0},
    "granitemoe_swa": {**SMALL, "model_type": "granitemoe_swa", "logits_scaling": 3.0},
    "hyperclovax": {**SMALL, "model_type": "hyperclovax", "logits_scaling": 0.3},
    "gemma3n_text": {**SMALL, "model_type": "gemma3n_text", **GEMMA3N},
    "granitemoehybrid": {**SMALL, "model_type": "granitemoehybrid", "logits_scaling": 3.0, **ATTENTION},
    "granitemoeshared": {**SMALL, "model_type": "granitemoeshared", "logits_scaling": 3.0},
    "xlstm": {"model_type": "xlstm", "hidden_size": 16, "num_heads": 2, "num_hidden_layers": 1, **XLSTM},
    "inkling2_text": {**UNTIED, "model_type": "inkling2_text", "final_logit_softcapping": 2.0},
    "inkling2_loop_text": {**UNTIED, "model_type": "inkling2_loop_text", "final_logit_softcapping": 2.0},
    # Divided before the head, which sees what is left.
    "inkling_text": {**UNTIED, "model_type": "inkling_text", "logits_mup_width_multiplier": 3.0},
    "minicpm3": {**SMALL, "model_type": "minicpm3", "dim_model_base": 8, **LATENT},
}


def both(config, batch, loading=None, **options):
    """Output and whole gradient with the fused head and with the model's own logits."""
    results = []
    for kind in ("fused", "full"):
        pl.seed_everything(0, verbose=False)
        module = CausalLMModule(config, loading={"head": kind, **(loading or {})}, **options)
        module.configure_model()
        torch.manual_seed(1)  # dropout
        output = module.token_output(batch, statistics=["entropy"])
        output.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        results.append((output, gradient))
    return results


def assert_agree(config, tolerance=1e-5, **options):
    batch = next(iter(loader()))
    (fused, fused_gradient), (full, full_gradient) = both(config, batch, **options)
    for name in ("loss", "log_prob", "weight", "entropy"):
        torch.testing.assert_close(getattr(fused, name), getattr(full, name), rtol=tolerance, atol=tolerance)
    assert torch.equal(fused.correct, full.correct)
    assert (fused_gradient - full_gradient).norm() < tolerance * full_gradient.norm()


def known_here(name):
    """The model types of the newest transformers are not those of the oldest that is supported."""
    if ARCHITECTURES[name]["model_type"] not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such model")
    return ARCHITECTURES[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_statistics_and_gradient_are_those_of_the_models_own_logits(name):
    assert_agree(known_here(name), loss=FocalLoss(2.0))


@pytest.mark.parametrize("name", sorted({*head_module._SCALE, *head_module._SOFTCAP}))
def test_scale_and_cap_matter_in_the_test_above(name, monkeypatch):
    config = known_here(name)
    monkeypatch.setattr(head_module, "_SCALE", {})
    monkeypatch.setattr(head_module, "_SOFTCAP", {})
    with pytest.raises(InputError, match=rf"reproduce {name}'s own log-probabilities.*model.loading.head: full"):
        assert_agree(config, loss=FocalLoss(2.0))


@pytest.mark.parametrize("loading", [{"gradient_checkpointing": True}, {"dtype": "float64"}], ids=str)
@pytest.mark.parametrize("loss", [CrossEntropyLoss(0.1), DFTLoss()], ids=repr)
def test_options_of_the_module(loss, loading):
    assert_agree(SMALL, loss=loss, loading=loading)


def test_dropout_is_the_same_with_and_without_the_check():
    assert_agree({**TINY_GPT2, "resid_pdrop": 0.5, "initializer_range": 0.5}, loss=DFTLoss())


# -- mixtures of experts ---------------------------------------------------------------------------------------------


MIXTRAL = {**SMALL, "model_type": "mixtral", "num_local_experts": 4, "router_aux_loss_coef": 0.3}


@pytest.mark.parametrize("kind", ["fused", "full"])
def test_auxiliary_loss_is_added_as_the_model_defines_it(kind):
    module = CausalLMModule({**MIXTRAL, "output_router_logits": True}, loading={"head": kind})
    module.configure_model()
    plain = CausalLMModule(MIXTRAL, loading={"head": kind})
    plain.model = module.model
    batch = next(iter(loader()))
    expected = module.model(**batch)
    assert expected.aux_loss > 0
    output = module.token_output(batch, normalizer=8.0)
    count = len(output.log_prob)
    assert output.loss.item() * 8 / count == pytest.approx(expected.loss.item(), rel=1e-5)
    assert output.loss_sum.item() / count == pytest.approx(expected.loss.item(), rel=1e-5)
    own = torch.autograd.grad(output.loss * 8 / count, list(module.parameters()))
    reference = torch.autograd.grad(expected.loss, list(module.parameters()))
    own, reference = (torch.cat([g.flatten() for g in gradients]) for gradients in (own, reference))
    assert (own - reference).norm() < 1e-5 * reference.norm()
    module.model.config.output_router_logits = False  # the model's default: no such loss
    assert module.token_output(batch).loss.item() == pytest.approx(-output.log_prob.sum().item(), rel=1e-5)


# -- training --------------------------------------------------------------------------------------------------------


class Losses(CausalLMModule):
    """Keeps the objective of every step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen.append(float(self.train_telemetry.tokens.loss_sum / self.train_telemetry.tokens.targets))
        self.train_telemetry.tokens.reset()
        return loss


def losses_of(folder, kind, steps, dtype):
    pl.seed_everything(0, verbose=False)
    module = Losses(folder, loss=DFTLoss(), loading={"head": kind, "dtype": dtype}, optimizer={"lr": 1e-3})
    module.seen = []
    precision = "64-true" if dtype == "float64" else "32-true"
    trainer(max_steps=steps, max_epochs=-1, precision=precision).fit(module, loader(vocabulary=500))
    return torch.tensor(module.seen, dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "steps", "tolerance"), [("float64", 50, 1e-9), ("float32", 10, 1e-5)])
def test_training_is_that_with_full_logits(dtype, steps, tolerance):
    """stories260K, a real model: the objective of every step."""
    folder = str(at_hand("models/stories260K"))
    fused, full = (losses_of(folder, kind, steps, dtype) for kind in ("fused", "full"))
    assert len(fused) == steps
    assert (fused - full).abs().max() < tolerance
    assert fused.unique().numel() == steps  # they are the steps' own


def test_frozen_head_and_frozen_backbone():
    for config in (TINY_QWEN2, SMALL):
        batch = next(iter(loader()))
        gradients = []
        for kind in ("fused", "full"):
            pl.seed_everything(0, verbose=False)
            module = CausalLMModule(config, loss=DFTLoss(), loading={"head": kind})
            module.configure_model()
            module.model.requires_grad_(config is SMALL)
            module.model.lm_head.weight.requires_grad_(config is not SMALL)
            module.token_output(batch).loss.backward()
            gradients.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys() != set()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_bf16_mixed_trains_float32_weights():
    """Under autocast the head's gradient is that of the model's own logits, as far as bfloat16 goes."""
    batch = next(iter(loader()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (fused, own), (full, reference) = both(SMALL, batch, loss=DFTLoss())
    torch.testing.assert_close(fused.log_prob, full.log_prob, rtol=0.02, atol=0.05)
    assert own.dtype == torch.float32
    assert (own - reference).norm() < 0.02 * reference.norm()


# -- what the fused head cannot do is refused ------------------------------------------------------------------------


def refused(match, module, batch=None):
    module.configure_model()
    with pytest.raises(InputError, match=match):
        module.token_output(batch or next(iter(loader())))


def test_a_head_that_does_something_else_is_refused():
    class Own(CausalLMModule):
        def build_model(self):
            model = load_causal_lm(SMALL)
            forward = model.forward

            def with_bonus(**inputs):
                output = forward(**inputs)
                output.logits = output.logits + output.logits.square() / 10
                return output

            model.forward = with_bonus
            return model

    refused(r"does not reproduce llama's own log-probabilities.*set model.loading.head: full", Own("own"))
    module = Own("own", loading={"head": "full"})
    module.configure_model()
    assert module.token_output(next(iter(loader()))).loss > 0


def test_a_head_that_is_called_twice_is_refused():
    class Own(CausalLMModule):
        def build_model(self):
            model = load_causal_lm(SMALL)
            backbone = model.model.forward

            def twice(**inputs):
                output = backbone(**inputs)
                model.lm_head(output.last_hidden_state)
                return output

            model.model.forward = twice
            return model

    refused("called its output layer 2 times.*head: full", Own("own"))


def test_hidden_states_of_other_dimensions_are_refused():
    """ProphetNet predicts several tokens ahead, of which its logits are the first."""
    prophet = {"model_type": "prophetnet", "hidden_size": 16, "vocab_size": 32, "num_decoder_layers": 1}
    prophet |= {"num_decoder_attention_heads": 2, "decoder_ffn_dim": 16, "num_encoder_layers": 1}
    model = load_causal_lm(prophet)
    with pytest.raises(
        InputError, match=r"ProphetNet.* gives its output layer .*, the fused head expects \[B, T, H\].*head: full"
    ):
        head_module.run_without_head(model, head_module.find_head(model), input_ids=torch.arange(6)[None])


def test_an_adapter_on_the_head_is_refused():
    class Adapter(torch.nn.Module):  # as peft wraps layers
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer

        weight = property(lambda self: self.base_layer.weight)

        def forward(self, hidden):
            return self.base_layer(hidden)

    class Own(CausalLMModule):
        def build_model(self):
            model = load_causal_lm(SMALL)
            model.lm_head = Adapter(model.lm_head)
            return model

    refused("an adapter on it would not be trained.*head: full", Own("own"))

    class Patched(CausalLMModule):
        def build_model(self):
            model = load_causal_lm(SMALL)
            own = model.lm_head.forward
            model.lm_head.forward = lambda hidden: own(hidden) + 0.0
            return model

    refused("whose forward is wrapped", Patched("own"))


class Behind(CausalLMModule):
    """A model that does something behind its output layer."""

    def __init__(self, after, **options):
        super().__init__("own", **options)
        self.after = after

    def build_model(self):
        model = load_causal_lm({**SMALL, "initializer_range": 0.02})
        forward = model.forward

        def changed(**inputs):
            output = forward(**inputs)
            output.logits = self.after(output.logits)
            return output

        model.forward = changed
        return model


def test_a_head_of_another_shape_is_refused():
    config = {**UNTIED, "model_type": "inkling_text", "unpadded_vocab_size": 90}
    if config["model_type"] not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such model")
    refused(
        r"output layer is given \[.*\] and .* logits are \[.*\].*set model.loading.head: full", CausalLMModule(config)
    )
    module = CausalLMModule(config, loading={"head": "full"})
    module.configure_model()
    ids = torch.arange(3, 12).view(1, -1)
    assert module.token_output({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}).loss > 0


class Factor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(()))

    def forward(self, logits):
        return logits * self.factor


def test_what_shows_only_later_is_refused_at_the_start():
    """A cap on logits near 0, a factor of 1 that would be trained, a bias of 0 as wide as the vocabulary."""
    refused("reproduce llama's own", Behind(lambda logits: 15 * torch.tanh(logits / 15)))
    refused("something to train between", Behind(Factor()))
    refused("does not run without its logits.*head: full", Behind(lambda logits: logits + torch.zeros(97)))


def test_a_model_of_nan_is_left_to_the_loss():
    module = CausalLMModule(SMALL)
    module.configure_model()
    torch.nn.init.constant_(module.model.model.norm.weight, float("nan"))
    assert module.token_output(next(iter(loader()))).loss.isnan()


def test_an_overridden_forward_is_refused():
    class Own(CausalLMModule):
        def forward(self, input_ids, attention_mask=None):
            return 2 * super().forward(input_ids, attention_mask)

    with pytest.raises(ValueError, match=r"Own overrides forward.*head: full"):
        Own(SMALL)
    batch = next(iter(loader()))
    outputs = []
    for cls in (Own, CausalLMModule):
        pl.seed_everything(0, verbose=False)
        module = cls(SMALL, loading={"head": "full"})
        module.configure_model()
        outputs.append(module.token_output(batch).loss)
    assert outputs[0] != outputs[1]


def test_unknown_head_is_refused():
    with pytest.raises(ValueError, match="head must be one of fused, full, got 'liger'"):
        CausalLMModule(SMALL, loading={"head": "liger"})


def test_the_model_is_as_it_was_after_the_fused_head():
    module = CausalLMModule(SMALL)
    module.configure_model()
    batch = next(iter(loader()))
    before = module.model(**batch).logits
    module.token_output(batch)
    assert "forward" not in module.model.lm_head.__dict__
    assert torch.equal(module(batch["input_ids"], batch["attention_mask"]), before)
