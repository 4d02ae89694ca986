"""A run that was stopped and goes on ends as one that was not: bit for bit, with dropout, from any hook."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from resumed_runs import FIXED_BATCH, HOOKS, WITHOUT_DROPOUT, SaveAt, fit, goes_on_alike, result
from small_runs import run_two_processes

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "epochs, whole steps": ({}, {"max_steps": -1, "max_epochs": 2}),
    "steps, windows of three": ({}, {"max_steps": 6, "max_epochs": -1, "accumulate_grad_batches": 3}),
    "validation in the middle": (
        {},
        {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 3},
    ),
    "validation over epochs, packed, with workers": (
        {"packing": "bfd", "max_length": 64, "num_rows": 40, "num_workers": 2},
        {"max_steps": 9, "max_epochs": -1, "check_val_every_n_epoch": None, "val_check_interval": 4},
    ),
    "streamed": (
        {"streaming": True, "shuffle_buffer_size": 5},
        {"max_steps": 6, "accumulate_grad_batches": 2, "check_val_every_n_epoch": None, "val_check_interval": 3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_from_every_hook(case, tmp_path):
    data, options = CASES[case]
    whole, logged = fit(data, options, SaveAt(tmp_path, *HOOKS))
    expected = result(whole)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert {path.name.partition("-")[0] for path in paths} >= set(HOOKS[:3])
    for path in paths[2 :: len(paths) // 5]:
        goes_on_alike(path, data, options, expected, logged)


def assert_close(one, other, above):
    """Logged values of the steps above one, to what the issue of other sums of float32 leaves."""
    assert {key for key in one if key[0] > above} == {key for key in other if key[0] > above}
    for key, value in other.items():
        if key[0] > above and "generation" not in key[1]:
            assert value == pytest.approx(one[key], rel=1e-5, abs=1e-5), key


def test_two_processes_go_on_alike_and_on_one_and_from_one(tmp_path):
    """DDP, FSDP2 in shards and in one file; in the middle of a step and of a validation. Then on another number of
    processes: the global batch is fixed, dropout is off, and so losses are the same."""
    more = tmp_path / "more"
    _, one = fit(FIXED_BATCH, {"max_steps": 6}, SaveAt(more / "one", "on_train_batch_end"), model=WITHOUT_DROPOUT)
    run_two_processes("two_resume.py", str(tmp_path), timeout=200)
    for name in ("ddp", "shards"):
        found = torch.load(more / f"{name}.pt", weights_only=True)
        assert_close(one, found["whole"], 0)
        if name == "ddp":
            assert_close(one, found["resumed"], 2)
        path = more / name / "on_train_batch_end-3.ckpt"
        options = {"max_steps": 6}
        if name == "shards":
            options["strategy"] = ModelParallelStrategy(1, 1)
        _, resumed = fit(FIXED_BATCH, options, ckpt_path=path, model=WITHOUT_DROPOUT)
        assert_close(one, resumed, 3)
