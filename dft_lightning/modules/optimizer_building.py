"""A run's optimizer and schedule, and whether the run takes the steps that the schedule was made for."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dft_lightning.errors import InputError
from dft_lightning.models.head import ends_of
from dft_lightning.modules.factories import Values
from dft_lightning.modules.optimizers import (
    build_optimizer,
    check_sharding,
    matrix_names,
    optimizer_values,
    parameter_groups,
)
from dft_lightning.modules.schedules import (
    build_schedule,
    needs_total_steps,
    schedule_values,
    sets_rates_itself,
    steps_of_epochs,
    total_optimizer_steps,
)
from dft_lightning.modules.training import scales_gradients


class OptimizerBuilder:
    """Makes a run's optimizer and schedule, given as :class:`~dft_lightning.modules.CausalLMModule` takes them.

    Raises:
        ValueError: there is no such class or option, or it cannot be used here.
    """

    def __init__(self, optimizer: Any, schedule: Any) -> None:
        self._optimizer: Values = optimizer_values(optimizer)
        self.schedule_values: Values = schedule_values(schedule)
        self._matrices: frozenset[str] = frozenset()
        self._steps: tuple[int, list[int] | None] | None = None

    def see(self, module: nn.Module, trainer: pl.Trainer | None) -> None:
        """Look at parameters before a strategy wraps them; some flatten matrices.

        Raises:
            InputError: the optimizer does not work on the parts of parameters that the strategy makes.
        """
        check_sharding(self._optimizer, trainer)
        self._matrices = matrix_names(module)

    def groups(self, module: nn.Module, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups of a module with a language model in it."""
        return parameter_groups(module, self._optimizer, self._matrices, ends_of(model))

    def optimizer(self, groups: list[dict[str, Any]], device: torch.device, trainer: pl.Trainer) -> Optimizer:
        """The optimizer for parameter groups."""
        if not isinstance(groups, (list, tuple)):
            raise InputError(f"build_parameter_groups must return a list of groups, got {type(groups).__name__}")
        if not any(group["params"] for group in groups):
            raise InputError("no parameter of the model requires a gradient: there is nothing to train")
        return build_optimizer(self._optimizer, groups, device=device, scales_gradients=scales_gradients(trainer))

    def schedule(self, optimizer: Optimizer, trainer: pl.Trainer) -> LRScheduler:
        """The schedule of an optimizer, which is stepped once per optimizer step."""
        if not isinstance(optimizer, Optimizer):
            raise InputError(f"build_optimizer must return an optimizer, got {type(optimizer).__name__}")
        if sets_rates_itself(self.schedule_values):
            rank_zero_info(
                f"model.schedule: {self.schedule_values['class_path']} sets the learning rate by its max_lr: "
                "model.optimizer.lr counts for nothing"
            )
        if needs_total_steps(self.schedule_values):
            self._steps = total_optimizer_steps(trainer), steps_of_epochs(trainer)
        return build_schedule(self.schedule_values, optimizer, None if self._steps is None else self._steps[0])

    # -- the run's length, which data that is loaded anew, callbacks and early stops may change ------------------

    def check_epoch(self, trainer: pl.Trainer) -> None:
        """Warn of an epoch of another length than the schedule counted."""
        total, of_epochs = self._steps or (0, None)
        epoch = trainer.current_epoch
        if of_epochs is None or epoch >= len(of_epochs):
            return
        steps = trainer.num_training_batches / trainer.accumulate_grad_batches
        if math.isfinite(steps) and math.ceil(steps) != of_epochs[epoch]:
            rank_zero_warn(
                f"model.schedule: epoch {epoch} takes {math.ceil(steps)} optimizer steps, and {of_epochs[epoch]} were "
                f"counted when the schedule was made: it comes to its end after {total} steps, and the run perhaps "
                "not. Set trainer.max_steps"
            )

    def check_end(self, trainer: pl.Trainer, learning_rate: float) -> None:
        """Warn of a run of another length than the schedule counted, with its last learning rate."""
        if self._steps is not None and trainer.global_step != self._steps[0]:
            rank_zero_warn(
                f"model.schedule: the run ended after {trainer.global_step} optimizer steps, and {self._steps[0]} were "
                f"counted when the schedule was made: the last learning rate, {learning_rate:.3g}, is not the one at "
                "its end"
            )
