"""Every shipped config is parsed as it is, and run for two steps with a tiny model on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, TINY_LLAMA
from dft_lightning.cli import main

# Comparisons are no fit configs; test_compare_settings has them.
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "compare")
OVERLAYS = {
    "quickstart_ce": "quickstart",
    "quickstart_focal": "quickstart",
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
    wanted = yaml.safe_load(path.read_text()).get("data", {})
    prompt, completion = wanted.get("prompt_column", "prompt"), wanted.get("completion_column", "completion")
    if "alpaca" in path.stem:
        prompt, completion = "instruction", "output"
    row = {prompt: "1+1=", completion: "1+1+0=2c0|2" if "answer" not in completion else "#### 2"}
    rows.write_text("\n".join([json.dumps(row)] * 60))
    small = tmp_path / "small.yaml"
    small.write_text(
        yaml.safe_dump(
            {
                "model": {"model": TINY, "gradient_checkpointing": False, "generation": {"max_new_tokens": 4}},
                "data": {"train": str(rows), "test": str(rows), "tokenizer": "asset://arithmetic-base"},
                "trainer": {
                    "max_steps": 2,
                    "accumulate_grad_batches": 1,
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


def test_there_are_configs():
    assert {path.stem for path in CONFIGS} >= {"quickstart", "alpaca_qwen3", "gsm8k_smollm2", *OVERLAYS}
