"""Parameter groups, the learning-rate schedule and how many steps a run will take."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.utils.data import DistributedSampler

from dft_lightning.errors import InputError

Schedule = Literal["cosine", "linear", "constant"]


def check_schedule_options(warmup_steps: int, warmup_ratio: float | None, min_ratio: float) -> None:
    """Raise ``ValueError`` for options of the schedule that contradict each other or are out of range."""
    if warmup_ratio is not None and warmup_steps:
        raise ValueError(f"give warmup_steps ({warmup_steps}) or warmup_ratio ({warmup_ratio}), not both")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
    for name, value in (("warmup_ratio", warmup_ratio), ("min_lr_ratio", min_ratio)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")


def check_adamw_options(learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise ``ValueError`` for options of AdamW that are out of range."""
    for name, value in (("learning_rate", learning_rate), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")


# What FSDP1, activation checkpointing and torch.compile put into names.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def matrix_names(module: nn.Module) -> frozenset[str]:
    """Names of the parameters of two dimensions or more, whatever wraps the module's parts."""
    return frozenset(_own_name(name) for name, p in module.named_parameters() if p.ndim >= 2)


def decay_groups(module: nn.Module, weight_decay: float, matrices: frozenset[str]) -> list[dict[str, Any]]:
    """Two AdamW groups of the trainable parameters: matrices with weight decay; norms and biases without.

    Args:
        module: has the parameters.
        weight_decay: of the matrices.
        matrices: names of those that FSDP1 may have flattened since; others show that they are.
    """
    decayed: dict[str, Any] = {"params": [], "weight_decay": weight_decay}
    spared: dict[str, Any] = {"params": [], "weight_decay": 0.0}
    groups = [decayed, spared]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 or _own_name(name) in matrices
            (decayed if is_matrix else spared)["params"].append(parameter)
    return [group for group in groups if group["params"]]


def _own_name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def learning_rate_factor(
    step: int, *, schedule: Schedule, warmup_steps: int, total_steps: int | None, min_ratio: float
) -> float:
    """What the peak learning rate is multiplied by at an optimizer step, counted from 0.

    Linear warm-up from 0 over ``warmup_steps``, then decay to ``min_ratio`` at ``total_steps``, as the schedules of
    the same names in transformers.

    Args:
        step: optimizer steps done.
        schedule: ``"cosine"``, ``"linear"`` or ``"constant"``.
        warmup_steps: steps of warm-up.
        total_steps: steps of the run; not read by ``"constant"``.
        min_ratio: the factor at the end, in ``[0, 1]``.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    assert total_steps is not None
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return min_ratio + (1 - min_ratio) * shape


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
                "data has no length: set trainer.max_steps, or model.lr_schedule: constant with warmup_steps"
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
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    schedulers = [callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)]

    def accumulation(epoch: int) -> int:
        return schedulers[-1].get_accumulate_grad_batches(epoch) if schedulers else trainer.accumulate_grad_batches

    return [math.ceil(batches / accumulation(epoch)) for epoch in range(trainer.max_epochs)]


def num_training_batches(trainer: pl.Trainer) -> int | None:
    """Micro-batches per epoch and rank, or ``None`` where the data has no length."""
    # Covers loaders given to fit, the data module's and the module's own alike, without starting their workers.
    loader = trainer.fit_loop._data_source.dataloader()
    try:
        batches = len(loader)
    except (TypeError, NotImplementedError):
        return trainer.limit_train_batches if isinstance(trainer.limit_train_batches, int) else None
    sampler = getattr(loader, "sampler", None)
    shared_out = isinstance(sampler, DistributedSampler) or not trainer._accelerator_connector.use_distributed_sampler
    if sampler is not None and not shared_out:
        batches = math.ceil(batches / trainer.world_size)  # Lightning will share the rows out among the ranks
    limit = trainer.limit_train_batches
    if isinstance(limit, int):
        return min(batches, limit)
    return int(batches * (1.0 if limit is None else limit))
