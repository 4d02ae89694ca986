"""Options and states of optimizers and schedules on resume, without a run."""

from __future__ import annotations

import pickle
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, AdamW
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    OneCycleLR,
    StepLR,
)

from dft_lightning.errors import InputError
from dft_lightning.modules.resume.restored import KEY, OptimizerOptions
from dft_lightning.modules.schedules import WarmupSchedule, schedule_values


class Power:
    """A function of the step with an attribute, which ``LambdaLR`` keeps in its state."""

    def __init__(self, base) -> None:
        self.base = base

    def __call__(self, step):
        return self.base**step


class Run:
    """Optimizer and schedule as a trainer has them; each step's rate is kept."""

    def __init__(self, make_optimizer, make_schedule) -> None:
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.bias = nn.Parameter(torch.randn(2))
        groups = [{"params": [self.weight]}, {"params": [self.bias], "weight_decay": 0.0}]
        self.optimizers = [make_optimizer(groups)]
        self.lr_scheduler_configs = []
        if make_schedule is not None:
            self.lr_scheduler_configs = [SimpleNamespace(scheduler=make_schedule(self.optimizers[0]))]
        self.ckpt_path, self.lightning_module, self.rates = None, None, []

    def states(self):
        return [*self.optimizers, *(config.scheduler for config in self.lr_scheduler_configs)]

    def step(self, first, last):
        for step in range(first, last):
            draws = torch.Generator().manual_seed(step)
            for parameter in (self.weight, self.bias):
                parameter.grad = torch.randn(parameter.shape, generator=draws)
            self.rates.append(float(self.optimizers[0].param_groups[0]["lr"]))
            self.optimizers[0].step()
            for config in self.lr_scheduler_configs:
                config.scheduler.step()
        return self


def resumed(before, after, steps=3, forget=False):
    """Steps of ``before`` until a checkpoint, and what ``after`` makes of it."""
    options, again = (OptimizerOptions(schedule_values({})) for _ in range(2))
    options.remember(before)
    checkpoint: dict = {}
    options.save(checkpoint)
    before.step(0, steps)
    checkpoint, states, weights = pickle.loads(
        pickle.dumps((checkpoint, [x.state_dict() for x in before.states()], [before.weight, before.bias]))
    )
    if forget:
        del checkpoint[KEY]
    again.load(checkpoint)
    again.remember(after)
    for each, state in zip(after.states(), states, strict=True):
        each.load_state_dict(state)
    with torch.no_grad():
        after.weight.copy_(weights[0])
        after.bias.copy_(weights[1])
    after.ckpt_path = "a.ckpt"
    again.put_back(after)
    return after


ADAMW = partial(AdamW, lr=0.1, betas=(0.8, 0.9))
OTHERS = {
    "none": (ADAMW, None),
    "warm-up": (ADAMW, partial(WarmupSchedule, warmup=2, total_steps=9)),
    "power": (ADAMW, lambda optimizer: LambdaLR(optimizer, Power(0.9))),
    "cosine": (partial(SGD, lr=0.1, momentum=0.9), partial(CosineAnnealingLR, T_max=9)),
    "one cycle": (ADAMW, partial(OneCycleLR, max_lr=0.1, total_steps=9)),
    "adafactor": (partial(Adafactor, lr=0.1), partial(StepLR, step_size=2)),
    "chained": (ADAMW, lambda optimizer: ChainedScheduler([StepLR(optimizer, 2), ExponentialLR(optimizer, 0.9)])),
}


@pytest.mark.parametrize("name", OTHERS)
def test_without_a_change_a_run_goes_on_to_the_bit(name):
    whole, after = Run(*OTHERS[name]).step(0, 7), Run(*OTHERS[name])
    resumed(Run(*OTHERS[name]), after).step(3, 7)
    assert after.rates == whole.rates[3:]
    assert torch.equal(after.weight, whole.weight)
    assert torch.equal(after.bias, whole.bias)


@pytest.mark.parametrize(
    ("name", "optimizer", "schedule"),
    [
        ("none", partial(AdamW, lr=0.03, betas=(0.8, 0.9)), None),
        ("warm-up", partial(AdamW, lr=0.03, betas=(0.8, 0.9)), partial(WarmupSchedule, decay="linear", total_steps=20)),
        ("power", partial(AdamW, lr=0.03, betas=(0.8, 0.9)), lambda optimizer: LambdaLR(optimizer, Power(0.9))),
    ],
)
def test_this_runs_options_count(name, optimizer, schedule):
    expected = Run(optimizer, schedule).step(0, 7)
    after = resumed(Run(*OTHERS[name]), Run(optimizer, schedule)).step(3, 7)
    assert after.rates == expected.rates[3:]
    assert after.rates != Run(*OTHERS[name]).step(0, 7).rates[3:]


def test_options_of_groups_count_and_their_state_is_kept():
    before, after = (
        Run(*OTHERS["warm-up"]),
        Run(partial(AdamW, lr=0.1, betas=(0.7, 0.9), eps=0.5), OTHERS["warm-up"][1]),
    )
    for run in (before, after):
        run.optimizers[0].param_groups[0]["count"] = 0
    options = OptimizerOptions(schedule_values({}))
    options.remember(before)
    before.optimizers[0].param_groups[0]["count"] = 7
    kept: dict = {}
    options.save(kept)
    again = OptimizerOptions(schedule_values({}))
    again.load(kept)
    again.remember(after)
    for each, state in zip(after.states(), [x.state_dict() for x in before.step(0, 2).states()], strict=True):
        each.load_state_dict(state)
    again.put_back(after)
    group, spared = after.optimizers[0].param_groups
    assert (group["count"], group["betas"], group["eps"], spared["weight_decay"]) == (7, (0.7, 0.9), 0.5, 0.0)


@pytest.mark.parametrize(
    ("name", "optimizer", "schedule", "message"),
    [
        ("cosine", None, partial(CosineAnnealingLR, T_max=20),
         "model.schedule.T_max: 20 here, and the checkpoint's run had 9, with which the state of its Cos"),
        ("cosine", partial(SGD, lr=0.03, momentum=0.9), None,
         "model.optimizer.lr: 0.03 here, and the checkpoint's run had 0.1, with"),
        ("one cycle", None, partial(OneCycleLR, max_lr=0.1, total_steps=20),
         "model.schedule.total_steps: 20 here, and the checkpoint's run had 9, with"),
        ("one cycle", None, partial(OneCycleLR, max_lr=0.2, total_steps=9),
         "model.schedule.max_lr: 0.2 here, and the checkpoint's run had 0.1, with"),
        ("adafactor", None, partial(StepLR, step_size=2, gamma=0.5),
         "model.schedule.gamma: 0.5 here, and the checkpoint's run had 0.1, with"),
        ("chained", None,
         lambda optimizer: ChainedScheduler([StepLR(optimizer, 2), ExponentialLR(optimizer, 0.8)]),
         "ChainedScheduler's _schedulers.1.gamma: 0.8 here, and the checkpoint's run had 0.9, with"),
        ("power", None, lambda optimizer: LambdaLR(optimizer, Power(0.5)),
         "LambdaLR's lr_lambdas.0.base: 0.5 here, and the checkpoint's run had 0.9, with"),
        ("chained", partial(AdamW, lr=0.2, betas=(0.8, 0.9)), None,
         "model.optimizer.lr: 0.2 here, and the checkpoint's run had 0.1, with"),
        ("cosine", ADAMW, None, "model.optimizer: torch.optim.AdamW here, and the checkpoint's run had torch.opt"),
        ("none", None, partial(StepLR, step_size=1),
         "model.schedule: torch.optim.lr_scheduler.StepLR here, and the checkpoint's run had none, whose state"),
        ("warm-up", None, partial(CosineAnnealingLR, T_max=9),
         "and the checkpoint's run had dft_lightning.modules.schedules.WarmupSchedule, whose state it cannot take"),
    ],
)  # fmt: skip
def test_what_a_state_would_override_is_refused_by_name(name, optimizer, schedule, message):
    of_optimizer, of_schedule = OTHERS[name]
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        resumed(Run(of_optimizer, of_schedule), Run(optimizer or of_optimizer, schedule or of_schedule))
    assert "or begin anew, with model.model as the exported checkpoint" in str(caught.value)


def test_options_for_each_group_are_named_as_one():
    made = partial(CyclicLR, base_lr=0.01, step_size_up=3)
    sgd = partial(SGD, lr=0.1, momentum=0.9)
    with pytest.raises(InputError, match=r"model\.schedule\.max_lr: 0\.3 here, and the checkpoint's run had 0\.2"):
        resumed(Run(sgd, partial(made, max_lr=0.2)), Run(sgd, partial(made, max_lr=0.3)))


def test_a_checkpoint_that_does_not_say_what_its_options_were():
    with pytest.warns(UserWarning, match="the checkpoint does not say what its run's optimizer options were"):
        after = resumed(Run(*OTHERS["none"]), Run(partial(AdamW, lr=0.5), None), forget=True)
    assert after.optimizers[0].param_groups[0]["lr"] == 0.1
