"""configs/paper: what each recipe says, how its rows look to the model, and that one of them runs to its avg@16."""

from __future__ import annotations

import json

import pytest
import yaml

from conftest import ROOT, TINY_LLAMA
from dft_lightning import CausalLMModule, GenerationEvaluation, InstructionDataModule
from dft_lightning.data import HubRows
from dft_lightning.data.batches.steps import micro_batches_of
from dft_lightning.errors import InputError
from dft_lightning.fit import main
from dft_lightning.fit.config import read_fit_config
from small_runs import TINY_ARITHMETIC, run_script, trainer
from test_data import bytes_tokenizer

PAPER = ROOT / "configs" / "paper"
MODELS = {
    "qwen2.5_math_1.5b": ("Qwen/Qwen2.5-Math-1.5B", 5e-5),
    "qwen2.5_math_7b": ("Qwen/Qwen2.5-Math-7B", 5e-5),
    "llama3.2_3b": ("meta-llama/Llama-3.2-3B", 5e-5),
    "llama3.1_8b": ("meta-llama/Llama-3.1-8B", 2e-5),
    "deepseekmath_7b": ("deepseek-ai/deepseek-math-7b-base", 5e-5),
}
ADAMW, WARMUP = "torch.optim.AdamW", "dft_lightning.modules.WarmupSchedule"
LOSSES = {"dft": "DFTLoss", "ce": "CrossEntropyLoss", "focal": "FocalLoss"}


def test_there_is_nothing_else():
    assert {path.stem for path in PAPER.iterdir()} == {"recipe", *MODELS, *LOSSES}


@pytest.mark.parametrize("name", MODELS)
def test_what_a_recipe_says(name):
    """The paper's section on its training, number by number."""
    overlays = [PAPER / f"{part}.yaml" for part in ("recipe", name, "focal")]
    config = read_fit_config([*overlays, ROOT / "configs" / "trainer" / "fsdp2_8gpus.yaml"], {})
    model, data, run = config["model"], config["data"], config["trainer"]
    assert (model["optimizer"]["class_path"], model["schedule"]["class_path"]) == (ADAMW, WARMUP)
    optimizer, schedule = (model[kind]["init_args"] for kind in ("optimizer", "schedule"))
    assert (model["model"], optimizer["lr"]) == MODELS[name]
    assert (list(optimizer["betas"]), optimizer["weight_decay"]) == ([0.9, 0.95], 0.01)
    assert (schedule["decay"], schedule["warmup"], schedule["minimum"]) == ("cosine", 0.1, 0.0)
    assert (run["gradient_clip_val"], run["max_epochs"], run["max_steps"]) == (1.0, 1, -1)
    assert (data["global_batch_size"], data["text"]["max_length"]) == (256, 2048)
    assert data["train"]["init_args"]["num_rows"] == 100_000
    assert data["rows"]["prompt_suffix"] == "\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert model["evaluation"]["generation"]["max_new_tokens"] == 4096
    (evaluation,) = run["callbacks"]
    values = evaluation["init_args"]
    assert (values["num_samples"], values["temperature"], values["limit"]) == (16, 1.0, None)
    assert (values["at_test"], values["at_start"], values["at_end"]) == (True, False, False)
    loss = model["loss"]
    assert loss["class_path"].endswith("FocalLoss")
    assert loss["init_args"]["gamma"] == 2.0
    for overlay in ("one_gpu", "ddp", "fsdp2_8gpus", "fsdp2_4nodes"):
        content = yaml.safe_load((ROOT / "configs" / "trainer" / f"{overlay}.yaml").read_text())
        ranks = content["trainer"]["devices"] * content["trainer"]["num_nodes"]
        micro_batches_of(256, {**data, **content.get("data", {})}["batch_size"], ranks)


def test_the_losses():
    for name, loss in LOSSES.items():
        assert yaml.safe_load((PAPER / f"{name}.yaml").read_text()) == {"model": {"loss": loss}}


ASKED = "1+1?\nPlease reason step by step, and put your final answer within \\boxed{}."
RENDERED = {
    "qwen2.5_math_1.5b": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n",
    "llama3.2_3b": f"<s>{ASKED}\n",
    "deepseekmath_7b": f"<s>User: {ASKED}\n\nAssistant:",
}
RENDERED |= {"qwen2.5_math_7b": RENDERED["qwen2.5_math_1.5b"], "llama3.1_8b": RENDERED["llama3.2_3b"]}


@pytest.mark.parametrize("name", MODELS)
def test_how_a_row_looks_to_the_model(name, tmp_path):
    tokenizer = bytes_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    row = {"source": "amc", "problem": "1+1?", "solution": "It is $\\boxed{2}$.", "messages": [{"role": "user"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    recipe, own = (yaml.safe_load((PAPER / f"{part}.yaml").read_text())["data"] for part in ("recipe", name))
    rows, text = ({**recipe.get(group, {}), **own.get(group, {})} for group in ("rows", "text"))
    source, text = str(tmp_path / "rows.jsonl"), {**text, "tokenizer": str(tmp_path / "tokenizer")}
    data = InstructionDataModule(source, test=source, rows=rows, text=text)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    learnt = batch["labels"][0] != -100
    prompt, answer = (tokenizer.decode(batch["input_ids"][0][part]) for part in (~learnt, learnt))
    end, answered = ("<|im_end|>", "\n") if "qwen" in name else ("<|endoftext|>", "")
    assert answer == f"{' ' if 'deepseek' in name else ''}It is $\\boxed{{2}}$.{end}"
    assert prompt == RENDERED[name] + answered
    data.setup("test")
    asked = next(iter(data.test_dataloader()))
    assert asked["prompt"] == [RENDERED[name]]
    assert asked["answer"] == ["It is $\\boxed{2}$."]


def test_one_of_them_runs(tmp_path, monkeypatch, capsys):
    """DeepSeekMath's, with a tiny model, two samples and short answers: fit, then test with avg@2."""
    pytest.importorskip("math_verify")
    monkeypatch.chdir(tmp_path)
    tokenizer = bytes_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.save_pretrained("tokenizer")
    lines = "\n".join([json.dumps({"problem": "1+1?", "solution": "\\boxed{2}"})] * 6)
    (tmp_path / "rows.jsonl").write_text(lines)
    values = {
        "model": {"model": {**TINY_LLAMA, "vocab_size": 300}, "evaluation": {"generation": {"max_new_tokens": 4}}},
        "data": {
            "train": "rows.jsonl",
            "test": "rows.jsonl",
            "text": {"tokenizer": "tokenizer"},
            "global_batch_size": 4,
        }
        | {"batch_size": 2},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "devices": 1, "default_root_dir": "run"}
        | {"enable_progress_bar": False},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values))
    configs = [PAPER / "recipe.yaml", PAPER / "deepseekmath_7b.yaml", PAPER / "dft.yaml", tmp_path / "small.yaml"]
    arguments = [argument for path in configs for argument in ("--config", str(path))]
    assert main(["fit", *arguments]).trainer.global_step == 2
    (checkpoint,) = tmp_path.glob("run/**/*.ckpt")
    logged = main(["test", *arguments, "--ckpt_path", str(checkpoint)]).trainer.callback_metrics
    assert {f"test/{name}" for name in ("exact_match", "sampled", "pass_at_2", "pass_at_16")} <= set(logged)


class Alternating(CausalLMModule):
    """Answers rightly at every second call."""

    def generate(self, input_ids, attention_mask, options):
        self.calls = getattr(self, "calls", 0) + 1
        assert options.do_sample
        rows = self.trainer.datamodule.answers("test")
        return [rows[0] if (self.calls + i) % 4 == 0 else "0" for i in range(len(input_ids))]


def test_what_is_sampled_in_test(tmp_path):
    """By hand: two problems with four samples each, one of four right in either."""
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps({"prompt": "1+1=", "completion": "1+1+0=2c0|2"})] * 2))
    data = InstructionDataModule(test=str(tmp_path / "rows.jsonl"), text={"tokenizer": "asset://arithmetic-base"})
    module = Alternating(TINY_ARITHMETIC)
    module.test_step = lambda batch, batch_idx: None
    callback = GenerationEvaluation(False, at_end=False, num_samples=4, at_test=True)
    (logged,) = trainer(callbacks=[callback]).test(module, datamodule=data, verbose=False)
    assert logged == pytest.approx({"test/sampled": 0.25, "test/pass_at_2": 0.5, "test/pass_at_4": 1.0})
    with pytest.raises(ValueError, match="at_test samples: num_samples must be at least 1"):
        GenerationEvaluation(at_test=True, num_samples=0)


def test_rows_are_drawn_by_seed(tmp_path):
    rows = [{"prompt": str(number), "completion": "x"} for number in range(1000)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def drawn(**options):
        return [int(row["prompt"]) for _, row in HubRows(str(tmp_path), **options).rows()]

    some = drawn(num_rows=500, seed=1)
    assert len(set(some)) == 500  # without replacement
    assert some == drawn(num_rows=500, seed=1) != drawn(num_rows=500, seed=2)
    # From all over: 500 of the first 1000 numbers have a mean of 499.5 and a standard error of 9.
    assert abs(sum(some) / 500 - 499.5) < 40
    assert max(some) > 980
    assert sorted(drawn(num_rows=1000)) == drawn() == list(range(1000))
    with pytest.raises(InputError, match=r"1001 rows of .*/train: there are 1000"):
        drawn(num_rows=1001)
    with pytest.raises(InputError, match="cannot be drawn at random from a stream"):
        drawn(num_rows=2, streaming=True)
    with pytest.raises(ValueError, match="num_rows must be a whole number from 1"):
        HubRows("a/b", num_rows=0)


def test_the_table_is_the_one_in_the_docs(capsys):
    script = run_script("benchmarks/paper_table.py")
    printed = capsys.readouterr().out
    assert printed.startswith("| model |")
    assert printed in (ROOT / "docs" / "paper.md").read_text()
    # By hand: 8 operations for each of a billion parameters and 5e7 tokens, on 8 GPUs at 395.6 TFLOP/s.
    assert script["training_minutes"](10**9) == pytest.approx(4e17 / 3.1648e15 / 60)
    assert script["evaluation_hours"]("any", 10**9) == pytest.approx(2 * 50 * 4096 * (0.03 + 2 / 3350) / 3600)


def test_benchmarks_have_one_form(tmp_path, monkeypatch, capsys):
    rows = [
        {"problem": "a?", "solution": "long, so $\\frac{1}{2}$", "answer": "\\frac{1}{2}"},
        {"question": "b?", "answer": "$5$"},
        {"question": "c?", "final_answer": ["1", "$-1$"]},
    ]
    monkeypatch.setattr("datasets.load_dataset", lambda path, split: rows)
    convert = run_script("examples/math_benchmarks.py", "--output", tmp_path)["convert"]
    names = ["math500", "minerva", "olympiadbench", "aime24", "amc23"]
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path / name}.jsonl: 3 problems" for name in names]
    for name in names:
        assert [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] == [
            {"problem": "a?", "solution": "\\boxed{\\frac{1}{2}}"},
            {"problem": "b?", "solution": "\\boxed{5}"},
            {"problem": "c?", "solution": "\\boxed{1, -1}"},
        ]
    with pytest.raises(SystemExit, match=r"name, row 2: expected a problem and an answer, found \['question'\]"):
        list(convert([rows[0], {"question": "d?"}], "name"))
