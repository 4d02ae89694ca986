"""What a model does with rows is found out before it is trained: the future, padding, documents in one row."""

from __future__ import annotations

import json
import re
from collections import UserDict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.modeling_outputs import CausalLMOutput

from conftest import TINY_LLAMA
from dft_lightning import CausalLMModule, InstructionDataModule
from dft_lightning.errors import InputError
from dft_lightning.models import generation
from dft_lightning.models.documents import check_documents
from dft_lightning.models.loading import load_causal_lm
from dft_lightning.models.row_checks import check_rows
from small_runs import TINY_GPT2, data_options, trainer

ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ENCODER |= {"vocab_size": 97, "max_position_embeddings": 64}
EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16},
    "olmoe": {"num_experts": 4},
    "deepseek_v2": {"n_routed_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 0, "topk_group": 1}
    | {
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 4,
        "n_group": 1,
    },
    "phimoe": {"num_local_experts": 4},
}
LLAMA4 = {**TINY_LLAMA, "model_type": "llama4_text", "attention_chunk_size": 8, "head_dim": 4, "initializer_range": 0.5}
LLAMA4 |= {"intermediate_size_mlp": 32, "num_local_experts": 2, "layer_types": ["chunked_attention"] * 2}


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "roformer", "camembert"])
@pytest.mark.parametrize("head", ["fused", "full"])
def test_an_encoder_is_refused_unless_it_is_a_decoder(kind, head):
    batch = {"input_ids": torch.arange(12).view(2, 6) + 5, "labels": torch.arange(12).view(2, 6) + 5}
    module = CausalLMModule({**ENCODER, "model_type": kind}, loading={"head": head})
    module.configure_model()
    with pytest.raises(InputError, match=r"sees the tokens that it is to predict: .*set is_decoder: true"):
        module.token_output(batch)
    module = CausalLMModule({**ENCODER, "model_type": kind, "is_decoder": True}, loading={"head": "full"})
    module.configure_model()
    module.token_output(batch)
    assert module.training


def test_xlnet_has_another_setting():
    model = load_causal_lm({"model_type": "xlnet", "d_model": 16, "n_layer": 1, "n_head": 2, "vocab_size": 97})
    with pytest.raises(InputError, match="sees the tokens that it is to predict: .*take a causal language model"):
        check_rows(model)


def test_a_model_that_does_not_run_on_padded_rows_is_named():
    """transformers' mask of this kind of XLNet does not fit more rows than one."""
    config = {"model_type": "xlnet", "d_model": 16, "n_layer": 1, "n_head": 2, "vocab_size": 97, "attn_type": "uni"}
    with pytest.raises(
        InputError, match=r"XLNetLMHeadModel does not run on two rows, of which one is padded \(.*shape"
    ):
        check_rows(load_causal_lm(config))


class Leaking(nn.Module):
    """Hands a little of each token to the one before it, or of padding to the row."""

    def __init__(self, share=0.0, of_padding=0.0):
        super().__init__()
        self.embedding, self.lm_head = nn.Embedding(97, 8), nn.Linear(8, 97)
        self.share, self.of_padding = share, of_padding

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        hidden = self.embedding(input_ids)
        hidden = hidden + self.share * torch.cat([hidden[:, 1:], 0 * hidden[:, :1]], dim=1)
        hidden = hidden + self.of_padding * ((attention_mask == 0)[..., None] * hidden).sum(1, keepdim=True)
        return CausalLMOutput(logits=self.lm_head(hidden))


def test_a_leak_of_a_thousandth_is_found():
    check_rows(Leaking())
    with pytest.raises(InputError, match="sees the tokens"):
        check_rows(Leaking(share=1e-3))
    with pytest.raises(InputError, match="takes padding for tokens"):
        check_rows(Leaking(of_padding=1e-3))


@pytest.mark.parametrize("kind", EXPERTS)
def test_mixtures_of_experts_are_not_refused_for_rounding(kind):
    for seed in range(5):
        torch.manual_seed(seed)
        model = load_causal_lm({**TINY_LLAMA, **EXPERTS[kind], "model_type": kind, "num_experts_per_tok": 2})
        check_rows(model)
        check_documents(model)
        check_documents(model, num_rows=2)


class Far(Leaking):
    """Hands each token to the one that comes 14 after it, in whatever document."""

    config = SimpleNamespace(sliding_window=8)

    def forward(self, input_ids, attention_mask=None, use_cache=False, position_ids=None):
        hidden = self.embedding(input_ids)
        return CausalLMOutput(logits=self.lm_head(hidden + nn.functional.pad(hidden, (0, 0, 14, 0))[:, :-14]))


def test_documents_are_tried_that_are_longer_than_a_window():
    check_documents(Far(), longest=8)
    with pytest.raises(InputError, match=r"a second of 14 tokens move by .*set data.text.max_length to 8 or less"):
        check_documents(Far())


def test_documents_beyond_a_chunk_are_refused():
    """sdpa keeps Llama 4's chunks within each document; one call for each document knows of none."""
    check_documents(load_causal_lm(LLAMA4))
    module = CausalLMModule(LLAMA4, loading={"attn_implementation": "documents"})
    module.configure_model()
    ids, positions = torch.arange(12)[None], torch.arange(12)[None]
    with pytest.raises(InputError, match="one of 12 tokens is longer than the model's chunk of attention, 8"):
        module.token_output({"input_ids": ids, "labels": ids, "position_ids": positions})


def test_positions_that_start_elsewhere_are_found():
    """RoBERTa's first position is padding_idx + 1, which the batch's positions from 0 are not."""
    options = {"model_type": "roberta", **ENCODER, "is_decoder": True, "initializer_range": 0.5}
    for attention in ("sdpa", "documents"):
        with pytest.raises(InputError, match="the logits of a second of 6 tokens move"):
            check_documents(load_causal_lm(options, attn_implementation=attention))


RWKV = {"model_type": "rwkv", "hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 97}
BART = {"model_type": "bart", "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
BART |= {"vocab_size": 97, "encoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 2}
PROMPTS = ([5, 6, 7], [11, 12, 13, 14, 15, 16, 17], [20])


def likeliest(model, prompt, new):
    """By the forward of the row alone, without a cache."""
    row = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            ids = torch.tensor([row])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            row.append(int(logits[0, -1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("config", [RWKV, BART, TINY_LLAMA], ids=["rwkv", "bart", "llama"])
def test_rows_of_a_padded_batch_generate_what_each_generates_alone(config, monkeypatch):
    model = load_causal_lm(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    said = []
    monkeypatch.setattr(generation, "rank_zero_info", said.append)
    options = generation.GenerationOptions(max_new_tokens=5)
    for _ in range(2):
        found = generation.generate(model, ids, mask, options, stop_token_ids=[], pad_token_id=0)
        assert found.tolist() == [likeliest(model, prompt, 5) for prompt in PROMPTS]
    assert len(said) == (config is not TINY_LLAMA)


def test_a_model_whose_positions_begin_elsewhere_generates_one_row_at_a_time():
    """RoBERTa's first is padding_idx + 1."""
    model = load_causal_lm({**ENCODER, "model_type": "roberta", "is_decoder": True, "initializer_range": 0.5}).eval()
    ids, options = torch.tensor([[5, 6]]), generation.GenerationOptions(max_new_tokens=3)
    found = generation.generate(model, ids, torch.ones_like(ids), options, stop_token_ids=[], pad_token_id=1)
    assert found.tolist() == [likeliest(model, [5, 6], 3)]


IDS = torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, "each [B, T]: this one has input_ids"),
        ({}, "this one has nothing"),
        ([torch.ones(2, 3, dtype=torch.long)] * 2, "this one is of type list"),
        ({"labels": IDS}, "this one has labels"),
        ({"input_ids": IDS, "labels": None}, "labels is of type NoneType"),
        ({"input_ids": IDS.tolist(), "labels": IDS}, "input_ids is of type list"),
        ({"input_ids": IDS, "labels": IDS.float()}, "labels are torch.float32, and are to be torch.int64"),
        ({"input_ids": IDS.to(torch.uint8), "labels": IDS}, "input_ids are torch.uint8"),
        ({"input_ids": IDS[0], "labels": IDS[0]}, "input_ids are [3]"),
        ({"input_ids": IDS[:0], "labels": IDS[:0]}, "input_ids are [0, 3]"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, "labels are [2, 2], and input_ids [2, 3]"),
        ({"input_ids": IDS, "labels": IDS[..., None]}, "labels are [2, 3, 1], and input_ids [2, 3]"),
        ({"input_ids": IDS, "labels": IDS, "attention_mask": IDS[:, 1:]}, "attention_mask are [2, 2]"),
        ({"input_ids": IDS, "labels": IDS, "token_weight": torch.ones(2)}, "token_weight are [2]"),
        ({"input_ids": IDS, "labels": IDS, "source": IDS[:, 1:]}, "source are [2, 2]"),
    ],
)
def test_what_is_no_batch_says_what_one_is(batch, expected):
    """In training and in validation, whatever loader it comes from."""
    module = CausalLMModule(TINY_LLAMA)
    for run in (trainer(max_steps=1).fit, trainer().validate):
        with pytest.raises(InputError, match=re.escape(expected)):
            run(module, DataLoader([batch], batch_size=None))


@pytest.mark.parametrize("head", ["fused", "full"])
def test_batches_of_other_mappings_and_dtypes_are_taken(head):
    ids = IDS.int()
    batch = UserDict({"input_ids": ids, "labels": ids, "attention_mask": None})
    module = CausalLMModule(TINY_LLAMA, loading={"head": head})
    module.configure_model()
    assert module.token_output(batch).log_prob.shape == (4,)
    with pytest.raises(ValueError, match="is not a class index"):
        module.token_output({"input_ids": ids, "labels": ids + 1000})


def test_rows_to_generate_from_need_their_prompts():
    for batch, lacking in ((IDS, "prompt_input_ids, "), ({"prompt_input_ids": IDS}, "prompt_attention_mask, index")):
        with pytest.raises(InputError, match=f"these batches lack {lacking}"):
            trainer().predict(CausalLMModule(TINY_LLAMA), DataLoader([batch], batch_size=None))


def test_a_data_module_alone_says_what_is_missing():
    rows = [{"prompt": "1+1=", "completion": "2"}] * 2
    with pytest.raises(InputError, match="there is no module to take it from: set it"):
        InstructionDataModule(rows).setup()
    data = InstructionDataModule(rows, batch_size=2, text={"tokenizer": "asset://arithmetic-base"})
    with pytest.raises(InputError, match=r"no train rows: set data\.train and call setup\('fit'\) first"):
        data.train_dataloader()
    data.setup()
    assert {"input_ids", "labels"} <= next(iter(data.train_dataloader())).keys()
    for loader, split in ((data.test_dataloader, "test"), (data.predict_dataloader, "predict")):
        with pytest.raises(InputError, match=rf"no {split} rows: set data\.{split} and call setup\('{split}'\)"):
            loader()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "is no checkpoint of Lightning: it has no pytorch-lightning_version"),
        ({"model.weight": IDS}, "is no checkpoint of Lightning"),
        ({"pytorch-lightning_version": "2.6.6"}, "is no checkpoint of Lightning: it has no state_dict"),
        ({"pytorch-lightning_version": "2.6.6", "state_dict": {}}, "holds no model of CausalLMModule: pass it to load"),
    ],
)
def test_checkpoints_without_what_is_loaded(content, message, tmp_path):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=message):
        CausalLMModule.load_from_checkpoint(tmp_path / "x.ckpt")


LLAMA_OF_16 = {**TINY_LLAMA, "vocab_size": 20, "max_position_embeddings": 16}
POSITIONS = {"gpt2": ({**TINY_GPT2, "vocab_size": 20, "n_positions": 16}, True), "llama": (LLAMA_OF_16, False)}


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("options", [{}, {"streaming": {}, "shuffle": False}, {"packing": "bfd_split"}], ids=str)
def test_rows_longer_than_the_positions_are_named(tmp_path, name, options):
    """Before the first step, where they are not streamed; as pieces of a packed row they are no longer than that."""
    model, learned = POSITIONS[name]
    rows = [{"prompt": "1" * length, "completion": "2"} for length in (3, 20, 30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cut = {"max_length": 16} if "packing" in options else {}
    text = {"tokenizer": "asset://arithmetic-base", **cut}
    options = data_options(**options)
    data = InstructionDataModule(str(tmp_path / "rows.jsonl"), batch_size=1, text=text, **options)
    fit = partial(trainer(max_steps=3).fit, CausalLMModule(model), datamodule=data)
    if cut:
        fit()
    elif learned:
        said = (
            r"row 2 has 23 tokens, more than the model has positions: set data.text.max_length: 16"
            if "streaming" in options
            else r"data.train: 2 of 3 rows have more tokens than .* positions \(16\): the longest, row 3, has 33"
        )
        with pytest.raises(InputError, match=said):
            fit()
    elif "streaming" in options:
        with pytest.warns(UserWarning, match=r"more tokens than the model has positions, 16: it was not trained on"):
            fit()
    else:
        with pytest.warns(UserWarning, match=r"the longest, row 3, has 33. It was not trained on what is beyond"):
            fit()
