"""Answers of predict and test that are stopped: kept as they come, and the same command goes on with the others."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import torch

from dft_lightning import CausalLMModule
from dft_lightning.callbacks import PredictionWriter
from dft_lightning.errors import InputError
from dft_lightning.files import open_alone
from dft_lightning.models.generation import Completions
from dft_lightning.modules import GenerationOptions
from dft_lightning.modules.kept_answers import KeptAnswers
from small_runs import TINY_ARITHMETIC, run_processes, trainer
from test_telemetry import validation_data

pytestmark = pytest.mark.timeout(120)
SAMPLING = GenerationOptions(max_new_tokens=6, do_sample=True)


class Stops(Exception):
    pass


class Stopping(CausalLMModule):
    """Stops in the middle of a batch, ``after`` so many of them."""

    after: int | None = None
    asked: list[int] = []
    weights = 0

    def build_model(self):
        model, numbers = super().build_model(), torch.Generator().manual_seed(self.weights)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=numbers)
        return model


class Stopped(Completions):
    """Asked in place of the module's own."""

    def tokens(self, model, input_ids, *args):
        if Stopping.after is not None and len(Stopping.asked) >= Stopping.after:
            raise Stops("in the middle")
        Stopping.asked.append(len(input_ids))
        return super().tokens(model, input_ids, *args)


@pytest.fixture(autouse=True)
def goes_on():
    Stopping.asked, Stopping.after, Stopping.weights = [], None, 0


def predicted(path, running=None, *, seed=0, command="predict", generation=SAMPLING, **options):
    """The lines that 15 rows in batches of 4 give."""
    pl.seed_everything(seed, verbose=False)
    module = Stopping(TINY_ARITHMETIC, optimizer={"lr": 0.0}, evaluation={"generation": generation})
    module._completions.__class__ = Stopped
    data = validation_data(eval_batch_size=4)
    data.sources["predict"] = data.sources["test"] = data.sources["validation"]
    running = running or trainer(**options)
    running.callbacks.append(PredictionWriter(None if path is None else str(path)))
    getattr(running, command)(module, datamodule=data)
    return [json.loads(line) for line in path.open()] if path is not None and running.is_global_zero else []


def stopped(path, after, **options):
    Stopping.after = after
    with pytest.raises(Stops):
        predicted(path, **options)
    Stopping.asked, Stopping.after = [], None
    return sorted(path.parent.glob(f"{path.name}.*.partial"))


@pytest.mark.parametrize("command", ["predict", "test"])
def test_the_same_command_goes_on(command, tmp_path, caplog):
    whole = predicted(tmp_path / "whole.jsonl", command=command)
    Stopping.asked = []
    path = tmp_path / "p.jsonl"
    with caplog.at_level("INFO"):
        (kept,) = stopped(path, 2, command=command)
    assert f"8 answers are kept in {kept}: the same command goes on with the others" in caplog.text
    assert not path.exists()
    assert len(kept.read_text().splitlines()) == 8
    assert stopped(path, 1, command=command) == [kept]  # again, and further on
    assert len(kept.read_text().splitlines()) == 12
    assert predicted(path, command=command) == whole
    assert Stopping.asked == [3]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.jsonl", "whole.jsonl"]


def test_a_last_line_that_was_cut_is_answered_again(tmp_path):
    whole = predicted(tmp_path / "whole.jsonl")
    path = tmp_path / "p.jsonl"
    for cut in (1, 20):
        Stopping.asked = []
        (kept,) = stopped(path, 2)
        kept.write_bytes(kept.read_bytes()[:-cut])
        stopped(path, 0)
        assert kept.read_bytes().endswith(b"}\n")
        assert predicted(path) == whole
        assert Stopping.asked == [4, 4, 3]  # the batch that is not whole


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"weights": 1},
        {"generation": GenerationOptions(max_new_tokens=5, do_sample=True)},
        {"generation": GenerationOptions(max_new_tokens=6)},
        {"precision": "bf16-mixed"},
    ],
)
def test_what_answers_depend_on_is_asked_anew(other, tmp_path):
    other = dict(other)
    path = tmp_path / "p.jsonl"
    (kept,) = stopped(path, 2)
    Stopping.weights = other.pop("weights", 0)
    predicted(path, **other)
    assert Stopping.asked == [4, 4, 4, 3]
    assert list(tmp_path.glob("*.partial")) == [kept]  # not lost either


def test_other_prompts_are_asked_anew(tmp_path):
    path = tmp_path / "p.jsonl"
    (kept,) = stopped(path, 2)
    lines = [json.loads(line) for line in kept.open()]
    lines[5]["prompt"][0] += 1
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    predicted(path)
    assert Stopping.asked == [4, 4, 3]


def test_beside_the_runs_folders_without_a_path(tmp_path):
    Stopping.after = 1
    with pytest.raises(Stops):
        predicted(None, default_root_dir=tmp_path)
    (kept,) = tmp_path.iterdir()
    assert kept.match("predictions.jsonl.*.partial")


def test_where_nothing_can_be_kept_the_answers_come_all_the_same(tmp_path):
    path = tmp_path / "p.jsonl"
    (kept,) = stopped(path, 1)
    with open_alone(kept), pytest.warns(UserWarning, match=f"not kept as they come \\({kept}: another process answers"):
        whole = predicted(path)
    assert kept.exists()
    kept.unlink()
    kept.mkdir()
    with pytest.warns(UserWarning, match=f"not kept as they come \\({kept}: Is a directory"):
        assert predicted(path) == whole


def test_a_run_of_fewer_rows_leaves_the_others_answers(tmp_path):
    path = tmp_path / "p.jsonl"
    (kept,) = stopped(path, 3)
    assert len(predicted(path, limit_predict_batches=1)) == 4
    assert kept.exists()
    Stopping.asked = []
    assert len(predicted(path)) == 15
    assert len(Stopping.asked) < 4
    assert not kept.exists()


def test_a_full_disk_has_one_message(tmp_path, monkeypatch):
    def full(file, lines):
        file.write(b"half a li")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dft_lightning.modules.kept_answers.add_lines", full)
    with pytest.raises(InputError, match="partial cannot be written: No space left on device: give PredictionWriter"):
        predicted(tmp_path / "p.jsonl")


class Generating(Stopping):
    """Of ones own, which the file's name could say nothing of."""

    def generate(self, input_ids, attention_mask, options):
        return ["7"] * len(input_ids)


def test_of_a_generate_of_ones_own_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("test_kept_answers.Stopping", Generating)
    monkeypatch.setattr(KeptAnswers, "__init__", lambda *args: pytest.fail("kept"))
    assert {line["completion"] for line in predicted(tmp_path / "p.jsonl")} == {"7"}


STRATEGIES = ("ddp", "fsdp2")


def test_two_processes_go_on(tmp_path):
    """The same lines as of one process that was never stopped; and where one rank lacks an answer, both ask.

    Of the first batches, a line of the second rank's is taken away.
    """
    run_processes("two_kept_answers.py", str(tmp_path), *STRATEGIES, timeout=90)
    whole = predicted(tmp_path / "whole.jsonl")
    for name in STRATEGIES:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(found["kept"]) == 7
        assert sorted(sum(rows) for rows in found["asked"]) == [7, 8]
        assert [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] == whole
        assert not list(tmp_path.glob("*.partial"))


def test_a_module_of_ones_own_is_left_alone(tmp_path):
    """Without weights that are known, nothing is kept."""

    class Own(pl.LightningModule):
        def predict_step(self, batch, batch_idx):
            return [{"index": batch_idx, "prompt": "", "completion": str(batch.item()), "answer": None}]

    path = tmp_path / "p.jsonl"
    running = pl.Trainer(logger=False, enable_checkpointing=False, callbacks=[PredictionWriter(str(path))])
    running.predict(Own(), torch.utils.data.DataLoader(torch.arange(3), batch_size=1))
    assert len(path.read_text().splitlines()) == 3
