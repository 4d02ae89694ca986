"""The help of the commands: short by itself, everything by group, the options of one's own classes among it."""

from __future__ import annotations

import inspect
import re
import sys
from typing import get_type_hints

import pytest

from dft_lightning.cli import COMMANDS, FITS, help
from dft_lightning.cli.outline import outline
from dft_lightning.cli.sources import function_at, parameters, subclasses
from dft_lightning.component import imported
from dft_lightning.fit import main
from dft_lightning.losses import LOSSES
from own_modules import OwnModule


def shown(*args):
    return help.help_text([*args])


@pytest.fixture
def asked(capfd):
    """What the command writes to standard output, where everything is imported."""

    def asked(*args, status=0, **classes):
        with pytest.raises(SystemExit) as ending:
            main([*args], **classes)
        written = capfd.readouterr()
        assert ending.value.code == status, written.err
        return written.err if status else written.out

    return asked


@pytest.fixture(autouse=True)
def width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def keys(text):
    return re.findall(r"(?m)^ +--([a-z]\S+)", text)


def test_the_front_page_names_every_command():
    lines = shown("--help").splitlines()
    assert {*FITS, *COMMANDS} == {line.split()[0] for line in lines if re.match(r"  [a-z]", line)}
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("command", FITS)
def test_a_command_has_a_page(command):
    """With nothing on it that there is not, and a way to all that there is."""
    text, found = shown(command, "--help"), outline(command)
    assert len(text.splitlines()) <= 42
    assert max(map(len, text.splitlines())) <= 100
    assert {*help.IN_FRONT} == {key for key in keys(text) if not key.startswith("help.")}
    named = {key.removeprefix("help.") for key in keys(text) if key.startswith("help.")}
    assert named <= found.groups.keys()
    reached = {key for group in found.groups for key in keys(shown(command, f"--help.{group}"))}
    listed = set(re.findall(r"--([a-z_]+)[,;]", text))
    assert {*found.options} - {*help.IN_FRONT} <= reached | listed


def test_a_group_lists_types_and_defaults():
    text = shown("fit", "--help.model.loading")
    assert "--model.loading.dtype auto|float32|bfloat16|float16|float64\n" in text
    assert "takes the checkpoint's own. (default: float32)\n" in text
    assert "--model.loading.revision str|null\n" in text
    assert "--trainer.log_every_n_steps int|null\n      How often to log within steps. (default: 10)\n" in shown(
        "fit", "--help.trainer"
    )
    assert "(required)" in shown("fit", "--help.model.model")
    assert "--data.streaming.pack_buffer_size int\n" in shown("validate", "--help.data.streaming")


def test_a_class_has_its_options():
    text = shown("fit", "--help.model.loss")
    assert set(re.findall(r"(?m)^  (\w+)\(", text)) == LOSSES.keys()
    assert "FocalLoss(gamma: float = 2.0, alpha: float = 1.0, detach_weight: bool = false)\n" in text
    assert "reduction" not in text
    assert keys(shown("fit", "--help.model.schedule"))[1:] == [
        f"model.schedule.{name}" for name in ("warmup", "decay", "minimum", "total_steps")
    ]
    assert "--model.optimizer.lr float\n      of AdamW (default: 5e-05)\n" in shown("fit", "--help.model.optimizer")
    assert "HashAnswer()" in shown("fit", "--help.model.evaluation.answer_extractor")


def test_where_everything_is_imported_it_is_the_same(asked):
    for args in (["fit", "--help"], ["test", "--help.model.evaluation"], ["fit", "--help.model.loss"], ["--help"]):
        assert asked(*args) == shown(*args)
    assert asked("inspect", "--help.data.text").startswith("How conversations become tokens")


def test_a_class_of_ones_own_has_its_options_there(asked):
    own = "  --model.own_start float\n"
    named = ["fit", "--model", "own_modules.OwnModule", "--help.model"]
    assert own in asked(*named)
    assert own in asked("fit", "--help.model", module_class=OwnModule)
    assert own not in shown("fit", "--help.model")
    assert "Every weight of the head begins as own_start" in asked("fit", "--help", module_class=OwnModule)


def test_no_such_group(asked):
    expected = "error: --help.modle: no such key; did you mean model?\n"
    assert asked("fit", "--help.modle", status=2) == expected
    assert asked("fit", "--help.qwerty", status=2) == "error: --help.qwerty: no such key; --help names the groups\n"


def test_narrow_terminals(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    for args in (["--help"], ["fit", "--help"], ["fit", "--help.model.loading"]):
        assert max(map(len, shown(*args).splitlines())) <= 63  # a key is not broken


def test_a_class_in_arguments_is_left_to_the_command(monkeypatch, capfd):
    from dft_lightning.cli.commands import answered

    monkeypatch.delitem(sys.modules, "lightning")
    assert answered(["fit", "--model", "own_modules.OwnModule", "--help"]) is None
    assert answered(["fit", "--help"]) == 0
    assert capfd.readouterr().out == shown("fit", "--help")


# -- what the sources say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", COMMANDS.values())
def test_other_commands_take_what_their_functions_do(path):
    function, found = imported(path), function_at(path)
    expected, hints = inspect.signature(function).parameters, get_type_hints(function)
    listed = inspect.signature(found).parameters
    assert [(each.name, each.kind, each.default) for each in listed.values()] == [
        (each.name, each.kind, each.default) for each in expected.values()
    ]
    for name in expected.keys() - {"fit", "classes"}:
        assert help.type_text(listed[name].annotation) == help.type_text(hints[name]), name
    assert found.__doc__ == inspect.cleandoc(function.__doc__)


def test_every_loss_is_found_with_its_options():
    paths = subclasses("dft_lightning.losses.base.TokenLoss")
    assert {path.rpartition(".")[2] for path in paths} == LOSSES.keys()
    for path in paths:
        listed = {each.name: each.default for each in parameters(path)}
        expected = list(inspect.signature(LOSSES[path.rpartition(".")[2]].__init__).parameters.values())[1:]
        assert listed == {each.name: each.default for each in expected}
