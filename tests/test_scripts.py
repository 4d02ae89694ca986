"""Scripts of benchmarks/ and docs/ in their smallest form, to the end, and that no script is without a test.

What a benchmark measures in processes of their own is measured in this one: the figures are no good, all else is the
same.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import ROOT, TINY_LLAMA
from dft_lightning.data import ArithmeticRows, arithmetic_tokenizer
from small_runs import run_script
from stand_ins import stand_ins

FOLDERS = ("benchmarks", "docs", "examples")


def test_every_script_is_run_by_a_test():
    """By ``run_script``, or in a process of its own by ``run_limited``."""
    calls = re.compile(r'run_script\(\s*"([^"]+)"|run_limited\(\s*\[str\(ROOT / "([^"]+)"\)')
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    run = {first or second for first, second in calls.findall(tests)}
    there = {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert run == there


def installed(package):
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


# Candidates of the head's benchmark and sides of the others that run on this machine.
TRL = ["trl"] if installed("trl") else []


@pytest.fixture
def children_here(monkeypatch):
    """A script that a script would start in a process of its own runs in this one."""
    real = subprocess.run

    def run(command, stdout=None, stderr=None, env=None, cwd=None, **options):
        if command[0] != sys.executable:
            return real(command, stdout=stdout, stderr=stderr, env=env, cwd=cwd, **options)
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.chdir(cwd or os.getcwd())
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            run_script(*command[1:])
        return subprocess.CompletedProcess(command, 0, printed.getvalue(), "")

    monkeypatch.setattr(subprocess, "run", run)


@pytest.fixture
def rows(tmp_path):
    """Twelve rows with question and answer."""
    path = tmp_path / "rows.jsonl"
    pairs = [{"question": row["prompt"], "answer": row["completion"]} for _, row in ArithmeticRows(12).rows()]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.fixture
def model(tmp_path):
    """A folder with weights and tokenizer."""
    folder = tmp_path / "model"
    tokenizer = arithmetic_tokenizer()
    config = LlamaConfig(**{**TINY_LLAMA, "vocab_size": len(tokenizer)})
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def says_what_is_missing(printed):
    return ("trl is not installed" in printed) == (not TRL)


# -- benchmarks --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("children_here")
def test_training_step(model, rows, tmp_path, capsys):
    """Without the sides that are compiled, which takes long; test_blocks has what they do."""
    output = tmp_path / "out.json"
    sizes = ["--steps", 3, "--batch_size", 2, "--turns", 1]
    sizes += ["--sides", "dft_lightning", "padded", "packed", "trl", "products"]
    run_script("benchmarks/training_step.py", "--model", model, "--rows", rows, *sizes, "--output", output)
    off, on = json.loads(output.read_text())["results"]
    assert (off["gradient_checkpointing"], on["gradient_checkpointing"]) == (False, True)
    for (turn,) in (off["turns"], on["turns"]):
        assert set(turn) == {"dft_lightning", "padded", "packed", "products", *TRL}
        for found in turn.values():
            assert found["steps"] == 3
            assert found["tokens"] > 0
            assert found["peak_memory"] > 0
    assert says_what_is_missing(capsys.readouterr().out)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("children_here")
def test_trl_trainer(model, rows, tmp_path, capsys):
    """The same losses by TRL's own DFT and by the mixin, where TRL is installed."""
    output, sizes = tmp_path / "out.json", ["--steps", 3, "--batch_size", 2, "--turns", 1]
    run_script("benchmarks/trl_trainer.py", "--model", model, "--rows", rows, *sizes, "--output", output)
    assert says_what_is_missing(capsys.readouterr().out)
    for name, most in {"32-true": 1e-5, "bf16-mixed": 0.1}.items() if TRL else ():
        found = json.loads(output.read_text())[name]
        assert found["peak_memory_mib"]["trl"] > 0
        assert found["largest_difference_of_losses"] < most


@pytest.mark.usefixtures("children_here")
def test_activations(model, rows, tmp_path):
    """Without the sides that are compiled, which takes long; test_blocks has what they do."""
    output = tmp_path / "out.json"
    sides = ["none", "every_2", "full", "selective", "offload"]
    sizes = ["--steps", 3, "--batch_size", 4, "--turns", 1, "--sides", *sides]
    run_script("benchmarks/activations.py", "--model", model, "--rows", rows, *sizes, "--output", output)
    found = json.loads(output.read_text())["sides"]
    assert list(found) == sides
    assert len({each["loss"] for each in found.values()}) == 1
    for side, each in found.items():
        assert each["times_the_speed"] > 0
        assert each["peak_memory"] > 0
        assert bool(each["to_host"]) == (side == "offload")


@pytest.mark.usefixtures("children_here")
def test_generation(tmp_path):
    """Eight problems: greedy answers of both sides are the same, and samples are as many."""
    output = tmp_path / "out.json"
    sizes = ["--problems", 8, "--turns", 1, "--num_samples", 3, "--data.train.init_args.num_rows", 8]
    config = ROOT / "configs" / "quickstart.yaml"
    run_script("benchmarks/generation.py", "--config", config, *sizes, "--output", output)
    found = json.loads(output.read_text())["embedded"]
    assert (found["greedy"]["differ"], found["avg@3"]["ratio"] > 0) == ([], True)
    (turn,) = found["greedy"]["turns"]
    assert turn["transformers"]["tokens"] == turn["dft_lightning"]["tokens"] > 8


@pytest.mark.usefixtures("children_here")
def test_linear_head_beside_others(tmp_path):
    output = tmp_path / "out.json"
    sizes = ["--tokens", 64, "--hidden", 16, "--vocabulary", 97, "--pairs", 1, "--device", "cpu", "--dtype", "float32"]
    sizes += ["--candidates", "dft_lightning", "--beside", 1]
    run_script("benchmarks/linear_head.py", *sizes, "--output", output)
    (row,) = json.loads(output.read_text())["results"]
    assert row["ratio_to_bare"] > 0
    assert "extra_memory" not in row


def test_head_error(model, rows, tmp_path):
    output = tmp_path / "out.json"
    losses = ["CrossEntropyLoss", "DEFTLoss", "AnchoredLoss", "SequenceDFTLoss"]
    options = ["--tokens", 40, "--losses", *losses, "--output", output]
    run_script("benchmarks/head_error.py", "--model", model, "--rows", rows, *options)
    found = json.loads(output.read_text())["results"]
    assert list(found) == losses
    assert set(found["AnchoredLoss"]) == {
        "dft_lightning", "dft_lightning, mixed", "float32 logits", "float32 logits, mixed", "bfloat16 logits",
    }  # fmt: skip
    for heads in found.values():
        assert all(math.isfinite(value) for each in heads.values() for value in each.values())
    assert found["CrossEntropyLoss"]["dft_lightning"]["dW"] < 0.02
    assert found["CrossEntropyLoss"]["liger's formulas"].keys() == {"dh", "dW", "log_prob"}


def test_gradient_threshold(model, rows, tmp_path):
    output, picture = tmp_path / "gradient_threshold_tiny.json", tmp_path / "picture.svg"
    options = ["--tokens", 40, "--rounds", 1, "--output", output]
    run_script("benchmarks/gradient_threshold.py", "--model", model, "--rows", rows, *options)
    found = json.loads(output.read_text())
    assert {"CE, exact", "DFT, 2^-12", "plain", *TRL} <= set(found["times_the_bare_products"])
    for by_threshold in found["errors"].values():
        for each in list(by_threshold.values())[1:]:
            for letter in "hW":
                assert each[f"d{letter} left out"] <= each[f"d{letter} bound"] + 0.02  # what bfloat16 rounds
                assert each["dropped"] == 0 or each[f"d{letter} bound"] > 0
    run_script("benchmarks/gradient_threshold.py", "--plot", picture, "--output", tmp_path)
    model = found["model"]
    assert all(name in picture.read_text() for name in (f"{model}, CE", f"{model}, DFT", "Gradient of the weight"))


@pytest.mark.usefixtures("children_here")
def test_linear_head(tmp_path, capsys):
    output = tmp_path / "out.json"
    sizes = ["--tokens", 64, "--hidden", 16, "--vocabulary", 97, "--pairs", 1, "--device", "cpu"]
    run_script("benchmarks/linear_head.py", *sizes, "--output", output)
    found = json.loads(output.read_text())["results"]
    names = ["dft_lightning", "plain", *TRL, "torch chunked"]
    assert [(row["candidate"], row["dtype"]) for row in found] == [
        (name, dtype) for dtype in ("bfloat16", "float32") for name in names
    ]
    for row in found:
        assert "failed" not in row
        assert row["ratio_to_bare"] > 0
        assert 0 < row["hidden_gradient_error"] < (0.05 if row["dtype"] == "bfloat16" else 1e-5)
        assert 0 < row["weight_gradient_error"] < (0.05 if row["dtype"] == "bfloat16" else 1e-5)
    assert says_what_is_missing(capsys.readouterr().out)


def test_head_losses(tmp_path):
    output = tmp_path / "out.json"
    sizes = ["--tokens", 300, "--hidden", 16, "--vocabulary", 97, "--turns", 1, "--device", "cpu"]
    script = run_script("benchmarks/head_losses.py", *sizes, "--output", output)
    found = json.loads(output.read_text())
    assert set(found["times_the_bare_products"]) == set(script["LOSSES"])
    assert all(times > 0 for times in found["times_the_bare_products"].values())


@pytest.mark.usefixtures("children_here")
def test_data(model, rows, tmp_path, capsys):
    output = tmp_path / "out.json"
    sizes = ["--max-length", 64, "--processes", 1, "--turns", 1, "--output", output]
    run_script("benchmarks/data.py", "--tokenizer", model, "--rows", rows, *sizes)
    found = json.loads(output.read_text())["processes"]["1"]
    assert ("ratio" in found) == bool(TRL)
    for side in ("dft_lightning", *TRL):
        assert found[side]["rows_per_second"] > 0
        assert 0.5 < found[side]["efficiency"] <= 1
    assert says_what_is_missing(capsys.readouterr().out)


@pytest.mark.usefixtures("children_here")
def test_data_of_generated_rows(tmp_path, capsys):
    tokenizer = ["--tokenizer", "asset://arithmetic-base"]
    sizes = ["--synthetic", 20, "--max-length", 64, "--processes", 1, "--turns", 1]
    run_script("benchmarks/data.py", *tokenizer, *sizes, "--output", tmp_path / "none.json")
    assert '"peak_mib"' in capsys.readouterr().out
    assert not (tmp_path / "none.json").exists()


def test_waits(tmp_path, capsys):
    output = tmp_path / "out.json"
    run_script("benchmarks/waits.py", "--variants", "padded", "--lines", "--output", output)
    found = json.loads(output.read_text())["processes"]["1"]["padded"]
    assert found["waits"]["own"]["within"] == 0
    assert "exact_sums.py" in capsys.readouterr().out


def test_dealing(tmp_path, capsys):
    output = tmp_path / "out.json"
    run_script("benchmarks/dealing.py", "--synthetic", 300, "--output", output)
    found = json.loads(output.read_text())["results"]
    assert {row["padded"] for row in found} == {False, True}
    for row in found:
        assert row["rows"]["step"] < row["in turn"]["step"] or row["padded"]
        assert row["time of tokens"]["step"] < 1
    assert "joined 32 x 4 x 2" in capsys.readouterr().out


def test_threshold_curve(tmp_path):
    """The same first loss of the same rows, whatever the threshold; and another of other rows."""
    output = tmp_path / "out.json"
    sizes = ["--trainer.max_steps", 3, "--trainer.log_every_n_steps", 1, "--trainer.enable_progress_bar", "false"]
    sizes += ["--data.train.num_rows", 12, "--trainer.callbacks", "null"]
    config = ROOT / "configs" / "quickstart.yaml"
    run_script("benchmarks/threshold_curve.py", "--config", config, "--threshold", 0.1, "--output", output, *sizes)
    curves = json.loads(output.read_text())["steps, objective, nll"]
    assert {name: [row[0] for row in curve] for name, curve in curves.items()} == {
        name: [1, 2, 3] for name in ("exact", "threshold", "another order")
    }
    exact, threshold, order = curves.values()
    assert exact[0] == threshold[0] != order[0]
    assert exact[2] != threshold[2]


def test_quickstart(tmp_path):
    output = tmp_path / "out.json"
    sizes = ["--trainer.max_steps", 1, "--trainer.enable_progress_bar", "false", "--data.train.num_rows", 4]
    sizes += [
        "--data.batch_size",
        4,
        "--data.validation.num_rows",
        2,
        "--model.evaluation.generation.max_new_tokens",
        2,
    ]
    run_script("benchmarks/quickstart.py", "--output", output, *sizes)
    runs = json.loads(output.read_text())["runs"]
    assert set(runs) == {"DFT", "cross-entropy", "focal"}
    for found in runs.values():
        assert found.pop("seconds") > 0
        exact = {f"{how} {when}": 0.0 for how in ("greedy", "sampled") for when in ("before", "after")}
        assert found == {"steps": 1, **exact}  # two tokens are no answer


# -- docs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def a_trl(tmp_path, monkeypatch):
    """An installed TRL of which there are the templates alone."""
    monkeypatch.delitem(sys.modules, "trl", raising=False)
    package, metadata = tmp_path / "site" / "trl", tmp_path / "site" / "trl-9.9.dist-info"
    (package / "chat_templates").mkdir(parents=True)
    metadata.mkdir()
    (package / "__init__.py").touch()
    turns = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    (package / "chat_templates" / "own.jinja").write_text(turns)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(str(package.parent))


@pytest.mark.usefixtures("a_trl")
def test_make_chat_templates(tmp_path):
    run_script("docs/make_chat_templates.py", stand_ins(), copied_to=tmp_path)
    page = (tmp_path / "chat_templates.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)`", page, re.MULTILINE) == ["smollm2", "qwen3", "gpt2", "stories260K", "own"]
    assert "## Templates that come with TRL 9.9\n" in page


def test_make_chat_templates_without_trl(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match=r"^trl, whose templates .* is not installed: pip install"):
        run_script("docs/make_chat_templates.py", tmp_path, copied_to=tmp_path)
    assert not (tmp_path / "chat_templates.md").exists()


SOURCE = '''
class Loss:
    """A :class:`Loss`, ``x``\\\\ s of it.

    Example:
        >>> 1
        1
    """
'''


def test_mkdocs_site(tmp_path):
    griffe = pytest.importorskip("griffe", reason="the docs extra is not installed")
    site = run_script("docs/mkdocs_site.py")
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "__init__.py").write_text(SOURCE)
    package = griffe.load(
        "a_package",
        search_paths=[tmp_path],
        extensions=griffe.load_extensions(site["Docstrings"]),
        allow_inspection=False,
    )
    found = package["Loss"].docstring.value
    assert '<autoref optional identifier="a_package.Loss">`Loss`</autoref>, ``x``s of it' in found
    assert "Examples:" in found
    assert site["on_page_content"]("a\\|b <td>`a\\|b`</td>") == "a\\|b <td>`a|b`</td>"
