"""One of two processes dies: the other ends with one message, and what was saved is whole."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

from dft_lightning.checkpoints import resolve_checkpoint
from dft_lightning.errors import InputError
from dft_lightning.fit import processes
from dft_lightning.fit.processes import is_of_a_lost_process
from small_runs import TINY_ARITHMETIC, trainer

LIMIT = 240.0


def config(folder: Path, dies: int) -> Path:
    """A run without an end, whose rank ``dies`` kills itself once there is a checkpoint."""
    values = {
        "model": {"model": TINY_ARITHMETIC, "loss": {"class_path": "dying_loss.DyingLoss", "init_args": {}}},
        "data": {
            "train": {"class_path": "ArithmeticRows", "init_args": {"num_rows": 8}},
            "tokenizer": "asset://arithmetic-base",
            "batch_size": 4,
        },
        "trainer": {
            "max_steps": 1000000,
            "max_epochs": -1,
            "accelerator": "cpu",
            "devices": 2,
            "strategy": "ddp",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 2}}],
        },
    }
    values["model"]["loss"]["init_args"] = {"rank": dies, "folder": str(folder)}
    path = folder.with_suffix(".yaml")  # one in the folder would be taken for an earlier run's
    path.write_text(yaml.safe_dump(values))
    return path


def start(folder: Path, dies: int) -> subprocess.Popen[str]:
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "dft_lightning", "fit", "--config", str(config(folder, dies))],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )


def test_the_other_process_ends_with_one_message(tmp_path):
    """Killed as by the system where memory runs out: the process that was started, and the one that started it.

    The survivor of the second run computes meanwhile and is in no collective. Its end is that of the pipe that both
    write to.
    """
    folders = [tmp_path / str(rank) for rank in (0, 1)]
    for folder in folders:
        folder.mkdir()
    runs = [start(folder, rank) for rank, folder in enumerate(folders)]  # at once: importing is what takes long
    try:
        errors = [run.communicate(timeout=LIMIT)[1] for run in runs]
    finally:
        for run in runs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    assert [run.returncode for run in runs] == [-signal.SIGKILL, 1], errors
    for error, words in zip(errors, DEAD, strict=True):
        assert "Traceback" not in error
        messages = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(messages) == 1, error
        assert words in messages[0]
        assert "Checkpoints saved before are whole (the newest: " in messages[0]
        assert messages[0].endswith("go on with --ckpt_path last")
    for folder in folders:
        newest = resolve_checkpoint("last", trainer(default_root_dir=folder))
        assert torch.load(newest, weights_only=True)["global_step"] >= 2


DEAD = (
    "process 0 of this run, which started the others, was killed; this process ends too",
    "process 1 of this run was ended by SIGKILL, as Linux does where memory runs out; this process ends too",
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:412"), True),
        (RuntimeError("[pair.cc:537] Read error [127.0.0.1]:412: Connection reset by peer. This is typically"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:446] writev [127.0.0.1]:412: Broken pipe"), True),
        (torch.distributed.DistBackendError("ncclRemoteError: a remote process exited or there was a network"), True),
        (RuntimeError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE"), True),
        (ConnectionResetError(104, "Connection reset by peer"), False),  # of a hub
        (RuntimeError("Broken pipe"), False),
        (InputError("data.train: Connection closed by peer"), False),
    ],
)
def test_the_words_of_backends_are_known(error, expected):
    assert is_of_a_lost_process(error) == expected


class Launched:
    """What a run of several processes knows of those it started."""

    def __init__(self, *codes: str) -> None:
        command = [sys.executable, "-c"]
        self.procs = [subprocess.Popen([*command, code], stderr=subprocess.DEVNULL) for code in codes]


@pytest.fixture
def first(monkeypatch):
    monkeypatch.setattr(processes, "_PATIENCE", 10.0)
    monkeypatch.setattr(processes.RunProcesses, "_end_late", staticmethod(lambda: None))
    return processes.RunProcesses(trainer())


def test_a_process_that_said_why_it_ended_is_named(first, capfd):
    first._launcher = Launched("import time; time.sleep(60)", "raise SystemExit(3)")
    assert first.report_lost(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:412")) == 1
    assert capfd.readouterr().err.startswith("error: process 2 of this run ended with status 3, and has said why; this")
    first.ended(failed=True)
    first._wait_for_children()  # which ends what still runs
    assert [process.poll() for process in first._launcher.procs] == [-signal.SIGTERM, 3]


def test_another_launcher_is_not_waited_for(first, capfd):
    first._trainer = trainer(devices=2)  # torchrun ends what is left at once
    first.say_at_once(RuntimeError("a bug"))
    first.say_at_once(RuntimeError("[/pytorch/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:412"))
    first.report_lost(RuntimeError("Connection closed by peer"))
    expected = "error: another process of this run is gone (Connection closed by peer [127.0.0.1]:412); this"
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
    assert line.startswith(expected)


def test_a_mistake_of_one_process_alone_is_told(first, capfd, monkeypatch):
    monkeypatch.setattr(processes, "_PATIENCE", 0.2)
    first._local_rank, first._is_child = 1, True
    first.say_of_this_alone("data.train: no such file")
    assert capfd.readouterr().err == "error: process 1 alone: data.train: no such file\n"
    again = processes.RunProcesses(trainer())
    again._is_child, again._parent = True, -1  # the first met it as well, and is gone
    again.say_of_this_alone("data.train: no such file")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("ours", [True, False])
def test_lightnings_own_watch_does_not_kill_before_something_is_said(ours):
    launched = Launched("import time; time.sleep(60)", "raise SystemExit(3)")
    main, child = launched.procs
    child.wait()
    observer = _ChildProcessObserver(main.pid, [child], sleep_period=1)
    observer.start()
    if ours:
        processes._dismiss_observers()
    observer.join(30)
    assert not observer.is_alive()
    status = main.poll() if ours else main.wait(30)
    main.kill()
    main.wait()
    assert status == (None if ours else -signal.SIGKILL)
