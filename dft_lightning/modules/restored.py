"""What a restored optimizer and schedule keep of the run before, and what this run's options say of them.

Their states hold options beside what training made of them: a learning rate, betas, the length of a schedule. Loaded as
they are, they would override what a resumed run was told. So a checkpoint also holds both as they were before the first
step: what differs between one run's and another's is an option, and all else is state.
"""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

KEY = "optimizer_options"  # of a checkpoint

_OF_ADAMW = ("betas", "eps", "weight_decay")  # what is compared where a checkpoint does not hold KEY


class OptimizerOptions:
    """The options of a run's optimizers and schedules, to be put back over those that a checkpoint restores."""

    def __init__(self) -> None:
        self._own: dict[str, Any] | None = None
        self._before: dict[str, Any] | None = None

    def remember(self, trainer: pl.Trainer) -> None:
        """Read them; to be called when the optimizers are made and nothing is restored."""
        self._own = _read(trainer)

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Add them to a checkpoint."""
        if self._own is not None:
            checkpoint[KEY] = self._own

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Take from a checkpoint what its run had."""
        self._before = checkpoint.get(KEY)

    def put_back(self, trainer: pl.Trainer) -> None:
        """Change restored optimizers and schedules where this run's options are not those of the checkpoint's run.

        Learning rates become what this run's schedule gives at the restored step: exactly under ``LambdaLR`` and
        torch's schedules in closed form, by the ratio of the peaks under others until these step. With the same options
        nothing changes by a bit.
        """
        own, before, self._before = self._own, self._before, None
        if own is None:
            if trainer.ckpt_path is not None:
                rank_zero_warn(
                    f"{type(trainer.lightning_module).__name__} overrides on_fit_start without calling super(): the "
                    "optimizer keeps the checkpoint's learning rate and options, whatever this run's are"
                )
            return
        now = _read(trainer)
        if _same(now, own):  # nothing was restored
            return
        before = before or _older(now)
        for optimizer, *groups in zip(trainer.optimizers, before["groups"], own["groups"], strict=False):
            _set_groups(optimizer, *groups)
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        for schedule, *states in zip(schedules, *(each["schedules"] for each in (now, before, own)), strict=False):
            _set_schedule(schedule, *states)


def _read(trainer: pl.Trainer) -> dict[str, Any]:
    groups = [
        [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    return copy.deepcopy({"groups": groups, "schedules": schedules})


def _older(now: dict[str, Any]) -> dict[str, Any]:
    """What is known of the options behind a checkpoint without :data:`KEY`."""
    groups = [
        [{name: group[name] for name in (*_OF_ADAMW, _peak(group)) if name in group} for group in groups]
        for groups in now["groups"]
    ]
    schedules = [{name: state[name] for name in ("base_lrs",) if name in state} for state in now["schedules"]]
    return {"groups": groups, "schedules": schedules}


def _peak(group: dict[str, Any]) -> str:
    """The key of a group's learning rate before a schedule."""
    return "initial_lr" if "initial_lr" in group else "lr"


def _set_groups(optimizer: Optimizer, before: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
    for group, old, new in zip(optimizer.param_groups, before, own, strict=False):
        peak = _peak(new)
        if peak in old and not _same(old[peak], new[peak]):
            scaled = not _same(group["lr"], old[peak]) and float(old[peak]) != 0
            _set(group, "lr", group["lr"] / old[peak] * new[peak] if scaled else new[peak])
        for name, value in new.items():
            if name != "lr" and (name not in group or (name in old and not _same(old[name], value))):
                _set(group, name, value)


def _set(group: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(group.get(name), Tensor):  # of a capturable optimizer, whose graph reads this very tensor
        group[name].fill_(value)
    else:
        group[name] = value


def _set_schedule(schedule: Any, now: dict[str, Any], before: dict[str, Any], own: dict[str, Any]) -> None:
    own = {name: value for name, value in own.items() if name != "_last_lr"}  # which is read off the groups below
    merged = _merged(now, before, own)
    if changed := not _same(merged, now):
        schedule.load_state_dict(merged)
    rates: list[Any] = []
    if isinstance(schedule, LambdaLR) and type(schedule).get_lr is LambdaLR.get_lr:
        # As LambdaLR has them, so that without a change they are the restored ones. Its functions are this run's, and
        # may go by another number of steps.
        pairs = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        rates = [base * factor(schedule.last_epoch) for base, factor in pairs]
    elif changed and hasattr(schedule, "_get_closed_form_lr"):
        rates = schedule._get_closed_form_lr()
    groups = schedule.optimizer.param_groups
    for group, rate in zip(groups, rates, strict=False):
        _set(group, "lr", rate)
    if hasattr(schedule, "_last_lr"):
        schedule._last_lr = [copy.copy(group["lr"]) for group in groups]


def _merged(now: Any, before: Any, own: Any) -> Any:
    """A restored state, but with ``own`` wherever that is not what ``before`` was."""
    if isinstance(now, dict) and isinstance(before, dict) and isinstance(own, dict):
        known = {name: _merged(now[name], before[name], own[name]) for name in own if name in now and name in before}
        return {**own, **now, **known}
    lists = (now, before, own)
    if all(isinstance(each, list) for each in lists) and len({len(each) for each in lists}) == 1:
        return [_merged(*each) for each in zip(*lists, strict=True)]
    return now if _same(before, own) else own


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal; a list is what a tuple of the same is, and a tensor its number."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_same(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not isinstance(one, (Tensor, int, float)) or not isinstance(other, (Tensor, int, float)):
            return False
        return torch.equal(torch.as_tensor(one).cpu(), torch.as_tensor(other).cpu())
    return bool(one == other)
