"""Whether what a run's callbacks and schedulers monitor is logged at all, known before its first step."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from dft_lightning.errors import InputError, did_you_mean
from dft_lightning.losses import TokenLoss
from dft_lightning.losses.statistics import names_of
from dft_lightning.modules.options import StepOptions

_TOKENS = ("loss", "nll", "perplexity", "token_accuracy", "mean_weight", "target_tokens")
_SPEED = ("tokens_per_second", "peak_memory_gib", "mfu")
_TRAINING = (*_TOKENS, *_SPEED, "grad_norm", "clipped_steps", "lr", "skipped_steps")
# Whose classes log what is known here, or nothing.
_KNOWN = ("dft_lightning", "lightning", "torch", "builtins")
# What a subclass may override and log nothing in: Lightning refuses to log there, or it is called for no run.
_LOG_NOTHING = {
    "__init__",
    "build_model",
    "build_optimizer",
    "build_parameter_groups",
    "build_scheduler",
    "configure_model",
    "configure_optimizers",
    "lr_scheduler_step",
}


def check_monitors(trainer: pl.Trainer, cls: type, loss: TokenLoss, step: StepOptions, own: Collection[str]) -> None:
    """What is monitored against what the run logs, before it begins.

    Where a subclass or a callback of another's may log as well, any name may be right: see
    :func:`check_monitors_by_validation`. Each metric of one's own, by its name in ``own``, may log several values.

    Raises:
        InputError: something is monitored that the run never logs.
    """
    if _others_log(trainer, cls):
        return
    names = logged_by_module(trainer, loss, step)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        names += getattr(callback, "logged_names", list)()  # of this package's
    names += [config.name for config in trainer.lr_scheduler_configs if config.name]
    further = [f"{stage}/{name}" for stage in ("val", "forgetting") if f"{stage}/nll" in names for name in own]
    names += further
    for owner, name in _monitored(trainer):
        of_rates = name.startswith("lr-") and any(isinstance(each, LearningRateMonitor) for each in trainer.callbacks)  # type: ignore[attr-defined]
        of_checkpoints = name in ("epoch", "step") and owner == "ModelCheckpoint"
        of_several = name.rpartition("/")[0] in further
        if name not in names and not of_rates and not of_checkpoints and not of_several:
            raise InputError(f"{owner}.monitor: this run never logs {name}{_instead(name, names)}")


def check_monitors_by_validation(trainer: pl.Trainer, cls: type) -> None:
    """Warn of a monitored name that begins with ``val`` and that the validation before training did not log."""
    if not trainer.sanity_checking or not _others_log(trainer, cls):
        return
    logged = list(trainer.callback_metrics)
    for owner, name in _monitored(trainer):
        if name.startswith("val") and name not in logged:
            rank_zero_warn(
                f"{owner}.monitor: the validation before training did not log {name}{_instead(name, logged)}"
            )


def _instead(name: str, names: list[str]) -> str:
    if name.startswith(("val/", "forgetting/")) and not any(other.startswith("val/") for other in names):
        return ", as it has no validation rows: set data.validation, or monitor something else"
    return did_you_mean(name, names, f": it logs {', '.join(names)}")


def _monitored(trainer: pl.Trainer) -> Iterator[tuple[str, str]]:
    """Who monitors, and which name, of those that go wrong without it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.strict:
            yield type(callback).__name__, callback.monitor
        elif isinstance(callback, ModelCheckpoint) and callback.monitor is not None and callback.save_top_k != 0:
            yield "ModelCheckpoint", callback.monitor
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.strict and config.monitor is not None:
            yield type(config.scheduler).__name__, config.monitor


def _others_log(trainer: pl.Trainer, cls: type) -> bool:
    own = [each for each in cls.__mro__ if each.__module__.partition(".")[0] not in _KNOWN]
    wrapped = (property, staticmethod, classmethod)
    code = {name for each in own for name, value in vars(each).items() if callable(value) or isinstance(value, wrapped)}
    known = [type(each).__module__.startswith(("lightning.", "dft_lightning.")) for each in trainer.callbacks]  # type: ignore[attr-defined]
    own_functions = any(isinstance(each, LambdaCallback) for each in trainer.callbacks)  # type: ignore[attr-defined]
    return bool(code - _LOG_NOTHING) or not all(known) or own_functions


def logged_by_module(trainer: pl.Trainer, loss: TokenLoss, step: StepOptions) -> list[str]:
    """Every name that the module itself may log in a trainer's ``fit``, with the data module set up."""
    data = getattr(trainer, "datamodule", None)
    names = {"train": [*_TRAINING]} if trainer.log_every_n_steps > 0 else {}  # type: ignore[attr-defined]
    needs = names_of(loss.needs)
    if names and (step.log_train_entropy or "entropy" in needs):
        names["train"].append("entropy")
    if names and step.gradient_threshold:
        names["train"].append("head/dropped")
    has_split = getattr(data, "has_split", lambda split: split == "validation")
    if trainer.limit_val_batches != 0:
        stages = {"val": "validation", "forgetting": "forgetting"}
        names |= {stage: [*_TOKENS, "entropy"] for stage, split in stages.items() if has_split(split)}
    sources = [f"{kind}/{name}" for name in getattr(data, "source_names", []) for kind in ("loss", "nll")]
    return [f"{stage}/{name}" for stage, own in names.items() for name in (*own, *sources)]
