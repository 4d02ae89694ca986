"""Mistakes found before the heavy imports: what the sources say is what the parser has, and no more is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

import test_cli
import test_own_classes
from conftest import ROOT
from dft_lightning.cli import FITS, early
from dft_lightning.cli.class_paths import names_classes
from dft_lightning.cli.commands import run
from dft_lightning.cli.help import type_text
from dft_lightning.cli.outline import CLASSES, outline
from dft_lightning.cli.parsers import refuse_nulls
from dft_lightning.data import InstructionDataModule
from dft_lightning.errors import InputError
from dft_lightning.fit.command import DFTLightningCLI, cli_options
from dft_lightning.fit.help import outline_of
from dft_lightning.foreign.jsonargparse import actions, type_of
from dft_lightning.modules import CausalLMModule
from test_docs import FITS as SHOWN
from test_docs import with_own_config

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


class Built(Exception):
    pass


class Builds(DFTLightningCLI):
    def parse_arguments(self, parser, args):
        (options,) = self._parsers  # of the command that is given alone
        raise Built(parser, options)


@pytest.fixture(scope="module")
def built():
    """The parser of each command, and the one inside of it that has the options; made once."""
    found = {}
    for command in FITS:
        with pytest.raises(Built) as made:
            Builds(CausalLMModule, InstructionDataModule, **cli_options(), args=[command])
        found[command] = made.value.args
    return found


@pytest.fixture
def told(built, capfd):
    """What the command's parser says of arguments, and what is said before: ``None`` where they are right."""

    def told(*args):
        parser, inner = built[args[0]] if args[:1] and args[0] in built else built["fit"]
        capfd.readouterr()
        try:
            refuse_nulls(inner, parser.parse_args([*args])[args[0]])
            real = None
        except SystemExit:
            real = capfd.readouterr().err.removeprefix("error: ").rstrip("\n")
        except InputError as error:
            real = str(error)
        return real, said(*args)

    return told


def said(*args):
    try:
        early.check([*args])
    except InputError as error:
        return str(error)
    return None


# -- what the sources say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", FITS)
def test_the_outline_is_what_the_parser_has(command, built):
    """Keys, types, defaults and what is said of them, so that an option of a class needs no other place."""
    (_, parser), found = built[command], outline(command)
    named = {action.dest: action for action in actions(parser) if type_of(action) is not None}
    named = {key: action for key, action in named.items() if not key.endswith(".help")}
    assert found.options.keys() == {*named, "config"}
    for key, action in named.items():
        option = found.options[key]
        assert type_text(option.hint) == type_text(type_of(action)), key
        if key.partition(".")[0] not in CLASSES:
            assert option.default == action.default, key
    of_parser = outline_of(parser, command)
    assert of_parser.groups == found.groups
    for key, option in of_parser.options.items():
        expected = found.options[key]
        assert (option.default, " ".join(option.doc.split())) == (expected.default, expected.doc), key
        assert getattr(option.default, "options", None) == getattr(expected.default, "options", None), key


# -- mistakes ----------------------------------------------------------------------------------------------------------

FOUND = [
    (["--model.los", "x"], "unknown key model.los; did you mean model.loss?"),
    (["--lr", "1"], "unknown key lr; did you mean model.optimizer.lr?"),
    (["--model.loading.dtype", "float31"], "model.loading.dtype: expected one of 'auto'"),
    (["--trainer.max_steps", "many"], "trainer.max_steps: expected int. Got value: many"),
    (["--trainer.precision", "31"], "trainer.precision: expected one of"),
    (["--data.batch_size", "[1]"], "data.batch_size: "),
    (["--data.validation_fraction", "half"], "data.validation_fraction: expected float"),
    (["--data.batch_size"], "expected one argument"),
    (["--model.loss", "null"], "model.loss: Not a valid subclass of TokenLoss"),
    (["--config", "/"], "config: Path is not a file"),
    (["--seed_everything", "x"], "seed_everything: "),
    (["--config", "nowhere.yaml"], "config: no such file: "),
    (["--model.loss", "DFTLos"], "model.loss: unknown class 'DFTLos'; did you mean DFTLoss?"),
    (["--model.loss", "dft"], "model.loss: unknown class 'dft'; did you mean DFTLoss?"),
    (["--model.loss", "FocalLoss", "--model.loss.gama", "1"], "FocalLoss has no option 'gama'; did you mean gamma?"),
    (["--model.loss", "FocalLoss", "--model.loss.gamma", "much"], "model.loss.gamma: expected float"),
    (["--model.loss", "FocalLoss", "--model.loss.reduction", "sum"], "FocalLoss has no option 'reduction'"),
    (["--model.loss.gamma", "1"], "DFTLoss has no option 'gamma'"),
    (["validate"], "validate"),
]
IN_A_CONFIG = [
    ("model: {los: DFTLoss}", "unknown key model.los; did you mean model.loss?"),
    ("modle: {loss: DFTLoss}", "unknown key modle.loss"),
    ("trainer: {max_stepz: 3}", "unknown key trainer.max_stepz"),
    ("model: [", "config: broken YAML"),
    ("", "config: expected a file of keys and values, got one of nothing"),
    ("- 1", "config: expected a file of keys and values"),
    ("fit: {model: {peft: null}}", "take it out of its fit: level"),
    ("model: {loading: null}", "model.loading: null is none of its values"),
    ("model: {loss: null}", "model.loss: null is none of its values"),
    ("model: {evaluation: {generation: null}}", "model.evaluation.generation: null is none of its values"),
    ("model: {evaluation: {generation: {max_new: 3}}}", "unknown key model.evaluation.generation.max_new"),
    ("model: {loss: {class_path: DFTLoss, init_args: {gamma: 1}}}", "DFTLoss has no option 'gamma'"),
    ("model: {loss: {class_path: MixtureLoss, init_args: {losses: [DFTLos]}}}", "unknown class 'DFTLos'"),
    ("data: {text: {max_length: long}}", "data.text.max_length: expected int"),
]


@pytest.mark.parametrize(("args", "expected"), FOUND, ids=[" ".join(args) for args, _ in FOUND])
def test_a_mistake_is_told_as_the_parser_tells_it(args, expected, told):
    real, message = told("fit", "--config", QUICKSTART, *args)
    assert message == real
    assert expected in message


@pytest.mark.parametrize(("text", "expected"), IN_A_CONFIG)
def test_a_mistake_in_a_config_too(text, expected, told, tmp_path):
    (tmp_path / "overlay.yaml").write_text(text)
    real, message = told("predict", "--config", QUICKSTART, "--config", str(tmp_path / "overlay.yaml"))
    assert message == real
    assert expected in message


def test_other_commands_tell_them_too(monkeypatch, capfd):
    """Of a command that reads the config as another's, whose options are right there."""
    monkeypatch.delitem(sys.modules, "lightning")
    monkeypatch.setattr("dft_lightning.cli.commands.imported", lambda path: pytest.fail(path))
    args = ["--config", QUICKSTART, "--output", "x", "--return_predictions", "false", "--model.los", "x"]
    for command, key in (("score", "model.los; did you mean model.loss?"), ("sample", "return_predictions;")):
        assert run(command, args) == 2
        assert f"error: unknown key {key}" in capfd.readouterr().err


def test_of_commands_and_what_is_required(told):
    for args in ((), ("fitt",), ("export_",)):
        real, message = told(*args)
        assert message.split(":")[0] == real.split(":")[0]
    assert told("fit", "--data.train", "rows.jsonl") == ("model.model: required, but not given",) * 2


CASES = {
    "flags": test_cli.test_flags.pytestmark[0].args[1],
    "configs": test_cli.test_configs.pytestmark[0].args[1],
    "own": test_own_classes.test_bad_flags.pytestmark[0].args[1],
    "nulls": [([f"--model.{key}", "null"], "") for key in ("optimizer", "loading", "evaluation.answer_extractor")],
}


@pytest.mark.parametrize("kind", CASES)
def test_of_what_the_command_refuses_nothing_else_is_said(kind, told, tmp_path):
    """Of each mistake that the tests of the command know: the same, or nothing."""
    for number, (given, _) in enumerate(CASES[kind]):
        if kind == "configs":
            (tmp_path / f"{number}.yaml").write_text(given)
            given = ["--config", str(tmp_path / f"{number}.yaml")]
        if not names_classes(given):
            real, message = told("fit", "--config", QUICKSTART, *given)
            assert message in (None, real)


# -- nothing that is right is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_right(path):
    if "base" not in yaml.safe_load(path.read_text()):  # a comparison
        assert said("fit", "--config", QUICKSTART, "--config", str(path)) is None


def test_shown_commands_are_right(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert SHOWN
    for arguments in sorted(SHOWN):
        assert said(*with_own_config(arguments, tmp_path)) is None, arguments


ODD = [
    ["--model.model", "{model_type: llama, hidden_size: 8}"],
    ["--model.model.hidden_size", "8"],
    ["--model.peft.r", "4", "--model.peft.alpha", "8"],
    ["--model.loss=FocalLoss", "--model.loss.gamma=3", "--model.loss.init_args.alpha", "0.5"],
    ["--model.loss", '{"class_path": "dft_lightning.losses.FocalLoss", "init_args": {"gamma": 1}}'],
    ["--model.loss", "examples.own_loss.ClippedDFT", "--model.loss.floor", "0.3"],
    ["--model.loss", "ThresholdLoss", "--model.loss.base", "DFTLoss"],
    ["--model.optimizer.lr", "1e-4", "--model.optimizer.betas", "[0.9, 0.99]"],
    ["--model.optimizer", "SGD", "--model.optimizer.lr=0.1"],
    ["--model.evaluation.answer_extractor", "HashAnswer"],
    ["--model.sharding.blocks+", "a.B", "--model.sharding.blocks+=c.D"],
    ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/nll", "--trainer.callbacks.patience", "3"],
    ["--trainer.logger", "false", "--trainer.max_time", "{hours: 1}", "--trainer.devices", "[0, 1]"],
    ["--trainer.logger+=CSVLogger", "--trainer.logger.save_dir", "-1"],
    ["--trainer.strategy", "ModelParallelStrategy", "--trainer.strategy.tensor_parallel_size", "1"],
    ["--trainer.max_steps", "-1", "--trainer.gradient_clip_val", "1", "--seed_everything", "true"],
    ["--data.train", "MixedRows", "--data.train.sources", '{"a": "rows.jsonl"}'],
    ["--data.streaming", "{}", "--data.streaming.shuffle_buffer_size", "3"],
    [
        "--data.text.allow_special_tokens",
        "[<a>]",
        "--data.text.span_weights",
        "{'a+': 2}",
        "--data.rows.form",
        "alpaca",
    ],
    ["--config", "{trainer: {max_epochs: 2}}", "-c", "{model: {loss: {class_path: DFTLoss}}}"],
    ["--data", "data.yaml", "--model.loading", "loading.yaml", "--data.text", "{max_length: 3}"],
    ["--data", "data.yaml", "--data", "other.yaml", "--config", "{model.loss: {class_path: PowerLoss}}"],
    ["--config", "{data: {train: {class_path: ArithmeticRows, init_args: {num_rows: 3}}}}"],
    ["--config", "whole.yaml", "--config", "over.yaml"],
    ["--config", "over.yaml", "--model.loss", "CrossEntropyLoss", "--model.loss.label_smoothing", "0.1"],
]


@pytest.mark.parametrize("args", ODD, ids=" ".join)
def test_odd_forms_are_right(args, told, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.yaml").write_text(
        "{batch_size: 3, rows: {form: messages}, train: {class_path: LocalRows, init_args: {path: a}}}"
    )
    (tmp_path / "loading.yaml").write_text("{dtype: auto, revision: '1e5'}")
    (tmp_path / "over.yaml").write_text("{config: whole.yaml, model: {loss: {class_path: FocalLoss}, peft: {r: 3}}}")
    (tmp_path / "whole.yaml").write_text("{seed_everything: 3, model: {model: x}, ckpt_path: null, weights_only: true}")
    (tmp_path / "other.yaml").write_text("train: {class_path: ArithmeticRows, init_args: {num_rows: 3}}")
    parse, parsed = early._Command.parse, []
    monkeypatch.setattr(early._Command, "parse", lambda *given: parsed.append(parse(*given)) or parsed[-1])
    assert told("fit", "--config", QUICKSTART, *args) == (None, None)
    assert parsed[0] is not None, "not looked at"


def test_files_of_groups_in_configs_are_right(told, tmp_path, monkeypatch):
    """Where this parser stumbles, the command's own decides."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.yaml").write_text("{train: {class_path: ArithmeticRows, init_args: {num_rows: 3}}}")
    (tmp_path / "whole.yaml").write_text("{data: data.yaml, model: {model: x}}")
    assert told("fit", "--config", "whole.yaml", "--config", "whole.yaml") == (None, None)


def test_a_saved_config_is_right(built, tmp_path):
    """With every key, nulls among them."""
    parser, _ = built["fit"]
    whole = parser.parse_args(["fit", "--config", QUICKSTART])
    saved = tmp_path / "config.yaml"
    saved.write_text(built["fit"][1].dump(whole["fit"], skip_none=False))
    assert said("fit", "--config", str(saved), "--print_config") is None
    saved.write_text(parser.dump(whole, skip_none=False))
    assert said("--config", str(saved), "fit") is None


@pytest.mark.parametrize(
    "args",
    [
        ["--model", "own_modules.OwnModule", "--model.own_start", "0.25"],
        ["--config", "{model: {class_path: own_modules.OwnModule, own_start: 0.25}}"],
        ["--config", "{model: {class_path: own_modules.OwnModule, init_args: {own_start: 0.25}}, data: own.Data}"],
        ["--model.loss", "ShortName", "--trainer.callbacks", "my_package.callbacks.ThatImportsIt"],
        ["--model.loss", "ShortName", "--trainer.callbacks", '[{"class_path": "my_package.ThatImportsIt"}]'],
        ["--model.loss.help", "DFTLoss"],
        ["--config", "-"],
    ],
    ids=" ".join,
)
def test_what_it_cannot_know_it_leaves_alone(args):
    assert said("fit", "--config", QUICKSTART, *args) is None
    assert said("fit", "--config", QUICKSTART, *args, "--model.los", "x") is None or "ShortName" in args


def test_a_loss_of_ones_own_is_not_imported(tmp_path, monkeypatch):
    """Its module may need what the command imports before."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_early.py").write_text("raise ImportError")
    for loss in ("own_early.Loss", '{"class_path": "own_early.Loss"}'):
        assert said("fit", "--config", QUICKSTART, "--model.loss", loss) is None


def test_what_can_be_read_but_once_is_left(tmp_path):
    pipe, over = tmp_path / "pipe", tmp_path / "over.yaml"
    os.mkfifo(pipe)
    over.write_text(yaml.safe_dump({"config": str(pipe)}))
    for args in (
        ["--config", str(pipe)],
        [f"--config={pipe}"],
        [f"-c{pipe}"],
        ["--data", str(pipe)],
        ["-c", str(over)],
    ):
        with ThreadPoolExecutor(1) as pool:
            check = pool.submit(said, "fit", *args)
            try:
                assert check.result(timeout=10) is None
            finally:  # one that waits for the pipe reads nothing
                os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))


def test_other_ranks_and_the_environment_are_left_alone(monkeypatch):
    for name, value in (("LOCAL_RANK", "1"), ("SLURM_LOCALID", "2"), ("JSONARGPARSE_DEFAULT_ENV", "true")):
        assert said("fit", "--model.los", "x") is not None
        monkeypatch.setenv(name, value)
        assert said("fit", "--model.los", "x") is None
        monkeypatch.delenv(name)


# -- the time that it takes --------------------------------------------------------------------------------------------


def test_nothing_heavy_is_imported(tmp_path):
    """One process for all, in which the command's own end is that of each."""
    quick = [["--help"], ["fit", "--help"], ["fit", "--help.model.loss"], ["inspect", "--help"], ["compare", "--help"]]
    quick += [["cache", "--help"], ["configs"], ["fit", "--lr", "1"], ["fitt"], ["sample", "--outptu", "x"]]
    quick += [["fit", "--config", "nowhere.yaml"], ["inspect", "--config", QUICKSTART, "--model.los", "x"]]
    quick += [
        ["score", "--output", "x", "--config", QUICKSTART, "--trainer.max_steps", "x"],
        ["inspect", "--help.data"],
    ]
    code = f"""
import contextlib, io, json, sys
from dft_lightning.__main__ import run
def heavy():
    return [each for each in ("torch", "lightning", "transformers", "numpy") if each in sys.modules]
def of(args):
    sys.argv = ["dft-lightning", *args]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            run()
        except SystemExit as ending:
            return ending.code, said.getvalue()
with_torch = ["fit", "--config", {QUICKSTART!r}, "--model.loss", "x"]
print(json.dumps([[*of(args), heavy()] for args in [*{quick!r}, with_torch]]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    *others, last = json.loads(result.stdout)
    for args, (status, message, heavy) in zip(quick, others, strict=True):
        wrong = not re.search("help|configs$", " ".join(args[:2]))
        assert (status, bool(message), heavy) == (2 * wrong, wrong, []), args
    assert last[0] == 2
    assert last[2] == ["torch", "numpy"]
