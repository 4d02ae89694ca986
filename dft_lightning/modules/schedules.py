"""Any learning-rate schedule of torch's kind by class path, this package's own, and how many steps a run will take."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    LambdaLR,
    LRScheduler,
    MultiplicativeLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.utils.data import DistributedSampler

from dft_lightning.errors import InputError, check_one_of, one_line
from dft_lightning.foreign.lightning import shares_rows_out, training_loader
from dft_lightning.modules.factories import Values, class_of, factory_values, options_of, parameters_of, tried
from dft_lightning.progress import accumulation_of, limited_batches

ScheduleCallable = Callable[[Optimizer], LRScheduler]
Decay = Literal["cosine", "linear", "constant"]


class WarmupSchedule(LambdaLR):
    """Linear warm-up from 0, then a decay, stepped once per optimizer step.

    The peak is the optimizer's ``lr``. The curves are those of the schedules of the same names in transformers.

    Args:
        optimizer: whose rates it sets.
        warmup: optimizer steps of warm-up, or as a float in ``[0, 1]`` the share of all steps, rounded up.
        decay: ``"cosine"``, ``"linear"`` or ``"constant"``.
        minimum: learning rate at the end, as a share of the peak in ``[0, 1]``.
        total_steps: optimizer steps until the end; the module gives the run's where it is not set.

    Raises:
        ValueError: an option is out of range, or ``total_steps`` is needed and not given.

    Example:
        >>> optimizer = AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = WarmupSchedule(optimizer, warmup=0.5, decay="linear", total_steps=4)
        >>> [schedule.lr_lambdas[0](step) for step in range(5)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: int | float = 0,
        decay: Decay = "cosine",
        minimum: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        _check_warmup_options(warmup, decay, minimum, total_steps)
        steps = math.ceil(warmup * total_steps) if isinstance(warmup, float) and total_steps is not None else warmup
        # A partial function, and nothing kept in self: a restored state would override it.
        factor = partial(
            learning_rate_factor, decay=decay, warmup_steps=int(steps), total_steps=total_steps, minimum=minimum
        )
        super().__init__(optimizer, factor)


def _check_warmup_options(warmup: Any, decay: Any, minimum: Any, total_steps: Any) -> None:
    for name, value in (("warmup", warmup), ("minimum", minimum)):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{name} must be a number, got {value!r}")
    if isinstance(warmup, float) and not 0 <= warmup <= 1:
        raise ValueError(f"warmup must be a whole number of steps or, as a share of all, lie in [0, 1], got {warmup}")
    if warmup < 0:
        raise ValueError(f"warmup must not be negative, got {warmup}")
    check_one_of("decay", decay, ("cosine", "linear", "constant"))
    if not 0 <= minimum <= 1:
        raise ValueError(f"minimum must lie in [0, 1], got {minimum}")
    if decay == "constant" and minimum:
        raise ValueError(f"minimum is where a decay ends, and decay: constant has none: leave it out, got {minimum}")
    if total_steps is None and (decay != "constant" or isinstance(warmup, float)):
        raise ValueError("total_steps: required where the decay or the warmup goes by it")
    if total_steps is not None and (not isinstance(total_steps, int) or isinstance(total_steps, bool)):
        raise ValueError(f"total_steps must be a whole number, got {total_steps!r}")
    if total_steps is not None and total_steps < 0:
        raise ValueError(f"total_steps must not be negative, got {total_steps}")


def learning_rate_factor(
    step: int, *, decay: Decay, warmup_steps: int, total_steps: int | None, minimum: float
) -> float:
    """What :class:`WarmupSchedule` multiplies the peak learning rate by at an optimizer step, counted from 0."""
    if step < warmup_steps:
        return step / warmup_steps
    if decay == "constant":
        return 1.0
    assert total_steps is not None
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if decay == "cosine" else 1 - progress
    return minimum + (1 - minimum) * shape


# -- options -------------------------------------------------------------------------------------------------------

NAMES = {**vars(torch.optim.lr_scheduler), "WarmupSchedule": WarmupSchedule}
# Their constructors take functions or other schedules.
_NOT_OF_OPTIONS = (LambdaLR, MultiplicativeLR, SequentialLR, ChainedScheduler)


def schedule_values(given: Any) -> Values:
    """A schedule's class path and options in plain form, checked.

    Args:
        given: a schedule's class, a ``functools.partial`` of one, a dict with ``class_path`` (dotted, or the name of
            :class:`WarmupSchedule` or of a class of ``torch.optim.lr_scheduler``) and ``init_args``, or a dict of
            options of :class:`WarmupSchedule`.

    Raises:
        ValueError: there is no such class or option, an option is out of range or missing, or the class needs more
            than plain options and the number of steps.

    Example:
        >>> schedule_values({"warmup": 10})
        {'class_path': 'dft_lightning.modules.schedules.WarmupSchedule', 'init_args': {'warmup': 10}}
    """
    values = factory_values(given, LRScheduler, "schedule", WarmupSchedule, NAMES, _check_class)
    optimizer = AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    tried(_with_total(values, 1000), "schedule", optimizer)
    return values


def _check_class(cls: type) -> None:
    if issubclass(cls, ReduceLROnPlateau):
        raise ValueError(
            f"schedule: {cls.__name__} goes by a value that it watches, which this option cannot name: override "
            "configure_optimizers"
        )
    if cls in _NOT_OF_OPTIONS:
        raise ValueError(
            f"schedule: {cls.__name__} takes functions or schedules, which no config and no checkpoint can hold: name "
            "a subclass of your own that makes them from numbers, or override configure_optimizers"
        )


def sets_rates_itself(values: Values) -> bool:
    """Whether a schedule goes by rates of its own, so that the optimizer's ``lr`` counts for nothing."""
    return "max_lr" in parameters_of(class_of(values))


def needs_total_steps(values: Values) -> bool:
    """Whether a schedule goes by the number of the run's steps: its class takes ``total_steps``, which is not given."""
    cls = class_of(values)
    options = {**{name: each.default for name, each in parameters_of(cls).items()}, **values["init_args"]}
    if options.get("total_steps", 0) is not None:
        return False
    if issubclass(cls, WarmupSchedule) and {"decay", "warmup"} <= options.keys():
        return options["decay"] != "constant" or isinstance(options["warmup"], float)
    return options.get("epochs") is None or options.get("steps_per_epoch") is None  # of OneCycleLR


def build_schedule(values: Values, optimizer: Optimizer, total_steps: int | None) -> LRScheduler:
    """The schedule of values of :func:`schedule_values`, which has ``total_steps`` where :func:`needs_total_steps`.

    Raises:
        InputError: the class refuses the options or the optimizer.
    """
    values = _with_total(values, total_steps)
    try:
        return cast(LRScheduler, class_of(values)(optimizer, **options_of(values)))
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"model.schedule: {one_line(error)}") from error


def _with_total(values: Values, total_steps: int | None) -> Values:
    if not needs_total_steps(values):
        return values
    return {**values, "init_args": {**values["init_args"], "total_steps": total_steps}}


# -- the run's steps -----------------------------------------------------------------------------------------------


def total_optimizer_steps(trainer: pl.Trainer) -> int:
    """Optimizer steps that a ``fit`` will take: ``max_steps``, or epochs times the known length of the data.

    ``trainer.estimated_stepping_batches`` is not read: it sets up the data loaders before a checkpoint restores
    their state, which is then lost (Lightning issue 20550).

    Raises:
        InputError: neither ``max_steps`` nor the data's length is known.
    """
    limits: list[int] = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        steps = steps_of_epochs(trainer)
        if steps is not None:
            limits.append(sum(steps))
        elif not limits:
            raise InputError(
                "the schedule needs the number of optimizer steps, but trainer.max_steps is not set and the training "
                "data has no length: set trainer.max_steps, or model.schedule.decay: constant with a warmup in steps"
            )
    if not limits:
        raise InputError("the schedule needs an end: set trainer.max_steps or trainer.max_epochs")
    return min(limits)


def steps_of_epochs(trainer: pl.Trainer) -> list[int] | None:
    """Optimizer steps of each epoch, as a ``GradientAccumulationScheduler`` will have them.

    ``None`` where the run has no number of epochs, or the data no length.
    """
    batches = num_training_batches(trainer)
    if batches is None or trainer.max_epochs is None or trainer.max_epochs < 0:
        return None
    return [math.ceil(batches / accumulation_of(trainer, epoch)) for epoch in range(trainer.max_epochs)]


def num_training_batches(trainer: pl.Trainer) -> int | None:
    """Micro-batches per epoch and rank, or ``None`` where the data has no length."""
    # Covers loaders given to fit, the data module's and the module's own alike, without starting their workers.
    loader = training_loader(trainer)
    try:
        batches = len(loader)
    except (TypeError, NotImplementedError):
        return trainer.limit_train_batches if isinstance(trainer.limit_train_batches, int) else None
    sampler = getattr(loader, "sampler", None)
    shared_out = isinstance(sampler, DistributedSampler) or not shares_rows_out(trainer)
    if sampler is not None and not shared_out:
        batches = math.ceil(batches / trainer.world_size)  # Lightning will share the rows out among the ranks
    return limited_batches(trainer, batches)
