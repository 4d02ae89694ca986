"""Padding-free batches: several documents in one row give what the same rows padded give, or are refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from conftest import TINY_LLAMA, TINY_QWEN2, at_hand
from dft_lightning import CausalLMModule, DFTLoss, InstructionDataModule, TokenLoss
from dft_lightning.data.batches.collating import Collator
from dft_lightning.errors import InputError
from dft_lightning.models import attention, documents
from dft_lightning.models.documents import check_documents
from dft_lightning.models.layout import document_lengths, layout_of
from dft_lightning.models.loading import load_causal_lm
from small_runs import TINY_ARITHMETIC, TINY_GPT2, arithmetic_data, trainer

# Large weights: attention must depend on what it sees.
LLAMA, QWEN2 = {**TINY_LLAMA, "initializer_range": 0.5}, {**TINY_QWEN2, "initializer_range": 0.5}
GPT2 = {**TINY_GPT2, "initializer_range": 0.5}
GEMMA3 = {**LLAMA, "model_type": "gemma3_text", "head_dim": 4, "sliding_window": 16}
LENGTHS = (7, 2, 12, 1, 9)


class SequenceMean(TokenLoss):
    """Every token by the mean probability of its own sequence: not pointwise."""

    pointwise = False
    needs = ("sequence_index",)

    def token_loss(self, stats):
        index = stats.sequence_index
        sums = torch.zeros(int(index.max()) + 1, dtype=stats.log_prob.dtype).index_add(0, index, stats.log_prob.exp())
        return -sums[index] / index.bincount()[index] * stats.log_prob


def rows(vocabulary=97, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(5)
    made = []
    for index, length in enumerate(lengths):
        ids = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        labels = [-100 if place < length // 3 else token for place, token in enumerate(ids)]
        made.append({"input_ids": ids, "labels": labels, "index": index})
    return made


def loss_and_gradient(model, padding_free, attention=None, data=None, loading=None, **options):
    torch.manual_seed(0)
    loading = {"attn_implementation": attention, **(loading or {})}
    module = CausalLMModule(model, loading=loading, **{"loss": DFTLoss(), **options})
    module.configure_model()
    batch = Collator(0, padding_free=padding_free)(data or rows())
    output = module.token_output(batch, statistics=["entropy"])
    output.loss.backward()
    return output, torch.cat([p.grad.flatten() for p in module.parameters()])


def assert_equal_to_padded(model, attention, tolerance=1e-5, **options):
    padded, expected = loss_and_gradient(model, False, "eager", **options)
    joined, gradient = loss_and_gradient(model, True, attention, **options)
    for name in ("loss", "log_prob", "weight", "entropy"):
        torch.testing.assert_close(getattr(joined, name), getattr(padded, name), rtol=tolerance, atol=tolerance)
    assert (gradient - expected).norm() < tolerance * expected.norm()


def test_rows_become_one_with_positions_that_start_anew():
    first = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    batch = Collator(0, padding_free=True)([first, {"input_ids": [8, 9], "labels": [-100, 9]}])
    assert batch.pop("layout").num_tokens == 5
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "labels": [[-100, 6, 7, -100, 9]],  # no first token is a target, whatever the row says
        "position_ids": [[0, 1, 2, 0, 1]],
    }


def test_a_document_begins_where_positions_do_not_go_up_by_one():
    positions = torch.tensor([[3, 4, 0, 1, 2, 0, 0]])  # the first is the end of one that was cut
    assert document_lengths(positions) == [2, 3, 1, 1]
    layout = layout_of({"labels": positions, "position_ids": positions})
    assert layout.sequence_index().tolist() == [0, 0, 1, 1, 1, 2, 3]
    assert layout.cu_seq_lens.tolist() == [0, 2, 5, 6, 7]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "documents"])
@pytest.mark.parametrize("model", [LLAMA, QWEN2, GPT2, GEMMA3], ids=["llama", "qwen2", "gpt2", "gemma3"])
def test_losses_and_gradients_are_those_of_the_same_rows_padded(model, attention):
    assert_equal_to_padded(model, attention)


@pytest.mark.parametrize(
    "options",
    [{"loading": {"head": "full"}}, {"loss": SequenceMean()}, {"loading": {"gradient_checkpointing": True}}],
)
def test_with_every_head_and_kind_of_loss(options):
    assert_equal_to_padded(LLAMA, "documents", **options)


def test_exact_in_float64():
    assert_equal_to_padded(GPT2, "documents", tolerance=1e-10, loading={"dtype": "float64"})


def test_a_real_model():
    folder = str(at_hand("models/stories260K"))
    data = rows(vocabulary=512, lengths=(40, 90, 7, 120))
    assert_equal_to_padded(folder, "documents", data=data)


def test_whole_runs_take_the_same_steps():
    losses = []
    for padding_free in (False, True):
        torch.manual_seed(0)
        attention = "documents" if padding_free else "sdpa"
        module = CausalLMModule(
            TINY_ARITHMETIC, loss=DFTLoss(), loading={"dtype": "float64", "attn_implementation": attention}
        )
        data = arithmetic_data(batch_size=4, validation_fraction=0.25, padding_free=padding_free)
        run = trainer(max_steps=6, precision="64-true", accumulate_grad_batches=2, log_every_n_steps=1)
        run.fit(module, data)
        losses.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
        metrics = {name: float(value) for name, value in run.callback_metrics.items()}
        del metrics["train/tokens_per_second"], metrics["train/peak_memory_gib"]
        losses.append(torch.tensor(list(metrics.values()), dtype=torch.float64))
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(losses[1], losses[3], rtol=1e-6, atol=1e-6)


def test_test_and_generation_go_on_with_padding_free_batches():
    results = []
    for padding_free in (False, True):
        torch.manual_seed(0)
        attention = "documents" if padding_free else None
        module = CausalLMModule(
            TINY_ARITHMETIC,
            loading={"attn_implementation": attention},
            evaluation={"generation": {"max_new_tokens": 4}},
        )
        data = InstructionDataModule(
            test=arithmetic_data().sources["train"],
            batch_size=4,
            text={"tokenizer": "asset://arithmetic-base"},
            batches={"padding_free": padding_free},
        )
        results.append(trainer().test(module, data, verbose=False)[0])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_padded_batches_take_sdpa_under_the_same_name():
    _, expected = loss_and_gradient(LLAMA, False, "sdpa")
    _, gradient = loss_and_gradient(LLAMA, False, "documents")
    assert torch.equal(gradient, expected)


# -- what is refused -----------------------------------------------------------------------------------------------


def leaking(module, query, key, value, attention_mask, **options):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, None, **options)


def test_attention_that_crosses_documents_is_found_out(monkeypatch):
    monkeypatch.setattr(attention, "_documents_attention", leaking)
    with pytest.raises(InputError, match=r"LlamaForCausalLM with attn_implementation documents does not keep .* apart"):
        loss_and_gradient(TINY_LLAMA, True, "documents")  # weights of 0.02: logits hardly move


@pytest.mark.parametrize(
    "model",
    [
        {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 97, "state_size": 4},
        {"model_type": "falcon_h1", **{k: v for k, v in LLAMA.items() if k != "model_type"}}
        | {"mamba_d_ssm": 16, "mamba_n_heads": 2},
    ],
    ids=["mamba", "falcon_h1"],
)
def test_recurrent_and_hybrid_models_are_refused(model):
    with pytest.raises(InputError, match=r"row of documents|documents of a row.*data.batches.padding_free: false"):
        loss_and_gradient(model, True)


class IgnoresPositions(nn.Module):
    """Each token by its place in the row: nothing leaks, but the second document does not start anew."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(97, 8)
        self.place = nn.Embedding(64, 8)
        self.lm_head = nn.Linear(8, 97)

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=False):
        places = self.place(torch.arange(input_ids.shape[1]))
        return CausalLMOutput(logits=self.lm_head(self.embedding(input_ids) + places))


def test_a_model_that_ignores_position_ids_is_refused_and_left_in_training_mode():
    model = IgnoresPositions().train()
    with pytest.raises(InputError, match="with no first document the logits of a second of 6 tokens move"):
        check_documents(model)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "gemma3_text"])
def test_a_document_beyond_the_sliding_window(kind):
    """Is attended to within the window, as the same rows padded."""
    model = {**LLAMA, "model_type": kind, "sliding_window": 8}
    if kind == "qwen2":
        model |= {"use_sliding_window": True, "max_window_layers": 1}
    if kind == "gemma3_text":
        model |= {"head_dim": 4, "layer_types": ["sliding_attention", "full_attention"]}
    assert_equal_to_padded(model, "documents")


def attention_of_documents(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch's kernel for CUDA computes, by its own page: ``[T, heads, D]``, documents one after the other."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert (q.shape[1] != k.shape[1]) == enable_gqa
    outputs = []
    for start, stop in itertools.pairwise(cu_seq_q.tolist()):
        own = [tensor[start:stop].transpose(0, 1) for tensor in (q, k, v)]
        own[1:] = [tensor.repeat_interleave(q.shape[1] // k.shape[1], 0) for tensor in own[1:]]
        scores = own[0] @ own[1].transpose(1, 2) * scale
        behind = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        seen = (behind >= -window_size[1]) & ((window_size[0] < 0) | (behind <= window_size[0]))
        outputs.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ own[2])
    return torch.cat(outputs, 1).transpose(0, 1)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("model", [LLAMA, GPT2, {**LLAMA, "model_type": "mistral", "sliding_window": 8}], ids=str)
def test_all_documents_in_one_call(model, told, monkeypatch):
    """As a GPU takes them: with the documents' places from the batch, or from the lengths in the mask's place."""
    from torch.nn.attention import varlen

    calls = []
    monkeypatch.setattr(attention, "in_one_call", lambda query, dropout: True)
    monkeypatch.setattr(varlen, "varlen_attn", lambda *args, **options: calls.append(args) or kernel(*args, **options))
    kernel = attention_of_documents
    if not told:
        monkeypatch.setattr(documents, "takes_any_option", lambda model: False)
    assert_equal_to_padded(model, "documents")
    assert (calls[-2][3] is calls[-1][3]) == told  # both layers are given the batch's own


SIZES = [5, 9, 1]


def inputs_of_attention(heads=4, key_heads=2, dtype=torch.float64):
    generator, tokens = torch.Generator().manual_seed(0), sum(SIZES)
    shapes = [(1, heads, tokens, 8), (1, key_heads, tokens, 8), (1, key_heads, tokens, 8)]
    return [torch.randn(shape, generator=generator, dtype=dtype).mul(2).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("window", [None, 3], ids=["whole", "window"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_the_operator_is_attention_within_each_document(window, key_heads):
    """Held against scores and a softmax written out, values and gradients, and against torch's rules for operators."""
    inputs = inputs_of_attention(key_heads=key_heads)
    lengths = torch.tensor(SIZES).view(1, 1, 1, -1)
    found = attention.document_attention(*inputs, lengths, window, 0.7)[0]
    starts = torch.tensor([0, *itertools.accumulate(SIZES)], dtype=torch.int32)
    expected = attention_of_documents(
        *(tensor[0].transpose(0, 1) for tensor in inputs), *[starts] * 2, *[max(SIZES)] * 2,
        scale=0.7, window_size=(-1 if window is None else window - 1, 0), enable_gqa=key_heads != 4,
    )  # fmt: skip
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(found, inputs, direction)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, direction[0]), rtol=1e-11, atol=1e-11)
    torch.library.opcheck(attention.document_attention, (*inputs, lengths, window, 0.7))


def test_dropout_goes_document_by_document():
    """Of probabilities that are kept, each is divided by the share that is: on the average, nothing changes."""
    module, lengths = torch.nn.Module().train(), torch.tensor(SIZES).view(1, 1, 1, -1)
    inputs = inputs_of_attention(dtype=torch.float32)
    exact, _ = attention._documents_attention(module, *inputs, lengths, scaling=0.1)
    torch.manual_seed(0)
    draws = [attention._documents_attention(module, *inputs, lengths, scaling=0.1, dropout=0.2)[0] for _ in range(600)]
    assert not torch.equal(draws[0], draws[1])
    spread = torch.stack(draws).std(0) / len(draws) ** 0.5
    assert ((torch.stack(draws).mean(0) - exact).abs() < 5 * spread + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True])
def test_half_precision_on_the_cpu_loses_no_more_than_its_last_digit(dtype, mixed):
    """Scores and sums are in float32, under autocast too."""
    module, generator = torch.nn.Module().eval(), torch.Generator().manual_seed(0)
    sizes = [5, 30, 1]
    query, key, value = (torch.randn(1, 2, 36, 8, generator=generator).mul(3).to(dtype) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found, _ = attention._documents_attention(module, query, key, value, torch.tensor(sizes).view(1, 1, 1, -1))
    assert found.dtype == dtype
    parts = zip(*(tensor.double().split(sizes, 2) for tensor in (query, key, value)), strict=True)
    exact = [torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True) for part in parts]
    exact = torch.cat(exact, 2).transpose(1, 2)
    assert (found.double() - exact).abs().max() <= 0.51 * torch.finfo(dtype).eps * exact.abs().max()


def test_what_goes_to_one_call():
    half = torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16, device="meta")
    assert not attention.in_one_call(half, 0.0)  # not on CUDA

    class OnCUDA(torch.Tensor):
        is_cuda = True

    half = half.as_subclass(OnCUDA)
    assert attention.in_one_call(half, 0.0)
    assert not attention.in_one_call(half, 0.1)
    assert not attention.in_one_call(half.float(), 0.0)
    assert not attention.in_one_call(half[..., :60], 0.0)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_is_told_where_documents_begin(attention, monkeypatch):
    module = CausalLMModule(LLAMA)
    module.configure_model()
    batch = Collator(0, padding_free=True)(rows())
    monkeypatch.setattr(documents, "attention_of", lambda model: attention)
    found = documents.model_inputs(module.model, batch)
    lengths = [len(row["input_ids"]) for row in rows()]
    assert found["cu_seq_lens_q"].tolist() == found["cu_seq_lens_k"].tolist() == [0, *itertools.accumulate(lengths)]
    assert found["cu_seq_lens_q"].dtype == torch.int32
    assert found["max_length_q"] == found["max_length_k"] == max(lengths)
    assert found["attention_mask"] is None
    packed = Collator(0)([{"documents": rows()[:2]}, {"documents": rows()[2:]}])
    assert "cu_seq_lens_q" not in documents.model_inputs(module.model, packed)  # rows that it refuses
    assert "cu_seq_lens_q" not in documents.model_inputs(IgnoresPositions(), batch)  # it takes no such option


@pytest.mark.parametrize("option", ["s_aux", "position_bias"])
def test_an_attention_that_has_more_to_it_is_refused(option):
    query, lengths = torch.zeros(1, 2, 4, 8), torch.tensor([4]).view(1, 1, 1, 1)
    with pytest.raises(InputError, match="attn_implementation: documents computes no .*, which Linear has"):
        attention._documents_attention(torch.nn.Linear(1, 1), *[query] * 3, lengths, **{option: torch.zeros(2)})


def test_what_sdpa_cannot_compute_is_refused():
    with pytest.raises(InputError, match="sdpa calls, which Gemma2ForCausalLM does not support"):
        load_causal_lm({**LLAMA, "model_type": "gemma2"}, attn_implementation="documents")  # it caps its scores


def test_other_rows_or_a_mask_beside_positions_are_refused():
    module = CausalLMModule(TINY_LLAMA)
    module.configure_model()
    ids = torch.zeros(2, 4, dtype=torch.int64)
    for batch in ({"input_ids": ids}, {"input_ids": ids[:1], "attention_mask": ids[:1] + 1}):
        with pytest.raises(InputError, match="rows of whole documents"):
            module.token_output({"position_ids": ids[:1], "labels": batch["input_ids"], **batch})


def test_padding_to_a_multiple_contradicts():
    with pytest.raises(ValueError, match="padding_free batches have nothing to pad"):
        InstructionDataModule("rows.jsonl", batches={"padding_free": True, "pad_to_multiple_of": 8})


@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_rounding_that_a_model_makes_much_of_passes_between_no_documents(half):
    """In half precision the logits of a row may move by a fifth with its length, as those of a SmolLM2 that had been
    trained at a high rate did by a seventh."""
    module = CausalLMModule(TINY_LLAMA, loading={"attn_implementation": "documents"})
    module.configure_model()
    model = module.model.to(torch.bfloat16) if half == "weights" else module.model

    def rounded(model, args, kwargs, output):
        if torch.is_autocast_enabled("cpu") or output.logits.dtype == torch.bfloat16:
            output.logits += output.logits.abs().max() * (output.logits.shape[1] - 6) / 30

    model.register_forward_hook(rounded, with_kwargs=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        check_documents(model)
