"""What is logged: right by an independent reference, and the same for any batch size and number of ranks."""

from __future__ import annotations

import itertools
import json

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

from dft_lightning import CausalLMModule, CrossEntropyLoss, DFTLoss, FocalLoss, InstructionDataModule
from dft_lightning.data import ArithmeticRows
from dft_lightning.errors import InputError
from dft_lightning.metrics import GradientMetrics, TokenMetrics
from dft_lightning.ops import TokenOutput
from small_runs import TINY_ARITHMETIC, arithmetic_data, data_options, run_processes, trainer

NAMES = {"loss", "nll", "perplexity", "token_accuracy", "entropy", "mean_weight", "target_tokens"}


def validation_data(num_rows=15, **options):
    rows = ArithmeticRows(num_rows, min_digits=1, max_digits=9, seed=8)
    return InstructionDataModule(rows, validation=rows, **data_options(tokenizer="asset://arithmetic-base", **options))


def validate(loss, batch_size, num_rows=15, **options):
    pl.seed_everything(0)
    module = CausalLMModule(TINY_ARITHMETIC, loss=loss)
    data = validation_data(num_rows, eval_batch_size=batch_size)
    (values,) = trainer(**options).validate(module, datamodule=data, verbose=False)
    return {name.removeprefix("val/"): value for name, value in values.items()}


def reference(loss):
    """Row by row in float64 from the model's logits, by torch's own functions."""
    pl.seed_everything(0)
    module = CausalLMModule(TINY_ARITHMETIC)
    module.configure_model()
    data = validation_data(eval_batch_size=1)
    data.prepare_data()
    data.setup("validate")
    logits, targets = [], []
    for batch in data.val_dataloader():
        keep = batch["labels"][0, 1:] != -100
        logits.append(module.model(batch["input_ids"]).logits[0, :-1][keep].double().detach())
        targets.append(batch["labels"][0, 1:][keep])
    z, y = torch.cat(logits).requires_grad_(), torch.cat(targets)
    nll = F.cross_entropy(z, y, reduction="none")
    p = (-nll).exp()
    weight = {"CrossEntropyLoss": torch.ones_like(p), "DFTLoss": p, "FocalLoss": (1 - p) ** 2}[type(loss).__name__]
    slope = weight
    if isinstance(loss, FocalLoss):  # the design's dL/dl, negated
        slope = (1 - p) ** 2 + 2 * (1 - p) * p * nll
    return {
        "loss": (weight * nll).mean(),
        "nll": nll.mean(),
        "perplexity": nll.mean().exp(),
        "token_accuracy": (z.argmax(-1) == y).double().mean(),
        "entropy": torch.distributions.Categorical(logits=z).entropy().mean(),
        "mean_weight": slope.mean(),
        "target_tokens": float(len(y)),
    }


@pytest.mark.parametrize("loss", [CrossEntropyLoss(), DFTLoss(), FocalLoss()], ids=repr)
def test_validation_numbers_are_right_for_any_batch_size(loss):
    expected = {name: float(value) for name, value in reference(loss).items()}
    for batch_size in (1, 4, 15):
        values = validate(loss, batch_size)
        assert set(values) == NAMES
        assert values == pytest.approx(expected, rel=1e-6), batch_size


@pytest.mark.parametrize("inference_mode", [True, False])
def test_mean_weight_in_validation_needs_no_gradients_of_the_model(inference_mode):
    values = validate(DFTLoss(), 4, inference_mode=inference_mode)
    assert values["mean_weight"] == pytest.approx(float(reference(DFTLoss())["mean_weight"]), rel=1e-6)


STRATEGIES = ("ddp", "fsdp1", "fsdp2")


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_processes("two_validate.py", str(folder), *STRATEGIES)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_validation_and_predictions_are_the_same_on_two_processes(tmp_path, on_two_processes, strategy):
    """15 rows on 2 ranks: a sampler that repeats a row to even them out would be seen."""
    values = json.loads((on_two_processes / f"{strategy}.json").read_text())
    expected = validate(DFTLoss(), 4)
    for stage in ("validate", "fit"):
        assert {k.removeprefix("val/"): v for k, v in values[stage].items()} == pytest.approx(expected, rel=1e-6)
    expected = validate(DFTLoss(), 1, num_rows=1)
    assert {k.removeprefix("val/"): v for k, v in values["alone"].items()} == pytest.approx(expected, rel=1e-6)
    import two_validate  # which imports this module

    two_validate.predict(str(tmp_path / "alone.jsonl"))
    alone = (tmp_path / "alone.jsonl").read_text()
    assert len(alone.splitlines()) == 15
    assert (on_two_processes / f"{strategy}.jsonl").read_text() == alone


def test_train_numbers_cover_the_whole_window(tmp_path):
    """Two micro-batches a step, logged every second step: sums over four micro-batches, not a mean of means."""
    logged = []

    class Keep(pl.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            logged.append((step, metrics))

    class Watch(CausalLMModule):
        outputs: list[TokenOutput] = []

        def token_output(self, batch, **kwargs):
            output = super().token_output(batch, **kwargs)
            self.outputs.append(output)
            return output

    module = Watch(TINY_ARITHMETIC, loss=DFTLoss(), optimizer={"lr": 1e-3}, step={"log_train_entropy": True})
    run = trainer(
        logger=Keep(tmp_path), max_steps=4, accumulate_grad_batches=2, log_every_n_steps=2, gradient_clip_val=0.5
    )
    run.fit(module, datamodule=arithmetic_data(16, batch_size=2))
    assert [step for step, metrics in logged if "train/nll" in metrics] == [1, 3]
    metrics = logged[0][1]
    window = module.outputs[:4]
    count = sum(len(output.log_prob) for output in window)
    assert metrics["train/target_tokens"] == count
    assert metrics["train/nll"] == pytest.approx(-sum(float(o.log_prob.sum()) for o in window) / count, rel=1e-5)
    assert metrics["train/loss"] == pytest.approx(sum(float(o.loss_sum) for o in window) / count, rel=1e-5)
    assert metrics["train/tokens_per_second"] > 0
    assert {"train/grad_norm", "train/clipped_steps", "train/lr", "train/entropy"} <= set(metrics)


def test_gradient_norm_and_clipping():
    seen = {}

    class Watch(CausalLMModule):
        def configure_gradient_clipping(self, *args, **kwargs):
            seen["before"] = torch.cat([p.grad.flatten() for p in self.parameters()]).norm()
            super().configure_gradient_clipping(*args, **kwargs)
            seen["after"] = torch.cat([p.grad.flatten() for p in self.parameters()]).norm()

    for clip, clipped in ((None, 0.0), (1e-3, 1.0), (1e3, 0.0)):
        run = trainer(gradient_clip_val=clip, log_every_n_steps=1)
        run.fit(Watch(TINY_ARITHMETIC), datamodule=arithmetic_data())
        assert run.callback_metrics["train/grad_norm"].item() == pytest.approx(seen["before"].item(), rel=1e-6)
        assert run.callback_metrics["train/clipped_steps"].item() == clipped
        torch.testing.assert_close(seen["after"], torch.tensor(1e-3) if clipped else seen["before"], rtol=1e-3, atol=0)


def test_clipping_by_value_is_the_trainers():
    seen = {}

    class Watch(CausalLMModule):
        def configure_gradient_clipping(self, *args, **kwargs):
            super().configure_gradient_clipping(*args, **kwargs)
            seen["largest"] = max(float(p.grad.abs().max()) for p in self.parameters())

    run = trainer(gradient_clip_val=1e-4, gradient_clip_algorithm="value")
    run.fit(Watch(TINY_ARITHMETIC), datamodule=arithmetic_data())
    assert seen["largest"] == pytest.approx(1e-4)


@pytest.mark.parametrize("clip", [-1, 0, -1e-9, float("-inf")])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_clip_value_of_0_or_below_is_off(clip, algorithm):
    def weights(**options):
        pl.seed_everything(0)
        module = CausalLMModule(TINY_ARITHMETIC, optimizer={"lr": 1e-2})
        run = trainer(max_steps=4, log_every_n_steps=1, **options)
        run.fit(module, datamodule=arithmetic_data(8, batch_size=2))
        return run, torch.cat([p.detach().flatten() for p in module.parameters()])

    run, found = weights(gradient_clip_val=clip, gradient_clip_algorithm=algorithm)
    assert torch.equal(found, weights()[1])
    assert run.callback_metrics["train/clipped_steps"].item() == 0.0


def test_a_clip_value_of_nan_is_refused():
    run = trainer(gradient_clip_val=float("nan"))
    with pytest.raises(InputError, match=r"trainer.gradient_clip_val: nan is no value to clip at"):
        run.fit(CausalLMModule(TINY_ARITHMETIC), datamodule=arithmetic_data(4, batch_size=2))


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_sums_stay_float64_under_any_precision(precision):
    module = CausalLMModule(
        TINY_ARITHMETIC, loss=DFTLoss(), loading={"dtype": "float64" if precision == "64-true" else "float32"}
    )
    data = validation_data(batch_size=4)
    trainer(precision=precision, limit_val_batches=2).fit(module, datamodule=data)
    tokens = module.eval_metrics.telemetry("val").tokens
    assert tokens.nll_sum.dtype == torch.float64
    assert tokens.targets.dtype == torch.int64


def test_metrics_by_hand():
    metrics = TokenMetrics()
    for log_prob, correct in (([-1.0, -3.0], [True, False]), ([-2.0], [True])):
        metrics.update(
            TokenOutput(
                loss=torch.tensor(-sum(log_prob) / 2),
                log_prob=torch.tensor(log_prob),
                weight=torch.full((len(log_prob),), 0.5),
                correct=torch.tensor(correct),
            ),
            tokens=7,
        )
    values = {name: float(value) for name, value in metrics.compute().items()}
    expected = {"loss": 1.0, "nll": 2.0, "perplexity": 7.38905609893065, "token_accuracy": 2 / 3, "mean_weight": 0.5}
    assert values == pytest.approx({**expected, "target_tokens": 3.0, "tokens": 14.0})


def test_perplexity_survives_one_very_unlikely_token():
    """exp of the mean in float64: torchmetrics' Perplexity overflows here in half precision."""
    metrics = TokenMetrics()
    log_prob = torch.tensor([-200.0] + [-1.0] * 99)
    wrong = torch.zeros(100, dtype=torch.bool)
    metrics.update(TokenOutput(loss=torch.tensor(299.0), log_prob=log_prob, weight=torch.ones(100), correct=wrong))
    assert metrics.compute()["perplexity"].item() == pytest.approx(19.885682, rel=1e-6)  # e ** 2.99


def test_windows_after_a_resume_are_those_that_loggers_see(tmp_path):
    """A checkpoint saved at the end of an epoch puts Lightning's logging interval one step ahead of global_step."""
    logged, rates, collected = [], {}, []

    class Keep(pl.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            logged.extend([(step, metrics)] if "train/nll" in metrics else [])

    class Watch(CausalLMModule):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            rates[self.global_step] = optimizer.param_groups[0]["lr"]

        def on_train_batch_end(self, *args):
            before = self.train_telemetry.tokens.update_count
            super().on_train_batch_end(*args)
            if before and not self.train_telemetry.tokens.update_called:
                collected.append(self.global_step - 1)

    def run(max_steps, **options):
        checkpoint = pl.callbacks.ModelCheckpoint(tmp_path)
        fit = trainer(
            logger=Keep(tmp_path), max_steps=max_steps, log_every_n_steps=4, enable_checkpointing=True,
            callbacks=[checkpoint],
        )  # fmt: skip
        fit.fit(Watch(TINY_ARITHMETIC, optimizer={"lr": 1e-3}), datamodule=arithmetic_data(16, batch_size=2), **options)
        return checkpoint.best_model_path

    path = run(8)
    run(24, ckpt_path=path)
    assert len(logged) == len(collected) == 6
    for step, (_, metrics) in zip(collected, logged, strict=True):
        assert metrics["train/lr"] == pytest.approx(rates[step], rel=1e-6, abs=1e-12)
    # every step after the first window that follows the resume is in a window of four
    assert [b - a for a, b in itertools.pairwise(collected[2:])] == [4, 4, 4]


def test_skipped_fp16_steps_do_not_count():
    metrics = GradientMetrics()
    for norm in (2.0, float("inf"), 4.0):
        metrics.update(norm, 3.0, skips_non_finite=True)
    assert {k: float(v) for k, v in metrics.compute().items()} == {"grad_norm": 3.0, "clipped_steps": 0.5}
    metrics.update(float("nan"), None)
    assert metrics.compute()["grad_norm"].isnan()
