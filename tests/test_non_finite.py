"""A step that is not finite: refused before the optimizer takes it, or left out as if it had no target."""

from __future__ import annotations

import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from dft_lightning import CausalLMModule, DFTLoss
from dft_lightning.errors import InputError
from dft_lightning.modules import non_finite
from non_finite_losses import At, make, rows_of
from small_runs import TINY_GPT2, run_processes, trainer

SKIP = {"on_non_finite": "skip"}


class Watch(pl.Callback):
    """Weights, the optimizer's moments and what was logged after each step."""

    def __init__(self):
        self.weights, self.moments, self.logged, self.rates = [], [], [], []

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == len(self.weights) + 1:
            self.weights.append(flat(module.parameters()))
            states = trainer.optimizers[0].state.values()
            self.moments.append(flat([torch.ones(1), *(value for state in states for value in state.values())]))
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def flat(tensors):
    return torch.cat([tensor.detach().flatten().clone() for tensor in tensors])


def fit(module, rows, folder=None, **options):
    watch = Watch()
    logger = CSVLogger(folder) if folder else False
    run = trainer(
        **{"max_steps": 4, "max_epochs": 1, "log_every_n_steps": 1, "callbacks": [watch], "logger": logger} | options
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, rows)
    watch.warnings = [str(each.message) for each in caught if "on_non_finite" in str(each.message)]
    watch.logged = [] if not folder else logger.experiment.metrics
    watch.run = run
    return watch


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("nan", {}),
        ("inf", {"loading": {"head": "full"}}),
        ("gradient", {"step": {"renormalize": True}}),
        ("nan", {"loading": {"head": "full"}, "step": {"renormalize": True}}),
        ("gradient", {"loading": {"head": "full"}}),
    ],
)
def test_a_skipped_step_is_one_without_targets(what, options, tmp_path, monkeypatch):
    """Weights, moments and schedule, bit for bit, through two micro-batches of a step, of which one is not finite."""
    logged = []
    monkeypatch.setattr(CSVLogger, "log_metrics", lambda self, metrics, step=None: logged.append(metrics))
    skipping = make(At((1,), what), **{**options, "step": {**SKIP, **options.get("step", {})}})
    found = fit(skipping, rows_of(16, 2), tmp_path, accumulate_grad_batches=2)
    expected = fit(make(At(), **options), rows_of(16, 2, empty=(4, 5, 6, 7)), accumulate_grad_batches=2)
    for name in ("weights", "moments"):
        for step, (a, b) in enumerate(zip(getattr(found, name), getattr(expected, name), strict=True)):
            assert torch.equal(a, b), (name, step)
    assert len(found.weights) == 4
    assert found.rates == expected.rates
    assert torch.equal(found.weights[0], found.weights[1])
    assert not torch.equal(found.weights[1], found.weights[2])
    assert all(math.isfinite(value) for metrics in logged for value in metrics.values())
    logged = [metrics for metrics in logged if any(name.startswith("train/") for name in metrics)]
    assert [metrics.get("train/skipped_steps") for metrics in logged] == [None, 1, 1, 1]
    assert [metrics["train/target_tokens"] for metrics in logged] == [28] * 4
    assert logged[1]["train/loss"] == logged[0]["train/loss"]  # Lightning logs again what there is nothing new of
    assert logged[2]["train/loss"] != logged[1]["train/loss"]
    subject = "the gradient's norm (the loss, At, is finite)" if what == "gradient" else "the loss (At)"
    assert len(found.warnings) == 1
    assert f"{subject} is NaN or infinite at global step 1" in found.warnings[0]


def test_a_logged_window_is_that_of_its_other_steps(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(CSVLogger, "log_metrics", lambda self, metrics, step=None: logged.append(metrics))
    fit(make(At((1, 2)), step=SKIP), rows_of(8, 2), tmp_path, log_every_n_steps=4)
    fit(make(At()), rows_of(8, 2, empty=(2, 3, 4, 5)), tmp_path, log_every_n_steps=4)
    (found, expected) = (metrics for metrics in logged if "train/loss" in metrics)
    assert found.pop("train/skipped_steps") == 2
    # A step without targets has no gradient to measure either, and its tokens count for the speed.
    for name in ("train/tokens_per_second", "train/peak_memory_gib"):
        del found[name], expected[name]
    assert found == expected


@pytest.mark.parametrize("what", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("head", ["fused", "full"])
def test_by_default_the_run_ends_before_the_step(what, head, tmp_path):
    watch = Watch()
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1)
    module = make(At((2,), what), loading={"head": head})
    run = {"enable_checkpointing": True, "callbacks": [watch, keep]}
    with pytest.raises(InputError) as caught:
        fit(module, rows_of(16, 2), **run)
    message = str(caught.value)
    assert "is NaN or infinite at global step 2, learning rate 0.005; the optimizer has not taken the step" in message
    assert ("the loss (At) is" in message) == (what != "gradient")
    assert "lower model.optimizer.lr, set trainer.gradient_clip_val, look at the data, or leave" in message
    assert message.endswith(f"go on with --ckpt_path {tmp_path / 'step=2.ckpt'}")
    assert len(watch.weights) == 2
    assert torch.equal(flat(module.parameters()), watch.weights[1])
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(torch.cat([saved[name].flatten() for name, _ in module.named_parameters()]), watch.weights[1])


def test_the_rows_of_the_micro_batch_are_named():
    """Where batches say which they have, and of the micro-batch whose loss it was alone."""

    class OneBatch(CausalLMModule):
        def training_step(self, batch, batch_idx):
            first = batch_idx * 2
            return super().training_step({**batch, "index": torch.tensor([first, first + 1])}, batch_idx)

        def token_output(self, batch, **options):
            self.loss.steps = (0,) if batch["index"][0] == 2 else ()
            return super().token_output(batch, **options)

    module = OneBatch(make(At()).hparams["model"], loss=At())
    with pytest.raises(InputError, match=r"\(rows of index 2, 3\); the optimizer"):
        fit(module, rows_of(16, 2), accumulate_grad_batches=2)


def test_dft_of_weights_that_are_nan_and_too_many_skipped_steps(monkeypatch):
    monkeypatch.setattr(non_finite, "SKIPPED_IN_A_ROW", 3)
    for head in ("fused", "full"):
        module = make(DFTLoss(), step=SKIP, loading={"head": head})
        module.configure_model()
        with torch.no_grad():
            module.model.transformer.ln_f.weight[0] = float("nan")
        with pytest.raises(InputError, match=r"^3 steps in a row were not finite; of the last, the loss \(DFTLoss\)"):
            fit(module, rows_of(16, 2))
        assert (module._steps.non_finite.skipped, module._steps.non_finite.in_a_row) == (2, 3)
    # Not in a row.
    found = fit(make(At((0, 1, 3, 4)), step=SKIP), rows_of(16, 2), max_steps=6)
    assert found.run.lightning_module._steps.non_finite.skipped == 4


def test_gradients_that_overflow_are_a_scalers_to_skip():
    def run(loss):
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16))
        module = make(loss)
        return fit(module, rows_of(8, 2), plugins=[plugin])

    watch = run(At((1,), "gradient"))
    assert torch.equal(watch.weights[0], watch.weights[1])
    assert not torch.equal(watch.weights[1], watch.weights[2])
    with pytest.raises(InputError, match=r"the loss \(At\) is NaN or infinite at global step 1"):
        run(At((1,), "inf"))


def test_validation_shows_what_it_is():
    module = make(At((0,)))
    (values,) = trainer().validate(module, rows_of(4, 2), verbose=False)
    assert math.isnan(values["val/loss"])
    assert math.isfinite(values["val/nll"])


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="on_non_finite must be one of raise, skip, got 'ignore'"):
        make(At(), step={"on_non_finite": "ignore"})


def test_two_ranks_decide_alike(tmp_path):
    """The loss is not finite on rank 1 alone."""
    run_processes("two_non_finite.py", str(tmp_path))
    found = torch.load(tmp_path / "out.pt")
    assert len(found) == 6
    for (strategy, on_non_finite), values in found.items():
        assert torch.equal(*values["weights"]), strategy
        assert values["weights"][0].isfinite().all()
        assert values["kept"] == [True, True]
        if on_non_finite == "skip":
            assert values["messages"] == []
            assert values["logged"]["train/skipped_steps"] == 1
            assert all(math.isfinite(value) for value in values["logged"].values())
        else:
            assert len(set(values["messages"])) == 1
            assert len(values["messages"]) == 2
            assert "the loss (NaNOnRankOne) is NaN or infinite at global step 1" in values["messages"][0]


class OwnLoop(CausalLMModule):
    """Steps its optimizer by itself."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx) * batch["factor"])
        optimizer.step()


class OwnClipping(CausalLMModule):
    """Whose object, and not its class, clips otherwise."""

    def on_fit_start(self):
        super().on_fit_start()
        self.configure_gradient_clipping = lambda *args, **options: None

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * batch["factor"]


@pytest.mark.parametrize("cls", [OwnLoop, OwnClipping])
def test_steps_that_are_never_clipped_are_looked_at_all_the_same(cls):
    """Those that are not finite are refused, and those without targets move nothing."""
    ids = torch.arange(3, 11).repeat(2, 1)
    batch = {"input_ids": ids, "labels": ids, "factor": 1.0}
    module = cls(TINY_GPT2, optimizer={"lr": 1e-2})
    weights = []

    class Weights(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            weights.append(torch.cat([p.detach().flatten().clone() for p in module.parameters()]))

    empty = {**batch, "labels": torch.full_like(ids, -100)}
    trainer(max_steps=3, callbacks=[Weights()]).fit(module, DataLoader([batch, empty, empty], batch_size=None))
    assert len(weights) == 3
    assert torch.equal(weights[1], weights[0])
    assert torch.equal(weights[2], weights[0])
    with pytest.raises(InputError, match="is NaN or infinite at global step 0"):
        trainer(max_steps=1).fit(cls(TINY_GPT2), DataLoader([{**batch, "factor": float("nan")}], batch_size=None))
