"""Schedules by class path: what is taken and refused, and this package's own against transformers'."""

from __future__ import annotations

import math
import pickle
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, ReduceLROnPlateau, StepLR
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from dft_lightning.errors import InputError
from dft_lightning.modules.schedules import WarmupSchedule, build_schedule, needs_total_steps, schedule_values

WARMUP = "dft_lightning.modules.schedules.WarmupSchedule"
TORCHS = "torch.optim.lr_scheduler"


class Halving(LambdaLR):
    """Makes its function of numbers."""

    def __init__(self, optimizer, every: int) -> None:
        super().__init__(optimizer, lambda step: 0.5 ** (step // every))


class Watching(ReduceLROnPlateau):
    pass


def one(lr=1.0):
    return SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def rates(schedule, steps):
    """The rates before each step."""
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


def named(name, **options):
    return {"class_path": name, "init_args": options}


@pytest.mark.parametrize(
    ("given", "path", "options", "needs"),
    [
        (WarmupSchedule, WARMUP, {}, True),
        ({}, WARMUP, {}, True),
        ({"warmup": 3, "minimum": 1}, WARMUP, {"warmup": 3, "minimum": 1}, True),
        ({"decay": "constant", "warmup": 3}, WARMUP, {"decay": "constant", "warmup": 3}, False),
        ({"decay": "constant", "warmup": 0.5}, WARMUP, {"decay": "constant", "warmup": 0.5}, True),
        ({"total_steps": 9}, WARMUP, {"total_steps": 9}, False),
        (named("WarmupSchedule", total_steps=None), WARMUP, {"total_steps": None}, True),
        (partial(WarmupSchedule, decay="linear"), WARMUP, {"decay": "linear"}, True),
        (partial(CosineAnnealingLR, T_max=5), f"{TORCHS}.CosineAnnealingLR", {"T_max": 5}, False),
        (named("StepLR", step_size=2), f"{TORCHS}.StepLR", {"step_size": 2}, False),
        (named("OneCycleLR", max_lr=1), f"{TORCHS}.OneCycleLR", {"max_lr": 1}, True),
        (named("OneCycleLR", max_lr=1, total_steps=5), f"{TORCHS}.OneCycleLR", {"max_lr": 1, "total_steps": 5}, False),
        (named("OneCycleLR", max_lr=1, epochs=2, steps_per_epoch=5), f"{TORCHS}.OneCycleLR",
         {"max_lr": 1, "epochs": 2, "steps_per_epoch": 5}, False),
        (named(f"{__name__}.Halving", every=2), f"{__name__}.Halving", {"every": 2}, False),
    ],
)  # fmt: skip
def test_forms(given, path, options, needs):
    values = schedule_values(given)
    assert values == {"class_path": path, "init_args": options}
    assert schedule_values(values) == values
    assert needs_total_steps(values) is needs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "schedule must be a class, a functools.partial of one or a dict"),
        (lambda optimizer: None, "schedule must be a class"),
        (named("CosineLR"), "schedule: unknown class 'CosineLR'; did you mean CosineAnnealingLR?"),
        (named("torch.optim.SGD"), "schedule: SGD is not a subclass of LRScheduler"),
        (named("StepLR"), "schedule.step_size: required, but not given"),
        (named("StepLR", step=1), "schedule.step: StepLR has no option 'step'; did you mean step_size?"),
        ({"warmup_steps": 3}, "schedule.warmup_steps: WarmupSchedule has no option 'warmup_steps'; did you mean"),
        ({"warmup": -1}, "schedule.warmup must not be negative, got -1"),
        ({"warmup": -0.1}, "schedule.warmup must be a whole number of steps or, as a share of all, lie in [0, 1]"),
        ({"warmup": 1.5}, "schedule.warmup must be a whole number of steps or, as a share of all, lie in [0, 1], got"),
        ({"warmup": math.nan}, "schedule.warmup must be a whole number of steps or"),
        ({"warmup": True}, "schedule.warmup must be a number, got True"),
        ({"warmup": "3"}, "schedule.warmup must be a number, got '3'"),
        ({"minimum": 2}, "schedule.minimum must lie in [0, 1], got 2"),
        ({"minimum": -0.5}, "schedule.minimum must lie in [0, 1], got -0.5"),
        ({"minimum": math.nan}, "schedule.minimum must lie in [0, 1], got nan"),
        ({"decay": "square"}, "schedule.decay must be one of cosine, linear, constant, got 'square'"),
        ({"total_steps": 1.5}, "schedule.total_steps must be a whole number, got 1.5"),
        (named("OneCycleLR", max_lr=1, pct_start=2), "schedule: "),
        (named("LRScheduler"), "schedule: "),
        (partial(ReduceLROnPlateau, patience=1), "schedule: ReduceLROnPlateau goes by a value that it watches"),
        (Watching, "schedule: Watching goes by a value that it watches, which this option cannot name: override"),
        (partial(LambdaLR, lr_lambda=lambda step: 1), "schedule: LambdaLR takes functions or schedules"),
        (named("SequentialLR"), "schedule: SequentialLR takes functions or schedules"),
        (named("ChainedScheduler"), "schedule: ChainedScheduler takes functions or schedules"),
        (partial(StepLR, step_size=[StepLR]), "schedule.step_size: no config and no checkpoint can hold it"),
    ],
)  # fmt: skip
def test_refusals(given, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        schedule_values(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_curves_are_transformers_own(decay):
    theirs = {
        "cosine": lambda: get_cosine_schedule_with_warmup(one(), 5, 20),
        "linear": lambda: get_linear_schedule_with_warmup(one(), 5, 20),
        "constant": lambda: get_constant_schedule_with_warmup(one(), 5),
    }[decay]()
    expected = rates(theirs, 21)
    assert rates(build_schedule(schedule_values({"decay": decay, "warmup": 5}), one(), 20), 21) == pytest.approx(
        expected, abs=1e-12
    )
    # A share is rounded up: 0.21 of 20 steps are 5.
    of_share = build_schedule(schedule_values({"decay": decay, "warmup": 0.21}), one(), 20)
    assert rates(of_share, 21) == pytest.approx(expected, abs=1e-12)
    if decay != "constant":
        # minimum: 0.1 + 0.9 * shape, by hand at the middle of the decay, at its end and beyond
        lowest = build_schedule(schedule_values({"decay": decay, "warmup": 5, "minimum": 0.1}), one(), 20)
        found = rates(lowest, 25)
        assert found[12] == pytest.approx(0.1 + 0.9 * expected[12])
        assert found[20] == found[24] == pytest.approx(0.1)


def test_what_is_built():
    exponential = build_schedule(schedule_values(partial(ExponentialLR, gamma=0.5)), one(0.4), None)
    assert rates(exponential, 3) == [0.4, 0.2, 0.1]
    assert rates(build_schedule(schedule_values(partial(Halving, every=2)), one(), None), 5) == [1, 1, 0.5, 0.5, 0.25]
    # A total that is given is kept, and one that is not is the run's.
    linear = {"decay": "linear"}
    assert rates(build_schedule(schedule_values({**linear, "total_steps": 2}), one(), 4), 3) == [1, 0.5, 0]
    assert rates(build_schedule(schedule_values(linear), one(), 4), 3) == [1, 0.75, 0.5]
    adamw = AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    cycle = build_schedule(schedule_values(named("OneCycleLR", max_lr=1)), adamw, 7)
    assert cycle.total_steps == 7
    with pytest.raises(InputError, match=r"model\.schedule: optimizer must support momentum or beta1"):
        build_schedule(schedule_values(named("OneCycleLR", max_lr=1)), torch.optim.Adafactor(adamw.param_groups), 7)


def test_a_restored_state_leaves_this_runs_options():
    """As ``LambdaLR`` has it with a function: the state is where the schedule is, and the curve is this run's."""
    before = build_schedule(schedule_values({"decay": "linear"}), one(), 4)
    rates(before, 2)
    after = build_schedule(schedule_values({"decay": "linear", "minimum": 0.5}), one(), 8)
    after.load_state_dict(pickle.loads(pickle.dumps(before.state_dict())))
    assert after.last_epoch == 2
    assert rates(after, 3)[1:] == [0.5 + 0.5 * 5 / 8, 0.5 + 0.5 * 4 / 8]
