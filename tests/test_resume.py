"""A run that was stopped and goes on ends as one that was not: bit for bit, with dropout, from any hook."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from lightning.pytorch.strategies import ModelParallelStrategy

from dft_lightning.data.batches.sampling import RowSampler
from resumed_runs import FIXED_BATCH, HOOKS, WITHOUT_DROPOUT, SaveAt, assert_same, fit, goes_on_alike, result
from small_runs import arithmetic_data, run_processes

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
    "micro-batches of tokens": (
        {"num_rows": 40, "global_batch_size": 6, "max_tokens": 120, "padding_free": True},
        {"max_steps": -1, "max_epochs": 2},
    ),
    "streamed": (
        {"streaming": {}, "shuffle_buffer_size": 5},
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


OTHERS = {
    "SGD": ({"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"class_path": "OneCycleLR", "init_args": {"max_lr": 0.2}}),
    "Muon": ({"lr": 1e-3}, {"warmup": 0.3, "decay": "linear", "minimum": 0.1}),
    "Adafactor": ({"lr": 1e-2}, {"class_path": "CosineAnnealingWarmRestarts", "init_args": {"T_0": 3}}),
    "RMSprop": ({"lr": 1e-3}, {"class_path": "StepLR", "init_args": {"step_size": 2}}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_and_schedules_go_on(name, tmp_path):
    chosen, schedule = OTHERS[name]
    options = {"optimizer": {"class_path": name, "init_args": chosen}, "schedule": schedule}
    whole, logged = fit({}, {"max_steps": 5}, SaveAt(tmp_path, "on_train_batch_end"), **options)
    assert len({value for (_, key), value in logged.items() if key == "train/lr"}) > 1
    goes_on_alike(tmp_path / "on_train_batch_end-2.ckpt", {}, {"max_steps": 5}, result(whole), logged, **options)


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
    run_processes("two_resume.py", str(tmp_path), timeout=200)
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
        if torch.distributed.is_initialized():  # by ModelParallelStrategy
            torch.distributed.destroy_process_group()
        assert_close(one, resumed, 3)


@pytest.mark.parametrize("before", ["rows", "tokens"])
def test_steps_of_as_many_rows_go_on_in_other_micro_batches(tmp_path, before):
    """Of a number of rows, and of a number of tokens: a checkpoint's position is counted in rows."""
    step = {"num_rows": 30, "global_batch_size": 4}
    kinds = {"rows": {**step, "batch_size": 2}, "tokens": {**step, "max_tokens": 120, "padding_free": True}}
    after = "tokens" if before == "rows" else "rows"
    _, whole = fit(kinds[before], {"max_steps": 12}, SaveAt(tmp_path, "on_train_batch_end"), model=WITHOUT_DROPOUT)
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    for path in paths[3 : len(paths) - 1 : len(paths) // 4]:
        _, resumed = fit(kinds[after], {"max_steps": 12}, ckpt_path=path, model=WITHOUT_DROPOUT)
        assert_close(whole, resumed, torch.load(path, weights_only=True)["global_step"])


def test_the_loader_goes_on_in_a_loop_of_ones_own():
    """Its state is good with and without workers, at any batch, and its later epochs are whole."""
    for options in ({}, {"num_workers": 2}, {"group_by_length": True}):
        data = arithmetic_data(14, batch_size=2, **options)
        data.load("fit")
        loader = data.train_dataloader()
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        state = loader.state_dict()
        expected = [batch["input_ids"] for batch in batches]
        resumed = data.train_dataloader()
        resumed.load_state_dict(state)
        assert_same(expected, [batch["input_ids"] for batch in resumed])
        assert len(list(resumed)) == 7


def test_a_sampler_goes_on_on_other_ranks():
    """What two ranks have drawn of an epoch is left out by one rank, by three, and in no other epoch."""
    rows = range(17)
    pair = [RowSampler(rows, 2, rank, shuffle=True, seed=5) for rank in range(2)]
    for sampler in pair:
        sampler.set_epoch(3)
    drawn = [iter(sampler) for sampler in pair]
    seen = [next(rank) for _ in range(3) for rank in drawn]
    state = pair[1].state_dict()
    assert state == {"epoch": 3, "rows": 6}
    whole = RowSampler(rows, shuffle=True, seed=5)
    whole.set_epoch(3)
    order = list(whole)
    assert order[:6] == seen
    for ranks in (1, 3):
        parts = []
        for rank in range(ranks):
            sampler = RowSampler(rows, ranks, rank, shuffle=True, seed=5)
            sampler.load_state_dict(state)
            sampler.set_epoch(3)
            parts.append(list(sampler))
            assert len(list(sampler)) == sampler.num_samples  # the next time all of it
            sampler.load_state_dict(state)
            sampler.set_epoch(4)
            assert len(list(sampler)) == sampler.num_samples
        assert [part[i] for i in range(len(parts[0])) for part in parts if i < len(part) and part[i] >= 0] == order[6:]


def test_batches_of_another_size_and_rows_in_another_order_are_said(tmp_path):
    fit({"num_rows": 20}, {"max_steps": 3}, SaveAt(tmp_path, "on_train_batch_end"))
    path = tmp_path / "on_train_batch_end-3.ckpt"  # 6 rows of 20 behind it
    with pytest.warns(UserWarning, match="6 rows into its epoch, and batches are of 4 rows now .*: 2 rows come twice"):
        run, _ = fit({"num_rows": 20, "batch_size": 4}, {"max_steps": -1, "max_epochs": 1}, ckpt_path=path)
    assert run.global_step == 3 + 4  # of five batches of four rows the first is done
    with pytest.warns(UserWarning, match=r"another order now: data.batches.seed 7 \(it was 0\). Some rows"):
        run, _ = fit({"num_rows": 20, "seed": 7}, {"max_steps": -1, "max_epochs": 1}, ckpt_path=path)
    assert run.global_step == 10


def test_a_run_that_its_number_of_steps_ended_goes_on_within_the_epoch(tmp_path):
    """With more steps, on the rows that were left: by the checkpoint that ModelCheckpoint writes at the very end."""
    options = {"schedule": {"warmup": 2, "decay": "constant"}}
    whole, logged = fit({}, {"max_steps": 9}, **options)
    expected = result(whole)
    fit({}, {"max_steps": 3}, SaveAt(tmp_path, "on_train_epoch_end"), **options)
    goes_on_alike(tmp_path / "on_train_epoch_end-1.ckpt", {}, {"max_steps": 9}, expected, logged, **options)


def test_windows_of_a_scheduler_and_early_stopping_go_on(tmp_path):
    """The window of the epoch that was begun, and the metric that is looked for at the epoch's end."""

    def callbacks():
        stopping = EarlyStopping("val/nll", patience=3, check_on_train_epoch_end=True)
        return GradientAccumulationScheduler({0: 1, 1: 2}), stopping

    options = {"max_steps": -1, "max_epochs": 3}
    whole, logged = fit({}, options, *callbacks(), SaveAt(tmp_path, "on_train_batch_end", "on_validation_end"))
    expected = result(whole)
    for name in ("on_train_batch_end-9", "on_train_batch_end-10", "on_validation_end-2"):
        goes_on_alike(tmp_path / f"{name}.ckpt", {}, options, expected, logged, *callbacks())


def test_a_checkpoint_without_a_place_in_the_rows_says_so(tmp_path):
    fit({}, {"max_steps": 3}, SaveAt(tmp_path, "on_train_batch_end"))
    old = torch.load(tmp_path / "on_train_batch_end-2.ckpt", weights_only=True)
    del old["dft_lightning_run"], old["InstructionDataModule"]
    torch.save(old, tmp_path / "old.ckpt")
    with pytest.warns(UserWarning, match="does not say where its run was in its rows"):
        fit({}, {"max_steps": 3}, ckpt_path=tmp_path / "old.ckpt")


def test_a_validation_that_was_due_is_run_once(tmp_path):
    """Before it and within it a checkpoint has it to do, after it not."""
    options = {"max_steps": 6, "check_val_every_n_epoch": None, "val_check_interval": 2}
    hooks = ("on_train_batch_end", "on_validation_batch_end", "on_validation_end")
    fit({}, options, SaveAt(tmp_path, *hooks))
    for name, validated in zip(("on_train_batch_end-4", f"{hooks[1]}-3", f"{hooks[2]}-2"), (1, 1, 0), strict=True):
        _, again = fit({}, options, ckpt_path=tmp_path / f"{name}.ckpt")
        assert [step for step, key in again if key == "val/nll"] == [3, 5][1 - validated :], name
