"""The auxiliary loss of experts by option, and what a run says of numbers that would be wrong."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from conftest import TINY_LLAMA
from dft_lightning import CausalLMModule, DFTLoss
from dft_lightning.data.batches.collating import Collator
from dft_lightning.errors import InputError
from dft_lightning.modules import building, size
from small_runs import TINY_ARITHMETIC, arithmetic_data, trainer
from test_module import loader

MIXTRAL = {**TINY_LLAMA, "model_type": "mixtral", "num_local_experts": 4, "initializer_range": 0.5}
OTHERS = {
    "mixtral": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_local_experts": None},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": None},
}


def gradient(head="fused", model=MIXTRAL, **step):
    torch.manual_seed(0)
    module = CausalLMModule(model, loading={"head": head}, step=step)
    module.configure_model()
    output = module.token_output(next(iter(loader())))
    output.loss.backward()
    return module, output, torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("head", ["fused", "full"])
def test_the_option_puts_it_in_with_its_coefficient(kind, head):
    """Against transformers' own sum: its loss with labels has the coefficient times the auxiliary loss."""
    model = {**MIXTRAL, **OTHERS[kind], "model_type": kind}
    model = {name: value for name, value in model.items() if value is not None}
    _, plain, without = gradient(head, model)
    module, output, found = gradient(head, model, router_aux_loss_coef=0.25)
    with torch.no_grad():
        own = module.model(**next(iter(loader())))
    targets = output.log_prob.numel()
    assert own.aux_loss > 0
    torch.testing.assert_close(output.loss - plain.loss, 0.25 * own.aux_loss * targets, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(output.loss / targets, own.loss, rtol=1e-5, atol=0)
    assert (found - without).norm() > 1e-4 * without.norm()
    off = gradient(head, {**model, "output_router_logits": True}, router_aux_loss_coef=0)[2]
    assert torch.equal(off, without)


class Kept(CausalLMModule):
    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.kept = torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None])


@pytest.mark.parametrize("renormalize", [False, True])
def test_its_strength_is_its_own_over_ragged_micro_batches(renormalize):
    """Each micro-batch's mean of DFT and its auxiliary loss, weighted as its targets (or their weights) are."""
    lengths = (3, 11, 6)
    rows = [{"input_ids": [*range(3, 4 + n)], "labels": [-100, *range(4, 4 + n)], "weights": None} for n in lengths]
    torch.manual_seed(0)
    step = {"router_aux_loss_coef": 0.5, "renormalize": renormalize}
    module = Kept(MIXTRAL, loss=DFTLoss(), step=step, schedule={"decay": "constant"})
    module.configure_model()
    plain = copy.deepcopy(module.model)
    loaded = DataLoader(rows, batch_size=1, collate_fn=Collator(0))
    trainer(accumulate_grad_batches=3).fit(module, loaded)
    objectives, shares = [], []
    for batch in loaded:
        output = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
        log_p = output.logits[:, :-1].log_softmax(-1).gather(-1, batch["labels"][:, 1:, None]).flatten()
        p = log_p.exp().detach()
        shares.append(p.sum() if renormalize else torch.tensor(float(len(p))))
        objectives.append(-(p * log_p).sum() / shares[-1] + 0.5 * output.aux_loss)
    sum(share * each for share, each in zip(shares, objectives, strict=True)).div(sum(shares)).backward()
    reference = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
    assert (module.kept - reference).norm() < 1e-5 * reference.norm()  # experts run in no float64


def test_it_is_refused_where_there_is_none():
    with pytest.raises(InputError, match=r"model.step.router_aux_loss_coef: LlamaForCausalLM has no auxiliary loss"):
        CausalLMModule(TINY_LLAMA, step={"router_aux_loss_coef": 0.1}).configure_model()
    with pytest.raises(ValueError, match="router_aux_loss_coef must be a number from 0 on, got -1"):
        CausalLMModule(MIXTRAL, step={"router_aux_loss_coef": -1})
    module = CausalLMModule(MIXTRAL, step={"router_aux_loss_coef": 0.1}, loading={"attn_implementation": "documents"})
    module.configure_model()
    ids = torch.arange(6)[None]
    with pytest.raises(InputError, match="the auxiliary loss of experts reads"):
        module.token_output({"input_ids": ids, "labels": ids, "position_ids": ids})


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (
            {},
            "not in the objective (output_router_logits: false in its config); model.step.router_aux_loss_coef: 0.001 "
            "puts",
        ),
        ({"router_aux_loss_coef": 0.5}, "in the objective, with coefficient 0.5"),
    ],
)
def test_the_run_says_whether_it_is_there(step, said, monkeypatch):
    lines = []
    monkeypatch.setattr(size, "rank_zero_info", lines.append)
    trainer().fit(CausalLMModule(MIXTRAL, step=step), loader())
    assert sum(said in line for line in lines) == 1, lines
    lines.clear()
    trainer().fit(CausalLMModule(TINY_LLAMA), loader())
    assert not any("auxiliary" in line for line in lines)


def test_a_loss_that_was_asked_for_and_is_not_computed_ends_the_run(monkeypatch):
    monkeypatch.setattr(building, "set_auxiliary_loss", lambda *_: None)
    with pytest.raises(InputError, match="computes no auxiliary loss"):
        gradient(router_aux_loss_coef=0.1)


@pytest.mark.parametrize(("precision", "dtype"), [("16-true", "float32"), ("32-true", "float16")])
def test_float16_without_a_scaler_is_named(precision, dtype):
    with pytest.warns(UserWarning, match="in float16 without a gradient scaler: gradients below 6e-8 are lost"):
        trainer(precision=precision).fit(
            CausalLMModule(TINY_ARITHMETIC, loading={"dtype": dtype}), datamodule=arithmetic_data(4, batch_size=2)
        )


def test_float32_and_bfloat16_are_not(recwarn):
    for precision in ("32-true", "bf16-true"):
        trainer(precision=precision).fit(CausalLMModule(TINY_ARITHMETIC), datamodule=arithmetic_data(4, batch_size=2))
    assert not any("gradient scaler" in str(each.message) for each in recwarn)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_frequencies_of_the_longest_row_are_said_once(kind, recwarn):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 8}
    rope |= {"short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0]} if kind == "longrope" else {}
    config = {**TINY_LLAMA, "model_type": "phi3" if kind == "longrope" else "llama", "pad_token_id": 0}
    config |= {"rope_parameters": rope, "original_max_position_embeddings": 8, "max_position_embeddings": 16}
    if kind == "dynamic":
        del config["original_max_position_embeddings"]
    module = CausalLMModule(config)
    module.configure_model()

    def run(length):
        ids = torch.arange(1, length + 1)[None]
        module.token_output({"input_ids": ids, "labels": ids})
        return sum("rotary frequencies" in str(each.message) for each in recwarn)

    assert [run(8), run(9), run(9)] == [0, 1, 1]
    pl.seed_everything(0)
