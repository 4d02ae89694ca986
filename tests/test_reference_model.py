"""The model that a divergence is taken from: its start, an adapter's base or another, and what it must not change."""

from __future__ import annotations

import copy
import itertools

import lightning.pytorch as pl
import pytest
import torch

from dft_lightning import AnchoredLoss, CausalLMModule, DFTLoss, EAFTLoss, InstructionDataModule, ScheduledLoss
from dft_lightning.errors import InputError
from small_runs import TINY_ARITHMETIC, arithmetic_data, trainer

BASE = "asset://arithmetic-base"
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.5}


def batches(**options):
    data = arithmetic_data(8, batch_size=4, shuffle=False, **options)
    data.prepare_data()
    data.setup("fit")
    return list(data.train_dataloader())


def moved(module):
    """Weights away from where they began, as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def built(**options):
    module = CausalLMModule(BASE, **{"loss": AnchoredLoss(0.7), "loading": {"dtype": "float64"}, **options})
    module.configure_model()
    return module


def by_hand(model, start, batch, weight=0.7):
    """DFT plus the divergence, over documents one at a time, by transformers' logits and torch's own divergence."""
    total = 0.0
    for ids, labels in documents(batch):
        log_p = model(ids[None]).logits[0, :-1].log_softmax(-1)
        with torch.no_grad():
            log_r = start(ids[None]).logits[0, :-1].log_softmax(-1)
        kept = labels[1:] != -100
        target = log_p[kept, labels[1:][kept]]
        divergence = torch.nn.functional.kl_div(log_p[kept], log_r[kept], reduction="sum", log_target=True)
        total = total - (target.detach().exp() * target).sum() + weight * divergence
    return total


def documents(batch):
    if "position_ids" not in batch:
        lengths = batch["attention_mask"].sum(-1).tolist()
        return [
            (ids[:n], labels[:n]) for ids, labels, n in zip(batch["input_ids"], batch["labels"], lengths, strict=True)
        ]
    found = []
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        found += [(ids[a:b], labels[a:b]) for a, b in itertools.pairwise(starts)]
    return found


@pytest.mark.parametrize("data", [{}, {"padding_free": True}, {"packing": "bfd", "max_length": 256}], ids=repr)
@pytest.mark.parametrize("head", ["fused", "full"])
def test_the_start_is_what_it_compares_with(head, data):
    module = moved(built(loading={"dtype": "float64", "head": head}))
    start = built(loss=DFTLoss()).model
    for batch in batches(**data):
        output = module.token_output(batch)
        expected = by_hand(module.model, start, batch)
        torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=0)
        parameters = list(module.parameters())
        own = torch.autograd.grad(output.loss, parameters)
        theirs = torch.autograd.grad(expected, parameters)
        for ours, reference in zip(own, theirs, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-11)
        assert output.reference_kl.min() > 1e-4


def test_an_adapter_is_switched_off_and_on_again():
    pytest.importorskip("peft")
    module = moved(built(peft=LORA))
    start = built(loss=DFTLoss()).model.eval()
    batch = batches()[0]
    module.eval()  # the dropout of the adapter's own
    output = module.token_output(batch)
    torch.testing.assert_close(output.loss, by_hand(module.model, start, batch), rtol=1e-10, atol=0)
    assert output.reference_kl.max() > 0.1
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    module.train()
    for _ in range(2):
        module.token_output(batch).loss.backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    assert all(each.training for each in module.modules())
    assert module._reference._model is None  # and no second copy in memory


def test_another_model_may_be_the_reference(tmp_path):
    other = moved(built(loss=DFTLoss())).model
    other.save_pretrained(tmp_path)
    module = built(reference_model=str(tmp_path))
    batch = batches()[0]
    torch.testing.assert_close(module.token_output(batch).loss, by_hand(module.model, other, batch), rtol=1e-10, atol=0)


def test_a_reference_is_neither_trained_nor_saved(tmp_path):
    """And a resumed run compares with the same start as the one that was not stopped."""

    def run(max_steps, **options):
        pl.seed_everything(1)
        module = CausalLMModule(BASE, loss=AnchoredLoss(0.7), optimizer={"lr": 1e-3}, schedule={"decay": "constant"})
        checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        data = arithmetic_data(16, batch_size=4)
        run = trainer(max_steps=max_steps, callbacks=[checkpoints], enable_checkpointing=True)
        run.fit(module, datamodule=data, **options)
        return module

    whole = run(4)
    start = CausalLMModule(BASE, loss=DFTLoss())
    start.configure_model()
    assert set(whole.state_dict()) == set(start.state_dict())
    for own, theirs in zip(whole._reference._model.parameters(), start.model.parameters(), strict=True):
        assert torch.equal(own, theirs)
        assert not own.requires_grad
    resumed = run(4, ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    for own, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(own, theirs)


def test_a_run_goes_on_with_the_reference_that_it_began_with(tmp_path):
    other = moved(built(loss=DFTLoss(), loading={"dtype": "float32"})).model
    other.save_pretrained(tmp_path / "other")
    options = {"loss": AnchoredLoss(0.7), "optimizer": {"lr": 1e-3}}
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, "last")
    data = arithmetic_data(8, batch_size=4)
    first = trainer(callbacks=[checkpoints], enable_checkpointing=True)
    first.fit(CausalLMModule(BASE, **options), datamodule=data)
    again = CausalLMModule(BASE, reference_model=str(tmp_path / "other"), **options)
    with pytest.raises(InputError, match="--ckpt_path: the checkpoint's run compares with another reference"):
        trainer(max_steps=2).fit(again, datamodule=data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_a_base_that_is_trained_beside_its_adapter_is_no_reference():
    pytest.importorskip("peft")

    class Unfrozen(CausalLMModule):
        def build_parameter_groups(self):
            self.model.model.norm.weight.requires_grad_()
            return super().build_parameter_groups()

    module = Unfrozen(BASE, loss=AnchoredLoss(), peft=LORA)
    with pytest.raises(InputError, match="model.norm.weight is trained beside the adapter, and the loss compares with"):
        trainer().fit(module, datamodule=arithmetic_data(8, batch_size=4))


def test_predictions_need_no_reference(tmp_path):
    module = CausalLMModule(BASE, loss=AnchoredLoss(), reference_model=str(tmp_path / "gone"))
    rows = arithmetic_data(2, batch_size=2)
    rows.sources["predict"] = rows.sources["train"]
    trainer().predict(module, datamodule=rows)
    assert module._reference is None


def test_negative_weights_are_refused_where_they_mean_nothing(tmp_path):
    import json

    rows = [{"prompt": "1+1=", "completion": "2", "advantage": value} for value in (1.0, -1.0)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = InstructionDataModule(str(tmp_path / "rows.jsonl"), batch_size=2, text={"tokenizer": BASE})
    with pytest.raises(InputError, match=r"-1, and AnchoredLoss means nothing with a negative weight"):
        trainer().fit(CausalLMModule(BASE, loss=AnchoredLoss()), datamodule=data)


def test_more_of_the_likeliest_tokens_than_there_are():
    with pytest.raises(InputError, match=r"EAFTLoss takes the 5000 likeliest tokens, and the model knows \d+ in all"):
        built(loss=EAFTLoss(top_k=5000))


def test_dropout_is_off_in_the_reference_alone():
    config = {**TINY_ARITHMETIC, "resid_pdrop": 0.5}
    module = CausalLMModule(config, loss=DFTLoss())
    module.configure_model()
    from dft_lightning.models.reference import ReferenceModel

    batch = batches()[0]
    reference = ReferenceModel(copy.deepcopy(module.model))
    first, second = (reference.logits(module.model, batch) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(module.model(batch["input_ids"]).logits, module.model(batch["input_ids"]).logits)


def test_a_combined_loss_needs_what_its_parts_need():
    module = built(loss=ScheduledLoss(DFTLoss(), AnchoredLoss(0.7), end_step=10))
    assert module._reference is not None
    assert built(loss=AnchoredLoss(0.0))._reference is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": TINY_ARITHMETIC}, r"compares with the model that the run starts from.*model.reference_model"),
        ({"peft": {**LORA, "bias": "all"}}, "model.peft.bias changes it"),
        ({"reference_model": "asset://nothing"}, "nothing"),
    ],
)  # fmt: skip
def test_what_is_refused(options, message):
    if "peft" in options:
        pytest.importorskip("peft")
    module = CausalLMModule(**{"model": BASE, "loss": AnchoredLoss(), **options})
    with pytest.raises(InputError, match=message):
        module.configure_model()


def test_another_vocabulary_is_refused(tmp_path):
    other = CausalLMModule({**TINY_ARITHMETIC, "vocab_size": 19}, loss=DFTLoss())
    other.configure_model()
    other.model.save_pretrained(tmp_path)
    module = CausalLMModule(BASE, loss=AnchoredLoss(), reference_model=str(tmp_path))
    with pytest.raises(InputError, match=r"vocabulary has 19 tokens and the model's \d+"):
        module.configure_model()


def test_a_reference_that_sees_the_future_is_refused(tmp_path):
    encoder = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    other = CausalLMModule({**encoder, "num_attention_heads": 2, "vocab_size": 20})
    other.configure_model()
    other.model.save_pretrained(tmp_path)
    for head in ("fused", "full"):
        module = CausalLMModule(
            TINY_ARITHMETIC, loss=AnchoredLoss(), reference_model=str(tmp_path), loading={"head": head}
        )
        module.configure_model()
        with pytest.raises(InputError, match="BertLMHeadModel sees the tokens that it is to predict"):
            module.token_output(batches()[0])


def test_a_reference_that_nothing_reads_is_refused():
    with pytest.raises(ValueError, match="DFTLoss compares with no model: leave reference_model out"):
        CausalLMModule(BASE, loss=DFTLoss(), reference_model=BASE)
