"""A comparison's config: what is read, what is refused, and the runs it makes."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from commands import compare as main
from compare_records import LOSSES, write_run
from conftest import ROOT, TINY_LLAMA
from dft_lightning.compare.grid import base_run, sweep_runs, write_config
from dft_lightning.compare.inputs import check_inputs
from dft_lightning.compare.settings import read_settings
from dft_lightning.errors import InputError
from dft_lightning.fit.config import read_fit_config
from test_compare_report import fails

ROWS = {"class_path": "ArithmeticRows", "init_args": {"num_rows": 6, "min_digits": 1, "max_digits": 2}}
BASE = {
    "model": {
        "model": {**TINY_LLAMA, "vocab_size": 20},
        "loss": "FocalLoss",
        "evaluation": {"generation": {"max_new_tokens": 3}, "answer_extractor": "LastNumber"},
    },
    "data": {
        "train": ROWS,
        "validation": ROWS,
        "test": ROWS,
        "batch_size": 3,
        "text": {"tokenizer": "asset://arithmetic-base"},
    },
    "trainer": {"max_steps": 2, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, "logger": False},
}
COMPARISON = {
    "base": "base.yaml",
    "losses": {"CE": "CrossEntropyLoss", "sharp DFT": {"class_path": "DFTLoss"}},
    "learning_rates": [1e-3, 1e-2],
    "evaluation": {"every_n_steps": 1, "num_samples": 2, "temperatures": [0.0, 1.0], "limit": 3, "probability_rows": 4},
}


ONE_CYCLE = {"class_path": "OneCycleLR", "init_args": {"max_lr": 0.1}}


def write(folder, fit_config=BASE, **changes):
    (folder / "base.yaml").write_text(yaml.safe_dump(fit_config))
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**COMPARISON, **changes}.items() if v is not None}))
    return path


def grid(path, output):
    settings = read_settings([path])
    config = read_fit_config(settings.base, settings.overrides)
    return [base_run(settings, config, output), *sweep_runs(settings, config, output)]


def test_the_grid(tmp_path):
    overrides = {"model": {"optimizer": {"weight_decay": 0.5}, "step": {"renormalize": True}}}
    path = write(tmp_path, seeds=[3, 4], overrides=overrides)
    runs = grid(path, tmp_path / "out")
    assert [run.identity.name for run in runs] == ["base"] + [
        f"{loss}-lr{rate}-seed{seed}" for seed in (3, 4) for rate in (0.001, 0.01) for loss in ("ce", "sharp-dft")
    ]
    run = next(run for run in runs if run.identity.name == "sharp-dft-lr0.01-seed4")
    model, data, trainer = (run.config[key] for key in ("model", "data", "trainer"))
    assert model["loss"]["class_path"] == "dft_lightning.DFTLoss"
    optimizer = model["optimizer"]["init_args"]
    assert (optimizer["lr"], optimizer["weight_decay"], model["step"]["renormalize"]) == (0.01, 0.5, True)
    assert (run.config["seed_everything"], data["batches"]["seed"]) == (4, 4)
    assert trainer["default_root_dir"] == str(tmp_path / "out" / "runs" / "sharp-dft-lr0.01-seed4")
    assert [c["class_path"] for c in trainer["callbacks"]] == ["dft_lightning.compare.RunRecorder"]
    assert list(runs[0].commands()) == ["test"]
    assert list(run.commands()) == ["fit", "test"]
    assert run.commands()["test"][-2:] == ["--ckpt_path", str(run.folder / "last.ckpt")]


def test_the_bases_own_callbacks_stay_but_generation_along_fit(tmp_path):
    names = ("GenerationEvaluation", "LearningRateMonitor", "ModelCheckpoint")
    callbacks = [{"class_path": name} for name in names]
    base = {**BASE, "trainer": {**BASE["trainer"], "callbacks": callbacks}}
    run = grid(write(tmp_path, base), tmp_path / "out")[1]
    names = [callback["class_path"].rpartition(".")[2] for callback in run.config["trainer"]["callbacks"]]
    assert names == ["LearningRateMonitor", "RunRecorder"]


def test_every_run_exports_into_its_own_folder(tmp_path):
    exports = [{"class_path": "HuggingFaceExport", "init_args": {"output": output}} for output in ("a/b", None)]
    base = {**BASE, "trainer": {**BASE["trainer"], "callbacks": exports}}
    runs = grid(write(tmp_path, base), tmp_path / "out")[1:3]
    outputs = [[c["init_args"].get("output") for c in run.config["trainer"]["callbacks"][:2]] for run in runs]
    assert outputs == [[str(run.folder / "b"), None] for run in runs]


def test_a_seed_is_another_order_and_no_other_split(tmp_path):
    data = {key: value for key, value in BASE["data"].items() if key != "validation"}
    base = {**BASE, "data": {**data, "validation_fraction": 0.5, "batches": {"seed": 5}}}
    runs = grid(write(tmp_path, base, seeds=[3, 4]), tmp_path / "out")
    assert {
        (batches["split_seed"], batches["seed"]) for batches in (run.config["data"]["batches"] for run in runs)
    } == {(5, 3), (5, 4)}


def test_another_way_to_the_same_folder_is_no_other_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = grid(write(tmp_path), tmp_path / "out")
    write_config(runs[1])
    (runs[1].folder / "fit.log").write_text("begun\n")
    (same,) = [run for run in grid(tmp_path / "compare.yaml", Path("out")) if run.identity == runs[1].identity]
    write_config(same)
    same.config["model"]["optimizer"]["init_args"]["weight_decay"] = 0.5
    message = r"another config \(model.optimizer.init_args.weight_decay: 0.01 there, 0.5 now\)"
    with pytest.raises(InputError, match=message):
        write_config(same)


def test_print_commands_goes_on_to_the_best_rates(tmp_path, capsys):
    """A loss whose sweep has ended has its further seeds printed, beside what is left of the others."""
    path, out = write(tmp_path, seeds_at_best=[1], evaluation={"num_samples": 4}), tmp_path / "out"
    arguments = ["--config", str(path), "--output", str(out), "--print_commands"]
    assert main(arguments) == 0
    loss = yaml.safe_load((out / "compare.yaml").read_text())["losses"]["CE"]
    monkeyed = {name: LOSSES[name] for name in LOSSES}
    LOSSES["CE"] = loss
    try:
        for rate in (1e-3, 1e-2):
            folder = out / "runs" / f"ce-lr{rate:g}-seed0"
            config = (folder / "config.yaml").read_text()
            shutil.rmtree(folder)
            write_run(out, "CE", rate)
            (folder / "config.yaml").write_text(config)
    finally:
        LOSSES.update(monkeyed)
    capsys.readouterr()
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [Path(line.split("--config ")[1].split()[0]).parent.name for line in lines]
    assert names == ["base", "sharp-dft-lr0.001-seed0", "sharp-dft-lr0.01-seed0", "ce-lr0.001-seed1"]


def test_print_commands_writes_configs_and_runs_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["--config", str(write(tmp_path)), "--output", str(out), "--print_commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    folder = out / "runs" / "ce-lr0.001-seed0"
    assert lines[1] == (
        f"python -m dft_lightning fit --config {folder}/config.yaml && "
        f"python -m dft_lightning test --config {folder}/config.yaml --ckpt_path {folder}/last.ckpt"
    )
    assert {path.name for path in folder.iterdir()} == {"config.yaml"}
    assert (folder / "config.yaml").read_text().startswith(f"# python -m dft_lightning fit --config {folder}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": {}}, "losses: name at least one loss to compare"),
        ({"losses": None}, "losses: name at least one loss to compare"),
        ({"losses": {"a": {"class_path": "DFTLoss", "init_args": {"reduction": "sum"}}}},
         "losses.reduction: DFTLoss has no option 'reduction'; it has none"),
        ({"losses": {"a b": "DFTLoss", "A-B": "DFTLoss"}}, "'a b' gives its runs the name 'a-b'; 'A-B' has the same"),
        ({"losses": {"base": "DFTLoss"}}, "'base' gives its runs the name 'base'"),
        ({"losses": {"?": "DFTLoss"}}, "neither letters nor digits"),
        ({"losses": {"focal": {"class_path": "FocalLoss", "init_args": {"gamma": -1}}}}, "gamma must be finite"),
        ({"losses": {"DFT": "DFTLos"}}, "DFTLos"),
        ({"base": "nowhere.yaml"}, "base: no such file: "),
        ({"base": []}, "base: name a fit config"),
        ({"base": None}, "base: required, but not given"),
        ({"learning_rates": []}, "learning_rates: give at least one"),
        ({"learning_rates": [1e-3, 0.001]}, "learning_rates: 0.001 is there twice, and would give two runs one name"),
        ({"learning_rates": [-1.0]}, "learning_rates must be finite and more than 0"),
        ({"learning_rates": ["fast"]}, "learning_rates"),
        ({"learning_rates": [float("inf")]}, "learning_rates must be finite"),
        ({"learning_rates": [1e-3, 1.0000001e-3]}, "learning_rates: 0.001 is there twice"),
        ({"losses": {1: "DFTLoss"}}, "losses: 1 is no text: put the name in quotes"),
        ({"losses": {"_x": "DFTLoss"}}, "begins with an underscore"),
        ({"losses": {"Base model": "DFTLoss"}}, "'Base model' gives its runs the name 'base-model'"),
        ({"losses": {"bad": "failing_loss.UnbuildableLoss"}}, "this loss cannot be built"),
        ({"overrides": {"model": {"optimizer": {"lr": 1}}}}, "model.optimizer.lr is set for each run: use learning_ra"),
        ({"overrides": {"model": {"schedule": ONE_CYCLE}}}, "OneCycleLR sets the learning rate by its max_lr, so that"),
        ({"overrides": {"model": {"loss": "DFTLoss"}}}, "overrides: model.loss is set for each run: use losses"),
        ({"overrides": {"seed_everything": 3}}, "overrides: seed_everything is set for each run: use seeds"),
        ({"overrides": {"trainer": {"limit_test_batches": 1}}}, "limit_test_batches: every loss is tested on all"),
        ({"overrides": {"data": {"streaming": {}}}}, "data.streaming: training rows are measured before and after"),
        ({"seeds": [-1]}, "seeds must not be negative"),
        ({"seeds": [1, 1]}, "seeds: 1 is there twice"),
        ({"seeds": [1], "seeds_at_best": [1]}, "seeds_at_best: 1 is among seeds already"),
        ({"measures": ["bleu"]}, "'bleu' is never measured; known: greedy, sampled, pass_at_2, nll"),
        ({"best_by": ["entropy"]}, "'entropy' judges nothing"),
        ({"evaluation": {"num_samples": 0}}, "num_samples must be at least 1"),
        ({"evaluation": {"temperatures": [-1.0]}}, "temperatures must be finite and not negative"),
        ({"learning_rate": [1e-3]}, "unknown key learning_rate"),
        ({"overrides": {"model": {"learning_rat": 1}}}, "unknown key model.learning_rat; did you mean"),
        ({"overrides": {"data": {"validation": None}}}, "no data.validation"),
        ({"overrides": {"data": {"test": None}}}, "no data.test"),
    ],
)  # fmt: skip
def test_bad_configs(tmp_path, capsys, changes, message):
    assert main(["--config", str(write(tmp_path, **changes)), "--output", str(tmp_path / "out")]) == 2
    found = capsys.readouterr().err
    assert message in found
    assert found.startswith("error: ")
    assert "Traceback" not in found
    assert len(found.strip().splitlines()) <= (2 if "known: " in found else 1)  # a list of classes has its own line
    assert not (tmp_path / "out").exists()


NO_ANSWERS = [{"prompt": "1+1=", "completion": " two"}]
LOCAL = {"class_path": "LocalRows", "init_args": {"path": "rows.jsonl"}}


@pytest.mark.parametrize(
    ("rows", "data", "changes", "message"),
    [
        (None, {"train": "nowhere.jsonl"}, {}, "nowhere.jsonl"),
        (None, {"test": "nowhere.jsonl"}, {}, "nowhere.jsonl"),
        ([{"prompt": "1+1="}], {"train": LOCAL}, {}, "rows.jsonl"),
        ("{", {"validation": LOCAL}, {}, "rows.jsonl: 1 of 1 rows are bad\n  row 1: broken JSON"),
        (NO_ANSWERS, {"validation": LOCAL}, {}, "validation row 1: LastNumber() finds nothing in the answer"),
        (NO_ANSWERS, {"test": LOCAL}, {}, "test row 1: LastNumber() finds nothing in the answer"),
        (NO_ANSWERS, {"forgetting": LOCAL}, {}, "forgetting row 1: .*; or set evaluation.forgetting_answers: false"),
        (None, {"text": {"tokenizer": "no/where"}}, {}, "data.text.tokenizer"),
        (None, {"text": {"tokenizer": None}}, {}, "data.text.tokenizer is not set"),
        (
            None,
            {"text": {**BASE["data"]["text"], "max_length": 2}},
            {},
            "data.train: no row has a target left within max_length 2",
        ),
        (None, {"batches": {"packing": "bfd"}}, {}, "packing"),
        (None, {}, {"losses": {"CE": "CrossEntropyLoss", "iw": "ProximalLoss"}}, "ProximalLoss reads reference_log_pr"),
    ],
)
def test_a_mistake_in_the_data_ends_it_before_the_first_run(
    tmp_path, capsys, monkeypatch, rows, data, changes, message
):
    """With what each run would say, in one line (and one for each bad row), and nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if rows is not None:
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "rows.jsonl").write_text(text)
    path = write(tmp_path, {**BASE, "data": {**BASE["data"], **data}}, **changes)
    found = fails(capsys, "--config", path, "--output", tmp_path / "out", lines=1 + message.count("\n"))
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), found)
    assert not (tmp_path / "out").exists()


def test_an_extractor_that_finds_nothing_ends_it_before_the_first_run(tmp_path, capsys):
    model = {**BASE["model"], "evaluation": {"answer_extractor": "HashAnswer"}}
    arguments = ["--config", write(tmp_path, {**BASE, "model": model}), "--output", tmp_path / "out"]
    for more in ([], ["--print_commands"]):
        assert "row 1: HashAnswer() finds nothing in the answer" in fails(capsys, *arguments, *more)
    assert not (tmp_path / "out").exists()


def test_what_is_checked_is_what_the_runs_read(tmp_path):
    """Rows of the base and of the losses alone, answers within the limit: no more is refused than a run would."""
    rows = [{"prompt": "1+1=", "completion": "2"}, *NO_ANSWERS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = {"class_path": "LocalRows", "init_args": {"path": str(tmp_path / "rows.jsonl")}}
    data = {**BASE["data"], "train": local, "validation": local, "forgetting": local}
    path = write(tmp_path, {**BASE, "data": data}, evaluation={**COMPARISON["evaluation"], "limit": 1})
    check_inputs(grid(path, tmp_path / "out"), read_settings([path]).evaluation)
    evaluation = {**read_settings([path]).evaluation, "limit": 2}
    with pytest.raises(InputError, match="validation row 2: "):
        check_inputs(grid(path, tmp_path / "out"), evaluation)


def test_checking_a_mixture_leaves_the_grid_as_it_is(tmp_path):
    """Else its runs are of another loss than the comparison's, and it gets no further seeds."""
    parts = ["CrossEntropyLoss", {"class_path": "FocalLoss", "init_args": {"gamma": 1.0}}]
    mixture = {"class_path": "MixtureLoss", "init_args": {"losses": parts, "weights": [1.0, 0.5]}}
    path = write(tmp_path, losses={"mixture": mixture})
    settings = read_settings([path])
    config = read_fit_config(settings.base, settings.overrides)
    runs = [base_run(settings, config, tmp_path / "out"), *sweep_runs(settings, config, tmp_path / "out")]
    before = copy.deepcopy([settings.losses, *(run.config for run in runs)])
    check_inputs(runs, settings.evaluation)
    assert before == [settings.losses, *(run.config for run in runs)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("losses:\n  DFT: DFTLoss\n  DFT: FocalLoss\n", "'DFT' is there twice, in lines 2 and 3"),
        ("losses: [", "broken YAML"),
        ("nothing", "expected keys and values"),
    ],
)
def test_bad_files(tmp_path, capsys, text, message):
    path = tmp_path / "compare.yaml"
    path.write_text(text)
    assert message in fails(capsys, "--config", path, "--output", tmp_path / "out")


def test_bad_arguments(tmp_path, capsys):
    path = write(tmp_path)
    out = tmp_path / "out"
    assert "no such file" in fails(capsys, "--config", tmp_path / "none.yaml", "--output", out)
    assert "give --config FILE and --output FOLDER" in fails(capsys, "--config", path)
    assert "--jobs must be at least 1" in fails(capsys, "--config", path, "--output", out, "--jobs", 0)
    assert "and nothing else" in fails(capsys, "--report_only", out, "--config", path)
    assert "is a file" in fails(capsys, "--config", path, "--output", path)


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    path = write(tmp_path)
    path.write_text(path.read_text().replace("- 0.001", "- 1e-3"))
    assert "1e-3" in path.read_text()
    assert read_settings([path]).learning_rates == [0.001, 0.01]


def test_files_compose(tmp_path):
    data = {"train": {"class_path": "ArithmeticRows", "init_args": {"num_rows": 9, "seed": 3}}, "forgetting": ROWS}
    overrides = {"model": {"optimizer": {"weight_decay": 0.5}}, "trainer": {"max_steps": 5}, "data": data}
    path = write(tmp_path, overrides=overrides)
    above = tmp_path / "above.yaml"
    local = {"class_path": "LocalRows", "init_args": {"path": "rows.jsonl"}}
    changes = {
        "learning_rates": [0.5],
        "evaluation": {"limit": 1},
        "overrides": {"trainer": {"max_steps": 6}, "data": {"train": {"init_args": {"seed": 4}}, "forgetting": local}},
    }
    above.write_text(yaml.safe_dump(changes))
    settings = read_settings([path, above])
    assert (settings.learning_rates, list(settings.losses)) == ([0.5], ["CE", "sharp DFT"])
    assert (settings.evaluation["limit"], settings.evaluation["num_samples"]) == (1, 2)
    data["train"]["init_args"]["seed"] = 4
    assert settings.overrides == {
        "model": {"optimizer": {"weight_decay": 0.5}},
        "trainer": {"max_steps": 6},
        "data": {"train": data["train"], "forgetting": local},
    }


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_comparisons(path, tmp_path):
    settings = read_settings([path])
    runs = grid(path, tmp_path)
    assert len(runs) == 1 + len(settings.losses) * len(settings.learning_rates) * len(settings.seeds)
    assert f"--config configs/compare/{path.name} --output" in path.read_text()
