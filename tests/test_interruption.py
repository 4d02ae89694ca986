"""Signals write a checkpoint before the run leaves, from which it ends as one that got none."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader

from dft_lightning import CausalLMModule, InstructionDataModule
from dft_lightning.callbacks import GenerationEvaluation, Interrupted, InterruptionCheckpoint, interruption
from dft_lightning.data import ArithmeticRows
from resumed_runs import fit, goes_on_alike, result
from signalled_runs import stopped_at
from small_runs import TINY_ARITHMETIC, on_two_processes, trainer

OPTIONS = {"max_steps": 6, "accumulate_grad_batches": 2, "check_val_every_n_epoch": None, "val_check_interval": 3}


class SignalAt(Callback):
    """Sends a signal to this process when a hook has run so often."""

    def __init__(self, hook: str, number: int, sent: int = signal.SIGTERM, times: int = 1) -> None:
        self.left = number
        setattr(self, hook, lambda *args: self.send(sent, times))

    def send(self, sent: int, times: int) -> None:
        self.left -= 1
        if self.left == 0:
            for _ in range(times):
                os.kill(os.getpid(), sent)


def interrupted(tmp_path: Path, *callbacks: Callback, **options) -> SystemExit:
    with pytest.raises(Interrupted) as leaving:
        fit(
            {},
            {**OPTIONS, "enable_checkpointing": True, "default_root_dir": tmp_path, **options},
            *callbacks,
            InterruptionCheckpoint(),
        )
    return leaving.value


def saved(tmp_path: Path) -> Path:
    (path,) = (path for path in tmp_path.rglob("*.ckpt") if "epoch=" not in path.name)
    return path


@pytest.mark.parametrize(
    ("hook", "number", "sent", "step"),
    [
        ("on_train_batch_end", 5, signal.SIGTERM, 2),  # in the middle of a step
        ("on_train_batch_end", 1, signal.SIGTERM, 0),  # and of the first
        ("on_validation_batch_end", 5, signal.SIGINT, 3),  # of a validation, after the two batches before the run
        ("on_before_optimizer_step", 4, signal.SIGTERM, 4),
    ],
)
def test_a_signal_writes_a_checkpoint_and_leaves(hook, number, sent, step, tmp_path, caplog):
    whole, logged = fit({}, OPTIONS)
    expected = result(whole)
    before = signal.getsignal(sent)
    with caplog.at_level(logging.INFO):
        leaving = interrupted(tmp_path, SignalAt(hook, number, sent))
    assert leaving.code == 128 + sent
    assert signal.getsignal(sent) is before
    path = saved(tmp_path)
    assert path.name == f"interrupted-step={step}.ckpt"
    assert f"stopped after step {step}. Saved {path}" in caplog.text
    assert f"--ckpt_path {path} (or --ckpt_path last)" in caplog.text
    goes_on_alike(path, {}, OPTIONS, expected, logged)


def test_a_checkpoint_just_written_is_not_written_again(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="own-{step}")
    interrupted(tmp_path, saver, SignalAt("on_train_batch_end", 4))
    assert saved(tmp_path).name == "own-step=2.ckpt"


def test_a_checkpoint_of_an_earlier_step_is_not_taken_for_the_newest(tmp_path):
    """Somebody else writes one where the run is stopped, and the run's own is older."""

    class Own(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "theirs-epoch=.ckpt")

    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="epoch={epoch}-{step}")
    interrupted(tmp_path, saver, Own(), SignalAt("on_train_batch_end", 8))
    assert saved(tmp_path).name == "interrupted-step=4.ckpt"


def test_generation_is_given_up_and_done_when_the_run_goes_on(tmp_path):
    def evaluation(asked: bool) -> GenerationEvaluation:
        callback = GenerationEvaluation(at_start=False, every_n_steps=2, at_end=False, num_samples=2)
        count = callback._count

        def signalled(*args, **options):
            if asked and args[0].global_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return count(*args, **options)

        callback._count = signalled
        return callback

    whole, stopped = evaluation(False), evaluation(True)
    fit({}, OPTIONS, whole)
    interrupted(tmp_path, stopped)
    assert [step for step, _ in stopped.history] == [2]
    resumed = evaluation(False)
    fit({}, OPTIONS, resumed, ckpt_path=saved(tmp_path))
    assert resumed.history == whole.history
    assert [step for step, _ in whole.history] == [2, 4, 6]


def test_a_second_ctrl_c_leaves_at_once(tmp_path, monkeypatch, capfd):
    class Left(BaseException):
        pass

    def leave(status: int) -> None:
        raise Left(status)

    monkeypatch.setattr(interruption.os, "_exit", leave)
    with pytest.raises(Left) as left:
        fit({}, OPTIONS, SignalAt("on_train_batch_end", 3, signal.SIGINT, times=2), InterruptionCheckpoint())
    assert left.value.args == (130,)
    said = capfd.readouterr().err
    assert "SIGINT: stopping, with a checkpoint" in said
    assert "left at once" in said
    assert not list(tmp_path.rglob("*.ckpt"))


def test_after_the_last_step_all_is_finished(tmp_path):
    """A run that goes on there would have nothing to do: its validation and evaluation are not given up."""
    evaluation = GenerationEvaluation(at_start=False, at_end=True, num_samples=0)
    sent = SignalAt("on_validation_batch_end", 3)  # the first batch after the two before the run
    options = {**OPTIONS, "val_check_interval": 11, "enable_checkpointing": True, "default_root_dir": tmp_path}
    run, logged = fit({}, options, sent, evaluation, InterruptionCheckpoint())
    assert sent.left <= 0
    assert run.global_step == 6
    assert (5, "val/nll") in logged
    assert [step for step, _ in evaluation.history] == [6]


def test_a_loader_of_ones_own_loses_no_batch(tmp_path):
    """What was drawn for the next step when the run stopped is drawn again."""

    class Seen(CausalLMModule):
        def training_step(self, batch, batch_idx):
            seen.append(batch["input_ids"][:, 1].tolist())
            return super().training_step(batch, batch_idx)

    def run(*callbacks, ckpt_path=None):
        rows = [{"input_ids": torch.full((5,), i), "labels": torch.full((5,), i)} for i in range(12)]
        options = {"max_steps": -1, "max_epochs": 1, "enable_checkpointing": True, "default_root_dir": tmp_path}
        loader = StatefulDataLoader(rows, batch_size=2)
        module = Seen(TINY_ARITHMETIC, schedule={"decay": "constant"})
        trainer(**options, callbacks=[*callbacks]).fit(module, loader, ckpt_path=ckpt_path, weights_only=True)

    seen: list[list[int]] = []
    with pytest.raises(Interrupted):
        run(SignalAt("on_train_batch_end", 3), InterruptionCheckpoint())
    assert seen == [[0, 1], [2, 3], [4, 5]]
    run(ckpt_path=saved(tmp_path))
    assert seen == [[i, i + 1] for i in range(0, 12, 2)]


def test_a_signal_on_one_rank_stops_both_at_the_end_of_its_step(tmp_path):
    """In the exchange of the step, whichever of its micro-batches the signal comes in."""
    cases = [{"strategy": "ddp", "number": at, "folder": str(tmp_path)} for at in (3, 4, 5)]
    for found in on_two_processes(stopped_at, cases):
        (first, second) = found
        assert first[1] == second[1] == 2
        assert second[0] == 128 + signal.SIGTERM
        assert first[0] == 128 + signal.SIGTERM


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system does not tell who sent a signal")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_worker_ends_by_its_own_process_alone(streaming):
    """Others' signals are meant for the run, which still needs its batches; at its exit Python waits for the worker."""
    data = InstructionDataModule(
        ArithmeticRows(64),
        batch_size=2,
        num_workers=1,
        streaming={} if streaming else None,
        text={"tokenizer": "asset://arithmetic-base"},
    )
    data.prepare_data()
    data.setup("fit")
    before = set(multiprocessing.active_children())
    batches = iter(data.train_dataloader())
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    for name in ("TERM", "INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert len([next(batches) for _ in range(20)]) == 20  # more than were made ahead
    assert worker.is_alive()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0
