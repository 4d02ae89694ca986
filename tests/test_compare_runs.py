"""Runs of a comparison: what the recorder measures, and the whole command on real processes."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml

from commands import compare as main
from commands import score
from conftest import ROOT
from dft_lightning import CausalLMModule, CrossEntropyLoss, DFTLoss, InstructionDataModule
from dft_lightning.compare import recorder
from dft_lightning.compare.execute import _Children, check_jobs, execute, job_environments, last_error
from dft_lightning.compare.files import Clock
from dft_lightning.compare.grid import Run
from dft_lightning.compare.recorder import Evaluation, RunIdentity, RunRecorder
from dft_lightning.compare.records import Record
from dft_lightning.compare.starts import STARTS
from dft_lightning.data import ArithmeticRows, MixedRows
from dft_lightning.errors import InputError
from dft_lightning.metrics import LastNumber
from dft_lightning.modules import GenerationOptions
from forked import compare_forked, run_forked
from small_runs import TINY_ARITHMETIC, data_options, run_processes, trainer
from test_compare_report import fails
from test_compare_settings import BASE, ROWS, write

# -- the recorder --------------------------------------------------------------------------------------------------

EVALUATION = Evaluation(every_n_steps=2, num_samples=2, temperatures=(0.0, 0.5), limit=5, probability_rows=6)
DROPOUT = {**TINY_ARITHMETIC, "resid_pdrop": 0.2}


def rows_of(forgetting=True, data_seed=0, batch_size=4):
    sources = {
        "train": ArithmeticRows(16, min_digits=1, max_digits=3, seed=1),
        "validation": ArithmeticRows(7, part="held_out", seed=2),
        "test": ArithmeticRows(5, part="held_out", seed=3),
    }
    if forgetting:
        sources["forgetting"] = ArithmeticRows(6, min_digits=1, max_digits=1, seed=4)
    return InstructionDataModule(
        batch_size=batch_size, **data_options(tokenizer="asset://arithmetic-base", seed=data_seed, **sources)
    )


def fit(
    folder, loss, *, record=True, model=TINY_ARITHMETIC, steps=3, seed=0, forgetting=True, batch_size=4,
    dtype="float32", data=None, ckpt_path=None, watch=(), **options,
):  # fmt: skip
    pl.seed_everything(seed)
    short = GenerationOptions(max_new_tokens=6)
    module = CausalLMModule(
        model, loss=loss, optimizer={"lr": 1e-2}, evaluation={"generation": short}, loading={"dtype": dtype}
    )
    identity = RunIdentity("run", "loss", 1e-2, seed)
    recorder = RunRecorder(str(folder), identity, EVALUATION)
    run = trainer(
        max_steps=steps, max_epochs=-1, callbacks=[*([recorder] if record else []), *watch], log_every_n_steps=1,
        **options,
    )  # fmt: skip
    data = rows_of(forgetting, data_seed=seed, batch_size=batch_size) if data is None else data
    run.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, recorder


def read(folder):
    files = [
        json.loads((folder / name).read_text()) if (folder / name).exists() else None
        for name in ("fit.json", "test.json")
    ]
    return Record(folder, files[0]["run"], *files, True)


def test_what_is_recorded_of_a_fit(tmp_path):
    module, _ = fit(tmp_path, DFTLoss())
    record = read(tmp_path)
    assert record.fit["finished"]
    assert [entry["step"] for entry in record.history] == [0, 2, 3]
    names = {"greedy", "sampled", "pass_at_2", "loss", "nll", "perplexity", "token_accuracy", "entropy", "mean_weight"}
    for split in ("validation", "forgetting"):
        assert names <= set(record.history[-1][split])
    assert [step for step, _ in record.logged("train/grad_norm")] == [0, 1, 2]
    assert len(record.fit["steps"]) == 3
    # nll of the first five validation rows, by the model's own logits.
    data = rows_of()
    data.prepare_data()
    log_probs = []
    with torch.no_grad():
        for row in [data.splits.tokenized("validation")[i] for i in range(5)]:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
            logits = module.model.eval()(ids).logits[0, :-1].double().log_softmax(-1)
            log_probs.append(logits[labels != -100].gather(1, labels[labels != -100][:, None]))
    assert record.at_end("validation", "nll") == pytest.approx(-float(torch.cat(log_probs).mean()), rel=1e-5)


def test_probabilities_are_of_the_first_training_rows_before_and_after(tmp_path):
    module, _ = fit(tmp_path, CrossEntropyLoss())
    data = rows_of()
    data.prepare_data()
    before = CausalLMModule(TINY_ARITHMETIC)
    pl.seed_everything(0)
    before.configure_model()
    record = read(tmp_path)
    for when, model in (("before", before.model), ("after", module.model)):
        expected = []
        with torch.no_grad():
            for row in [data.splits.tokenized("train")[i] for i in range(6)]:
                ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
                probabilities = model.eval()(ids).logits[0, :-1].softmax(-1)
                expected.append(probabilities[labels != -100].gather(1, labels[labels != -100][:, None])[:, 0])
        np.testing.assert_allclose(record.probabilities[when], torch.cat(expected), rtol=1e-4)


def test_a_run_trains_the_same_with_and_without_its_recorder(tmp_path):
    weights = []
    for record in (True, False):
        module, _ = fit(tmp_path / str(record), DFTLoss(), record=record, model=DROPOUT)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


def test_hashes_tell_starts_rows_and_targets_apart(tmp_path):
    def hashes(name, *args, **options):
        fit(tmp_path / name, *args, **options)
        record = read(tmp_path / name).fit
        return {key: record[key] for key in ("initial_weights", "rows", "targets", "steps")}

    first = hashes("ce", CrossEntropyLoss())
    assert hashes("dft", DFTLoss(), forgetting=False) == first  # the loss and what is watched change nothing
    other = hashes("seed", CrossEntropyLoss(), seed=1)
    assert all(other[key] != first[key] for key in first)
    shorter = hashes("shorter", CrossEntropyLoss(), steps=2)
    assert shorter["steps"] == first["steps"][:2]
    assert shorter["initial_weights"] == first["initial_weights"]
    assert shorter["rows"] != first["rows"]


def test_what_is_recorded_of_a_test(tmp_path):
    """Of the base that half knows addition, so that some answers are right, and others with another temperature."""
    module = CausalLMModule("asset://arithmetic-base", evaluation={"generation": GenerationOptions(max_new_tokens=70)})
    data = rows_of()
    data.sources["test"] = ArithmeticRows(12, min_digits=4, part="held_out", seed=3)
    evaluation = Evaluation(num_samples=3, temperatures=(0.0, 0.5, 1.0), curve_samples=2)
    recorder = RunRecorder(str(tmp_path), RunIdentity("base"), evaluation)
    seen = []

    class Watch(pl.Callback):
        def on_test_batch_end(self, trainer, module, outputs, *args):
            seen.extend(outputs["predictions"])

    (values,) = trainer(callbacks=[recorder, Watch()]).test(module, datamodule=data, verbose=False)
    record = Record(tmp_path, {}, None, json.loads((tmp_path / "test.json").read_text()), True)
    seen.sort(key=lambda row: row["index"])
    assert record.by_problem("greedy").tolist() == [row["correct"] for row in seen]
    assert 0 < record.at_end("test", "greedy") == values["test/exact_match"] < 1
    sampled = record.test["correct"]["sampled"]
    assert 0 < sum(sampled) < 36
    assert sampled != record.test["correct"]["greedy"]
    assert record.at_end("test", "sampled") == pytest.approx(sum(sampled) / 36)
    assert record.at_end("test", "pass_at_3") == pytest.approx(sum(count > 0 for count in sampled) / 12)
    curve = dict(record.test["curve"])
    assert curve[0.0] == record.at_end("test", "greedy")
    assert curve[1.0] == record.at_end("test", "sampled")
    assert (curve[0.5] * 24) == pytest.approx(round(curve[0.5] * 24))
    assert record.at_end("test", "nll") == pytest.approx(values["test/nll"])


def test_the_last_weights_are_those_that_are_tested(tmp_path):
    module, recorder = fit(tmp_path, DFTLoss())
    again = CausalLMModule(
        TINY_ARITHMETIC, loss=DFTLoss(), evaluation={"generation": GenerationOptions(max_new_tokens=6)}
    )
    path = tmp_path / "last.ckpt"
    trainer(callbacks=[recorder]).test(again, datamodule=rows_of(), verbose=False, ckpt_path=path, weights_only=True)
    record = read(tmp_path)
    assert record.test["weights"] == record.fit["final_weights"] != record.fit["initial_weights"]
    weights = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (module, again)]
    assert torch.equal(*weights)
    assert "optimizer_states" not in torch.load(path, weights_only=True)


def test_what_a_loss_keeps_is_no_part_of_the_start(tmp_path):
    class Weighted(DFTLoss):
        def __init__(self):
            super().__init__()
            self.register_buffer("class_weights", torch.ones(3))

    for name, loss in (("plain", DFTLoss()), ("weighted", Weighted())):
        fit(tmp_path / name, loss, steps=1)
    plain, weighted = (read(tmp_path / name).fit["initial_weights"] for name in ("plain", "weighted"))
    assert plain == weighted


def test_forgetting_rows_without_answers(tmp_path):
    class NoAnswers(ArithmeticRows):
        def rows(self):
            for number, _ in super().rows():
                yield number, {"prompt": "1+1=", "completion": "||"}

    def run(**options):
        scored = {"generation": GenerationOptions(max_new_tokens=3), "answer_extractor": LastNumber()}
        module = CausalLMModule(TINY_ARITHMETIC, evaluation=scored)
        data = rows_of()
        data.sources["forgetting"] = NoAnswers(3)
        evaluation = Evaluation(num_samples=1, limit=2, probability_rows=2, **options)
        recorder = RunRecorder(str(tmp_path), RunIdentity("run", "loss", 1e-3), evaluation)
        trainer(max_steps=1, callbacks=[recorder], limit_val_batches=0).fit(module, datamodule=data)

    with pytest.raises(InputError, match="forgetting row 1: .* or set evaluation.forgetting_answers: false"):
        run()
    run(forgetting_answers=False)
    values = read(tmp_path).history[-1]["forgetting"]
    assert "nll" in values
    assert "greedy" not in values


def test_divergence_and_sources_of_forgetting_rows(tmp_path):
    """Against whole distributions in float64, of the weights that the run began with and of those it ended with."""
    parts = {
        "easy": ArithmeticRows(3, min_digits=1, max_digits=1, seed=4),
        "hard": ArithmeticRows(2, min_digits=2, seed=5),
    }
    data = rows_of()
    data.sources["forgetting"] = MixedRows(parts)
    module, _ = fit(tmp_path, DFTLoss(), data=data, dtype="float64", precision="64-true", model=DROPOUT)
    start = CausalLMModule(DROPOUT, loading={"dtype": "float64"})
    pl.seed_everything(0)
    start.configure_model()
    expected = {name: [] for name in parts}
    for i, row in enumerate(data.splits.tokenized("forgetting")[i] for i in range(5)):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        with torch.no_grad():
            before, after = (each.model.eval()(ids).logits[0, :-1].double() for each in (start, module))
        before, after, target = (each[labels != -100] for each in (before, after, labels))
        kl = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1)
        nll = -after.log_softmax(-1).gather(1, target[:, None])[:, 0]
        expected["easy" if i < 3 else "hard"] += zip(nll, after.argmax(-1) == target, kl, strict=True)
    first, last = (read(tmp_path).history[i]["forgetting"] for i in (0, -1))
    assert abs(first["kl"]) < 1e-12 < last["kl"]
    for name, tokens in expected.items():
        for value, column in zip(("nll", "token_accuracy", "kl"), zip(*tokens, strict=True), strict=True):
            assert last[f"{value}/{name}"] == pytest.approx(float(np.mean(column)), rel=1e-9)
    every = [kl for tokens in expected.values() for _, _, kl in tokens]
    assert last["kl"] == pytest.approx(float(np.mean(every)), rel=1e-9)
    evaluation = Evaluation(limit=2, num_samples=1, probability_rows=2, forgetting_kl=False)
    plain = RunRecorder(str(tmp_path / "plain"), RunIdentity("run"), evaluation)
    fit(tmp_path / "plain", DFTLoss(), record=False, steps=1, watch=[plain])
    assert "kl" not in read(tmp_path / "plain").history[-1]["forgetting"]


def test_runs_that_begin_alike_score_its_answers_once(tmp_path, monkeypatch):
    """To the records that each would have alone; another start, of another seed or on other rows, is scored anew."""
    counted = []
    count = recorder.count_correct
    monkeypatch.setattr(recorder, "count_correct", lambda *a, **k: counted.append(k["split"]) or count(*a, **k))

    def scored(name, loss, **options):
        counted.clear()
        fit(tmp_path / name, loss, steps=1, **options)
        return counted.count("validation"), counted.count("forgetting")

    assert scored("alone", DFTLoss()) == (4, 4)  # greedy and sampled, before and after
    monkeypatch.setenv(STARTS, str(tmp_path / "starts"))
    assert scored("first", CrossEntropyLoss()) == (4, 4)
    assert scored("second", DFTLoss()) == (2, 2)
    assert scored("third", DFTLoss(), seed=1) == (4, 4)
    other = rows_of()
    other.sources["validation"] = ArithmeticRows(7, part="held_out", seed=9)
    assert scored("fourth", DFTLoss(), data=other) == (4, 2)
    assert read(tmp_path / "second").history == read(tmp_path / "alone").history
    monkeypatch.setitem(globals(), "EVALUATION", replace(EVALUATION, num_samples=3))
    assert scored("more", DFTLoss()) == (3, 3)  # one greedily is known
    for file in (tmp_path / "starts").iterdir():
        file.write_text("{")
    with pytest.raises(InputError, match="starts/.*: broken record"):
        scored("fifth", DFTLoss())


class Stops(pl.Callback):
    """Ends a run in its fourth step."""

    def __init__(self, by):
        self.by = by

    def on_before_optimizer_step(self, trainer, *args):
        if trainer.global_step == 3:
            raise self.by


def test_an_interrupted_run_goes_on_to_the_same_records(tmp_path):
    """From its last evaluation, within an epoch and an accumulated step's rows, with what is drawn after it."""
    options = {"steps": 5, "model": DROPOUT, "batch_size": 2, "accumulate_grad_batches": 2}
    fit(tmp_path / "whole", DFTLoss(), **options)
    with pytest.raises(SystemExit):
        fit(tmp_path / "part", DFTLoss(), watch=[Stops(KeyboardInterrupt())], **options)
    part = tmp_path / "part" / "part.ckpt"
    assert not read(tmp_path / "part").fit["finished"]
    fit(tmp_path / "part", DFTLoss(), ckpt_path=part, **options)
    whole, gone_on = (read(tmp_path / name).fit for name in ("whole", "part"))
    speed = ("train/tokens_per_second", "train/peak_memory_gib")
    for record in (whole, gone_on):
        assert record.pop("seconds") > 0
        record["logged"] = [(s, {k: v for k, v in values.items() if k not in speed}) for s, values in record["logged"]]
    assert gone_on == whole
    assert [entry["step"] for entry in whole["history"]] == [0, 2, 4, 5]
    saved = [np.load(tmp_path / name / "probabilities.npz") for name in ("whole", "part")]
    assert all(np.array_equal(saved[0][when], saved[1][when]) for when in ("before", "after"))
    assert not part.exists()


def test_a_recorded_run_goes_on_from_no_other_checkpoint(tmp_path):
    module, _ = fit(tmp_path / "plain", DFTLoss(), record=False, steps=1)
    module.trainer.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="goes on from its own part.ckpt alone"):
        fit(tmp_path / "recorded", DFTLoss(), ckpt_path=tmp_path / "other.ckpt")


def test_other_checkpoints_of_a_recorded_run_are_none_to_go_on_from(tmp_path):
    """They are saved at other moments, of which the record would be another."""
    each = pl.callbacks.ModelCheckpoint(tmp_path / "own", "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path / "run", DFTLoss(), watch=[each], enable_checkpointing=True)
    with pytest.raises(InputError, match="goes on from its own part.ckpt alone"):
        fit(tmp_path / "again", DFTLoss(), ckpt_path=tmp_path / "own" / "step=2.ckpt")


def test_a_run_that_met_an_error_begins_anew(tmp_path):
    with pytest.raises(RuntimeError, match="wrong"):
        fit(tmp_path, DFTLoss(), watch=[Stops(RuntimeError("wrong"))], steps=5)
    assert [entry["step"] for entry in read(tmp_path).history] == [0, 2]
    assert not (tmp_path / "part.ckpt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["hashers"].append(state["hashers"][0]), "part.ckpt is of 2 processes, and this run has 1"),
        (lambda state: state["run"].update(name="other"), "this part.ckpt is of other, and the run is run"),
    ],
)
def test_a_part_of_another_run_is_refused_and_stays(tmp_path, change, message):
    with pytest.raises(SystemExit):
        fit(tmp_path, DFTLoss(), watch=[Stops(KeyboardInterrupt())], steps=5)
    part = tmp_path / "part.ckpt"
    checkpoint = torch.load(part, weights_only=True)
    change(checkpoint["callbacks"]["RunRecorder"])
    torch.save(checkpoint, part)
    with pytest.raises(InputError, match=message):
        fit(tmp_path, DFTLoss(), steps=5, ckpt_path=part)
    assert part.exists()


def test_forgetting_rows_are_of_no_source_of_other_splits(tmp_path):
    data = rows_of()
    data.sources["train"] = MixedRows({"clean": ArithmeticRows(8, seed=1), "other": ArithmeticRows(8, seed=2)})
    fit(tmp_path, DFTLoss(), data=data, steps=1)
    assert not [name for name in read(tmp_path).history[-1]["forgetting"] if "/" in name]


def test_two_processes_record_what_one_does(tmp_path, monkeypatch):
    """Rows that do not divide: 5 test problems, 5 of 7 validation rows. Samples are drawn anew on each rank."""
    module, recorder = fit(tmp_path / "one", DFTLoss(), precision="64-true", dtype="float64")
    trainer(callbacks=[recorder], precision="64-true").test(module, datamodule=rows_of(), verbose=False)
    monkeypatch.setenv(STARTS, str(tmp_path / "starts"))
    run_processes("two_recorder.py", str(tmp_path / "two"))
    assert len(list((tmp_path / "starts").iterdir())) == 4  # greedy and sampled, of two splits
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    for split in ("validation", "forgetting"):
        for name in ("nll", "loss", "entropy", "mean_weight", "token_accuracy", "target_tokens", "greedy"):
            found, expected = (np.array([y for _, y in record.curve(split, name)]) for record in (two, one))
            np.testing.assert_allclose(found, expected, rtol=1e-9, err_msg=name)
    for when in ("before", "after"):
        np.testing.assert_allclose(sorted(two.probabilities[when]), sorted(one.probabilities[when]), rtol=1e-5)
    assert two.by_problem("greedy").tolist() == one.by_problem("greedy").tolist()
    assert two.fit["initial_weights"] == one.fit["initial_weights"]


def test_a_recorder_refuses_what_it_cannot_record(tmp_path):
    module = CausalLMModule(TINY_ARITHMETIC)
    recorder = RunRecorder(str(tmp_path), RunIdentity("x", "x"), EVALUATION)
    without = InstructionDataModule(ArithmeticRows(4), text={"tokenizer": "asset://arithmetic-base"})
    with pytest.raises(InputError, match="needs validation rows: set data.validation"):
        trainer(callbacks=[recorder]).fit(module, datamodule=without)


# -- processes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "status", "message"),
    [
        ("Epoch 0\rEpoch 1\nerror: data.train: no such file\n", 2, "data.train: no such file"),
        ("Traceback\n  File\nRuntimeError: bad\nException ignored\n", 1, "RuntimeError: bad"),
        ("torch.OutOfMemoryError: CUDA out of memory\n", 1, "torch.OutOfMemoryError: CUDA out of memory"),
        ("step 3\n", -9, "ended by SIGKILL; last line: step 3"),
        ("step 3\n", 1, "ended with status 1; last line: step 3"),
        ("", 3, "ended with status 3, and wrote nothing"),
        ("step 3\n", None, "stopped; last line: step 3"),
        ("error: old\n\n--- goes on ---\nstep 3\n", -9, "ended by SIGKILL; last line: step 3"),
    ],
)
def test_last_error(log, status, message):
    assert last_error(log, status) == message


def test_jobs_share_cores_and_gpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    environments = job_environments(2)
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["0,2", "1,3"]
    assert [e["OMP_NUM_THREADS"] for e in environments] == ["4", "4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in job_environments(3)] == ["5"] * 3
    assert "OMP_NUM_THREADS" not in job_environments(1)[0]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert job_environments(2)[0]["OMP_NUM_THREADS"] == "3"


def test_jobs_that_want_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    check_jobs(2, {"devices": 2})
    check_jobs(4, {"devices": "auto"})
    with pytest.raises(InputError, match="--jobs 4: trainer.devices is 2, and 4 GPUs are visible"):
        check_jobs(4, {"devices": 2})


def test_runs_of_a_call_are_given_what_they_share(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(_Children, "run", lambda self, command, log, environment: given.append(environment) or 0)
    (failure,) = execute([Run(RunIdentity("base"), tmp_path, {})], 1, "sweep", 0, Clock(tmp_path), {STARTS: "here"})
    assert failure.message == "test left no record"
    assert [environment[STARTS] for environment in given] == ["here"]


def test_ending_children_ends_theirs_too(tmp_path):
    """A process that started another: both are gone, and nothing begins afterwards."""
    children = _Children(os.open(tmp_path, os.O_RDONLY))
    script = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    log = tmp_path / "log"
    with log.open("w") as output:
        thread = threading.Thread(target=children.run, args=([sys.executable, "-c", script], output, dict(os.environ)))
        thread.start()
        deadline = time.time() + 30
        while not log.read_text().strip() and time.time() < deadline:
            time.sleep(0.05)
        children.end_all()
        thread.join(timeout=30)
        assert not thread.is_alive()
        assert children.run(["true"], output, dict(os.environ)) != 0
    grandchild = Path(f"/proc/{int(log.read_text())}/stat")
    deadline = time.time() + 30  # a busy machine takes its time over a signal
    while not _has_ended(grandchild) and time.time() < deadline:
        time.sleep(0.05)
    assert _has_ended(grandchild)


def _has_ended(stat: Path) -> bool:
    try:
        return stat.read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# -- the whole command ---------------------------------------------------------------------------------------------

LOSSES = {"CE": "CrossEntropyLoss", "DFT": "DFTLoss", "broken": "failing_loss.FailingLoss"}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of two losses and one that fails, run once."""
    folder = tmp_path_factory.mktemp("compare")
    out = folder / "out"
    path = write(folder, losses=LOSSES, learning_rates=[1e-3])
    old = dict(os.environ)
    os.environ |= {"PYTHONPATH": str(ROOT / "tests"), "HF_DATASETS_CACHE": str(folder / "cache")}
    try:
        status = compare_forked(["--config", str(path), "--output", str(out), "--jobs", "2"])
        times = {file: file.stat().st_mtime_ns for file in sorted(out.glob("runs/*/*.json"))}
        yield path, out, status, times
    finally:
        os.environ.clear()
        os.environ.update(old)


def test_a_failed_run_is_reported_and_the_rest_go_on(compared):
    _, out, status, times = compared
    assert status == 1
    names = {"base", "ce-lr0.001-seed0", "dft-lr0.001-seed0", "broken-lr0.001-seed0"}
    assert {folder.name for folder in (out / "runs").iterdir()} == names
    assert {file.parent.name for file in times if file.name == "test.json"} == names - {"broken-lr0.001-seed0"}
    text = (out / "report.md").read_text()
    assert "| broken-lr0.001-seed0 | fit: RuntimeError: this loss fails on purpose |" in text
    assert "| CE | 0.001 |" in text


def test_runs_had_the_same_start_rows_and_targets(compared):
    out = compared[1]
    text = (out / "report.md").read_text()
    assert text.count("| the same |") == 5  # config, problems, weights, rows, targets
    fits = [
        json.loads((out / "runs" / name / "fit.json").read_text()) for name in ("ce-lr0.001-seed0", "dft-lr0.001-seed0")
    ]
    base = json.loads((out / "runs" / "base" / "test.json").read_text())
    assert fits[0]["initial_weights"] == fits[1]["initial_weights"] == base["weights"]
    assert fits[0]["steps"] == fits[1]["steps"]
    assert fits[0]["history"][0] == fits[1]["history"][0] | {"validation": fits[0]["history"][0]["validation"]}
    assert fits[0]["history"][-1]["validation"]["nll"] != fits[1]["history"][-1]["validation"]["nll"]


def test_how_long_it_took(compared):
    """Two runs at once: by the clock it took longer than any, and models were loaded beside what is timed."""
    out = compared[1]
    (call,) = json.loads((out / "calls.json").read_text())
    names = ("fit.json", "test.json")
    seconds = [json.loads(file.read_text())["seconds"] for name in names for file in out.glob(f"runs/*/{name}")]
    assert len(seconds) >= 5
    assert 0 < max(seconds) < call["ended"] - call["began"]
    assert sum(seconds) < 2 * (call["ended"] - call["began"])
    assert "by the clock**: " in (out / "report.md").read_text()


def test_a_run_can_be_repeated_by_hand(compared):
    """By its own config, in another folder: the same record but for the time."""
    out = compared[1]
    folder = out / "runs" / "dft-lr0.001-seed0"
    again = out.parent / "again"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["trainer"]["default_root_dir"] = str(again)
    config["trainer"]["callbacks"][-1]["init_args"]["folder"] = str(again)
    again.mkdir()
    (again / "config.yaml").write_text(yaml.safe_dump(config))
    assert run_forked(["fit", "--config", str(again / "config.yaml")], str(again / "log"), dict(os.environ)) == 0
    first, second = (json.loads((where / "fit.json").read_text()) for where in (folder, again))
    assert first["history"] == second["history"]
    assert first["targets"] == second["targets"]


def test_a_second_call_runs_what_is_new_and_nothing_twice(compared):
    path, out, _, times = compared
    config = yaml.safe_load(path.read_text())
    del config["losses"]["broken"], config["losses"]["CE"]
    path.write_text(yaml.safe_dump({**config, "seeds_at_best": [1]}))
    assert compare_forked(["--config", str(path), "--output", str(out), "--jobs", "2"]) == 0
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert (out / "runs" / "dft-lr0.001-seed1" / "test.json").is_file()
    text = (out / "report.md").read_text()
    first, second = json.loads((out / "calls.json").read_text())
    assert first["ended"] < second["began"] < second["ended"]
    assert "in 2 calls together" in text
    assert "- **seeds**: 0 at every rate, 1 at the best" in text
    # The model is drawn at random, so each seed has another start: that is right, but there is no one base.
    assert "NOT COMPARABLE" not in text
    assert "| DFT | base model |" not in text
    rows = [line for line in text.splitlines() if line.startswith("| DFT | 0.001 |")]
    assert rows[0].endswith("| too few seeds |")
    assert rows[0].split(" | ")[-2].count(", ") == 1  # each of two


def test_rows_are_scored_where_a_loss_reads_it(tmp_path, monkeypatch, capsys):
    """Once, by the model that every run begins with, and for every run; a second call takes them as they are."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    ran, shared = [], set()

    def execute(runs, *args):
        """Scores here, and stops before the first run."""
        ran.append([run.identity.name for run in runs if run.commands()])
        shared.add(args[-1][STARTS])
        assert all(map(os.path.isdir, shared))
        if ran[-1] != ["scored"]:
            raise KeyboardInterrupt
        (command,) = runs[0].commands().values()
        (runs[0].folder / "score.log").touch()
        assert score(command[1:]) == 0
        return []

    monkeypatch.setattr("dft_lightning.compare.execute.execute", execute)
    model = {**BASE["model"], "model": "asset://arithmetic-base"}
    losses = {"CE": "CrossEntropyLoss", "PSFT": "ProximalLoss"}
    path = write(tmp_path, {**BASE, "model": model}, losses=losses, learning_rates=[1e-3])
    out, given = tmp_path / "out", ["--config", str(path), "--output", str(tmp_path / "out")]
    assert main([*given, "--print_commands"]) == 0
    (line,) = capsys.readouterr().out.strip().splitlines()
    assert line.endswith(f"score --config {out}/scored/config.yaml --output {out}/scored/rows")
    runs = ["base", "ce-lr0.001-seed0", "psft-lr0.001-seed0"]
    for scored in (["scored"], []):  # by the first call, and not by the second
        ran.clear()
        shared.clear()
        assert main(given) != 0
        assert ran == [scored, runs] if scored else ran == [runs]
        assert len(shared) == 1  # of a call, with which it ends
        assert not any(map(os.path.isdir, shared))
    configs = [yaml.safe_load(config.read_text()) for config in out.glob("runs/*/config.yaml")]
    assert len(configs) == 3
    for split in ("train", "validation", "test"):
        assert {config["data"][split] for config in configs} == {f"{out}/scored/rows/{split}"}
    changed = {**BASE, "model": model, "data": {**BASE["data"], "train": {**ROWS, "init_args": {"num_rows": 5}}}}
    write(tmp_path, changed, losses=losses, learning_rates=[1e-3])
    capsys.readouterr()
    assert "out/scored was run with another config (data.train" in fails(capsys, *given)


def test_a_changed_config_is_noticed(compared, capsys):
    path, out, _, times = compared
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**config, "overrides": {"model": {"optimizer": {"weight_decay": 0.25}}}}))
    message = fails(capsys, "--config", path, "--output", out)
    key = "model.optimizer.init_args.weight_decay"
    assert f"was run with another config ({key}: 0.01 there, 0.25 now): choose another --output" in message
    assert {file: file.stat().st_mtime_ns for file in times} == times
    path.write_text(yaml.safe_dump(config))


def test_a_call_that_runs_nothing_takes_no_time(compared, monkeypatch):
    monkeypatch.setattr("dft_lightning.compare.report.all_plots", lambda findings: [])
    path, out, _, _ = compared
    calls = (out / "calls.json").read_text()
    assert main(["--config", str(path), "--output", str(out)]) == 0
    assert (out / "calls.json").read_text() == calls


def test_a_run_that_was_killed_goes_on_from_its_last_evaluation(compared, monkeypatch, capsys):
    _, out, _, _ = compared
    folder = out / "runs" / "broken-lr0.001-seed0"
    part = folder / "part.ckpt"
    assert not part.exists()  # it had met an error
    path = write(out.parent, losses={"broken": LOSSES["broken"]}, learning_rates=[1e-3])
    monkeypatch.setenv("AFTER_TWO_STEPS", "kill")
    assert compare_forked(["--config", str(path), "--output", str(out)]) != 0
    begun = (folder / "fit.log").read_text()
    assert "goes on" not in begun
    capsys.readouterr()
    assert main(["--config", str(path), "--output", str(out), "--print_commands"]) == 0
    assert f"fit --config {folder}/config.yaml --ckpt_path {part} && " in capsys.readouterr().out
    monkeypatch.setenv("AFTER_TWO_STEPS", "more")
    assert compare_forked(["--config", str(path), "--output", str(out)]) == 0
    log = (folder / "fit.log").read_text()
    assert log.startswith(begun)
    assert f"goes on after step 1, from {part}" in log
    gone_on, whole = (
        json.loads((out / "runs" / name / "fit.json").read_text()) for name in (folder.name, "ce-lr0.001-seed0")
    )
    for record in ("history", "targets", "steps", "final_weights"):  # the loss is cross-entropy, too
        assert gone_on[record] == whole[record]
    assert not part.exists()
