"""The command, in process: runs, messages, checkpoints, defaults."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from conftest import ROOT, TINY_LLAMA
from dft_lightning.callbacks import InterruptionCheckpoint
from dft_lightning.cli import COMMANDS
from dft_lightning.cli.commands import run
from dft_lightning.fit import main
from dft_lightning.losses import LOSSES, CrossEntropyLoss, DFTLoss, FocalLoss

TINY = {**TINY_LLAMA, "vocab_size": 20}


@pytest.fixture
def config(tmp_path):
    """A complete small config; returns its path."""
    rows = {"class_path": "ArithmeticRows", "init_args": {"num_rows": 6, "min_digits": 1, "max_digits": 2}}
    values = {
        "model": {"model": TINY, "loss": "DFTLoss", "evaluation": {"generation": {"max_new_tokens": 5}}},
        "data": {
            "train": rows,
            "validation": rows,
            "test": rows,
            "batch_size": 3,
            "text": {"tokenizer": "asset://arithmetic-base"},
        },
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path / "runs"),
            "log_every_n_steps": 1,
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def fails(capfd, *args, lines=3):
    """The error message of a command that must exit with 2, without usage, traceback or warning wall."""
    with pytest.raises(SystemExit) as error:
        main(list(args))
    assert error.value.code == 2
    out = capfd.readouterr().err
    message = out[out.index("error: ") :].strip()
    assert "Traceback" not in out
    assert "usage:" not in out
    assert len(message.splitlines()) <= lines, message
    return message.removeprefix("error: ")


# -- one mistake, one message --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--model.optimzer", "SGD"], "unknown key model.optimzer; did you mean model.optimizer?"),
        (["--data.batchsize", "1"], "unknown key data.batchsize; did you mean data.batch_size?"),
        (["--trainer.max_stepz", "1"], "unknown key trainer.max_stepz; did you mean trainer.max_steps?"),
        (["--model.loss", "DFTLos"], "model.loss: unknown class 'DFTLos'; did you mean DFTLoss?\n"),
        (["--model.loss", "DFTLos"],
         f"known: {', '.join(sorted(LOSSES))}, or the dotted path of your own"),
        (["--model.loss", "EAFT"], "model.loss: unknown class 'EAFT'; did you mean EAFTLoss?\n"),
        (["--model.loss", "ThresholdLoss", "--model.loss.threshold", "1.5"],
         "threshold is a probability and must lie in [0, 1], got 1.5"),
        (["--model.loss", "PowerLoss", "--model.loss.q", "-1"], "q must be finite and not negative"),
        (["--model.loss", "torch.nn.Linear"], "model.loss: torch.nn.Linear is not a subclass of TokenLoss"),
        (["--model.loss", "DFTLoss", "--model.loss.gamma", "1"],
         "model.loss.gamma: DFTLoss has no option 'gamma'; it has none"),
        (["--model.loss", "FocalLoss", "--model.loss.gamma", "much"],
         "model.loss.gamma: expected float. Got value: much"),
        (["--model.loss", "FocalLoss", "--model.loss.gamma", "-1"], "gamma must be finite and not negative, got -1.0"),
        (["--model.loss", "no_such_module.Loss"],
         "model.loss: cannot import 'no_such_module.Loss': No module named 'no_such_module'"),
        (["--model.loss", "dft_lightning.losses.Nope"], "has no attribute 'Nope'"),
        (["--model.evaluation.answer_extractor", "LastNumbr"],
         "model.evaluation.answer_extractor: unknown class 'LastNumbr'"),
        (["--model.loading.dtype", "float31"], "model.loading.dtype: expected one of 'auto', 'float32'"),
        (["--model.optimizer.lr", "fast"], "model.optimizer.lr: expected float"),
        (["--model.schedule.warmup", "1.5"], "schedule.warmup must be a whole number of steps or, as a share of"),
        (["--model.schedule.warmup", "-3"], "schedule.warmup must not be negative, got -3"),
        (["--model.model", "./nowhere"], "no such folder: ./nowhere"),
        (["--data.train", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--data.train", "LocalRows"], "data.train.path: required, but not given"),
        (["--data.text.tokenizer", "./nowhere"], "data.text.tokenizer: no such folder: ./nowhere"),
        (["--data.train", ""], "data.train: empty"),
        (["--trainer.devices", "foo"], "trainer: "),
        (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches: must be at least 1, not 0"),
        (["--trainer.val_check_interval", "1000"], "trainer.val_check_interval: "),
        (["--trainer.default_root_dir", __file__], f"{__file__}"),
        (["--ckpt_path", "best"], "--ckpt_path best: a new process has not seen which was best"),
        (["--ckpt_path", __file__], f"--ckpt_path: {__file__} is cut short or no checkpoint"),
        (["--config", "nowhere.yaml"], "config: no such file: "),
        (["--trainer.max_steps", "many"], "trainer.max_steps: expected int. Got value: many"),
        (["--trainer.precision", "31"], "trainer.precision: expected one of"),
        (["--trainer.accelerator", "abacus"], "abacus"),
        (["--trainer.callbacks", "Nope"], "trainer.callbacks: unknown class 'Nope'"),
        (["--trainer.logger", "none"], "trainer.logger: unknown class 'none': none is false, and configs/logger/ has"),
        (["--trainer.precision", "16-mixed"], "trainer.precision: 16-mixed needs a GPU"),
        (["--ckpt_path", "nowhere.ckpt"], "--ckpt_path: no such checkpoint: nowhere.ckpt"),
        (["--ckpt_path", "last"], "--ckpt_path last: no checkpoint under"),
    ],
)  # fmt: skip
def test_flags(capfd, config, args, expected):
    assert expected in fails(capfd, "fit", "--config", config, *args)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {los: DFTLoss}", "unknown key model.los; did you mean model.loss?"),
        ("modle: {loss: DFTLoss}", "unknown key modle.loss; did you mean model.loss?"),
        ("model: {loss: {class_path: DFTLoss, init_args: {gamma: 1}}}",
         "model.loss.gamma: DFTLoss has no option 'gamma'"),
        ("model: {loss: {class_path: DFTLos}}", "model.loss: unknown class 'DFTLos'"),
        ("data: {train: {class_path: ArithmeticRowz}}", "data.train: unknown class 'ArithmeticRowz'"),
        ("data: {train: {class_path: ArithmeticRows, init_args: {num_rowz: 3}}}",
         "data.train.num_rowz: ArithmeticRows has no option 'num_rowz'; did you mean num_rows? It has num_rows"),
        ("trainer: {callbacks: [{class_path: GenerationEvaluation, init_args: {every: 3}}]}",
         "trainer.callbacks.every: GenerationEvaluation has no option 'every'; it has at_start"),
        ("model: [", "config: broken YAML"),
        ("", "config: expected a file of keys and values, got one of nothing"),
        ("- 1", "config: expected a file of keys and values"),
        ("fit: {model: {peft: null}}", "take it out of its fit: level"),
        ("model: {loading: null}", "model.loading: null is none of its values: leave it out for the default"),
        ("model: {evaluation: {generation: null}}", "model.evaluation.generation: null is none of its values"),
        ("model: {loss: null}", "model.loss: null is none of its values"),
        ("model: {optimizer: null}", "model.optimizer: null is none of its values"),
        ("model: {schedule: {decay: constant, minimum: 0.1}}", "schedule.minimum is where a decay ends"),
        ("model: {evaluation: {generation: {max_new: 3}}}", "unknown key model.evaluation.generation.max_new"),
    ],
)  # fmt: skip
def test_configs(capfd, config, tmp_path, text, expected):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(text)
    assert expected in fails(capfd, "fit", "--config", config, "--config", str(overlay))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("PL_TRAINER_MAX_STEPS", "trainer.max_steps"),
        ("PL_TRAINER__MAX_EPOCHS", "trainer.max_epochs"),
        ("PL_FIT__MODEL__OPTIMIZER__LR", "model.optimizer.lr"),
    ],
)
def test_options_in_the_environment_are_not_passed_over(capfd, config, monkeypatch, tmp_path, name, key):
    expected = f"{name}: options are not read from the environment: unset it, and give --{key} or a config"
    monkeypatch.setenv(name, "1")
    assert fails(capfd, "fit", "--config", config) == expected
    for command, *args in (("inspect",), ("sample", "--output", str(tmp_path / "rows.jsonl"))):
        assert run(command, [*args, "--config", config]) == 2
        assert expected in capfd.readouterr().err


def test_other_variables_are_let_be(config, monkeypatch, tmp_path):
    """Lightning's own, one that sets nothing, and one of no option."""
    for name, value in (("PL_GLOBAL_SEED", "3"), ("PL_TRAINER_MAX_STEPS", ""), ("PL_TRAINER_ADDRESS", "node1")):
        monkeypatch.setenv(name, value)
    assert main(["fit", "--config", config]).trainer.global_step == 2


def test_required_value_missing(capfd):
    assert fails(capfd, "fit", "--data.train", "rows.jsonl") == "model.model: required, but not given"


@pytest.mark.parametrize("given", [["rows.jsonl"], ["--model.model", "asset://arithmetic-base", "rows.jsonl"]])
def test_a_file_of_no_option_is_named_with_where_it_belongs(capfd, given):
    message = fails(capfd, "fit", *given)
    assert message == (
        "rows.jsonl: an argument of no option: a config is --config rows.jsonl, rows are --data.train rows.jsonl"
    )


def test_unknown_command(capfd):
    assert fails(capfd, "fitt") == "unknown command 'fitt'; did you mean fit?"
    assert fails(capfd, "train") == "unknown command 'train'; did you mean fit?"
    assert fails(capfd, "generate") == "unknown command 'generate'; did you mean predict?"
    assert fails(capfd, "inspec") == "unknown command 'inspec'; did you mean inspect?"
    assert fails(capfd, "exprt") == "unknown command 'exprt'; did you mean export?"
    assert fails(capfd, "config") == "unknown command 'config'; did you mean configs?"
    known = "fit, validate, test, predict, compare, init, inspect, score, sample, export, cache, configs; see --help"
    assert fails(capfd, "xyz") == f"unknown command 'xyz': give one of {known}"
    assert fails(capfd) == f"no command: give one of {known}"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("score", "--output", "scored", "--splits"), "argument --splits/--splits+: expected one argument"),
        (("compare", "--output", "runs", "--config"), "argument --config/--config+: expected one argument"),
        (("export", "--checkpoint=-a.ckpt", "--output=b"), "--checkpoint: no such file or folder: -a.ckpt"),
    ],
)
def test_options_without_a_value_and_with_a_dash_in_it(capfd, args, expected):
    assert fails(capfd, *args) == expected


def test_an_argument_of_no_option(capfd):
    for command in ("compare", "export"):
        assert run(command, ["runs"]) == 2
        assert capfd.readouterr().err == "error: runs: an argument of no option; see --help for the options\n"


def test_help_names_every_command(capfd):
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    known = {"fit", "validate", "test", "predict", *COMMANDS}
    assert known <= set(re.findall(r"\w+", capfd.readouterr().out))


def test_bad_rows_end_the_run_before_a_model_is_loaded(capfd, config, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1=", "completion": ""}\n' * 12)
    monkeypatch.setattr("dft_lightning.modules.building.load_causal_lm", lambda *a, **k: pytest.fail("model loaded"))
    message = fails(capfd, "fit", "--config", config, "--data.train", str(rows), lines=12)
    assert message.startswith(f"{rows}: 12 of 12 rows are bad\n  row 1: completion: empty")
    assert message.endswith("... and 2 more")
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


def test_a_data_file_is_never_read_as_a_config(capfd, config, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text('{"class_path": "ArithmeticRows", "init_args": {"num_rows": 3}}')
    message = fails(capfd, "fit", "--config", config, "--data.train", str(rows))
    assert message == f"{rows}: expected a list of objects, got an object"
    rows.write_text("")
    assert "broken JSON at character 1" in fails(capfd, "fit", "--config", config, "--data.train", str(rows))


def test_checkpoints_that_are_none(capfd, config, tmp_path):
    main(["fit", "--config", config])
    (whole,) = (tmp_path / "runs").rglob("*.ckpt")
    cut = tmp_path / "cut.ckpt"
    for size in (0, 1000, whole.stat().st_size - 100):
        cut.write_bytes(whole.read_bytes()[:size])
        assert "is cut short or no checkpoint" in fails(capfd, "fit", "--config", config, "--ckpt_path", str(cut))
    torch.save({"a": 1}, cut)
    assert "is not a Lightning checkpoint" in fails(capfd, "fit", "--config", config, "--ckpt_path", str(cut))
    (tmp_path / "empty").mkdir()
    assert "is an empty folder" in fails(capfd, "fit", "--config", config, "--ckpt_path", str(tmp_path / "empty"))
    other = ["--model.model", json.dumps({**TINY, "hidden_size": 32}), "--ckpt_path", str(whole)]
    assert "the checkpoint is of another model: size mismatch" in fails(capfd, "fit", "--config", config, *other)


def test_a_run_that_cannot_write_its_predictions_does_not_generate_them(capfd, config, tmp_path, monkeypatch):
    monkeypatch.setattr("dft_lightning.CausalLMModule.predict_step", lambda *args: pytest.fail("generated"))
    overlay = tmp_path / "overlay.yaml"
    writer = {"class_path": "PredictionWriter", "init_args": {"path": str(tmp_path)}}
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": [writer]}}))
    message = fails(capfd, "predict", "--config", config, "--config", str(overlay))
    assert "PredictionWriter.path" in message


# -- what a run does -----------------------------------------------------------------------------------------------


def test_fit_validate_test_and_predict(config, tmp_path):
    cli = main(["fit", "--config", config])
    assert cli.trainer.global_step == 2
    assert isinstance(cli.model.loss, DFTLoss)
    run = tmp_path / "runs" / "lightning_logs" / "version_0"
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "metrics.csv", "hparams.yaml", "checkpoints"}
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    names = ("loss", "nll", "perplexity", "token_accuracy", "mean_weight", "target_tokens", "grad_norm")
    assert {f"train/{name}" for name in (*names, "clipped_steps", "lr", "tokens_per_second")} <= set(header)
    (checkpoint,) = run.glob("checkpoints/*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2

    validated = main(["validate", "--config", config, "--ckpt_path", "last"])
    assert {f"val/{name}" for name in (*names[:-1], "entropy")} <= set(validated.trainer.callback_metrics)
    assert all(torch.equal(a, b) for a, b in zip(validated.model.parameters(), cli.model.parameters(), strict=True))

    tested = main(["test", "--config", config, "--ckpt_path", str(checkpoint)])
    records = [json.loads(line) for line in (Path(tested.trainer.log_dir) / "test_predictions.jsonl").open()]
    assert [record["index"] for record in records] == list(range(6))
    assert set(records[0]) == {"index", "prompt", "completion", "answer", "correct"}
    share = sum(record["correct"] for record in records) / 6
    assert tested.trainer.callback_metrics["test/exact_match"].item() == pytest.approx(share)

    predicted = main(["predict", "--config", config, "--ckpt_path", "last"])
    lines = (Path(predicted.trainer.log_dir) / "predictions.jsonl").read_text().splitlines()
    assert set(json.loads(lines[0])) == {"index", "prompt", "completion", "answer"}


def test_saved_config_repeats_the_run(config, tmp_path):
    first = main(["fit", "--config", config])
    again = main(["fit", "--config", str(Path(first.trainer.log_dir) / "config.yaml")])
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


def test_resuming_goes_on_and_auto_starts_anew_only_without_a_checkpoint(config, caplog):
    with caplog.at_level(logging.INFO):
        assert main(["fit", "--config", config, "--ckpt_path", "auto"]).trainer.global_step == 2
    assert "starting from the beginning" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        cli = main(["fit", "--config", config, "--ckpt_path", "auto", "--trainer.max_steps", "5"])
    assert cli.trainer.global_step == 5
    assert "step=2.ckpt" in caplog.text
    cli = main(["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_steps", "6"])
    assert cli.trainer.global_step == 6


def test_flags_win_over_what_a_checkpoint_says(config, tmp_path):
    main(["fit", "--config", config])
    (checkpoint,) = (tmp_path / "runs").rglob("*.ckpt")
    cli = main(["validate", "--config", config, "--ckpt_path", str(checkpoint), "--model.loss", "FocalLoss"])
    assert isinstance(cli.model.loss, FocalLoss)


def test_configs_compose_and_defaults_are_replaceable(config, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {loss: {class_path: FocalLoss, init_args: {gamma: 3.0}}}")
    cli = main(["fit", "--config", config, "--config", str(overlay), "--model.loss.alpha", "0.5"])
    assert (cli.model.loss.gamma, cli.model.loss.alpha) == (3.0, 0.5)
    assert [type(logger) for logger in cli.trainer.loggers] == [TensorBoardLogger, CSVLogger]
    assert not any(isinstance(callback, LearningRateMonitor) for callback in cli.trainer.callbacks)
    assert [callback.monitor for callback in cli.trainer.checkpoint_callbacks] == [None]
    assert any(isinstance(callback, InterruptionCheckpoint) for callback in cli.trainer.callbacks)
    assert cli.trainer.validate_loop.inference_mode is False

    overlay.write_text(
        "trainer:\n  logger: false\n  inference_mode: true\n  callbacks:\n"
        "  - class_path: ModelCheckpoint\n    init_args: {filename: mine}\n"
    )
    cli = main(["fit", "--config", config, "--config", str(overlay)])
    assert cli.trainer.validate_loop.inference_mode is True
    assert cli.trainer.loggers == []
    (checkpoint,) = cli.trainer.checkpoint_callbacks
    assert isinstance(checkpoint, ModelCheckpoint)
    assert checkpoint.filename == "mine"


def test_default_loss_is_cross_entropy(config, tmp_path):
    values = yaml.safe_load(Path(config).read_text())
    del values["model"]["loss"]
    Path(config).write_text(yaml.safe_dump(values))
    assert isinstance(main(["fit", "--config", config]).model.loss, CrossEntropyLoss)


def test_own_loss_by_dotted_path(config, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    cli = main(["fit", "--config", config, "--model.loss", "examples.own_loss.ClippedDFT", "--model.loss.floor", "0.3"])
    assert type(cli.model.loss).__name__ == "ClippedDFT"
    assert cli.model.loss.floor == 0.3


def test_console_script_and_module_are_the_same_command(config, monkeypatch, tmp_path):
    from dft_lightning.__main__ import run

    assert 'dft-lightning = "dft_lightning.__main__:run"\n' in (ROOT / "pyproject.toml").read_text()
    monkeypatch.setattr(sys, "argv", ["dft-lightning", "fit", "--config", config])
    run()
    assert list(tmp_path.rglob("*step=2.ckpt"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"THP_MEM_ALLOC_ENABLE": "1", "GOMP_SPINCOUNT": "1000"}),
        ({"THP_MEM_ALLOC_ENABLE": "0", "GOMP_SPINCOUNT": "7"}, {"THP_MEM_ALLOC_ENABLE": "0", "GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"THP_MEM_ALLOC_ENABLE": "1", "OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_what_the_command_tells_torch_and_openmp_before_torch_is_loaded(given, expected):
    """Unless the user has."""
    names = ("THP_MEM_ALLOC_ENABLE", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    code = (
        "import json, os, sys\n"
        "class Torch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        f"            print(json.dumps({{name: os.environ[name] for name in {names} if name in os.environ}}))\n"
        "            raise SystemExit\n"
        "sys.meta_path.insert(0, Torch())\n"
        "sys.argv = ['dft_lightning', 'fit', '--config', 'configs/quickstart.yaml']\n"
        "from dft_lightning.__main__ import run\n"
        "run()\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert json.loads(found.stdout.splitlines()[-1]) == expected
