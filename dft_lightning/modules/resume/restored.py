"""What a restored optimizer and schedule keep of the run before, and what this run's options say of them.

Their states hold options beside what training made of them: a learning rate, betas, the length of a schedule. Loaded as
they are, they would override what a resumed run was told. So a checkpoint also holds both as they were before the first
step: what differs between one run's and another's is an option, and all else is state.

An optimizer's options become this run's, and so do those of schedules that are functions of the step
(:class:`~dft_lightning.modules.schedules.WarmupSchedule` and every ``LambdaLR``). Others keep in their states what they
made of their options, so that a changed one is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
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

_MADE = ("_last_lr",)  # read off the groups
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
            for kind in ("optimizer", "schedule"):
                own, before = (", ".join(each["classes"][kind]) or "none" for each in (self._own, self._before))
                if own != before:
                    raise InputError(
                        f"model.{kind}: {own} here, and the checkpoint's run had {before}, whose state it cannot take: "
                        f"give that, {_ANEW}"
                    )
            for config in trainer.lr_scheduler_configs:
                if not _is_function(config.scheduler) and type(config.scheduler) is class_of(self._schedule):
                    _check_options(self._schedule, self._schedule_before)

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
            InputError: an option differs of which another schedule's state goes on with what it made of the old value.
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
        groups = list(zip(trainer.optimizers, before["groups"], own["groups"], strict=True))
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        states = list(zip(schedules, before["schedules"], own["schedules"], strict=True))
        for schedule, *pair in states:
            if not _is_function(schedule):
                of_groups = [each for optimizer, *each in groups if optimizer is schedule.optimizer]
                _check_unchanged(schedule, *pair, *of_groups[0])
        for optimizer, old_groups, new_groups in groups:
            for group, old, new in zip(optimizer.param_groups, old_groups, new_groups, strict=False):
                _set_changed(group, old, new)
        for schedule, *pair in states:
            if _is_function(schedule):
                _set_function(schedule, *pair)


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


def _set_changed(group: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> None:
    for name, value in new.items():
        if name not in group or (name in old and not _same(old[name], value)):
            _set(group, name, value)


def _set(group: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(group.get(name), Tensor):  # of a capturable optimizer, whose graph reads this very tensor
        group[name].fill_(value)
    else:
        group[name] = value


def _is_function(schedule: Any) -> TypeGuard[LambdaLR]:
    return isinstance(schedule, LambdaLR) and type(schedule).get_lr is LambdaLR.get_lr


def _set_function(schedule: LambdaLR, before: dict[str, Any], own: dict[str, Any]) -> None:
    """Its functions are this run's already; what it and they keep in attributes becomes so, and the rates follow."""
    changed = {n: v for n, v in own.items() if n not in _MADE and not (n in before and _same(before[n], v))}
    if changed:
        schedule.load_state_dict({**schedule.state_dict(), **copy.deepcopy(changed)})
    # As LambdaLR has them, so that without a change they are the restored ones.
    for group, base, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        _set(group, "lr", base * factor(schedule.last_epoch))
    rates = [copy.copy(group["lr"]) for group in schedule.optimizer.param_groups]
    schedule.load_state_dict({**schedule.state_dict(), "_last_lr": rates})


def _check_options(own: Values, before: Any) -> None:
    """Raise ``InputError`` for an option of a schedule that the checkpoint's run had otherwise."""
    if not isinstance(before, dict) or not isinstance(before.get("init_args"), dict):
        return
    for name, parameter in parameters_of(class_of(own)).items():
        had, has = (each["init_args"].get(name, parameter.default) for each in (before, own))
        if not _same(had, has):
            raise _refused(f"model.schedule.{name}", has, had, class_of(own).__name__)


def _refused(key: str, has: Any, had: Any, schedule: str) -> InputError:
    has, had = (shortened(str(_one(value)), 100) for value in (has, had))
    return InputError(
        f"{key}: {has} here, and the checkpoint's run had {had}, with which the state of its {schedule} goes on: give "
        f"that, {_ANEW}"
    )


def _check_unchanged(
    schedule: Any, before: dict[str, Any], own: dict[str, Any], old: list[dict[str, Any]], new: list[dict[str, Any]]
) -> None:
    """Raise ``InputError`` for an option whose old value a schedule's state would go on with."""
    options = parameters_of(type(schedule))
    found: dict[str, tuple[Any, Any]] = {}
    for name, *values in _differing(before, own):
        # base_lrs and max_lrs are the option's value for each group.
        found.setdefault(next((each for each in (name, name[:-1]) if each in options), name), tuple(values))
    for was, now in zip(old, new, strict=False):
        for name in now:
            if name in was and not _same(was[name], now[name]) and name in (*options, "lr", "initial_lr"):
                found.setdefault(name, (was[name], now[name]))
    if not found:
        return
    # The schedule's own come first: some set the groups' rates by them.
    named = next((name for name in found if name in options), None)
    if named is not None:
        key = f"model.schedule.{named}"
    else:
        of_rate = [name for name in found if name in ("lr", "initial_lr") or name.endswith("base_lrs")]
        named = of_rate[0] if of_rate else next(iter(found))
        key = "model.optimizer.lr" if of_rate else f"{type(schedule).__name__}'s {named}"
    had, has = found[named]
    raise _refused(key, has, had, type(schedule).__name__)


def _differing(before: Any, own: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name and values of what is not the same in the states of two schedules."""
    if isinstance(before, dict) and isinstance(own, dict):
        for key in [key for key in own if key not in _MADE]:
            yield from _differing(before.get(key), own[key], f"{name}.{key}" if name else key)
    elif isinstance(own, list) and any(isinstance(each, dict) for each in own) and isinstance(before, list):
        for i, pair in enumerate(zip(before, own, strict=False)):
            yield from _differing(*pair, f"{name}.{i}")
    elif not _same(before, own):
        yield name, before, own


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
