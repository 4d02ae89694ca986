"""What ``test`` makes of ordinary rows, and metrics of one's own."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch.utils.data import DataLoader
from torchmetrics import Metric
from torchmetrics.text import CHRFScore

from conftest import TINY_LLAMA
from dft_lightning import CausalLMModule, InstructionDataModule
from dft_lightning.errors import InputError
from dft_lightning.fit import main
from dft_lightning.metrics import LastNumber, TargetMetric, TokenMetrics
from dft_lightning.metrics.own import metrics_by_name, numbers, of_texts
from dft_lightning.modules.options import EvaluationOptions
from dft_lightning.modules.telemetry import Evaluation
from small_runs import arithmetic_data, run_processes

TINY = {**TINY_LLAMA, "vocab_size": 20}
ROWS = {
    "prompt_completion": [{"prompt": f"{i}+1=", "completion": f"{i}+1+0={i + 1}"} for i in range(6)],
    "messages": [
        {"messages": [{"role": "user", "content": f"{i}+1="}, {"role": "assistant", "content": f"{i}|"}]}
        for i in range(6)
    ],
    "alpaca": [{"instruction": f"{i}+2=", "input": "", "output": "c"} for i in range(6)],
    "text": [{"text": f"{i}+1={i + 1}"} for i in range(6)],
}


class Unlikely(TargetMetric):
    """Share of targets whose probability is below a bound, and their mean entropy."""

    needs = ("entropy",)

    def __init__(self, below: float = 0.05, **kwargs):
        super().__init__(**kwargs)
        self.below = below
        for name in ("found", "entropy_sum"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("targets", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, output, batch):
        self.found += (output.log_prob.exp() < self.below).sum()
        self.entropy_sum += output.entropy.double().sum()
        self.targets += len(output.log_prob)

    def compute(self):
        return {"share": self.found / self.targets, "entropy": self.entropy_sum / self.targets}


class Longer(Metric):
    """Share of completions that are longer than the answer."""

    def __init__(self):
        super().__init__()
        self.longer: list[bool] = []

    def update(self, preds, target):
        self.longer += [len(a) > len(b) for a, b in zip(preds, target, strict=True)]

    def compute(self):
        return sum(self.longer) / len(self.longer)

    def reset(self):
        super().reset()
        self.longer = []


class NoCompute(Metric):
    def update(self, preds, target):
        pass


class NoUpdate(TargetMetric):
    def compute(self):
        return 0.0


def run_of(stage, rows, tmp_path, evaluation=None, **options):
    """A fit or test of a tiny model on rows of an ordinary kind; returns the trainer."""
    torch.manual_seed(0)
    module = CausalLMModule(TINY, evaluation={"generation": {"max_new_tokens": 6}, **(evaluation or {})})
    data = InstructionDataModule(
        rows, test=rows, text={"tokenizer": "asset://arithmetic-base"}, batch_size=2, **options
    )
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        default_root_dir=tmp_path,
    )
    getattr(trainer, stage)(module, datamodule=data, **({"verbose": False} if stage == "test" else {}))
    return trainer


# -- ordinary rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["prompt_completion", "messages", "alpaca"])
def test_rows_without_an_extractor_are_scored_as_texts(form, tmp_path):
    values = run_of("test", ROWS[form], tmp_path).callback_metrics
    assert {"test/nll", "test/exact_match", "test/chrf"} <= set(values)
    assert 0 <= values["test/chrf"] <= 1


def test_plain_text_has_token_metrics_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        values = run_of("test", ROWS["text"], tmp_path).callback_metrics
    assert "test/nll" in values
    assert not {"test/exact_match", "test/chrf"} & set(values)
    assert caplog.messages.count("test: token metrics alone, as the rows have no prompts to generate answers to") == 1


@pytest.mark.parametrize("stage", ["fit", "test"])
@pytest.mark.parametrize(
    ("rows", "evaluation", "message"),
    [
        (ROWS["text"], {"answer_extractor": LastNumber()}, r"test row 1 has no final assistant turn"),
        (ROWS["text"], {"metrics": {"longer": Longer()}}, r"test row 1 has no final assistant turn"),
        (ROWS["alpaca"], {"answer_extractor": LastNumber()}, r"test row 1: LastNumber\(\) finds nothing in the answer"),
        ([*ROWS["alpaca"][:2], {"instruction": "1"}], {}, r"row 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_said_before_there_is_a_model(stage, rows, evaluation, message, tmp_path, monkeypatch):
    monkeypatch.setattr(CausalLMModule, "build_model", lambda self: pytest.fail("built"))
    with pytest.raises(InputError, match=message):
        run_of(stage, rows, tmp_path, evaluation)


def test_batches_of_ones_own_without_prompts_have_token_metrics(tmp_path):
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100, 2, 3]])}
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (values,) = trainer.test(CausalLMModule(TINY), DataLoader([batch], batch_size=None), verbose=False)
    assert "test/nll" in values
    assert "test/exact_match" not in values


# -- texts ---------------------------------------------------------------------------------------------------------


def chrf(texts, answers, order=6, words=2, beta=2.0):
    """chrF++ of a corpus by its definition (Popovic 2017): mean F over the orders of n-grams of characters, spaces left
    out, and of words."""

    def grams(items, n):
        return Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))

    scores = []
    for split, orders in ((lambda t: list(t.replace(" ", "")), order), (str.split, words)):
        for n in range(1, orders + 1):
            found = [(grams(split(a), n), grams(split(b), n)) for a, b in zip(texts, answers, strict=True)]
            match = sum(sum((a & b).values()) for a, b in found)
            of_texts, of_answers = (sum(sum(pair[i].values()) for pair in found) for i in (0, 1))
            precision, recall = match / of_texts if of_texts else 1e-16, match / of_answers if of_answers else 1e-16
            scores.append((1 + beta**2) * precision * recall / max(beta**2 * precision + recall, 1e-16))
    return sum(scores) / len(scores)


def test_chrf_is_that_of_its_definition():
    texts, answers = ["the cat sat", "a dog barks loud"], ["the cat sat on the mat", "the dog barks loud"]
    found = of_texts({"chrf": CHRFScore()}, texts, answers)
    assert found["chrf"] == pytest.approx(chrf(texts, answers), abs=1e-6)
    assert found["chrf"] != pytest.approx(chrf(texts, answers, words=0), abs=1e-3)


@pytest.mark.parametrize(
    ("name", "best"), [("BLEUScore", 1), ("SacreBLEUScore", 1), ("CHRFScore", 1), ("WordErrorRate", 0)]
)
def test_equal_texts_have_the_best_of_each_score(name, best):
    texts = ["the cat sat on the mat today", "a dog barks at the cat there"]
    assert of_texts(metrics_by_name({"x": name}), texts, texts)["x"] == pytest.approx(best)


def test_a_metric_within_another_exchanges_nothing_either():
    metric = metrics_by_name({"x": CHRFScore() + CHRFScore()})["x"]
    inner = [each for each in metric.modules() if isinstance(each, Metric)]
    assert len(inner) == 3
    assert not any(each.distributed_available_fn() for each in inner)


def test_values_of_a_run_are_those_of_its_predictions(tmp_path):
    """Of all rows at once, though batches are of two and one row makes the last even."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS["prompt_completion"][:5]))
    config = {
        "model": {"model": "asset://arithmetic-base", "evaluation": {"generation": {"max_new_tokens": 12}}},
        "data": {"test": str(path), "batch_size": 2},
        "trainer": {"accelerator": "cpu", "devices": 1, "default_root_dir": str(tmp_path), "logger": False},
    }
    metrics = {
        "chrf": "CHRFScore",
        "rouge": {"class_path": "ROUGEScore", "init_args": {"rouge_keys": "rougeL"}},
        "longer": "test_own_metrics.Longer",
    }
    config["model"]["evaluation"]["metrics"] = metrics
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli = main(["test", "--config", str(tmp_path / "config.yaml")])
    values = cli.trainer.callback_metrics
    records = [json.loads(line) for line in (Path(cli.trainer.log_dir) / "test_predictions.jsonl").open()]
    texts, answers = ([record[name] for record in records] for name in ("completion", "answer"))
    assert len(records) == 5
    assert values["test/chrf"].item() == pytest.approx(chrf(texts, answers), abs=1e-6)
    assert values["test/longer"].item() == sum(len(a) > len(b) for a, b in zip(texts, answers, strict=True)) / 5
    assert {"test/rouge/rougeL_fmeasure", "test/rouge/rougeL_recall"} <= set(values)
    same = [a.strip() == b.strip() for a, b in zip(texts, answers, strict=True)]
    assert values["test/exact_match"].item() == sum(same) / 5
    assert [record["correct"] for record in records] == same


def test_exact_match_is_the_share_of_right_answers():
    answers, evaluation = ["ab", "bc", "cd", "de"], Evaluation(EvaluationOptions())
    for index, text in ((2, "cd"), (0, "ab "), (3, "dx"), (1, "bc")):
        evaluation.score([{"index": index, "completion": text, "answer": answers[index]}])
    values = evaluation.collect_texts(1)
    assert values["exact_match"] == 3 / 4
    assert values["chrf"] == pytest.approx(chrf(["ab ", "bc", "cd", "dx"], answers), abs=1e-6)
    assert evaluation.collect_texts(1) == {}


def test_an_extractor_leaves_further_metrics_to_who_asks(tmp_path):
    values = run_of("test", ROWS["prompt_completion"], tmp_path, {"answer_extractor": LastNumber()}).callback_metrics
    assert "test/exact_match" in values
    assert "test/chrf" not in values


def test_a_test_that_was_left_in_the_middle_leaves_nothing_behind(tmp_path, monkeypatch):
    whole = run_of("test", ROWS["prompt_completion"], tmp_path)
    module, data = whole.lightning_module, whole.datamodule
    before = {name: value.item() for name, value in whole.callback_metrics.items()}
    generate, calls = module.generate, []

    def fails_later(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("left")
        return generate(*args)

    monkeypatch.setattr(module, "generate", fails_later)
    with pytest.raises(RuntimeError, match="left"):
        whole.test(module, datamodule=data, verbose=False)
    (again,) = whole.test(module, datamodule=data, verbose=False)
    assert again["test/target_tokens"] == 6 * 8
    assert again == pytest.approx(before)


# -- target tokens -------------------------------------------------------------------------------------------------


def test_a_metric_of_target_tokens_reads_what_the_head_has_anyway(tmp_path, monkeypatch):
    forwards = []
    own = CausalLMModule.token_output
    monkeypatch.setattr(CausalLMModule, "token_output", lambda *a, **k: forwards.append(1) or own(*a, **k))
    trainer = run_of("test", ROWS["text"], tmp_path, {"metrics": {"unlikely": Unlikely(below=0.052)}})
    assert len(forwards) == 3  # of six rows, two at a time
    values, module = trainer.callback_metrics, trainer.lightning_module
    expected, entropies = [], []
    for batch in trainer.datamodule.test_dataloader():
        with torch.no_grad():
            log_probs = module(batch["input_ids"], batch["attention_mask"])[:, :-1].double().log_softmax(-1)
        targets = batch["labels"][:, 1:]
        kept = targets != -100
        expected += log_probs[kept].gather(1, targets[kept].unsqueeze(1)).exp().flatten().tolist()
        entropies += (-(log_probs.exp() * log_probs).sum(-1)[kept]).tolist()
    share = sum(p < 0.052 for p in expected) / len(expected)
    assert 0 < share < 1
    assert values["test/unlikely/share"].item() == pytest.approx(share)
    assert values["test/unlikely/entropy"].item() == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)


def test_validation_has_it_for_each_of_its_sets_apart(tmp_path):
    rows = ROWS["prompt_completion"]
    options = {"validation": rows[:4], "forgetting": ROWS["alpaca"][:2]}
    values = run_of("fit", rows, tmp_path, {"metrics": {"all": Counting()}}, **options).callback_metrics
    for stage, of_stage in (("val", rows[:4]), ("forgetting", ROWS["alpaca"][:2])):
        assert values[f"{stage}/all"] == values[f"{stage}/target_tokens"], of_stage
    assert values["val/all"] != values["forgetting/all"]


class Counting(TargetMetric):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_state("targets", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, output, batch):
        self.targets += len(output.log_prob)

    def compute(self):
        return self.targets


def test_two_processes_have_the_values_of_one(tmp_path):
    """A metric of tokens is summed over them, and one of texts is given all of them in the order of the rows."""
    config = {
        "model": {
            "model": "asset://arithmetic-base",
            "evaluation": {
                "generation": {"max_new_tokens": 12},
                "metrics": {"chrf": "CHRFScore", "unlikely": "test_own_metrics.Unlikely"},
            },
        },
        "data": {"test": {"class_path": "ArithmeticRows", "init_args": {"num_rows": 7}}, "batch_size": 2},
        "trainer": {"accelerator": "cpu", "default_root_dir": str(tmp_path), "enable_progress_bar": False},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    one = main(["test", "--config", str(path), "--trainer.devices", "1"]).trainer.callback_metrics
    run_processes("two_command.py", "test", "--config", str(path), "--trainer.devices=2", "--trainer.strategy=ddp")
    rows = (tmp_path / "lightning_logs" / "version_1" / "metrics.csv").read_text().splitlines()
    two = dict(zip(rows[0].split(","), rows[1].split(","), strict=True))
    for name in ("chrf", "unlikely/share", "unlikely/entropy", "exact_match", "nll"):
        assert float(two[f"test/{name}"]) == pytest.approx(one[f"test/{name}"].item(), rel=1e-6), name


def test_sums_keep_their_digits_in_half_precision():
    module = CausalLMModule(TINY, evaluation={"metrics": {"all": Counting(), "unlikely": Unlikely()}}).bfloat16()
    states = module.eval_metrics.own["val"]["unlikely"]
    assert states.entropy_sum.dtype == torch.float64
    assert isinstance(module.eval_metrics.telemetry("val").tokens, TokenMetrics)


# -- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"x": "CHRFScor"}, r"evaluation\.metrics\.x: torchmetrics has no 'CHRFScor'; did you mean CHRFScore\?"),
        ({"x": "no_such_module.Metric"}, r"evaluation\.metrics\.x: cannot import 'no_such_module\.Metric'"),
        ({"x": "json.JSONDecoder"}, r"evaluation\.metrics\.x: json\.JSONDecoder is no torchmetrics\.Metric"),
        ({"x": "test_own_metrics.NoCompute"}, r"x: NoCompute must define compute"),
        ({"x": "test_own_metrics.NoUpdate"}, r"x: NoUpdate must define update"),
        ({"x": {"class_path": "CHRFScore", "init_args": {"ordr": 2}}}, r"x: CHRFScore: Unexpected keyword arg"),
        ({"x": "torchmetrics.text.Perplexity"}, r"x: Perplexity takes no lists of texts.*TargetMetric"),
        ({"x": {"class": "CHRFScore"}}, r"x: expected a class path"),
        ({"x": 3}, r"x: expected a class path, class_path and init_args, or a metric; got 3"),
        ({"nll": "CHRFScore"}, r"metrics\.nll: that name is taken"),
        ({"type": "CHRFScore"}, r"metrics\.type: that name is taken"),
        ({"a/b": "CHRFScore"}, r"metrics: 'a/b': a metric's name"),
    ],
)  # fmt: skip
def test_a_metric_that_cannot_be_is_refused_when_the_module_is_made(metrics, message):
    with pytest.raises(InputError, match=message):
        CausalLMModule(TINY, evaluation={"metrics": metrics})


def test_unknown_statistics_are_refused_at_once():
    metric = Counting()
    metric.needs = ("entropi",)
    with pytest.raises(InputError, match=r"metrics\.x: Counting\.needs: .*entropi"):
        CausalLMModule(TINY, evaluation={"metrics": {"x": metric}})


def test_the_command_says_it_in_one_line(tmp_path, capfd):
    with pytest.raises(SystemExit) as error:
        main(["fit", "--model.model=asset://arithmetic-base", "--data.train=x", "--model.evaluation.metrics.x=CHRFS"])
    assert error.value.code == 2
    assert "error: evaluation.metrics.x: torchmetrics has no 'CHRFS'; did you mean CHRFScore?" in capfd.readouterr().err


@pytest.mark.parametrize("value", ["text", [1.0], torch.tensor([1.0, 2.0]), {"a": None}])
def test_what_is_no_number_is_not_logged(value):
    with pytest.raises(InputError, match=r"evaluation\.metrics\.x: expected a number or a dict of numbers"):
        numbers("x", value)


# -- checkpoints ---------------------------------------------------------------------------------------------------


def test_checkpoints_do_not_hold_what_a_run_measures(tmp_path):
    module = CausalLMModule(TINY, evaluation={"metrics": {"x": Counting()}, "answer_extractor": LastNumber()})
    assert module.hparams["evaluation"]["metrics"] is None
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", inference_mode=False, **quiet)
    trainer.fit(module, datamodule=arithmetic_data(4, batch_size=2))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = CausalLMModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (loaded.evaluation.metrics, type(loaded.evaluation.answer_extractor)) == (None, LastNumber)
    again = CausalLMModule.load_from_checkpoint(tmp_path / "a.ckpt", evaluation={"metrics": {"y": Counting()}})
    assert list(again.evaluation.further_metrics()) == ["y"]
    assert math.isfinite(loaded.hparams["optimizer"]["init_args"]["lr"])


def test_a_checkpoint_that_names_metrics_has_nothing_imported(tmp_path):
    """One of a stranger's: its text is a class path, in the hyperparameters or in the file of them."""
    (tmp_path / "stranger_of_metrics.py").write_text("raise SystemExit('imported')")
    module = CausalLMModule(TINY)
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, inference_mode=False)
    trainer.fit(module, datamodule=arithmetic_data(4, batch_size=2))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    content["hyper_parameters"]["evaluation"]["metrics"] = {"x": "stranger_of_metrics.Metric"}
    torch.save(content, tmp_path / "b.ckpt")
    sys.path.insert(0, str(tmp_path))
    try:
        for given in ({}, {"evaluation": {"answer_extractor": LastNumber()}}):
            with pytest.raises(InputError, match=r"evaluation\.metrics: a file names classes to import"):
                CausalLMModule.load_from_checkpoint(tmp_path / "b.ckpt", **given)
        own = {"evaluation": {"metrics": {"y": Counting()}}}
        assert list(CausalLMModule.load_from_checkpoint(tmp_path / "b.ckpt", **own).evaluation.metrics) == ["y"]
        args = ["test", "--model.model", json.dumps(TINY), "--data.text.tokenizer", "asset://arithmetic-base"]
        args += [
            "--data.test",
            "ArithmeticRows",
            "--data.test.num_rows",
            "2",
            "--trainer.default_root_dir",
            str(tmp_path),
        ]
        args += ["--ckpt_path", str(tmp_path / "b.ckpt"), "--trainer.logger", "false", "--trainer.accelerator", "cpu"]
        assert main([*args, "--model.evaluation.generation.max_new_tokens=2"]).model.evaluation.metrics is None
    finally:
        sys.path.remove(str(tmp_path))
    assert "stranger_of_metrics" not in sys.modules


def test_a_validation_that_was_left_in_the_middle_leaves_nothing_behind(tmp_path, monkeypatch):
    rows = ROWS["prompt_completion"]
    trainer = run_of("fit", rows, tmp_path, {"metrics": {"all": Counting()}}, validation=rows)
    module, own, calls = trainer.lightning_module, trainer.lightning_module.validation_step, []

    def fails_later(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("left")
        return own(*args)

    monkeypatch.setattr(module, "validation_step", fails_later)
    with pytest.raises(RuntimeError, match="left"):
        trainer.validate(module, datamodule=trainer.datamodule, verbose=False)
    (values,) = trainer.validate(module, datamodule=trainer.datamodule, verbose=False)
    assert values["val/all"] == values["val/target_tokens"] == 6 * 8


def test_records_without_their_keys_end_the_test_at_the_first_batch(tmp_path):
    class Own(CausalLMModule):
        def predict_step(self, batch, batch_idx):
            return [{"completion": "a", "answer": "b"}]

    data = InstructionDataModule(test=ROWS["alpaca"], text={"tokenizer": "asset://arithmetic-base"}, batch_size=2)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(InputError, match="records with index, completion and answer; index is missing"):
        trainer.test(Own(TINY), datamodule=data, verbose=False)


def test_what_a_metric_logs_can_be_monitored(tmp_path):
    trainer_of = lambda name: pl.Trainer(  # noqa: E731
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        inference_mode=False,
        callbacks=[pl.callbacks.ModelCheckpoint(tmp_path, monitor=name)],
    )
    rows = ROWS["prompt_completion"]
    for name in ("val/unlikely/share", "val/unlikely/shar", "val/other"):
        module = CausalLMModule(TINY, evaluation={"metrics": {"unlikely": Unlikely()}})
        data = InstructionDataModule(rows, validation=rows, text={"tokenizer": "asset://arithmetic-base"})
        if name == "val/other":
            with pytest.raises(InputError, match=r"never logs val/other"):
                trainer_of(name).fit(module, datamodule=data)
        elif name.endswith("share"):
            trainer_of(name).fit(module, datamodule=data)
