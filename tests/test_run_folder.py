"""Where a run's files are, whatever its loggers; when it ends; and how far it says it is."""

from __future__ import annotations

import csv
import logging
import math
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import ModelParallelStrategy

from conftest import ROOT, TINY_LLAMA
from dft_lightning import CausalLMModule, DFTLoss
from dft_lightning.callbacks import StepProgress
from dft_lightning.callbacks.progress import shown
from dft_lightning.fit import main
from dft_lightning.fit.run_folder import RunTrainer, named_strategy
from dft_lightning.foreign.lightning import shard_over_all
from small_runs import arithmetic_data

TINY = {**TINY_LLAMA, "vocab_size": 20}


class Remote(Logger):
    """Of a service: no folder of the run's, as Weights & Biases' and MLflow's."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    @property
    def name(self):
        return "project"

    @property
    def version(self):
        return "a1b2c3"

    @property
    def save_dir(self):
        return "."

    def log_metrics(self, metrics, step=None):
        self.values |= metrics

    def log_hyperparams(self, params, *args, **kwargs):
        pass


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A small config, in an empty working directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    rows = {"class_path": "ArithmeticRows", "init_args": {"num_rows": 6, "min_digits": 1, "max_digits": 2}}
    values = {
        "model": {"model": TINY, "loss": "DFTLoss", "evaluation": {"generation": {"max_new_tokens": 5}}},
        "data": {"train": rows, "validation": rows, "test": rows, "batch_size": 3}
        | {"text": {"tokenizer": "asset://arithmetic-base"}},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1}
        | {"default_root_dir": str(tmp_path / "runs")},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# -- the run's folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logger", ["test_run_folder.Remote", "false"])
def test_every_run_has_a_folder_of_its_own_whatever_its_logger(config, tmp_path, logger, caplog):
    args = ["--config", config, "--trainer.logger", logger]
    with caplog.at_level(logging.INFO):
        runs = [main(["fit", *args]), main(["fit", *args, "--ckpt_path", "last", "--trainer.max_steps", "3"])]
        runs.append(main(["test", *args, "--ckpt_path", "last"]))
    folders = [tmp_path / "runs" / "lightning_logs" / f"version_{i}" for i in range(3)]
    assert [Path(run.trainer.log_dir) for run in runs] == folders
    assert files_of(folders[0]) == {"config.yaml", "checkpoints/epoch=0-step=2.ckpt"}
    assert files_of(folders[1]) == {"config.yaml", "checkpoints/epoch=1-step=3.ckpt"}
    assert files_of(folders[2]) == {"config.yaml", "test_predictions.jsonl"}
    assert [line for line in caplog.messages if line.startswith("this run's folder")] == [
        f"this run's folder: {folder}" for folder in folders
    ]
    assert not list(Path.cwd().iterdir())


def test_the_users_logger_stays_the_trainers(config):
    cli = main(["fit", "--config", config, "--trainer.logger", "test_run_folder.Remote"])
    assert type(cli.trainer.logger).__name__ == "Remote"
    assert {"train/loss", "val/nll"} <= set(cli.trainer.logger.values)


def test_a_csv_loggers_own_folder_is_the_runs(config, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    own = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "mine", "version": "first"}}
    overlay.write_text(yaml.safe_dump({"trainer": {"logger": [{"class_path": "test_run_folder.Remote"}, own]}}))
    cli = main(["fit", "--config", config, "--config", str(overlay)])
    assert Path(cli.trainer.log_dir) == tmp_path / "mine" / "first"
    assert {"config.yaml", "metrics.csv", "checkpoints/epoch=0-step=2.ckpt"} <= files_of(tmp_path / "mine" / "first")


def test_a_folder_that_two_runs_have_by_a_loggers_options_is_the_first_ones(config, tmp_path, capfd):
    own = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.version=mine"]
    first = Path(main(["fit", "--config", config, *own]).trainer.log_dir)
    before = files_of(first)
    with pytest.raises(SystemExit):
        main(["fit", "--config", config, *own])
    assert "config.yaml is of an earlier run, and is kept: leave the logger's version out" in capfd.readouterr().err
    assert files_of(first) == before
    kept = (first / "metrics.csv").read_text()
    main(["fit", "--config", config, *own, "--ckpt_path", "last", "--trainer.max_steps=3"])
    assert {"config-2.yaml", "metrics.csv"} <= files_of(first)
    assert (first / "metrics-2.csv").read_text() == kept


def test_two_tests_of_one_folder_keep_the_predictions_of_both(config, tmp_path):
    saved = main(["fit", "--config", config]).trainer.checkpoint_callback.best_model_path
    own = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.version=mine"]
    for _ in range(2):
        folder = Path(main(["test", "--config", config, *own, "--ckpt_path", saved]).trainer.log_dir)
    assert {"test_predictions.jsonl", "test_predictions-2.jsonl", "metrics.csv", "metrics-2.csv"} <= files_of(folder)


def test_an_address_stays_one(tmp_path):
    trainer = RunTrainer(default_root_dir="memory://bucket/runs", logger=False, accelerator="cpu")
    trainer.begin_in_folder(goes_on=True)
    assert trainer.log_dir == "memory://bucket/runs/lightning_logs/version_0"
    assert trainer.checkpoint_callback.dirpath == "memory://bucket/runs/lightning_logs/version_0/checkpoints"


def test_a_folder_that_a_checkpoint_callback_has_of_its_own_is_left_to_it(config, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    own = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "kept")}}
    overlay.write_text(yaml.safe_dump({"trainer": {"logger": False, "callbacks": [own]}}))
    main(["fit", "--config", config, "--config", str(overlay)])
    assert files_of(tmp_path / "kept") == {"epoch=0-step=2.ckpt"}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--trainer.logger", "test_run_folder.Lacking"],
         "trainer: Lacking: needs wandb, which is not installed: pip install 'wandb>=0.12'"),
        (["--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.save_top_k=-5"],
         "trainer: Invalid value for save_top_k=-5"),
        (["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor=x", "--trainer.callbacks.mode=up"],
         "trainer: `mode` can be"),
    ],
)  # fmt: skip
def test_what_a_constructor_says_is_one_line(config, capfd, args, expected):
    with pytest.raises(SystemExit) as error:
        main(["fit", "--config", config, *args])
    assert error.value.code == 2
    (message,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message.removeprefix("error: ").startswith(expected)


class Lacking(Remote):
    """In the words of Lightning's loggers."""

    def __init__(self) -> None:
        raise ModuleNotFoundError("Requirement 'wandb>=0.12' not met. HINT: Try running `pip install -U 'wandb>=0.12'`")


LOGGERS = sorted((ROOT / "configs" / "logger").glob("*.yaml"))
NEEDS = {"wandb": "wandb", "mlflow": "mlflow"}


@pytest.mark.filterwarnings("ignore")  # of those that are installed, their own business
@pytest.mark.parametrize("overlay", LOGGERS, ids=lambda path: path.stem)
def test_logger_overlays_log_or_say_what_they_need(config, capfd, overlay):
    args = ["fit", "--config", config, "--config", str(overlay)]
    needed = NEEDS.get(overlay.stem)
    if needed is None or find_spec(needed) is not None:
        if overlay.stem == "wandb":
            args += ["--trainer.logger.offline", "true"]
        found = type(main(args).trainer.logger).__name__
        assert found.removesuffix("Logger").lower() == overlay.stem
        return
    with pytest.raises(SystemExit):
        main(args)
    assert f"needs {needed}, which is not installed: pip install" in capfd.readouterr().err


def test_there_are_logger_overlays():
    assert [path.stem for path in LOGGERS] == ["csv", "mlflow", "tensorboard", "wandb"]


# -- when a run ends -----------------------------------------------------------------------------------------------


def test_a_fit_without_an_end_takes_three_epochs_and_says_so(config, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        cli = main(["fit", "--config", config, "--trainer.max_steps=-1", "--trainer.limit_val_batches", "0"])
    assert cli.trainer.global_step == 3 * 2  # of six rows, three at a time
    assert "trainer.max_epochs: 3, as neither it nor trainer.max_steps is given" in caplog.messages
    saved = yaml.safe_load((Path(cli.trainer.log_dir) / "config.yaml").read_text())
    assert saved["trainer"]["max_epochs"] == 3


@pytest.mark.parametrize("given", ["--trainer.max_steps=7", "--trainer.max_epochs=1", "--trainer.max_time=00:00:00:01"])
def test_an_end_that_is_given_is_the_end(config, given, caplog):
    with caplog.at_level(logging.INFO):
        args = ["--trainer.max_steps=-1", "--trainer.limit_val_batches", "0", "--model.schedule.decay", "constant"]
        cli = main(["fit", "--config", config, *args, given])
    if "time" not in given:
        assert cli.trainer.global_step == (7 if "steps" in given else 2)
    assert cli.trainer.max_epochs != 3
    assert not any("as neither it" in line for line in caplog.messages)


# -- how far it is -------------------------------------------------------------------------------------------------


def fit_of(progress, tmp_path, ckpt_path=None, **options):
    trainer = pl.Trainer(
        **{"max_steps": 4, "accelerator": "cpu", "log_every_n_steps": 2, "enable_model_summary": False, **options},
        logger=CSVLogger(tmp_path),
        callbacks=[progress],
        inference_mode=False,
    )
    torch.manual_seed(0)
    module = CausalLMModule(TINY, loss=DFTLoss(), optimizer={"lr": 1e-3})
    trainer.fit(module, datamodule=arithmetic_data(8, batch_size=2, validation_fraction=0.25), ckpt_path=ckpt_path)
    return trainer


def lines_of(caplog) -> list[str]:
    return [line for line in caplog.messages if line.startswith("step ")]


def test_a_file_has_a_line_for_each_logged_step(tmp_path, caplog):
    """The values are those of the logger, and the lines come in the order of the run."""
    with caplog.at_level(logging.INFO):
        trainer = fit_of(StepProgress(lines=True), tmp_path)
    lines = lines_of(caplog)
    assert [re.match(r"step \d of 4: (validation)?", line)[0] for line in lines] == [
        "step 0 of 4: ",
        "step 2 of 4: ",
        "step 3 of 4: validation",
        "step 4 of 4: ",
    ]
    assert lines[0] == "step 0 of 4: 4 to come (100%)"
    logged = [row for row in metrics_of(trainer) if row.get("train/loss")]
    for line, row in zip((lines[1], lines[3]), logged, strict=True):
        found = re.search(r": loss (\S+), nll (\S+), lr (\S+), tokens/s (\S+), (\d:\d\d:\d\d) left$", line)
        names = ("loss", "nll", "lr", "tokens_per_second")
        for text, name in zip(found.groups(), names, strict=False):
            assert float(text) == pytest.approx(float(row[f"train/{name}"]), rel=1e-3)
    assert lines[3].endswith("0:00:00 left")


def metrics_of(trainer):
    with (Path(trainer.log_dir) / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_that_goes_on_knows_what_is_to_come(tmp_path, caplog):
    trainer = fit_of(StepProgress(lines=True), tmp_path, max_steps=2)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        fit_of(StepProgress(lines=True), tmp_path, max_steps=8, ckpt_path=trainer.checkpoint_callback.best_model_path)
    assert lines_of(caplog)[0] == "step 2 of 8: 6 to come (75%)"


def test_the_bar_counts_all_steps_of_the_run(tmp_path, capsys, monkeypatch):
    """On a terminal: no "Epoch 0/-2", no version number, and objectives with the digits that they have."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    progress = StepProgress()
    trainer = fit_of(progress, tmp_path)
    bar = progress.train_progress_bar
    assert (bar.n, bar.total, bar.unit) == (4, 4, "step")
    shown_by = capsys.readouterr().out
    assert "4/4" in shown_by
    assert "/-" not in shown_by
    assert "v_num" not in shown_by
    values = progress.get_metrics(trainer, trainer.lightning_module)
    assert values["train/loss"] == shown(trainer.callback_metrics["train/loss"])


def test_without_a_terminal_the_default_is_lines(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    progress = StepProgress()
    assert progress.lines
    progress.enable()
    assert progress.is_disabled  # of the bar


def test_testing_in_a_file_says_how_far_it_is(caplog):
    progress = StepProgress(lines=True)
    with caplog.at_level(logging.INFO):
        for i in range(30):
            progress._write_share("test", i + 1, [30])
    assert caplog.messages == [f"test: {i} of 30 batches" for i in range(3, 31, 3)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0001234, "0.0001234"), (1.5, "1.5"), (12345.6, "12346"), (math.nan, "nan"), (0.0, "0"), (3e-9, "3e-09")],
)
def test_numbers_have_four_digits_that_count(value, expected):
    assert shown(torch.tensor(value, dtype=torch.float64)) == expected


def test_the_command_has_it_unless_another_bar_is_given(config):
    cli = main(["fit", "--config", config])
    assert [type(each) for each in cli.trainer.callbacks if isinstance(each, TQDMProgressBar)] == [StepProgress]
    other = main(["fit", "--config", config, "--trainer.callbacks", "RichProgressBar"])
    assert not any(isinstance(each, StepProgress) for each in other.trainer.callbacks)
    none = main(["fit", "--config", config, "--trainer.enable_progress_bar", "false"])
    assert none.trainer.progress_bar_callback is None


def test_nothing_is_logged_twice_and_nothing_said_that_means_nothing(config, caplog, recwarn):
    with caplog.at_level(logging.INFO):
        cli = main(["fit", "--config", config, "--trainer.log_every_n_steps", "10", "--data.num_workers", "1"])
    assert not [name for name in cli.trainer.logged_metrics if name.startswith("lr")]
    assert [
        str(warning.message) for warning in recwarn if "lightning" in warning.filename or "torch" in warning.filename
    ] == []
    assert not [line for line in caplog.messages if "TPU" in line or "litlogger" in line]


# -- shards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (8, 1)),
        ({"data_parallel_size": 8}, (8, 1)),
        ({"data_parallel_size": 4}, (4, 1)),  # which Lightning refuses: eight processes are not four
        ({"tensor_parallel_size": 2}, (4, 2)),  # which the module refuses
        ({"data_parallel_size": 2, "tensor_parallel_size": 4}, (2, 4)),
    ],
)
def test_a_strategy_that_shards_splits_no_tensors_unless_told_to(sizes, expected):
    strategy = ModelParallelStrategy(**sizes)
    strategy.parallel_devices, strategy.num_nodes = [torch.device("cpu")] * 4, 2
    shard_over_all(strategy)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == expected


@pytest.mark.parametrize("name", ["ModelParallelStrategy", "lightning.pytorch.strategies.ModelParallelStrategy"])
def test_a_strategy_is_known_by_its_class(name):
    assert isinstance(named_strategy(name), ModelParallelStrategy)
    assert named_strategy("ddp") == "ddp"
    assert named_strategy("no_such.Strategy") == "no_such.Strategy"  # Lightning says so


# -- what is said at the end ---------------------------------------------------------------------------------------


def said(caplog, *args):
    caplog.clear()
    with caplog.at_level(logging.INFO):
        cli = main([str(arg) for arg in args])
    return cli, caplog.messages


def test_a_run_says_what_has_come_of_it(config, caplog):
    cli, lines = said(caplog, "fit", "--config", config)
    saved = cli.trainer.checkpoint_callback.best_model_path
    assert f"saved {saved}; `test --ckpt_path` and `export --checkpoint` take it" in lines
    _, lines = said(caplog, "fit", "--config", config, "--ckpt_path", "last")
    assert any(line.startswith("nothing was trained: step 2 is the last") for line in lines)


def test_a_run_without_validation_says_that_none_was_due(config, caplog):
    none = "no validation was due before the end: it comes after each epoch, or as trainer.val_check_interval says"
    assert none not in said(caplog, "fit", "--config", config)[1]
    assert none in said(caplog, "fit", "--config", config, "--trainer.max_steps", 1)[1]
    not_asked = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    assert none not in said(caplog, "fit", "--config", config, *not_asked)[1]


def test_a_test_of_the_untrained_model_says_so(config, caplog):
    main(["fit", "--config", config])
    line = "no --ckpt_path: test takes the model of model.model as it is"
    assert line in said(caplog, "test", "--config", config)[1]
    assert line not in said(caplog, "test", "--config", config, "--ckpt_path", "last")[1]
