"""The fused head in transformers.Trainer, and in a loop of somebody's own: the same numbers as by logits."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Trainer,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from dft_lightning import (
    AnchoredLoss,
    CrossEntropyLoss,
    DFTLoss,
    EAFTLoss,
    ProximalLoss,
    ScheduledLoss,
    SequenceDFTLoss,
    TokenLoss,
    compute_loss_func,
)
from dft_lightning.errors import InputError
from dft_lightning.integrations import FusedLossMixin, fused_causal_lm_loss
from small_runs import run_processes
from trainer_runs import LLAMA, Fused, arguments, fused_and_by_logits, model_of, rows, trained

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")


def relative(own, other):
    return float((own - other).norm() / other.norm())


def stacked(given):
    return {name: torch.stack([row[name] for row in given]) for name in given[0]}


LOSSES = [CrossEntropyLoss(), DFTLoss(), EAFTLoss(top_k=5), SequenceDFTLoss("geometric")]


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_are_those_by_logits(loss, accumulate, tmp_path):
    (own, logged), (theirs, their_logs) = fused_and_by_logits(tmp_path, loss, gradient_accumulation_steps=accumulate)
    assert relative(own, theirs) < 1e-12
    for mine, other in zip(logged[:-1], their_logs[:-1], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)


def test_cross_entropy_is_the_trainers_own(tmp_path):
    options = {"gradient_accumulation_steps": 2}
    given = {"args": arguments(tmp_path, **options), "train_dataset": rows()}
    own = trained(Fused(model_of(), token_loss=CrossEntropyLoss(), **given))
    theirs = trained(Trainer(model_of(), **given))
    assert relative(own[0], theirs[0]) < 1e-6  # theirs goes through float32
    for logged in own[1][:-1]:
        assert logged["nll"] == pytest.approx(logged["loss"], rel=1e-6)  # the trainer's log is of float32


def test_no_logits_are_made(tmp_path):
    """In training and in evaluation: nothing as large as a vocabulary comes out of the output layer."""
    model, sizes = model_of(), []
    trainer = Fused(
        model, arguments(tmp_path, max_steps=1), train_dataset=rows(), eval_dataset=rows(5), token_loss=DFTLoss()
    )
    own = type(model.lm_head).forward
    torch.nn.Linear.forward, before = (lambda layer, x: sizes.append(layer.out_features) or own(layer, x)), own
    try:
        fused_causal_lm_loss(model, stacked(rows(1)), DFTLoss())  # the output layer is tried here, by logits
        sizes.clear()
        trainer.train()
        trainer.evaluate()
    finally:
        torch.nn.Linear.forward = before
    assert sizes
    assert 61 not in sizes
    assert "forward" not in vars(model.lm_head)


def test_evaluation_is_over_all_targets(tmp_path):
    """By hand, over batches of different numbers of targets; the trainer's own is a mean of means."""
    model, held_out = model_of(), rows(7)
    trainer = Fused(
        model, arguments(tmp_path, per_device_eval_batch_size=3), eval_dataset=held_out, token_loss=DFTLoss()
    )
    found = trainer.evaluate()
    batch = stacked(held_out)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    kept = targets != -100
    log_p = logits.log_softmax(-1)[kept].gather(-1, targets[kept][:, None])[:, 0]
    assert found["eval_nll"] == pytest.approx(-log_p.mean().item(), rel=1e-9)
    assert found["eval_loss"] == pytest.approx(-(log_p.exp() * log_p).mean().item(), rel=1e-9)
    assert found["eval_token_accuracy"] == pytest.approx((logits.argmax(-1) == targets)[kept].double().mean().item())
    assert 0.2 < found["eval_token_accuracy"] < 0.8
    means = [DFTLoss()(logits[i : i + 3], targets[i : i + 3]).item() for i in range(0, 7, 3)]
    assert sum(means) / 3 != pytest.approx(found["eval_loss"], rel=1e-3)


def test_an_adapter_with_gradient_checkpointing(tmp_path):
    from peft import LoraConfig, get_peft_model

    results = []
    by_logits = {"compute_loss_func": compute_loss_func(DFTLoss())}
    for cls, given in ((Fused, {"token_loss": DFTLoss()}), (Trainer, by_logits)):
        torch.manual_seed(5)
        adapted = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
        model = get_peft_model(model_of(), adapted).double()
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        run = cls(model, arguments(tmp_path), train_dataset=rows(), **given)
        results.append(trained(run)[0])
    assert relative(*results) < 1e-12


def test_a_step_in_bfloat16(tmp_path):
    """Under Accelerate's autocast the head computes in bfloat16 as well, and the loss is float32."""
    dtypes = []

    class Watched(Fused):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            dtypes.append(loss.dtype)
            return loss

    model = model_of(dtype=torch.float32, initializer_range=0.1)
    start = copy.deepcopy(model)
    begin = torch.cat([each.detach().flatten() for each in model.parameters()]).clone()
    run = Watched(model, arguments(tmp_path, bf16=True, max_steps=1), train_dataset=rows(), token_loss=DFTLoss())
    own = trained(run)[0]
    exact = Fused(start, arguments(tmp_path, max_steps=1), train_dataset=rows(), token_loss=DFTLoss())
    moved = trained(exact)[0]
    assert dtypes == [torch.float32]
    assert 1e-5 < relative(own - begin, moved - begin) < 0.05


def test_two_processes_are_one(tmp_path):
    """Steps of ragged micro-batches on two processes, logs and evaluation over both; the last batch is of one row."""
    run_processes("trainer_runs.py", str(tmp_path / "two"), str(tmp_path / "found.pt"), timeout=100)
    weights, logged, evaluated = torch.load(tmp_path / "found.pt")
    alone = Fused(
        model_of(),
        arguments(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2),
        train_dataset=rows(),
        eval_dataset=rows(7),
        token_loss=DFTLoss(),
    )
    expected, own_logs = trained(alone)
    assert relative(weights, expected) < 1e-12
    for mine, other in zip(logged[:-1], own_logs[:-1], strict=True):
        for name in ("loss", "nll", "token_accuracy"):
            assert mine[name] == pytest.approx(other[name], rel=1e-5), name
    expected = alone.evaluate()  # 7 rows on two processes: one is there twice, to fill up the last batch
    for name in ("eval_loss", "eval_nll", "eval_token_accuracy"):
        assert evaluated[name] == pytest.approx(expected[name], rel=1e-9), name


def test_a_schedule_follows_the_trainers_steps(tmp_path):
    steps = []

    class Noted(ScheduledLoss):
        def token_loss(self, stats):
            steps.append(stats.step)
            return super().token_loss(stats)

    loss = Noted(CrossEntropyLoss(), DFTLoss(), end_step=2)
    trainer = Fused(
        model_of(), arguments(tmp_path, gradient_accumulation_steps=2), train_dataset=rows(), token_loss=loss
    )
    trainer.train()
    assert sorted(set(steps)) == [0, 1, 2]


def test_documents_in_one_row_are_sequences():
    """Padding-free, as TRL and transformers' own collator make it: the first label of a document is -100."""
    model, padded = model_of(), rows(5)
    loss = SequenceDFTLoss("geometric")
    expected = fused_causal_lm_loss(model, stacked(padded), loss)
    lengths = [int(row["attention_mask"].sum()) for row in padded]
    joined = {
        "input_ids": torch.cat([row["input_ids"][:n] for row, n in zip(padded, lengths, strict=True)])[None],
        "labels": torch.cat([row["labels"][:n] for row, n in zip(padded, lengths, strict=True)])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    found = fused_causal_lm_loss(model, joined, loss)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-10, atol=0)
    one = fused_causal_lm_loss(model, {**joined, "position_ids": torch.arange(sum(lengths))[None]}, loss)
    assert abs(one.loss - expected.loss) > 1e-4


def test_rows_are_sequences_whatever_position_they_begin_at():
    """A text cut in two rows is two sequences: positions that go on from one row to the next join none."""
    model, loss = model_of(), SequenceDFTLoss("geometric")
    ids = torch.randint(0, model.config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    rows_of_their_own = {"input_ids": ids, "labels": ids}
    going_on = {**rows_of_their_own, "position_ids": torch.arange(16).view(2, 8)}  # rotary: distances count, in float32
    expected, found = (fused_causal_lm_loss(model, each, loss) for each in (rows_of_their_own, going_on))
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-5, atol=0)


def test_what_the_loss_reads_of_each_token():
    """Reference log-probs and weights go with the labels, and not to the model."""
    model, batch = model_of(), stacked(rows(4))
    shape = batch["labels"].shape
    reference, weight = -torch.rand(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
    found = fused_causal_lm_loss(
        model, {**batch, "reference_log_prob": reference, "token_weight": weight}, ProximalLoss(), num_items=10,
        statistics=["entropy"],
    )  # fmt: skip
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    kept = batch["labels"][:, 1:] != -100
    log_p = logits.log_softmax(-1)[kept]
    own = log_p.gather(-1, batch["labels"][:, 1:][kept][:, None])[:, 0]
    ratio = (own - reference[:, 1:][kept]).exp().clip(max=1.28)
    torch.testing.assert_close(found.loss, -(ratio * weight[:, 1:][kept]).sum() / 10)
    torch.testing.assert_close(found.entropy, -(log_p.exp() * log_p).sum(-1).detach())
    with pytest.raises(InputError, match="ProximalLoss needs reference_log_prob of every target, which the batch"):
        fused_causal_lm_loss(model, batch, ProximalLoss())
    with pytest.raises(InputError, match=r"token_weight is \[4, 3\], and labels are \[4, 12\]"):
        fused_causal_lm_loss(model, {**batch, "token_weight": weight[:, :3]}, DFTLoss())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_routers_loss_counts_once_a_target(tmp_path, accumulate):
    """Two micro-batches or one: the auxiliary losses' mean by targets."""
    config = MixtralConfig(
        **LLAMA, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, output_router_logits=True,
        router_aux_loss_coef=0.5, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    parts = [stacked(rows(12)[i : i + 12 // accumulate]) for i in range(0, 12, 12 // accumulate)]
    counts = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
    total = sum(fused_causal_lm_loss(model, part, DFTLoss(), sum(counts)).loss for part in parts)
    outputs = [model(**part) for part in parts]
    expected = sum(
        count / sum(counts) * (DFTLoss()(each.logits[:, :-1], part["labels"][:, 1:]) + 0.5 * each.aux_loss)
        for count, each, part in zip(counts, outputs, parts, strict=True)
    )
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    sums = sum(fused_causal_lm_loss(model, part, DFTLoss(), sum(counts)).loss_sum for part in parts)
    torch.testing.assert_close(sums / sum(counts), expected.detach(), rtol=1e-6, atol=0)
    leaves = list(model.parameters())
    own, theirs = (torch.autograd.grad(value, leaves, allow_unused=True) for value in (total, expected))
    for mine, other in zip(own, theirs, strict=True):
        assert other is None or relative(mine, other) < 1e-5


def test_a_batch_without_targets_is_zero_with_a_gradient():
    model, batch = model_of(), stacked(rows(2))
    batch["labels"].fill_(-100)
    for count in (None, 0, torch.tensor(0)):
        output = fused_causal_lm_loss(model, batch, DFTLoss(), count)
        assert output.loss.item() == 0
        gradient = torch.autograd.grad(output.loss, model.lm_head.weight)[0]
        assert torch.equal(gradient, torch.zeros_like(gradient))


# -- what cannot be honoured -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "Fused: label_smoothing_factor: token_loss is the loss: leave it out"),
        ({}, {"compute_loss_func": lambda *a: 0}, "Fused: compute_loss_func: token_loss is the loss"),
        ({}, {"compute_metrics": lambda p: {}}, "Fused: compute_metrics reads logits, which the fused head never has"),
        ({}, {"preprocess_logits_for_metrics": lambda a, b: a}, "Fused: preprocess_logits_for_metrics reads logits"),
        ({}, {"token_loss": AnchoredLoss()}, "Fused: AnchoredLoss needs reference_kl, of a second model: train by"),
        ({}, {"token_loss": ProximalLoss(refresh_every=2)}, "Fused: ProximalLoss with refresh_every needs an earlier"),
    ],
)
def test_what_a_trainer_cannot_have_is_named(tmp_path, options, more, message):
    given = {"token_loss": DFTLoss(), "train_dataset": rows(), **more}
    with pytest.raises(InputError, match=message):
        Fused(model_of(), arguments(tmp_path, **options), **given)


def test_options_by_name(tmp_path):
    """Those that need a package or a device to be set."""
    from types import SimpleNamespace

    from dft_lightning.integrations.transformers import _not_honoured

    args = arguments(tmp_path)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3)))
    for name, value in {"use_liger_kernel": True, "torch_compile": True, "loss_type": "dft", "_n_gpu": 2}.items():
        object.__setattr__(args, name, value)
    args.parallelism_config = SimpleNamespace(tp_size=1, cp_size=2, sp_size=1)
    trainer = SimpleNamespace(args=args, accelerator=accelerator, is_fsdp_enabled=True, model_init=lambda: None)
    trainer.train_dataset = trainer.eval_dataset = None
    found = " ".join(_not_honoured(trainer))
    for name in ("use_liger_kernel", "torch_compile", "loss_type='dft'", "2 GPUs in one process", "FSDP", "ZeRO-3",
                 "cp_size=2", "model_init"):  # fmt: skip
        assert name in found


def test_columns_that_the_loss_reads_are_not_dropped(tmp_path):
    weighed = [{**row, "token_weight": torch.zeros(12)} for row in rows(4)]
    with pytest.raises(InputError, match="Fused: remove_unused_columns would drop token_weight: set it to False"):
        Fused(model_of(), arguments(tmp_path), train_dataset=weighed, token_loss=DFTLoss())
    kept = arguments(tmp_path, remove_unused_columns=False, weight_decay=0.0)
    model, start = model_of(), model_of()
    run = Fused(model, kept, train_dataset=weighed, eval_dataset=weighed, token_loss=DFTLoss())
    run.train()
    for own, before in zip(model.parameters(), start.parameters(), strict=True):
        assert torch.equal(own, before)
    assert run.evaluate()["eval_loss"] == 0


def test_logs_are_of_one_training(tmp_path):
    """Steps that an earlier one did not log are not in the first line of the next."""
    found = []
    for calls in (1, 2):
        model = model_of()
        args = arguments(tmp_path, max_steps=3, logging_steps=2, learning_rate=0.0)
        run = Fused(model, args, train_dataset=rows(), token_loss=DFTLoss())
        for _ in range(calls):
            run.train()
        found.append(next(logs["nll"] for logs in run.state.log_history if "nll" in logs))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_a_prefix_by_place(tmp_path):
    trainer = Fused(model_of(), arguments(tmp_path), eval_dataset=rows(3), token_loss=DFTLoss())
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(), "a test", True, None, "held_out")
    assert "held_out_nll" in output.metrics


def test_logits_cannot_be_predicted(tmp_path):
    trainer = Fused(model_of(), arguments(tmp_path), token_loss=DFTLoss())
    with pytest.raises(InputError, match="Fused: predictions are made of logits, which the fused head never has"):
        trainer.predict(rows(2))


class Tempered(type(model_of())):
    """Trains a temperature of its logits."""

    def __init__(self, config):
        super().__init__(config)
        self.temperature = torch.nn.Parameter(torch.ones(()))

    def forward(self, input_ids, attention_mask=None, labels=None, use_cache=False):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        logits = self.lm_head(hidden) / self.temperature
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class OwnLoss(type(model_of())):
    """Computes its loss by itself."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        if labels is not None:
            output.loss = output.logits.sum()
        return output


def test_models_that_it_cannot_go_through_are_named():
    from peft import LoraConfig, get_peft_model

    batch = stacked(rows(2))

    def refused(model, message, given=batch):
        with pytest.raises(InputError, match=message):
            fused_causal_lm_loss(model, given, DFTLoss())

    own = OwnLoss(model_of().config)
    refused(own, "OwnLoss computes its loss by itself.*train on logits")
    assert "forward" not in vars(own.lm_head)
    refused(torch.nn.Linear(2, 2), "there is no causal language model of transformers in Linear")
    refused(torch.nn.DataParallel(model_of()), "wrapped by DataParallel, which it cannot go through")
    adapted = get_peft_model(model_of(), LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]))
    refused(adapted, "the output layer is a .* whose forward is wrapped or hooked.*train on logits")
    refused(model_of(), "the batch has no labels", {"input_ids": batch["input_ids"]})
    refused(model_of(), "or they are no tensor", {**batch, "labels": [[1] * 12] * 2})
    small = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
    refused(
        ModernBertForMaskedLM(ModernBertConfig(**small)), "ModernBertForMaskedLM has another loss than that of causal"
    )
    bart = BartConfig(vocab_size=61, d_model=16, decoder_layers=1, decoder_ffn_dim=32, decoder_attention_heads=2)
    refused(BartForCausalLM(bart), "BartForCausalLM")
    refused(Tempered(model_of().config).double(), "something to train between its output layer and its logits")
    with pytest.raises(ValueError, match="num_items is what the sum is divided by and must not be negative, got -1"):
        fused_causal_lm_loss(model_of(), batch, DFTLoss(), -1)
    for wrong in (None, "dft", torch.nn.CrossEntropyLoss()):
        with pytest.raises(InputError, match="the loss must be a TokenLoss, such as DFTLoss"):
            fused_causal_lm_loss(model_of(), batch, wrong)
    with pytest.raises(ValueError, match="follows a schedule: give the optimizer step"):
        fused_causal_lm_loss(model_of(), batch, ScheduledLoss(CrossEntropyLoss(), DFTLoss(), 2))
    with pytest.raises(ValueError, match="target 999 at position"):
        fused_causal_lm_loss(model_of(), {**batch, "labels": batch["labels"].clamp(max=-100) + 1099}, DFTLoss())


def test_a_loss_of_ones_own_and_a_model_within_a_module():
    class Surprise(TokenLoss):
        def token_loss(self, stats):
            return stats.log_prob.square()

    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model_of()

        def forward(self, **inputs):
            return self.inner(**inputs)

    model, batch = Around(), stacked(rows(3))
    found = fused_causal_lm_loss(model, batch, Surprise())
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = Surprise()(logits[:, :-1], batch["labels"][:, 1:])
    torch.testing.assert_close(found.loss, expected)


# -- in TRL ------------------------------------------------------------------------------------------------------------


TRL_OPTIONS = [{}, {"padding_free": True, "max_length": None}, {"packing": True, "max_length": 64}]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("options", TRL_OPTIONS, ids=repr)
def test_in_trls_trainer(tmp_path, options):
    """Its own DFT, step for step; padded, without padding and packed, over micro-batches."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset

    class SFT(FusedLossMixin, trl.SFTTrainer):
        pass

    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 61, (6 + i % 9,), generator=generator).tolist() for i in range(24)]
    data = Dataset.from_list([{"input_ids": row, "labels": [-100] * 3 + row[3:]} for row in ids])
    given = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1}
    given |= {"learning_rate": 0.01, "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False}
    given |= {"disable_tqdm": True, "dataset_kwargs": {"skip_prepare_dataset": "packing" not in options}, **options}
    tokenizer = _tokenizer()
    found = []
    for cls, loss_type, more in ((SFT, "nll", {"token_loss": DFTLoss()}), (trl.SFTTrainer, "dft", {})):
        args = trl.SFTConfig(str(tmp_path / loss_type), loss_type=loss_type, **given)
        model = model_of(dtype=torch.float32, initializer_range=0.1)
        run = cls(model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer, **more)
        found.append((trained(run), run.evaluate()))
    ((own, logs), evaluated), ((theirs, their_logs), their_evaluation) = found
    for mine, other in zip(logs[:-1], their_logs[:-1], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert mine["token_accuracy"] == pytest.approx(other["mean_token_accuracy"], abs=0.05)  # a mean of means
    assert relative(own, theirs) < 1e-4
    assert evaluated["eval_loss"] == pytest.approx(their_evaluation["eval_loss"], rel=0.1)  # a mean of means
    args = trl.SFTConfig(str(tmp_path), loss_type="dft", **given)
    with pytest.raises(InputError, match="SFT: loss_type='dft': token_loss is the loss"):
        SFT(model_of(), args, train_dataset=data, token_loss=DFTLoss(), processing_class=tokenizer)


def _tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    known = Tokenizer(models.WordLevel({f"t{i}": i for i in range(61)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=known, eos_token="t1", pad_token="t2", unk_token="t0")
