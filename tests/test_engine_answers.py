"""Commands and callbacks whose answers come from a server: those of the module, one message for what goes wrong."""

import functools
import importlib.util
import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

import engine_stub
from conftest import ROOT
from dft_lightning import CausalLMModule, InstructionDataModule
from dft_lightning.callbacks import EngineAnswers, GenerationEvaluation
from dft_lightning.cli.commands import run
from dft_lightning.data import ArithmeticRows
from dft_lightning.engine import Server
from dft_lightning.errors import InputError
from dft_lightning.fit import main
from dft_lightning.models.generation import GenerationOptions
from dft_lightning.modules.answers import answers_of
from engine_stub import serving

pytest.importorskip("openai", reason="the extra engine is not installed")
pytestmark = pytest.mark.timeout(120)

QUICKSTART = ["--config", str(ROOT / "configs" / "quickstart.yaml")]
FEW = [
    *("--data.train.init_args.num_rows", "8", "--data.validation.init_args.num_rows", "8"),
    *("--data.test.init_args.num_rows", "12", "--data.eval_batch_size", "5"),
]
SERVE = f"{sys.executable} -m transformers.cli.transformers serve {{folder}} --port {{port}} --device cpu"


@pytest.fixture(scope="module")
def base():
    """The module that the stub has the model of."""
    module = CausalLMModule("asset://arithmetic-base")
    module.configure_model()
    return module


@pytest.fixture(scope="module")
def answer(base):
    """Its greedy tokens after a prompt, each made once."""

    @functools.cache
    def tokens(prompt):
        ids = torch.tensor([prompt])
        return base.generate_tokens(ids, torch.ones_like(ids), GenerationOptions(80))[0].tolist()

    return tokens


@pytest.fixture
def stub(answer, monkeypatch):
    """A server with the model of the quickstart; it takes token ids and gives no log-probs."""

    def greedy(prompt, ways):
        return [5] * 60 if ways.other else answer(tuple(prompt)) + [engine_stub.END] * 60

    monkeypatch.setattr(engine_stub, "greedy_tokens", greedy)
    with serving(log_probs="none") as server:
        yield server


def asking(stub, **options):
    options = {"kind": "openai", "url": stub.url, "retries": 0, **options}
    return [part for name, value in options.items() for part in (f"--model.evaluation.engine.{name}", str(value))]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def predictions(command, folder, *args):
    trainer = ["--trainer.default_root_dir", str(folder), "--trainer.logger", "false"]
    writer = ["--trainer.callbacks", "PredictionWriter", "--trainer.callbacks.path", str(folder / "p.jsonl")]
    main([command, *QUICKSTART, *FEW, *trainer, *writer, *args])
    return lines(folder / "p.jsonl")


def message_of(capfd, call):
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        call()
    assert ended.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("command", ["predict", "test"])
def test_a_servers_greedy_answers_are_the_modules(command, stub, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "asked").mkdir()
    own = predictions(command, tmp_path / "own")
    asked = predictions(command, tmp_path / "asked", *asking(stub))
    assert asked == own
    assert len(own) == 12
    assert len({tuple(body["prompt"]) for body in stub.requests}) >= 12


def test_a_server_with_another_model_is_refused(stub, tmp_path, capfd):
    stub.ways.other = 1
    message = message_of(capfd, lambda: predictions("predict", tmp_path, *asking(stub)))
    assert f"{stub.url}: digits is another model than the one that is meant" in message
    assert not (tmp_path / "p.jsonl").exists()


def test_a_server_that_is_gone_is_named(stub, tmp_path, capfd):
    args = asking(stub, url="http://127.0.0.1:9/v1")
    assert "http://127.0.0.1:9/v1: no connection" in message_of(capfd, lambda: predictions("predict", tmp_path, *args))


def test_a_trainer_without_the_callback_says_so(stub):
    module = CausalLMModule("asset://arithmetic-base", evaluation={"engine": {"kind": "openai", "url": stub.url}})
    data = InstructionDataModule(predict=ArithmeticRows(2), batch_size=2)
    options = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "inference_mode": False}
    with pytest.raises(InputError, match="the callback EngineAnswers asks"):
        pl.Trainer(**options).predict(module, datamodule=data)
    found = pl.Trainer(**options, callbacks=[EngineAnswers()]).predict(module, datamodule=data)
    assert sorted(record["index"] for record in found[0]) == [0, 1]
    assert module.engine is None


def fitted(stub, callback, **evaluation):
    """The module of a fit of two steps, with an engine."""
    module = CausalLMModule(
        "asset://arithmetic-base",
        optimizer={"lr": 1e-4},
        evaluation={"engine": {"kind": "openai", "url": stub.url}, "answer_extractor": "LastNumber"},
    )
    data = InstructionDataModule(ArithmeticRows(8), validation=ArithmeticRows(6, part="held_out"), batch_size=4)
    options = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_checkpointing": False}
    pl.Trainer(**options, max_steps=2, callbacks=[callback], inference_mode=False).fit(module, datamodule=data)
    return module, data


def test_along_fit_a_running_server_would_answer_with_other_weights(stub):
    for options in ({}, {"at_end": False, "every_n_steps": 1}):
        with pytest.raises(InputError, match="does not have the weights that fit makes: set .*command"):
            fitted(stub, GenerationEvaluation(num_samples=0, **options))
    callback = GenerationEvaluation(num_samples=0, at_end=False)
    module, data = fitted(stub, callback)
    own = CausalLMModule("asset://arithmetic-base")
    own.configure_model()
    right = 0
    for batch in data.generation_dataloader():
        texts = answers_of(own, batch, GenerationOptions())
        right += sum(module.evaluation.extractor.matches(*pair) for pair in zip(texts, batch["answer"], strict=True))
    assert callback.history == [(0, {"greedy": right / 6})]


class OwnGenerate(CausalLMModule):
    def generate(self, input_ids, attention_mask, options):
        return [text.upper() for text in super().generate(input_ids, attention_mask, options)]


def test_a_generate_of_ones_own_is_not_left_out(stub, tmp_path, capfd):
    args = ["--model", f"{__name__}.OwnGenerate", *asking(stub)]
    message = message_of(capfd, lambda: predictions("predict", tmp_path, *args))
    assert "a server does not know OwnGenerate.generate" in message


def sampling(path, *args):
    return run("sample", ["--output", str(path), *QUICKSTART, *FEW, "--engine", "openai", *args])


def test_sample_goes_on_where_a_server_failed(stub, tmp_path, capfd):
    url = asking(stub)[2:]  # --engine says the kind
    asked = ["--k", "3", "--batch_size", "6", *url]
    assert sampling(tmp_path / "whole.jsonl", *asked) == 0
    stub.fault_after = (2 * stub.granted - 5, 500)  # of 8 questions the last 5, after as much that finds out
    assert sampling(tmp_path / "s.jsonl", *asked) == 2
    message = capfd.readouterr().err
    assert f"{stub.url}: Error code: 503" in message
    assert f"6 of 24 answers are in {tmp_path / 's.jsonl.partial'}; the same command goes on with the others" in message
    kept = lines(tmp_path / "s.jsonl.partial")[1:]
    assert len(kept) == 6
    stub.fault_after = None
    assert sampling(tmp_path / "s.jsonl", *asked) == 0
    assert (tmp_path / "s.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    found = lines(tmp_path / "s.jsonl")
    assert [(line["index"], line["sample"]) for line in found] == [(i, s) for i in range(8) for s in range(3)]
    assert {line["log_prob"] for line in found} == {None}
    assert all(line["finished"] for line in found)
    assert len({line["completion"] for line in found[:3]}) > 1


def test_predictions_go_on_where_a_server_failed(stub, tmp_path, capfd):
    (tmp_path / "own").mkdir()
    own = predictions("predict", tmp_path / "own", *asking(stub))
    stub.fault_after = (2 * stub.granted - 4, 500)  # of the last questions some
    assert "Error code: 503" in message_of(capfd, lambda: predictions("predict", tmp_path, *asking(stub)))
    assert not (tmp_path / "p.jsonl").exists()
    (kept,) = tmp_path.glob("p.jsonl.*.partial")
    assert len(lines(kept)) == 5
    stub.fault_after = None
    asked = len(stub.requests)
    assert predictions("predict", tmp_path, *asking(stub)) == own
    assert 7 <= len(stub.requests) - asked < 7 + 12  # the others', and what finds out about the server
    assert not kept.exists()


def test_sample_by_the_module_whatever_engine_the_config_has(stub, tmp_path):
    args = [*QUICKSTART, *FEW, *asking(stub), "--k", "1", "--engine", "module"]
    assert run("sample", ["--output", str(tmp_path / "s.jsonl"), *args]) == 0
    assert stub.tried == 0


def test_a_sharded_model_is_whole_after_its_export(tmp_path, capfd):
    """Under FSDP2 the weights are gathered for the server's folder, and go on to answer the known prompts."""
    command = f"{sys.executable} {Path(__file__).with_name('engine_stub.py')} {{port}} {{folder}}"
    strategy = ["--trainer.strategy", "ModelParallelStrategy", "--trainer.strategy.data_parallel_size", "1"]
    strategy += ["--trainer.strategy.tensor_parallel_size", "1", "--trainer.devices", "1"]
    args = [*strategy, "--trainer.default_root_dir", str(tmp_path), "--model.evaluation.engine.command", command]
    try:
        assert sampling(tmp_path / "s.jsonl", *args) == 2
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert "is another model than the one that is meant" in capfd.readouterr().err
    assert not list(tmp_path.rglob(".served-*"))


def test_sample_without_a_server_says_what_is_missing(tmp_path, capfd):
    assert sampling(tmp_path / "s.jsonl") == 2
    assert "kind openai takes url (of a running server) or command" in capfd.readouterr().err


@pytest.mark.skipif(
    not (importlib.util.find_spec("fastapi") and importlib.util.find_spec("uvicorn")),
    reason="transformers serve needs fastapi and uvicorn",
)
def test_a_server_is_started_with_the_weights_asked_and_ended(tmp_path, monkeypatch):
    """transformers serve, which takes text and one request at a time."""
    made = []
    start = Server.__enter__
    monkeypatch.setattr(Server, "__enter__", lambda self: made.append(self) or start(self))
    own, asked = tmp_path / "own", tmp_path / "asked"
    own.mkdir()
    asked.mkdir()
    few = ["--data.test.init_args.num_rows", "3"]
    args = ["--model.evaluation.engine.kind", "openai", "--model.evaluation.engine.command", SERVE]
    assert predictions("predict", asked, *few, *args) == predictions("predict", own, *few)
    (server,) = made
    assert server._process is None
    assert not list(asked.rglob(".served-*"))
    assert list(asked.rglob("engine.log"))
