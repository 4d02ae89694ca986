"""The functions beside the commands: what a command does, from a file or a dict, with errors in place of exits."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import commands
from dft_lightning.compare import compare
from dft_lightning.errors import InputError
from dft_lightning.export import export
from dft_lightning.inspection.command import inspect
from dft_lightning.losses import DFTLoss
from dft_lightning.sampling import sample
from dft_lightning.scoring import score
from test_compare_settings import BASE, COMPARISON

FIT = {**BASE, "trainer": {"accelerator": "cpu", "devices": 1}}


def text_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.rglob("rows.jsonl"))}


def test_score_and_sample_do_what_their_commands_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fit.yaml").write_text(yaml.safe_dump(FIT))
    score("one", splits=["train"], fit=FIT)
    assert commands.score(["--config", "fit.yaml", "--output", "two", "--splits", "train"]) == 0
    assert len(text_of(Path("one"))) == 1
    assert text_of(Path("one")) == text_of(Path("two"))
    over = {"data": {"text": {"tokenizer": "asset://arithmetic-base"}}, "model": {"loss": DFTLoss()}}
    sample("one.jsonl", 2, limit=3, fit=["fit.yaml", over])
    assert commands.sample(["--config", "fit.yaml", "--output", "two.jsonl", "--k", "2", "--limit", "3"]) == 0
    lines = Path("one.jsonl").read_text()
    assert lines == Path("two.jsonl").read_text()
    assert len(lines.splitlines()) == 6


def test_inspect_takes_a_dict(capsys):
    inspect(rows=1, fit=FIT)
    assert "train row 1" in capsys.readouterr().out


def test_compare_takes_a_dict_over_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(yaml.safe_dump(BASE))
    Path("compare.yaml").write_text(yaml.safe_dump(COMPARISON))
    assert compare(["compare.yaml", {"losses": {"mine": DFTLoss()}}], "out", print_commands=True) == 0
    lines = capsys.readouterr().out.splitlines()
    runs = [line.split("runs/")[1].split("/")[0] for line in lines if " fit " in line]
    assert runs == ["mine-lr0.001-seed0", "mine-lr0.01-seed0"]
    assert yaml.safe_load(Path("out/compare.yaml").read_text())["config"] == ["compare.yaml", "a dict"]
    compare("compare.yaml", Path("other"), print_commands=True)
    assert Path("other/compare.yaml").is_file()


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        ("absent.yaml", r"^fit: expected a config's file.*no such file: absent\.yaml$"),
        ("configs/quickstart.yaml", "it comes with the package"),
        (5, "got int$"),
        ([FIT, 5], "got int$"),
        ({"model": {"loss": object()}}, "fit: builtins.object has no plain form: name a class by its path"),
        ({**FIT, "nope": 1}, "unknown key nope"),
        ({**FIT, "data": {**FIT["data"], "batch_size": "many"}}, "data.batch_size"),
        ([FIT, {"model": {"loss": "DTFLoss"}}], "model.loss"),
    ],
)
@pytest.mark.parametrize("function", [sample, score, inspect])
def test_what_is_no_config_is_an_error_and_no_exit(function, fit, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = {inspect: {}, sample: {"output": "out.jsonl"}, score: {"output": "out"}}[function]
    with pytest.raises(InputError, match=message):
        function(fit=fit, **output)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("absent.yaml", "no such file: absent.yaml"),
        ({"base": "absent.yaml", "losses": {"a": "DFTLoss"}, "learning_rates": [1e-3]}, "base: no such file"),
        ({**COMPARISON, "nope": 1}, "config: unknown key nope"),
        ({**COMPARISON, "learning_rates": ["x"]}, "learning_rates"),
        ({**COMPARISON, "losses": {"a": object()}}, "config: .* has no plain form: give what a file can hold"),
    ],
)
def test_what_is_no_comparison_is_an_error_and_no_exit(config, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        compare(config, "out")


def test_export_and_score_name_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        export(str(tmp_path / "absent.ckpt"), str(tmp_path / "out"))
    with pytest.raises(InputError, match="--splits must be one of train, validation"):
        score(tmp_path / "out", splits=["trian"], fit=FIT)
