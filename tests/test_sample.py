"""The command ``sample``, in process: what a line says, how runs go on, what is refused, and that ``fit`` reads it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import yaml

import dft_lightning.sampling.command as command
from commands import sample as main
from conftest import ROOT
from dft_lightning import InstructionDataModule
from dft_lightning.assets import resolve
from dft_lightning.compare.settings import read_settings
from dft_lightning.data.options import RowOptions
from dft_lightning.data.rows.forms import Conversation
from dft_lightning.fit import main as fit
from dft_lightning.fit.config import read_fit_config
from dft_lightning.metrics import LastNumber
from dft_lightning.models.generation import GenerationOptions
from dft_lightning.sampling import lines as lines_of_sample
from dft_lightning.sampling.completions import Sampler
from dft_lightning.sampling.prompts import KEYS, check_columns, jobs_by_length, question_of, read_prompts
from small_runs import data_options, run_processes

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
ROWS = [  # of several lengths; the model is right of some
    {"prompt": f"{a}+{b}=", "completion": f"x|{a + b}"}
    for a, b in ((123, 456), (98765, 12345), (111, 222), (5432, 17), (70707, 80808), (999, 1))
]


@pytest.fixture
def arguments(tmp_path):
    """Arguments of ``sample`` on these rows."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump({"data": {"train": str(rows), "validation": None, "test": None}}))
    return ["--config", str(QUICKSTART), "--config", str(config)]


def sampled(path, *args):
    """The lines of a run that goes well."""
    assert main(["--output", str(path), *map(str, args)]) == 0
    return [json.loads(line) for line in path.read_text().splitlines()]


def fails(capsys, *args):
    """The one message of a command that must end with 2."""
    capsys.readouterr()
    status = main([str(arg) for arg in args])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 2
    assert len(error) == 1
    return error[0].removeprefix("error: ")


@pytest.fixture(scope="module")
def base():
    """The model and tokenizer by transformers alone, in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve("asset://arithmetic-base")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), AutoTokenizer.from_pretrained(folder)


# -- lines -------------------------------------------------------------------------------------------------------------


def test_what_a_line_says(arguments, tmp_path, base, capsys):
    """Log-probabilities by transformers in float64, answers by the extractor, all in the rows' order."""
    model, tokenizer = base
    lines = sampled(tmp_path / "s.jsonl", *arguments, "--k", 3, "--batch_size", 5, "--max_new_tokens", 50)
    assert [(line["index"], line["sample"]) for line in lines] == [(i, s) for i in range(len(ROWS)) for s in range(3)]
    for line in lines:
        assert list(line) == ["prompt", "completion", *KEYS]
        row = ROWS[line["index"]]
        assert (line["prompt"], line["gold_answer"]) == (row["prompt"], row["completion"])
        text = f"^{line['prompt']}{line['completion']}" + "$" * line["finished"]
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(list(text))])
        said = len(line["completion"]) + line["finished"]
        assert line["num_tokens"] == said
        log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[-said:, 0]
        assert line["log_prob"] == pytest.approx(log_probs.sum().item(), abs=2e-4)
        right = LastNumber().extract(line["completion"]) == LastNumber().extract(row["completion"])
        assert line["correct"] is (right and line["finished"])
        assert line["reward"] == float(line["correct"])
    # Five digits need 57 tokens, so these are cut off: the number that such a text ends in proves nothing.
    assert {line["finished"] for line in lines} == {True, False}
    assert {line["num_tokens"] for line in lines if not line["finished"]} == {50}
    counts = Counter(line["index"] for line in lines if line["correct"])
    right, some = sum(counts.values()), len(counts)
    out = capsys.readouterr().out
    assert f"s.jsonl: 18 answers to 6 prompts, {right} right: avg@3 {right / 18:.3f}, pass@2 " in out
    assert f"pass@3 {some / 6:.3f}; {some} prompts have a right one; " in out
    assert f"; {sum(not line['finished'] for line in lines)} cut off at 50 tokens; " in out
    assert 0 < right < 18


def test_log_prob_is_of_the_models_own_distribution_whatever_it_was_drawn_from(arguments, tmp_path, base):
    model, tokenizer = base
    (line,) = sampled(tmp_path / "s.jsonl", *arguments, "--limit", 1, "--k", 1, "--temperature", 2.5, "--top_p", 0.8)
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(list(f"^{line['prompt']}{line['completion']}$"))])
    log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[-line["num_tokens"] :, 0]
    assert line["finished"]
    assert line["log_prob"] == pytest.approx(log_probs.sum().item(), abs=2e-4)


def test_a_text_that_was_cut_off_is_wrong_even_where_it_ends_in_the_answer(arguments, tmp_path):
    """111+222=, worked in 23 characters: the turn's end would be the 24th token."""
    (line,) = sampled(tmp_path / "a.jsonl", *arguments, "--k", 1, "--temperature", 0.01, "--max_new_tokens", 27)[2:3]
    assert (line["completion"], line["correct"]) == ("1+2+0=3c0,1+2+0=3c0,1+2+0=3c0|333"[:27], False)
    (line,) = sampled(tmp_path / "b.jsonl", *arguments, "--k", 1, "--temperature", 0.01, "--max_new_tokens", 33)[2:3]
    assert (line["completion"], line["finished"]) == ("1+2+0=3c0,1+2+0=3c0,1+2+0=3c0|333", False)
    assert (line["correct"], line["reward"]) == (False, 0.0)
    (line,) = sampled(tmp_path / "c.jsonl", *arguments, "--k", 1, "--temperature", 0.01, "--max_new_tokens", 34)[2:3]
    assert (line["correct"], line["reward"], line["num_tokens"]) == (True, 1.0, 34)


def test_samples_follow_the_models_distribution(base):
    """First tokens of 4000 draws at a temperature and a top_p against the exact probabilities."""
    model, tokenizer = base
    config = read_fit_config([QUICKSTART], {})
    module = command.module_of(config)
    module.configure_model()
    trainer = command.trainer_of({**config["trainer"], "accelerator": "cpu"})
    asked = torch.tensor([tokenizer.convert_tokens_to_ids(list("^1+1=|"))])  # nothing that it knows, so it is unsure
    logits = model(asked).logits[0, -1]
    for temperature, top_p in ((1.0, 1.0), (2.0, 0.7)):
        expected = (logits / temperature).softmax(-1)
        order = expected.argsort(descending=True)
        kept = order[: int((expected[order].cumsum(0) < top_p).sum()) + 1]
        exact = torch.zeros_like(expected)
        exact[kept] = expected[kept] / expected[kept].sum()
        options = GenerationOptions(1, True, temperature, top_p)
        sampler = Sampler(module, trainer, options, [2], 0, seed=3)
        found = torch.zeros_like(exact)
        with torch.random.fork_rng([]):
            torch.manual_seed(5)
            # The tokens themselves: special ones have no text.
            tokens = sampler._generate([asked[0].int().numpy()] * 4000)[0][:, 0]
        found.index_add_(0, tokens, torch.ones(4000, dtype=found.dtype))
        assert (found[exact == 0] == 0).all()
        assert exact.max() < 0.9
        # Five standard deviations of each count.
        assert ((found / 4000 - exact).abs() <= 5 * (exact * (1 - exact) / 4000).sqrt() + 1e-12).all()


def test_batches_are_of_prompts_of_about_the_same_length():
    batches = jobs_by_length([3, 9, 5, 9], k=2, batch_size=3)
    assert batches == [[(1, 0), (1, 1), (3, 0)], [(3, 1), (2, 0), (2, 1)], [(0, 0), (0, 1)]]


STRATEGIES = {
    "ddp": ["--trainer.strategy", "ddp"],
    "fsdp2": [
        *("--trainer.strategy", "ModelParallelStrategy", "--trainer.strategy.data_parallel_size", "2"),
        *("--trainer.strategy.tensor_parallel_size", "1"),
    ],
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_write_the_lines_of_one(strategy, arguments, tmp_path):
    """An odd number of batches; under FSDP2 the weights are hashed whole, so that the other can go on."""
    asked = [*arguments, "--k", "3", "--batch_size", "4", "--max_new_tokens", "30"]
    of_one = sampled(tmp_path / "one.jsonl", *asked)
    two = tmp_path / "two.jsonl"
    asked = ["--output", str(two), *asked, "--trainer.devices", "2", *STRATEGIES[strategy]]
    said = run_processes("two_command.py", "sample", *asked)
    assert said.count("18 answers to 6 prompts") == 1
    of_two = [json.loads(line) for line in two.read_text().splitlines()]
    close = [line.pop("log_prob") for line in of_one], [line.pop("log_prob") for line in of_two]
    assert of_two == of_one
    assert close[1] == pytest.approx(close[0], abs=1e-4)
    assert not list(tmp_path.glob("*.partial"))


# -- what fit reads ----------------------------------------------------------------------------------------------------


def test_lines_are_asked_as_the_rows_were(tmp_path):
    """Token by token: what fit makes of a line's prompt, what the model was given, what predict would have given."""
    tools = [{"type": "function", "function": {"name": "1", "parameters": {"type": "object", "properties": {}}}}]
    call = {"type": "function", "function": {"name": "1", "arguments": {"a": 1}}}
    rows = [
        {"question": "1+1=", "answer": "2"},
        {"question": [{"role": "user", "content": "1+1="}], "answer": [{"role": "assistant", "content": "2"}]},
        {
            "question": [
                {"role": "system", "content": "3+"},
                {"role": "user", "content": "1+1="},
                {"role": "assistant", "content": "2", "weight": 0.5},
                {"role": "user", "content": "2+2="},
            ],
            "answer": "4",
            "tools": json.dumps(tools),
        },
        {
            "question": [
                {"role": "user", "content": "1+1="},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "2"},
            ],
            "answer": "2",
            "tools": tools,
        },
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }}"
        "{{ c['function']['arguments']['a'] }}{% endfor %}"
        "{{ '$' }}"
        "{% else %}{{ '^' + m['content'] }}{% endif %}{% endfor %}{% if tools %}{% endif %}"
    )
    options = {
        "tokenizer": "asset://arithmetic-base",
        "prompt_column": "question",
        "completion_column": "answer",
        "system_prompt": "9+9",
        "prompt_suffix": "|",
        "chat_template": template,
    }
    config = read_fit_config([QUICKSTART], {"data": {**data_options(**options), "train": str(path)}})
    data, prompts = read_prompts(config, "train", None)
    assert data.tokenizer.decode(prompts.ids[0]).replace(" ", "") == "^9+9^1+1=|"
    assert prompts.question(0) == prompts.question(1) == {"question": "1+1="}
    assert [message["content"] for message in prompts.question(2)["question"]] == ["3+", "1+1=", "2", "2+2="]
    assert prompts.question(2)["tools"] == tools
    lines = [
        {**prompts.question(i), "answer": "5", "gold_answer": "", "reward": 1.0, "index": i}
        for i in range(len(prompts))
    ]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = [list(ids) for ids in prompts.ids]
    for source in ("rows", "lines"):
        other = InstructionDataModule(test=str(tmp_path / f"{source}.jsonl"), **data_options(**options))
        other.setup("test")
        assert other.splits.tokenized("test")["prompt_ids"] == given
    train = InstructionDataModule(str(tmp_path / "lines.jsonl"), **data_options(**options))
    train.setup("fit")
    for row, ids in zip(train.splits.tokenized("train"), given, strict=True):
        assert row["input_ids"] == ids + train.tokenizer.convert_tokens_to_ids(["5", "$"])
        assert row["labels"] == [-100] * len(ids) + row["input_ids"][len(ids) :]  # the answer alone is learnt


def test_fit_learns_the_right_answers_alone(arguments, tmp_path):
    path = tmp_path / "s.jsonl"
    lines = sampled(path, *arguments)
    right = sum(line["correct"] for line in lines)
    run = ["--data.train", str(path), "--trainer.max_steps", "2", "--trainer.default_root_dir", str(tmp_path)]
    run += ["--trainer.callbacks", "null", "--trainer.enable_progress_bar", "false"]
    cli = fit(["fit", *arguments, *run])
    counts = cli.datamodule.splits.counts["train"]
    assert (counts.rows, counts.rows - counts.dropped) == (24, right)
    learnt = cli.datamodule.splits.tokenized("train")
    texts = ["".join(cli.datamodule.tokenizer.convert_ids_to_tokens(ids)) for ids in learnt["input_ids"]]
    assert texts == [f"^{line['prompt']}{line['completion']}$" for line in lines if line["correct"]]
    assert set(learnt["weights"]) == {None} if None in learnt["weights"] else learnt["weights"] == [None] * right


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_part_of_the_training_rows_is_sampled_from_as_fit_divides_them(arguments, tmp_path, split):
    config = read_fit_config([QUICKSTART], {"data": {"validation": None, "validation_fraction": 0.25}})
    config["data"]["train"] = str(tmp_path / "rows.jsonl")
    _, prompts = read_prompts(config, split, None)
    stated = InstructionDataModule(
        str(tmp_path / "rows.jsonl"), validation_fraction=0.25, text={"tokenizer": "asset://arithmetic-base"}
    )
    stated.setup("fit")
    expected = [json.loads(number) for number in stated.splits.tokenized(split)["number"]]
    assert prompts.rows.numbers == expected
    _, first = read_prompts(config, split, 1)
    assert first.rows.numbers == expected[:1]


def test_the_recipe_samples_and_fits(tmp_path, monkeypatch, capsys):
    """Its commands with fewer rows and steps; the comparison is parsed."""
    folder = ROOT / "configs" / "offline_rl"
    assert {path.stem for path in folder.iterdir()} == {"problems", "ce", "dft", "compare"}
    monkeypatch.chdir(tmp_path)
    problems = ["--config", str(folder / "problems.yaml")]
    lines = sampled(tmp_path / "runs" / "offline_rl" / "samples.jsonl", *problems, "--limit", 40, "--batch_size", 160)
    right = sum(line["correct"] for line in lines)
    assert right > 40
    for name, loss in (("ce", "CrossEntropyLoss"), ("dft", "DFTLoss")):
        small = ["--trainer.max_steps", "1", "--trainer.callbacks", "null", "--trainer.limit_val_batches", "1"]
        cli = fit(["fit", *problems, "--config", str(folder / f"{name}.yaml"), *small])
        assert type(cli.model.loss).__name__ == loss
        assert cli.trainer.default_root_dir == f"runs/offline_rl/{name}"
        assert len(cli.datamodule.splits.tokenized("train")) == right
    settings = read_settings([folder / "compare.yaml"])
    assert list(settings.losses) == ["CE", "DFT"]
    read_fit_config(settings.base, settings.overrides)


def test_what_the_page_has_for_vllm_writes_what_fit_reads(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "offline_rl.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    answers = [("1+2=3", "stop"), ("3", "length"), ("", "stop"), ("4", "stop")]

    class LLM:
        def __init__(self, folder):
            assert folder == "exported"

        def chat(self, asked, options):
            assert options["n"] == 4
            found = [SimpleNamespace(text=text, finish_reason=reason) for text, reason in answers]
            return [SimpleNamespace(outputs=found) for _ in asked]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=dict))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "problems.jsonl").write_text(json.dumps({"prompt": "1+2=", "completion": "3"}) + "\n")
    exec(compile(code, "offline_rl.md", "exec"), {})
    data = InstructionDataModule("samples.jsonl", text={"tokenizer": "asset://arithmetic-base"})
    data.setup("fit")
    (row,) = data.splits.tokenized("train")
    assert "".join(data.tokenizer.convert_ids_to_tokens(row["input_ids"])) == "^1+2=1+2=3$"


# -- runs that stop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["between", "within a line", "within a batch"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(arguments, tmp_path, monkeypatch, capsys, cut):
    options = [*arguments, "--k", "2", "--batch_size", "5"]
    whole, path = tmp_path / "whole.jsonl", tmp_path / "s.jsonl"
    sampled(whole, *options)
    assert not (tmp_path / "whole.jsonl.partial").exists()
    real = Sampler.batch

    def stops(self, jobs, prompts):
        if len(jobs) == 2:  # the last of 5, 5 and 2
            os.kill(os.getpid(), signal.SIGTERM if cut == "between" else signal.SIGINT)
        return real(self, jobs, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "batch", stops)
        capsys.readouterr()
        assert main(["--output", str(path), *options]) == (143 if cut == "between" else 130)
    partial = tmp_path / "s.jsonl.partial"
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"stopped: 10 of 12 answers are in {partial}; the same command goes on with the others"
    assert not path.exists()
    lines = partial.read_bytes().splitlines(keepends=True)
    assert len(lines) == 11
    done = 2
    if cut == "within a line":
        partial.write_bytes(b"".join(lines)[:-7])
        done = 1
    elif cut == "within a batch":
        partial.write_bytes(b"".join(lines[:-2]))
        monkeypatch.setattr(Sampler, "batch", stops)  # a second time
        assert main(["--output", str(path), *options]) == 130
    sizes = []
    monkeypatch.setattr(Sampler, "batch", lambda *args: sizes.append(len(args[1])) or real(*args))
    sampled(path, *options)
    assert sizes == [5, 5, 2][done:]
    assert path.read_bytes() == whole.read_bytes()
    assert not partial.exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--k", "3"], "was begun with --k 2, and it is 3 now: give that again, or --overwrite to begin anew"),
        (["--temperature", "0.5"], "was begun with --temperature 1.0, and it is 0.5 now"),
        (["--seed", "1"], "was begun with --seed 0, and it is 1 now"),
        (
            ["--data.rows.prompt_suffix", "1"],
            "was begun with other prompts (rows, tokenizer or template): give them again",
        ),
        (["--model.loading.dtype", "bfloat16"], "was begun with model.loading.dtype float32, and it is bfloat16 now"),
    ],
)
def test_a_partial_file_of_other_options_is_refused(arguments, tmp_path, capsys, partial_of_two, change, expected):
    path = partial_of_two
    before = (tmp_path / "s.jsonl.partial").read_bytes()
    options = [*arguments, "--k", "2", "--batch_size", "5", *change]
    assert fails(capsys, "--output", path, *options).startswith(f"--output: {path}.partial {expected}")
    assert (tmp_path / "s.jsonl.partial").read_bytes() == before
    if change == ["--k", "3"]:
        assert len(sampled(path, *options, "--overwrite")) == 18


@pytest.fixture
def partial_of_two(arguments, tmp_path, monkeypatch):
    """A run that was stopped before its second batch."""
    real = Sampler.batch

    def stops(self, number, prompts):
        if number:
            raise KeyboardInterrupt
        return real(self, number, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "batch", stops)
        assert main(["--output", str(tmp_path / "s.jsonl"), *arguments, "--k", "2", "--batch_size", "5"]) == 130
    return tmp_path / "s.jsonl"


def test_other_weights_under_the_same_name_are_noticed(arguments, tmp_path, capsys, monkeypatch):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(resolve("asset://arithmetic-base"), model)
    options = ["--output", tmp_path / "s.jsonl", *arguments, "--model.model", model]
    monkeypatch.setattr(Sampler, "batch", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([*map(str, options)]) == 130
    tensors = load_file(model / "model.safetensors")
    name = next(iter(tensors))
    tensors[name].view(-1)[-1] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "was begun with other weights: give them again" in fails(capsys, *options)


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_files_that_are_there(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "module_of", None)  # before a model is loaded
    path = tmp_path / "s.jsonl"
    path.write_text("mine")
    assert fails(capsys, "--output", path, *arguments) == (
        f"--output: {path} is there: give another file, or --overwrite"
    )
    assert path.read_text() == "mine"
    (tmp_path / "folder.jsonl").mkdir()
    assert fails(capsys, "--output", tmp_path / "folder.jsonl", *arguments).endswith("folder.jsonl is a folder")


def test_a_partial_file_that_is_none_or_in_use(arguments, tmp_path, capsys):
    path = tmp_path / "s.jsonl"
    partial = tmp_path / "s.jsonl.partial"
    partial.write_text('{"options": [1]}\n')
    expected = f"--output: {partial} is there and is none of sample: give another file, or --overwrite to begin anew"
    assert fails(capsys, "--output", path, *arguments) == expected
    partial.write_text("mine")  # without an end of its line, which a torn header has not either
    assert fails(capsys, "--output", path, *arguments) == expected
    assert partial.read_text() == "mine"
    partial.write_text("mine\n")
    assert fails(capsys, "--output", path, *arguments) == expected
    assert partial.read_text() == "mine\n"
    with partial.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert fails(capsys, "--output", path, *arguments, "--overwrite") == (
            f"--output: another sample is writing {partial}"
        )
    partial.unlink()
    (tmp_path / "file").write_text("")
    message = fails(capsys, "--output", tmp_path / "file" / "s.jsonl", *arguments)
    assert message.startswith(f"--output: {tmp_path / 'file' / 's.jsonl.partial'} cannot be written: ")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--k", "0"], "--k must be at least 1, got 0"),
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--max_new_tokens", "0"], "--max_new_tokens must be at least 1, got 0"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--top_p", "0"], "--top_p must lie in (0, 1], got 0"),
        (["--top_p", "1.5"], "--top_p must lie in (0, 1], got 1.5"),
        (["--top_p", ".nan"], "--top_p must lie in (0, 1], got nan"),
        (["--temperature", "0"], "--temperature must be finite and more than 0, got 0"),
        (["--temperature", ".inf"], "--temperature must be finite and more than 0, got inf"),
        (["--output", "s.json"], "--output must end in .jsonl, got s.json"),
        (["--split", "tests"], "--split: expected one of 'train', 'validation', 'forgetting', 'test', 'predict'"),
        (["--split", "test"], "data.test is not set"),
        (["--split", "predict"], "data.predict is not set, nor data.test"),
        (["--ckpt_path", "last"], "--ckpt_path: sample takes no checkpoint: `export` it, and give the folder as"),
        (["--model.modle", "x"], "unknown key model.modle; did you mean model.model?"),
        (
            ["--data.rows.prompt_column", "gold_answer"],
            "data.rows.prompt_column: gold_answer is another column of the samples",
        ),
        (
            ["--data.rows.text_column", "prompt", "--data.rows.form", "text"],
            "plain text has no prompt to generate from",
        ),
        (
            ["--model.evaluation.answer_extractor", "HashAnswer"],
            "train row 1: HashAnswer() finds nothing in the answer 'x|579'",
        ),
        (["--trainer.precision", "16-mixed"], "trainer.precision: 16-mixed needs a GPU"),
    ],
)
def test_one_message_for_one_mistake(arguments, tmp_path, capsys, given, expected):
    assert expected in fails(capsys, "--output", tmp_path / "s.jsonl", *arguments, *given)
    assert not (tmp_path / "s.jsonl").exists()
    assert not (tmp_path / "s.jsonl.partial").exists()


def test_rows_without_an_answer_are_named(arguments, tmp_path, capsys):
    path = tmp_path / "asked.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in [{"prompt": "1+1=", "completion": "2"}, {"prompt": "2+2="}])
    )
    message = fails(capsys, "--output", tmp_path / "s.jsonl", *arguments, "--data.predict", path, "--split", "predict")
    assert message == "predict row 2 has no final assistant turn to score against"


def test_columns_that_lines_cannot_have():
    check_columns(RowOptions(prompt_column="question", completion_column="answer"))
    for columns in (
        RowOptions(messages_column="prompt"),
        RowOptions(prompt_column="conversations"),
        RowOptions(prompt_column="sample"),
    ):
        with pytest.raises(ValueError, match="data.rows.prompt_column: .* rename"):
            check_columns(columns)
    check_columns(RowOptions(weight_column="reward"))
    with pytest.raises(ValueError, match="data.rows.weight_column: weight leaves the samples' reward out"):
        check_columns(RowOptions(weight_column="weight"))


def test_a_loss_with_a_reference_model_is_not_asked_for_it(arguments, tmp_path):
    reference = ["--model.loss", "AnchoredLoss", "--model.reference_model", "asset://arithmetic-base"]
    lines = sampled(tmp_path / "s.jsonl", *arguments, *reference, "--k", 1, "--limit", 2, "--max_new_tokens", 4)
    assert len(lines) == 2


def test_broken_weights_end_in_a_message(arguments, tmp_path, capsys, monkeypatch):
    def broken(module):
        module.model.get_input_embeddings().weight.fill_(float("nan"))
        return ""

    monkeypatch.setattr(lines_of_sample, "hash_weights", broken)
    assert fails(capsys, "--output", tmp_path / "s.jsonl", *arguments).startswith(
        "the model's probabilities are NaN or infinite: its weights are broken"
    )


def test_questions_by_hand():
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.0}
    columns = RowOptions()
    assert question_of(Conversation([user, answer]), columns) == {"prompt": "a"}
    assert question_of(Conversation([user]), columns) == {"prompt": "a"}
    named = {**user, "name": "Ann"}
    assert question_of(Conversation([named, answer]), columns) == {"prompt": [named]}
    assert question_of(Conversation([user, answer, user, answer], tools=[{}]), columns) == {
        "prompt": [user, {"role": "assistant", "content": "b"}, user],
        "tools": [{}],
    }
