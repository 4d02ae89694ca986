"""Every shipped config is parsed as it is, and run for two steps with a tiny model on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, TINY_LLAMA
from dft_lightning.data.batches.steps import micro_batches_of
from dft_lightning.fit import main
from dft_lightning.fit.config import read_fit_config
from dft_lightning.models.loading import load_causal_lm
from small_runs import run_processes

# Comparisons are no fit configs; test_compare_settings has them.
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TRAINERS = sorted((ROOT / "configs" / "trainer").glob("*.yaml"))
OVERLAYS = {
    "quickstart_ce": "quickstart",
    "quickstart_focal": "quickstart",
    "lora": "quickstart",
    "qlora": "quickstart",
    "arithmetic_competent": "arithmetic_base",
    "arithmetic_three_digits": "arithmetic_base",
}
TINY = {**TINY_LLAMA, "vocab_size": 20}


def stack(path: Path) -> list[str]:
    """Arguments for a config: an overlay comes after what it lies over."""
    base = OVERLAYS.get(path.stem)
    configs = [path.with_name(f"{base}.yaml"), path] if base else [path]
    return [argument for config in configs for argument in ("--config", str(config))]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_runs(path, tmp_path):
    rows = tmp_path / "rows.jsonl"
    wanted = yaml.safe_load(path.read_text()).get("data", {}).get("rows", {})
    prompt, completion = wanted.get("prompt_column", "prompt"), wanted.get("completion_column", "completion")
    if "alpaca" in path.stem:
        prompt, completion = "instruction", "output"
    row = {prompt: "1+1=", completion: "1+1+0=2c0|2" if "answer" not in completion else "#### 2"}
    data = {}
    if "word_problems" in path.stem:  # of an example's source, which would download them
        row, data = {prompt: "1+1=", completion: "1+1"}, {"validation": str(rows)}
    rows.write_text("\n".join([json.dumps(row)] * 60))
    model = TINY
    if path.stem in ("lora", "qlora"):  # an adapter needs a base, and 4 bits a width that 64 divides
        load_causal_lm({**TINY, "hidden_size": 64, "intermediate_size": 64}).save_pretrained(tmp_path / "base")
        model = str(tmp_path / "base")
    small = tmp_path / "small.yaml"
    small.write_text(
        yaml.safe_dump(
            {
                "model": {
                    "model": model,
                    "loading": {"gradient_checkpointing": False},
                    "evaluation": {"generation": {"max_new_tokens": 4}},
                },
                "data": {
                    "train": str(rows),
                    "test": str(rows),
                    "text": {"tokenizer": "asset://arithmetic-base"},
                    **data,
                },
                "trainer": {
                    "max_steps": 2,
                    "accelerator": "cpu",
                    "devices": 1,
                    "limit_val_batches": 1,
                    "num_sanity_val_steps": 0,
                    "enable_progress_bar": False,
                    "default_root_dir": str(tmp_path),
                },
            }
        )
    )
    cli = main(["fit", *stack(path), "--config", str(small)])
    assert cli.trainer.global_step == 2
    expected = {
        "quickstart_ce": "CrossEntropyLoss",
        "quickstart_focal": "FocalLoss",
        "arithmetic_base": "CrossEntropyLoss",
        "arithmetic_competent": "CrossEntropyLoss",
        "arithmetic_three_digits": "CrossEntropyLoss",
    }
    assert type(cli.model.loss).__name__ == expected.get(path.stem, "DFTLoss")


STRATEGIES = {
    "one_gpu": "auto",
    "ddp": "lightning.pytorch.strategies.DDPStrategy",
    "fsdp1_8gpus": "lightning.pytorch.strategies.FSDPStrategy",
    "fsdp2_4nodes": "lightning.pytorch.strategies.ModelParallelStrategy",
    "fsdp2_8gpus": "lightning.pytorch.strategies.ModelParallelStrategy",
}


@pytest.mark.parametrize("path", TRAINERS, ids=lambda path: path.stem)
def test_trainer_overlay_parses(path):
    trainer = read_fit_config([ROOT / "configs" / "alpaca_qwen3.yaml", path], {})["trainer"]
    assert trainer["precision"] == "bf16-mixed"
    strategy = trainer["strategy"]
    if strategy == "auto":
        assert STRATEGIES[path.stem] == "auto"
        return
    assert strategy["class_path"] == STRATEGIES[path.stem]
    options = strategy.get("init_args", {})
    if "FSDPStrategy" in strategy["class_path"]:
        block = "transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer"
        assert options["auto_wrap_policy"] == options["activation_checkpointing_policy"] == [block]


@pytest.mark.parametrize("path", TRAINERS, ids=lambda path: path.stem)
def test_every_fit_config_has_whole_micro_batches_under_a_trainer_overlay(path):
    overlay = yaml.safe_load(path.read_text())
    ranks = overlay["trainer"]["devices"] * overlay["trainer"]["num_nodes"]
    sizes = [yaml.safe_load(config.read_text()).get("data", {}) for config in CONFIGS]
    sizes = [{**size, **overlay.get("data", {})} for size in sizes if "global_batch_size" in size]
    assert len(sizes) == 2
    for size in sizes:
        micro_batches_of(size["global_batch_size"], size["batch_size"], ranks)


def test_trainer_overlay_runs(tmp_path):
    """FSDP2 over a fit config, on two processes; a second run loads the sharded checkpoint and tests."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join([json.dumps({"instruction": "1+1=", "output": "1+1+0=2c0|2"})] * 40))
    overlay = ROOT / "configs" / "trainer" / "fsdp2_4nodes.yaml"
    strategy = yaml.safe_load(overlay.read_text())["trainer"]["strategy"]  # over all processes, however many there are
    small = tmp_path / "small.yaml"
    content = {
        "model": {"model": TINY, "evaluation": {"generation": {"max_new_tokens": 4}}},
        "data": {"train": str(rows), "test": str(rows), "text": {"tokenizer": "asset://arithmetic-base"}}
        | {"batch_size": 4, "global_batch_size": 16},
        "trainer": {"accelerator": "cpu", "devices": 2, "num_nodes": 1, "strategy": strategy, "max_steps": 2}
        | {"default_root_dir": str(tmp_path), "enable_progress_bar": False, "val_check_interval": None},
    }
    small.write_text(yaml.safe_dump(content))
    configs = [ROOT / "configs" / "alpaca_qwen3.yaml", overlay, small]
    args = [argument for path in configs for argument in ("--config", str(path))]
    run_processes("two_command.py", "fit", *args)
    (run,) = (tmp_path / "lightning_logs").iterdir()
    assert (run / "config.yaml").is_file()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["epoch=0-step=2.ckpt"]
    tested = run_processes("two_command.py", "test", *args, "--ckpt_path", "last")
    assert "test/exact_match" in tested


def test_there_are_configs():
    assert {path.stem for path in CONFIGS} >= {"quickstart", "alpaca_qwen3", "gsm8k_smollm2", *OVERLAYS}
