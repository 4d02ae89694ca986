"""Model-FLOPs utilisation and memory: what is counted, against torch's own counter and by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import TINY_LLAMA, TINY_QWEN2
from dft_lightning import CausalLMModule, CrossEntropyLoss
from dft_lightning.data.batches.collating import Collator
from dft_lightning.models.flops import ModelFlops
from dft_lightning.models.layout import BatchLayout
from dft_lightning.modules.telemetry import peak_flops, peak_memory
from small_runs import TINY_ARITHMETIC, TINY_GPT2, arithmetic_data, trainer

EXPERTS = {**TINY_LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def built(model, **options):
    module = CausalLMModule(model, loss=CrossEntropyLoss(), **options)
    module.configure_model()
    return module


@pytest.mark.parametrize("model", [TINY_LLAMA, TINY_QWEN2, TINY_GPT2], ids=["tied", "untied", "gpt2"])
def test_against_torchs_counter(model):
    """Products of a forward and backward by the model's own logits, whose attention takes every pair of tokens."""
    module = built(model, loading={"head": "full", "attn_implementation": "eager"})
    ids = torch.arange(1, 25).view(2, 12)
    module.token_output({"input_ids": ids, "labels": ids})  # tries the model at its first batch
    with FlopCounterMode(display=False) as counter:
        module.token_output({"input_ids": ids, "labels": ids}).loss.backward()
    found = ModelFlops.of(module.model)
    attention = sum(12 * width for width, _, _ in found.attention)
    assert [span for _, _, span in found.attention] == [0, 0]
    counted = counter.get_total_flops()
    assert counted == found.of_token * 24 + found.of_target * 24 + attention * 2 * 12 * 12


def test_frozen_matrices_take_no_gradient_of_their_own():
    whole = ModelFlops.of(built(TINY_QWEN2).model)
    frozen = built(TINY_QWEN2)
    for parameter in frozen.model.parameters():
        parameter.requires_grad_(False)
    found = ModelFlops.of(frozen.model)
    assert (found.of_token, found.of_target) == (whole.of_token * 4 / 6, whole.of_target * 4 / 6)


def test_of_experts_those_that_a_token_meets():
    model = built(EXPERTS).model
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.ndim >= 2 and "embed" not in name}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert experts > 0
    assert ModelFlops.of(model).of_token == 6 * (sum(sizes.values()) - experts / 2)


def test_a_batch_by_hand():
    kinds = ((8, "full_attention", 0), (8, "sliding_attention", 2), (8, "chunked_attention", 2))
    flops = ModelFlops(of_token=100.0, of_target=10.0, attention=kinds)
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [-100]}]
    # Pairs: 1 + 2 + 3 and 1; within a window of two 1 + 2 + 2 and 1; in chunks of two 1 + 2 + 1 and 1.
    expected = 100 * 4 + 10 * 2 + 12 * 8 * (7 + 6 + 5)
    for padding_free in (False, True):
        assert flops.of_batch(Collator(0, padding_free=padding_free)(rows)["layout"]) == expected
    left = BatchLayout(torch.ones(1, 3).long(), torch.tensor([[0, 1, 1]]))  # whose rows count whole
    assert flops.of_batch(left) == 100 * 2 + 10 * 2 + 12 * 8 * (6 + 5 + 4)


KINDS = {
    "mistral": ({"sliding_window": 8}, [("sliding_attention", 8)] * 2),
    "qwen2": ({"sliding_window": 8}, [("full_attention", 0)] * 2),
    "gemma3_text": (
        {"head_dim": 4, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        [("sliding_attention", 8), ("full_attention", 0)],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_attend_as_their_config_says(kind):
    options, expected = KINDS[kind]
    found = ModelFlops.of(built({**TINY_LLAMA, "model_type": kind, **options}).model)
    assert [each[1:] for each in found.attention] == expected


def test_a_config_that_says_nothing_of_its_attention_counts_none():
    config = SimpleNamespace(num_hidden_layers=2, num_attention_heads=2)
    model = torch.nn.Linear(3, 5)
    model.config = config
    assert ModelFlops.of(model) == ModelFlops(of_token=6 * 15, of_target=0.0, attention=())
    config.layer_types, config.head_dim = ["linear_attention", "chunked_attention"], 4
    config.attention_chunk_size = 16
    assert ModelFlops.of(model).attention == ((8, "chunked_attention", 16),)


def test_what_is_logged():
    """The operations of the window over its seconds and the peak of all devices."""
    seen, logged, tokens = [], [], []

    class Watch(CausalLMModule):
        def training_step(self, batch, batch_idx):
            seen.append(self.train_telemetry.model_flops.of_batch(batch["layout"]))
            tokens.append(batch["layout"].num_tokens)
            return super().training_step(batch, batch_idx)

        def log(self, name, value, **options):
            super().log(name, value, **options)
            logged.append((name, float(value)))

    module = Watch(TINY_ARITHMETIC, schedule={"decay": "constant"}, step={"peak_flops": 1e9})
    trainer(max_steps=2, accumulate_grad_batches=2, log_every_n_steps=2).fit(module, arithmetic_data(16, batch_size=2))
    values = dict(logged)
    assert len(seen) == 4
    assert values["train/peak_memory_gib"] > 0.05
    seconds = sum(tokens) / values["train/tokens_per_second"]
    assert values["train/mfu"] == pytest.approx(sum(seen) / seconds / 1e9)


def test_without_a_peak_nothing_is_said_of_it():
    logged = []

    class Watch(CausalLMModule):
        def log(self, name, value, **options):
            super().log(name, value, **options)
            logged.append(name)

    trainer(log_every_n_steps=1).fit(Watch(TINY_ARITHMETIC), arithmetic_data(4, batch_size=2))
    assert "train/tokens_per_second" in logged
    assert "train/mfu" not in logged


def test_peaks(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert peak_flops(cpu, "bf16-mixed", None) is None
    assert peak_flops(cpu, "bf16-mixed", 2e12) == 2e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert peak_flops(cuda, "bf16-mixed", None) == peak_flops(cuda, "16-mixed", None) == 312e12
    assert peak_flops(cuda, "bf16-mixed", 1e12) == 1e12
    assert peak_memory(cpu) > 2**20


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_a_peak_is_a_number_above_0(value):
    with pytest.raises(ValueError, match="peak_flops must be a number above 0"):
        CausalLMModule(TINY_LLAMA, step={"peak_flops": value})
