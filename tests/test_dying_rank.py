"""One of two processes dies: the other ends, and what was saved is whole."""

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

from dft_lightning.checkpoints import resolve_checkpoint
from dft_lightning.errors import InputError
from dft_lightning.fit import command, processes
from dft_lightning.fit.run_folder import RunTrainer
from small_runs import TINY_ARITHMETIC

LIMIT = 240.0


def config(folder: Path, dies: int, mistake: str | None) -> Path:
    """A run without an end, whose rank ``dies`` kills itself, or meets a mistake, once there is a checkpoint."""
    values = {
        "model": {"model": TINY_ARITHMETIC, "loss": {"class_path": "dying_loss.DyingLoss", "init_args": {}}},
        "data": {
            "train": {"class_path": "ArithmeticRows", "init_args": {"num_rows": 8}},
            "batch_size": 4,
            "text": {"tokenizer": "asset://arithmetic-base"},
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
    values["model"]["loss"]["init_args"] = {"rank": dies, "folder": str(folder), "mistake": mistake}
    path = folder.with_suffix(".yaml")  # one in the folder would be taken for an earlier run's
    path.write_text(yaml.safe_dump(values))
    return path


def start(folder: Path, dies: int, mistake: str | None) -> subprocess.Popen[str]:
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "dft_lightning", "fit", "--config", str(config(folder, dies, mistake))],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )


@pytest.mark.parametrize("mistake", [None, "data.train: no such file"])
def test_no_process_is_left(tmp_path, mistake):
    """Killed as by the system where memory runs out, or ended by a mistake: the process that was started, and the one
    that started it, of which the other computes meanwhile and is in no collective. The end of each run is that of the
    pipe that both processes write to."""
    folders = [tmp_path / str(rank) for rank in (0, 1)]
    for folder in folders:
        folder.mkdir()
    runs = [start(folder, rank, mistake) for rank, folder in enumerate(folders)]  # at once: importing takes long
    try:
        errors = [run.communicate(timeout=LIMIT)[1] for run in runs]
    finally:
        for run in runs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    assert runs[0].returncode == (-signal.SIGKILL if mistake is None else 2), errors
    assert runs[1].returncode != 0, errors
    for error in errors:
        assert error.count("error: data.train") == (mistake is not None), error
    assert "Traceback" not in errors[0]
    for folder in folders:
        newest = resolve_checkpoint("last", RunTrainer(default_root_dir=folder, accelerator="cpu", logger=False))
        assert torch.load(newest, weights_only=True)["global_step"] >= 2


@pytest.mark.parametrize("ends_with_the_first", [True, False])
def test_a_mistake_of_another_process_than_the_first(capfd, monkeypatch, ends_with_the_first):
    """Said where the first, whose end would be its own, has not met the same; elsewhere by the first alone."""
    monkeypatch.setattr(processes, "_PATIENCE", 0.0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    if ends_with_the_first:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")

    def failing(*args, **options):
        raise InputError("data.train: no such file")

    monkeypatch.setattr(command, "DFTLightningCLI", failing)
    with pytest.raises(SystemExit) as ended:
        command.main(["fit"])
    assert ended.value.code == 2
    assert capfd.readouterr().err == ("error: data.train: no such file\n" if ends_with_the_first else "")


def test_a_process_whose_first_is_gone_does_not_begin(monkeypatch):
    assert not processes._is_started_by_the_first()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("DFT_LIGHTNING_STARTED_BY", "1")
    child = os.fork()
    if child == 0:  # no test runner in here
        with contextlib.suppress(BaseException):
            processes._is_started_by_the_first()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
