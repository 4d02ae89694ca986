"""What a restored optimizer and schedule keep of the run before, and what this run's options say of them.

Their states hold options beside what training made of them: a learning rate, betas, the length of a schedule. Loaded as
they are, they would override what a resumed run was told. So a checkpoint also holds both as they were before the first
step: what differs between one run's and another's is an option, and all else is state.

An optimizer's options become this run's, and so do those of every ``LambdaLR``, whose functions are no part of its
state; :class:`~dft_lightning.modules.schedules.WarmupSchedule` is one. What the state of a schedule has of its options
beside must be what the checkpoint's run had.
"""

from __future__ import annotations

import copy
from typing import Any, TypeGuard

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from dft_lightning.component import class_path
from dft_lightning.errors import InputError, shortened
from dft_lightning.modules.factories import Values, class_of, parameters_of

KEY = "optimizer_options"  # of a checkpoint

_ANEW = "or begin anew, with model.model as the exported checkpoint"


class OptimizerOptions:
    """The options of a run's optimizers and schedules, to be put back over those that a checkpoint restores.

    Args:
        schedule: class path and options of the schedule, as the module has them.
    """

    def __init__(self, schedule: Values) -> None:
        self._schedule = schedule
        self._schedule_before: Any = None
        self._own: dict[str, Any] | None = None
        self._before: dict[str, Any] | None = None

    def remember(self, trainer: pl.Trainer) -> None:
        """Read them; to be called when the optimizers are made and nothing is restored.

        Raises:
            InputError: the checkpoint's run had others, whose states these cannot take.
        """
        self._own = _read(trainer)
        if self._before is not None:
            self._check(trainer, self._before, self._own)

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Add them to a checkpoint."""
        if self._own is not None:
            checkpoint[KEY] = self._own

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Take from a checkpoint what its run had."""
        self._before = checkpoint.get(KEY)
        self._schedule_before = (checkpoint.get("hyper_parameters") or {}).get("schedule")

    def put_back(self, trainer: pl.Trainer) -> None:
        """Change restored optimizers and schedules where this run's options are not those of the checkpoint's run.

        Under ``LambdaLR`` learning rates become exactly what this run's schedule gives at the restored step. With the
        same options nothing changes by a bit.

        Raises:
            InputError: as :meth:`remember`, where a strategy reads the checkpoint later than that.
        """
        own, before, self._before = self._own, self._before, None
        if own is None:
            if trainer.ckpt_path is not None:
                rank_zero_warn(
                    f"{type(trainer.lightning_module).__name__} overrides on_fit_start without calling super(): the "
                    "optimizer keeps the checkpoint's learning rate and options, whatever this run's are"
                )
            return
        if _same(_read(trainer), own):  # nothing was restored
            return
        if before is None:
            rank_zero_warn(
                "the checkpoint does not say what its run's optimizer options were: learning rate, schedule and "
                "options go on as in its states, whatever this run's are"
            )
            return
        self._check(trainer, before, own)
        for optimizer, *of_groups in zip(trainer.optimizers, before["groups"], own["groups"], strict=True):
            for group, old, new in zip(optimizer.param_groups, *of_groups, strict=False):
                for name, value in new.items():
                    if name not in group or (name in old and not _same(old[name], value)):
                        _set(group, name, value)
        for config, *states in zip(trainer.lr_scheduler_configs, before["schedules"], own["schedules"], strict=True):
            if _is_function(config.scheduler):
                _set_rates(config.scheduler, *(state["base_lrs"] for state in states))

    def _check(self, trainer: pl.Trainer, before: dict[str, Any], own: dict[str, Any]) -> None:
        """Raise ``InputError`` for classes and options that the states of the checkpoint's run do not go with."""
        for kind in ("optimizer", "schedule"):
            classes = [", ".join(run["classes"][kind]) or "none" for run in (own, before)]
            if classes[0] != classes[1]:
                raise InputError(
                    f"model.{kind}: {classes[0]} here, and the checkpoint's run had {classes[1]}, whose state it "
                    f"cannot take: give that, {_ANEW}"
                )
        for i, schedule in enumerate(config.scheduler for config in trainer.lr_scheduler_configs):
            named = type(schedule) is class_of(self._schedule) and isinstance(self._schedule_before, dict)
            of_optimizer = trainer.optimizers.index(schedule.optimizer)
            had, has = (
                _options_in(schedule, run["schedules"][i], run["groups"][of_optimizer], values if named else {})
                for run, values in ((before, self._schedule_before), (own, self._schedule))
            )
            for key in has:
                if not _same(had.get(key), has[key]):
                    here, there = (shortened(str(_one(value)), 100) for value in (has[key], had.get(key)))
                    raise InputError(
                        f"{key}: {here} here, and the checkpoint's run had {there}, with which the state of its "
                        f"{type(schedule).__name__} goes on: give that, {_ANEW}"
                    )


def _read(trainer: pl.Trainer) -> dict[str, Any]:
    groups = [
        [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    classes: dict[str, list[Any]] = {"optimizer": trainer.optimizers, "schedule": schedules}
    return {
        "classes": {kind: [class_path(type(each)) for each in made] for kind, made in classes.items()},
        "groups": copy.deepcopy(groups),
        "schedules": copy.deepcopy([schedule.state_dict() for schedule in schedules]),
    }


def _set(group: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(group.get(name), Tensor):  # of a capturable optimizer, whose graph reads this very tensor
        group[name].fill_(value)
    else:
        group[name] = value


def _is_function(schedule: Any) -> TypeGuard[LambdaLR]:
    return isinstance(schedule, LambdaLR) and type(schedule).get_lr is LambdaLR.get_lr


def _set_rates(schedule: LambdaLR, before: list[Any], own: list[Any]) -> None:
    """As ``LambdaLR`` has them, so that without a change they are the restored ones."""
    peaks = schedule.base_lrs if _same(before, own) else copy.deepcopy(own)
    groups = schedule.optimizer.param_groups
    for group, peak, factor in zip(groups, peaks, schedule.lr_lambdas, strict=True):
        _set(group, "lr", peak * factor(schedule.last_epoch))
    rates = [copy.copy(group["lr"]) for group in groups]
    schedule.load_state_dict({**schedule.state_dict(), "base_lrs": peaks, "_last_lr": rates})


def _options_in(schedule: Any, state: dict[str, Any], groups: list[dict[str, Any]], values: Values) -> dict[str, Any]:
    """What a schedule would go on with, by the key of messages: its own options first, by which it may set rates.

    Args:
        schedule: of whose class they are.
        state: before the first step.
        groups: of its optimizer, before the first step.
        values: its options as the module has them, where it has them.
    """
    by_function, options = _is_function(schedule), parameters_of(type(schedule))
    said = {} if by_function else values.get("init_args", {})
    found = {f"model.schedule.{name}": said.get(name, each.default) for name, each in options.items()}
    found |= {f"model.schedule.{name}": [group[name] for group in groups] for name in options if name in groups[0]}
    if not by_function:
        found["model.optimizer.lr"] = [group.get("initial_lr", group["lr"]) for group in groups]
    for name, value in _flat(state).items():
        # base_lrs and max_lrs are the option's value for each group; _last_lr is read off the groups.
        option = next((each for each in (name, name[:-1]) if each in options), None)
        if name.rpartition(".")[2] != "_last_lr" and not (by_function and name == "base_lrs"):
            found[f"{type(schedule).__name__}'s {name}" if option is None else f"model.schedule.{option}"] = value
    return found


def _flat(state: Any, name: str = "") -> dict[str, Any]:
    """The values of nested dicts, and of dicts in lists, by dotted names."""
    if isinstance(state, list) and any(isinstance(each, dict) for each in state):
        state = dict(enumerate(state))
    if not isinstance(state, dict):
        return {name: state}
    parts = {f"{name}.{key}" if name else str(key): each for key, each in state.items()}
    return {path: value for part, each in parts.items() for path, value in _flat(each, part).items()}


def _one(value: Any) -> Any:
    """The value of all groups, where they have the same."""
    return value[0] if isinstance(value, list) and value and all(_same(each, value[0]) for each in value) else value


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
