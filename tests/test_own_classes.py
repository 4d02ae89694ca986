"""Modules and data modules of one's own, by class path and by ``main(module_class=...)``, in every command."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from compare_records import whole_comparison
from conftest import ROOT, TINY_LLAMA
from dft_lightning import CausalLMModule
from dft_lightning.compare.execute import _Children
from dft_lightning.compare.grid import common_part, first_difference
from dft_lightning.compare.report import write_report
from dft_lightning.compare.settings import read_settings
from dft_lightning.fit import main
from dft_lightning.fit.own_classes import this_script
from own_modules import OwnData, OwnModule
from small_runs import run_script

TINY = {**TINY_LLAMA, "vocab_size": 20, "tie_word_embeddings": False}
ROWS = {"class_path": "ArithmeticRows", "init_args": {"num_rows": 4, "min_digits": 1, "max_digits": 1}}
OPTIONS = {"train": ROWS, "validation": ROWS, "test": ROWS, "batch_size": 2}
NAMED = ["--model", "own_modules.OwnModule", "--data", "own_modules.OwnData"]


@pytest.fixture
def config(tmp_path):
    """A small config that names no class, and no tokenizer but for a data module that has one; returns its path."""
    trainer = {
        "max_steps": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "default_root_dir": str(tmp_path / "run"),
    }
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False}
    values = {
        "model": {"model": TINY, "evaluation": {"generation": {"max_new_tokens": 3}, "answer_extractor": "LastNumber"}},
        "data": OPTIONS,
        "trainer": trainer,
    }
    return written(tmp_path / "config.yaml", values)


def written(path, values):
    path.write_text(yaml.safe_dump(values))
    return str(path)


def status_of(*args, **classes):
    """What a command ends with."""
    with pytest.raises(SystemExit) as ending:
        main(list(map(str, args)), **classes)
    return ending.value.code


def fails(capfd, *args, **classes):
    """The one line of a command that must end with 2."""
    capfd.readouterr()
    assert status_of(*args, **classes) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def is_own(cli, start):
    head = cli.model.model.lm_head.weight
    return type(cli.model) is OwnModule and type(cli.datamodule) is OwnData and head.eq(start).all().item()


# -- which class -------------------------------------------------------------------------------------------------------

GIVEN = [
    {"model": {"class_path": NAMED[1], "init_args": {"own_start": 0.25}}, "data": NAMED[3]},
    {"model": {"class_path": NAMED[1], "own_start": 0.25}, "data": {"class_path": NAMED[3]}},
    {"validate": {"model": {"class_path": NAMED[1], "init_args": {"own_start": 0.25}}, "data": NAMED[3]}},
]


@pytest.mark.parametrize(
    "flags",
    [
        [*NAMED, "--model.own_start", "0.25"],
        [f"{NAMED[0]}={NAMED[1]}", f"{NAMED[2]}={NAMED[3]}", "--model.own_start=0.25"],
        ["--model.class_path", NAMED[1], "--data.class_path", NAMED[3], "--model.init_args.own_start", "0.25"],
        ["--model", "own_modules.OwnTexts", *NAMED, "--model.own_start", "0.25"],  # the last counts
    ],
)
def test_a_class_by_flags(flags, config):
    assert is_own(main(["validate", "--config", config, *flags]), 0.25)


def test_a_class_in_configs(config, tmp_path):
    """In every form, under another config, in one within another."""
    for number, values in enumerate(GIVEN):
        overlay = ["--config", written(tmp_path / f"{number}.yaml", values)]
        args = [*overlay, "validate"] if "validate" in values else ["validate", *overlay]
        assert is_own(main([*args, "--config", config, "--trainer.fast_dev_run", "true"]), 0.25)
    inner = written(tmp_path / "inner.yaml", {"config": "0.yaml"})
    assert is_own(main(["validate", "--config", config, "--config", inner]), 0.25)


def test_a_class_of_main_counts_where_none_is_named(config):
    own = {"module_class": OwnModule, "datamodule_class": OwnData}
    start = ["validate", "--config", config, "--trainer.fast_dev_run", "true"]
    assert is_own(main([*start, "--model.own_start", "0.25"], **own), 0.25)
    assert type(main([*start, "--model", "dft_lightning.CausalLMModule"], **own).model) is CausalLMModule


def test_the_saved_config_names_the_class_and_runs_the_same(config, tmp_path, capfd):
    first = main(["fit", "--config", config, *NAMED, "--model.own_start", "0.25"])
    saved = tmp_path / "run" / "lightning_logs" / "version_0" / "config.yaml"
    values = yaml.safe_load(saved.read_text())
    assert (values["model"]["class_path"], values["data"]["class_path"]) == (NAMED[1], NAMED[3])
    again = main(["fit", "--config", str(saved), "--trainer.default_root_dir", str(tmp_path / "again")])
    assert type(again.model) is OwnModule
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    for named in (NAMED, []):
        capfd.readouterr()
        assert status_of("fit", "--config", config, *named, "--print_config") == 0
        printed = yaml.safe_load(capfd.readouterr().out)
        assert [printed[group].get("class_path") for group in ("model", "data")] == (named[1::2] or [None, None])


def test_a_class_that_cannot_be_imported_is_that_of_main_again(config, tmp_path):
    class Here(OwnModule):
        pass

    class Data(OwnData):
        pass

    own = {"module_class": Here, "datamodule_class": Data}
    main(["validate", "--config", config], **own)
    saved = tmp_path / "run" / "lightning_logs" / "version_0" / "config.yaml"
    assert yaml.safe_load(saved.read_text())["model"]["class_path"].endswith("<locals>.Here")
    root = ["--trainer.default_root_dir", str(tmp_path / "again")]
    assert type(main(["validate", "--config", str(saved), *root], **own).model) is Here
    given = ["--config", config, "--output"]
    assert status_of("inspect", "--config", config, **own) == 0
    assert status_of("sample", *given, tmp_path / "sampled.jsonl", "--k", 1, **own) == 0
    assert status_of("score", *given, tmp_path / "scored", "--splits", "train", **own) == 0


def test_own_options_of_a_checkpoints_run_are_taken(config, tmp_path, caplog):
    main(["fit", "--config", config, *NAMED, "--model.own_start", "0.25"])
    (checkpoint,) = (tmp_path / "run").rglob("*.ckpt")
    resumed = ["--ckpt_path", str(checkpoint), "--trainer.max_steps", "2"]
    with caplog.at_level(logging.INFO):
        cli = main(["fit", "--config", config, *NAMED, *resumed])
    assert (cli.model.own_start, cli.trainer.global_step) == (0.25, 2)
    said = "model.own_start: 0.25, as the checkpoint's run had it (not given; it would be 0.5)"
    assert said in caplog.text
    saved = yaml.safe_load((tmp_path / "run" / "lightning_logs" / "version_1" / "config.yaml").read_text())["model"]
    assert (saved["class_path"], saved["own_start"]) == (NAMED[1], 0.25)


def test_a_checkpoint_has_no_class_imported(config, tmp_path, capfd):
    """It goes on with the class that is given, and is exported without."""
    main(["fit", "--config", config, *NAMED])
    (checkpoint,) = (tmp_path / "run").rglob("*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["class_path"] = "never_imported.Module"
    torch.save(content, tmp_path / "named.ckpt")
    cli = main(["validate", "--config", config, *NAMED, "--ckpt_path", str(tmp_path / "named.ckpt")])
    assert type(cli.model) is OwnModule
    assert status_of("export", "--checkpoint", tmp_path / "named.ckpt", "--output", tmp_path / "exported") == 0


def test_texts_of_a_config_stay_texts(config, tmp_path, capfd):
    """Also where it is written anew without its class."""
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        'model: {class_path: own_modules.OwnModule, loading: {revision: "1234e56"}}\n'
        'data: {rows: {system_prompt: "1e5"}}'
    )
    assert status_of("fit", "--config", config, "--config", overlay, "--print_config") == 0
    printed = yaml.safe_load(capfd.readouterr().out)
    assert (printed["model"]["loading"]["revision"], printed["data"]["rows"]["system_prompt"]) == ("1234e56", "1e5")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--model.class_path"], "model.class_path: unknown class ''"),
        (["--model", "no_such_module.Own"],
         "model.class_path: cannot import 'no_such_module.Own': No module named 'no_such_module'"),
        (["--model", "own_modules.Nope"], "has no attribute 'Nope'"),
        (["--model.class_path", "OwnModule"], "model.class_path: unknown class 'OwnModule'; give the dotted path"),
        (["--model", "__main__.Nope"], "model.class_path: __main__.Nope is of a script: run that with this config"),
        (["--model", "own_modules.OwnData"], "own_modules.OwnData is not a subclass of CausalLMModule"),
        (["--data", "own_modules.OwnModule"], "own_modules.OwnModule is not a subclass of InstructionDataModule"),
        (["--model", "own_modules.torch.nn"], "model.class_path: cannot import"),
        ([*NAMED, "--model.own_stat", "1"], "unknown key model.own_stat; did you mean model.own_start?"),
        ([*NAMED, "--model.own_start", "much"], "model.own_start: expected float. Got value: much"),
        ([*NAMED, "--data.own_letters", "-1"], "own_letters must not be negative, got -1"),
        (["--model.own_start", "1"], "unknown key model.own_start"),
    ],
)  # fmt: skip
def test_bad_flags(args, expected, config, tmp_path, capfd):
    for command in ("validate", "inspect"):
        assert expected in fails(capfd, command, "--config", config, *args)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {class_path: own_modules.OwnModule, init_args: {own_stat: 1}}",
         "unknown key model.own_stat; did you mean model.own_start?"),
        ("model: {class_path: own_modules.OwnModule, own_start: 1, init_args: {own_start: 2}}",
         "model.own_start: given twice, in init_args and beside it"),
        ("model: {class_path: own_modules.OwnModule, init_args: 3}", "model.init_args: expected the class's options"),
        ("model: {class_path: own_modules.Nope}", "model.class_path: cannot import 'own_modules.Nope'"),
        ("data: torch.nn.Linear", "data.class_path: torch.nn.Linear is not a subclass of InstructionDataModule"),
    ],
)  # fmt: skip
def test_bad_configs(text, expected, config, tmp_path, capfd):
    (tmp_path / "overlay.yaml").write_text(text)
    assert expected in fails(capfd, "fit", "--config", config, "--config", tmp_path / "overlay.yaml")


def test_a_config_that_can_be_read_but_once(config, tmp_path, capfd):
    """Its class would be known too late; nothing of it is passed over."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        written_there = pool.submit(pipe.write_text, "model: {class_path: own_modules.OwnModule}")
        message = fails(capfd, "validate", "--config", config, "--config", pipe)
        written_there.result(timeout=60)
    assert message.startswith("model.class_path: own_modules.OwnModule is in a config that can be read but once")
    assert message.endswith("give --model own_modules.OwnModule, too")


# -- the other commands ------------------------------------------------------------------------------------------------


def test_inspect(config, capfd):
    assert fails(capfd, "inspect", "--config", config).startswith("data.text.tokenizer is not set")
    assert status_of("inspect", "--config", config, *NAMED) == 0
    assert "4 rows read" in capfd.readouterr().out
    assert status_of("inspect", "--config", config, module_class=OwnModule, datamodule_class=OwnData) == 0
    assert "4 rows read" in capfd.readouterr().out


def test_sample(config, tmp_path, capfd):
    """Tokens and log-probs are the module's; one that makes other texts than tokens is refused."""
    ask = ["sample", "--config", config, "--k", 1, "--output"]
    assert status_of(*ask, tmp_path / "a.jsonl", *NAMED) == 0
    assert status_of(*ask, tmp_path / "b.jsonl", module_class=OwnModule, datamodule_class=OwnData) == 0
    for name in ("a", "b"):
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [(line["completion"], line["num_tokens"], line["log_prob"]) for line in lines] == [("2", 2, -6.0)] * 4
    greedy = ["--model", "own_modules.OwnGreedy", *NAMED[2:], "--max_new_tokens", 4, "--k", 3]
    assert status_of(*ask, tmp_path / "c.jsonl", *greedy) == 0
    lines = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert len({(line["index"], line["completion"]) for line in lines}) == 4
    other = ["--model", "own_modules.OwnTexts", *NAMED[2:]]
    assert "OwnTexts.generate returns other texts than" in fails(capfd, *ask, tmp_path / "d.jsonl", *other)


def test_score(config, tmp_path):
    for number, named in enumerate((NAMED, [])):
        own = {} if named else {"module_class": OwnModule, "datamodule_class": OwnData}
        folder = tmp_path / str(number)
        assert status_of("score", "--config", config, "--splits", "train", "--output", folder, *named, **own) == 0
        lines = [json.loads(line) for line in (folder / "train" / "rows.jsonl").read_text().splitlines()]
        assert {value for line in lines for value in line["reference_log_prob"]} == {-3.0}


def test_export(config, tmp_path, capfd):
    cli = main(["fit", "--config", config, *NAMED, "--model.own_start", "0.25"])
    args = ["export", "--checkpoint", tmp_path / "run", "--output"]
    assert status_of(*args, tmp_path / "exported") == 0
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    assert all(torch.equal(weights[name], value) for name, value in cli.model.model.state_dict().items())
    assert "own_start: 0.25" in (tmp_path / "exported" / "README.md").read_text()


def test_export_of_a_model_class_of_ones_own(config, tmp_path, capfd, monkeypatch):
    """By a script that has imported it, and by no other: the file's name for it is not imported."""
    main(["fit", "--config", config, "--model", "own_modules.OwnModel", *NAMED[2:]])
    args = ["export", "--checkpoint", tmp_path / "run", "--output"]
    assert status_of(*args, tmp_path / "exported", module_class=OwnModule) == 0
    monkeypatch.delitem(sys.modules, "own_modules")
    assert "own_modules.OwnLlama is no model class of transformers" in fails(capfd, *args, tmp_path / "other")
    assert "own_modules" not in sys.modules


# -- compare -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs_here(monkeypatch):
    """What compare starts in processes of their own runs in this one; yields the commands."""
    commands = []

    def run(self, command, output, environment):
        commands.append(command[1:])
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                if command[1:3] == ["-m", "dft_lightning"]:
                    main(command[3:])
                else:
                    run_script(*command[1:])
            except SystemExit as ending:
                return ending.code
        return 0

    monkeypatch.setattr(_Children, "run", run)
    monkeypatch.setattr("dft_lightning.compare.report.all_plots", lambda findings: [])
    return commands


EVALUATION = {"every_n_steps": 1, "num_samples": 1, "temperatures": [0.0], "limit": 2, "probability_rows": 2}


def comparison(tmp_path, base, **changes):
    values = {"base": base, "losses": {"DFT": "DFTLoss"}, "learning_rates": [1e-3], "evaluation": EVALUATION}
    return written(tmp_path / "compare.yaml", {**values, **changes})


def test_compare(config, tmp_path, runs_here, capfd):
    own = {"model": {"class_path": NAMED[1], "init_args": {"own_start": 0.25}}, "data": NAMED[3]}
    asked = ["compare", "--config", comparison(tmp_path, config, overrides=own), "--output", tmp_path / "out"]
    assert status_of(*asked) == 0
    assert [command[:3] for command in runs_here] == [
        ["-m", "dft_lightning", stage] for stage in ("test", "fit", "test")
    ]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "- **module**: own\\_modules.OwnModule\n- **data module**: own\\_modules.OwnData\n" in report
    run = yaml.safe_load((tmp_path / "out" / "runs" / "dft-lr0.001-seed0" / "config.yaml").read_text())
    assert (run["model"]["class_path"], run["model"]["own_start"]) == (NAMED[1], 0.25)
    comparison(
        tmp_path, config, overrides={**own, "model": {}, "data": {"text": {"tokenizer": "asset://arithmetic-base"}}}
    )
    assert "(model.own_start: 0.25 there, not set now)" in fails(capfd, *asked)


def test_runs_of_another_class_are_not_alike():
    one = {"model": {"class_path": "a.B", "loss": 1}, "data": {}}
    other = {"model": {"class_path": "a.C", "loss": 2}, "data": {}}
    assert first_difference(common_part(one), common_part(other)) == "model.class_path: a.B there, a.C now"


def test_the_report_names_no_class_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("dft_lightning.compare.report.all_plots", lambda findings: [])
    whole_comparison(tmp_path)
    for path in (tmp_path / "runs").glob("*/config.yaml"):
        values = yaml.safe_load(path.read_text())
        values["model"]["class_path"] = "dft_lightning.CausalLMModule"
        written(path, values)
    write_report(tmp_path)
    assert "module**" not in (tmp_path / "report.md").read_text()


def test_overrides_with_a_class(config, tmp_path, capfd, monkeypatch):
    """Of two files the later one's class takes none of the other options away; what the grid sets is refused. No object
    of such a class is made before there is a whole config."""
    monkeypatch.setattr(OwnData, "__init__", lambda self: pytest.fail("made of nothing"))
    read_settings([Path(comparison(tmp_path, config, overrides={"data": {"class_path": NAMED[3]}}))])
    first = comparison(tmp_path, config, overrides={"model": {"class_path": "a.B", "init_args": {"own_start": 1}}})
    second = written(tmp_path / "second.yaml", {"overrides": {"model": {"class_path": "a.C"}}})
    assert read_settings([Path(first), Path(second)]).overrides == {"model": {"class_path": "a.C", "own_start": 1}}
    inner = {"model": {"class_path": NAMED[1], "init_args": {"loss": "DFTLoss"}}}
    asked = ["compare", "--config", comparison(tmp_path, config, overrides=inner), "--output", tmp_path / "out"]
    assert "overrides: model.loss is set for each run" in fails(capfd, *asked)


def test_a_class_that_runs_cannot_import(config, tmp_path, capfd):
    class Here(OwnModule):
        pass

    asked = ["compare", "--config", comparison(tmp_path, config), "--output", tmp_path / "out"]
    message = fails(capfd, *asked, module_class=Here, datamodule_class=OwnData)
    assert "<locals>.Here cannot be imported by the runs" in message
    assert "move the class into a module" in message
    assert not (tmp_path / "out").exists()


def test_how_a_script_is_started_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["own.py", "compare"])
    script = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    assert this_script(None) is None  # a notebook
    script.__file__ = "/there/own.py"
    assert this_script(None) == this_script(["compare"]) == ("own.py",)
    assert this_script(["compare", "--output", "x"]) is None  # not what the script was given
    script.__spec__ = ModuleSpec("project.train", None)
    assert this_script(None) == ("-m", "project.train")
    script.__spec__ = ModuleSpec("project.__main__", None)
    assert this_script(None) == ("-m", "project")


# -- the example -------------------------------------------------------------------------------------------------------


def test_the_example_in_every_command(tmp_path, runs_here, capfd):
    script = "examples/own_module.py"
    quickstart = str(ROOT / "configs" / "quickstart.yaml")
    small = {split: {"class_path": "ArithmeticRows", "init_args": {"num_rows": 2}} for split in ("train", "validation")}
    trainer = {"max_steps": 1, "callbacks": [], "enable_progress_bar": False, "default_root_dir": str(tmp_path / "run")}
    values = {"data": {**small, "test": small["train"]}, "trainer": trainer}
    values["model"] = {"evaluation": {"generation": {"max_new_tokens": 3}}}
    given = ["--config", quickstart, "--config", written(tmp_path / "small.yaml", values)]

    def run(command, *args):
        with pytest.raises(SystemExit) as ending:
            run_script(script, command, *args)
        assert ending.value.code == 0, capfd.readouterr().err

    run_script(script, "fit", *given)
    run("inspect", *given)
    run("sample", *given, "--output", tmp_path / "sampled.jsonl", "--k", 1)
    run("score", *given, "--output", tmp_path / "scored")
    run("export", "--checkpoint", tmp_path / "run", "--output", tmp_path / "exported")
    run("configs")
    base = [quickstart, str(tmp_path / "small.yaml")]
    run("compare", "--config", comparison(tmp_path, base), "--output", tmp_path / "out")
    path = str(ROOT / script)
    assert [command[:2] for command in runs_here] == [[path, stage] for stage in ("test", "fit", "test")]
    assert "- **module**: \\_\\_main\\_\\_.FrozenEmbeddings\n" in (tmp_path / "out" / "report.md").read_text()
    config = tmp_path / "out" / "runs" / "dft-lr0.001-seed0" / "config.yaml"
    assert config.read_text().startswith(f"# python {shlex.quote(path)} fit --config ")
    assert yaml.safe_load(config.read_text())["model"]["class_path"] == "__main__.FrozenEmbeddings"
