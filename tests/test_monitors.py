"""What is monitored and never logged is named before a run begins; what a subclass or a callback logs is let be."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from dft_lightning import CausalLMModule, GenerationEvaluation, InstructionDataModule
from dft_lightning.cli.commands import user_message
from dft_lightning.data import ArithmeticRows, MixedRows
from dft_lightning.errors import InputError
from dft_lightning.models.generation import GenerationOptions
from dft_lightning.modules.monitors import logged_by_module
from small_runs import TINY_ARITHMETIC, arithmetic_data, data_options, trainer


def run(*callbacks, module=CausalLMModule, steps=4, validation=True, **options):
    """Two epochs of two steps, and what the trainer has when they end."""
    data = arithmetic_data(8, batch_size=4, validation_fraction=0.5 if validation else 0.0)
    ended = trainer(
        max_steps=steps,
        max_epochs=-1,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        log_every_n_steps=1,
        **options,
    )
    ended.fit(module(TINY_ARITHMETIC, evaluation={"generation": GenerationOptions(max_new_tokens=4)}), datamodule=data)
    return ended


def scheduled(monitor):
    """A subclass that cannot log anything of its own."""

    class Scheduled(CausalLMModule):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}

    return Scheduled


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda _: EarlyStopping("val/nl"),
            r"EarlyStopping.monitor: this run never logs val/nl; did you mean val/nll\?$",
        ),
        (lambda _: EarlyStopping("val_loss"), r"EarlyStopping.*val_loss; did you mean val/loss\?$"),
        (
            lambda path: ModelCheckpoint(path, monitor="exactness"),
            r"ModelCheckpoint.*logs exactness: it logs train/loss, ",
        ),
        (lambda _: EarlyStopping("test/nll"), r"EarlyStopping.*test/nll"),
        (lambda _: EarlyStopping("train/entropy"), r"EarlyStopping.*train/entropy"),
        (lambda _: EarlyStopping("forgetting/nll"), r"EarlyStopping.*forgetting/nll"),
        (lambda _: EarlyStopping("generation/greedy"), r"EarlyStopping.*generation/greedy"),
        (lambda _: EarlyStopping("lr-AdamW"), r"EarlyStopping.*lr-AdamW"),
    ],
)
def test_a_name_that_is_never_logged_is_refused_before_the_first_step(make, message, tmp_path):
    begun = []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalLMModule, "token_output", lambda *_, **__: begun.append(1))
        with pytest.raises(InputError, match=message):
            run(make(tmp_path))
    assert not begun


def test_validation_that_is_not_there_is_named():
    for options in ({"validation": False}, {"limit_val_batches": 0}):
        with pytest.raises(InputError, match=r"never logs val/nll, as it has no validation rows: set data.validation"):
            run(EarlyStopping("val/nll"), **options)


def test_of_a_scheduler():
    with pytest.raises(
        InputError, match=r"ReduceLROnPlateau.monitor: this run never logs val/los; did you mean val/loss\?"
    ):
        run(module=scheduled("val/los"))
    run(module=scheduled("val/loss"))


@pytest.mark.parametrize("name", ["val/nll", "val/entropy", "train/nll", "train/grad_norm", "train/lr", "lr-AdamW/pg1"])
def test_what_a_run_logs_can_be_monitored(name, tmp_path):
    ended = run(EarlyStopping(name, patience=9), LearningRateMonitor("step"), logger=CSVLogger(tmp_path))
    assert ended.global_step == 4
    assert name in ended.callback_metrics


@pytest.mark.parametrize("name", ["epoch", "step", "generation/pass_at_2"])
def test_what_checkpoints_and_generation_have(name, tmp_path):
    evaluation = GenerationEvaluation(at_start=False, every_n_steps=1, at_end=False, num_samples=2, limit=1)
    kept = ModelCheckpoint(tmp_path, monitor=name, every_n_train_steps=2)
    assert run(evaluation, kept).global_step == 4
    assert list(tmp_path.glob("*.ckpt"))


def test_names_are_those_of_a_run_that_logs_all_it_can():
    parts = {name: ArithmeticRows(8, seed=seed) for seed, name in enumerate(("easy", "hard"))}
    rows = {"train": MixedRows(parts), "validation": MixedRows(parts), "forgetting": MixedRows(parts)}
    module = CausalLMModule(TINY_ARITHMETIC, step={"log_train_entropy": True, "peak_flops": 1e12})
    ended = trainer(max_steps=4, log_every_n_steps=1, max_epochs=-1)
    ended.fit(
        module,
        datamodule=InstructionDataModule(batch_size=8, **data_options(tokenizer="asset://arithmetic-base", **rows)),
    )
    assert {*ended.callback_metrics, "train/skipped_steps"} == {*logged_by_module(ended, module.loss, module.step)}


def test_names_of_an_evaluation_are_those_it_logs():
    for samples in (0, 1, 3):
        evaluation = GenerationEvaluation(at_start=False, every_n_steps=1, at_end=False, num_samples=samples, limit=1)
        logged = {name for name in run(evaluation, steps=1).callback_metrics if name.startswith("generation/")}
        assert set(evaluation.logged_names()) == logged
    assert GenerationEvaluation().logged_names() == []


class Logs(CausalLMModule):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx, dataloader_idx)
        self.log("val/my_metric", 1.0)


class LogsAsWell(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        pl_module.log("seen", 1.0)


def test_what_a_subclass_or_a_callback_of_ones_own_logs_is_let_be():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert run(EarlyStopping("val/my_metric", patience=9), module=Logs).global_step == 4
        assert run(EarlyStopping("seen", patience=9), LogsAsWell()).global_step == 4
    assert not any("monitor" in str(warning.message) for warning in said)


def test_of_a_subclass_the_first_validation_tells_and_the_end_is_one_line():
    said = r"EarlyStopping.monitor: .* did not log val/my_metrics; did you mean val/my_metric\?"
    with pytest.warns(UserWarning, match=said), pytest.raises(RuntimeError, match="val/my_metrics") as ended:
        run(EarlyStopping("val/my_metrics"), module=Logs)
    message = user_message(ended.value)
    assert message.startswith("trainer.callbacks: Early stopping conditioned on metric `val/my_metrics`")
    assert "\n" not in message


def test_who_does_not_mind_is_let_be(tmp_path):
    run(EarlyStopping("never", strict=False), ModelCheckpoint(tmp_path, monitor="never", save_top_k=0), steps=1)
