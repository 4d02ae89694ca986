"""Lightning, where it has no option or no class of error for what this package needs."""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.compile import to_uncompiled


def quiet() -> None:
    """Advice that is wrong or no use here."""
    # The two default loggers share a folder, so it is never empty; nothing in it is deleted.
    warnings.filterwarnings("ignore", message=r"Experiment logs directory .* exists and is not empty")
    # Rows come tokenised: collating them is cheap, and data.num_workers is there.
    warnings.filterwarnings("ignore", message=r".*does not have many workers")
    # A fit without validation rows is what was asked for.
    warnings.filterwarnings("ignore", message=r"Total length of `list` across ranks is zero")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    # Steps are counted across epochs, and logged by that count.
    warnings.filterwarnings("ignore", message=r"The number of training batches .* is smaller than the logging interval")
    # Each run has a folder of its own, one that goes on, too.
    warnings.filterwarnings("ignore", message=r"The dirpath has changed from")
    # peft imports bitsandbytes where it is there: of a faster kernel for a base in 4 bits, which need not be one.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: "gemm_4bit_forward" not in record.getMessage()
    )
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not re.search("litlogger|^TPU available: False|^Restoring states from", record.getMessage())
    )

    if not isinstance(threading.excepthook, functools.partial):  # once
        threading.excepthook = functools.partial(_thread_ends, threading.excepthook)


@functools.cache
def believe_reduced(name: str) -> None:
    """No advice to reduce a value over ranks that was reduced before it was logged; that on anybody else's stays."""
    warnings.filterwarnings("ignore", message=rf"It is recommended to use `self\.log\('{re.escape(name)}'")


def believe_lengths() -> None:
    """No warning of a dataset that is iterated and has a length, where one process reads it and the length is exact."""
    warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")


def _thread_ends(otherwise: Callable[[threading.ExceptHookArgs], Any], ended: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer meets a full disk in a thread of its own, and says so again where the run ends by it."""
    if not isinstance(ended.exc_value, OSError) or type(ended.thread).__name__ != "_AsyncWriterThread":
        otherwise(ended)


def mistake(error: Exception) -> str | None:
    """What to tell a person of an error of Lightning's that a change of their input mends; ``None`` for any other.

    Lightning has a class for some of them alone; others are known by how their message begins.
    """
    text = str(error).strip()
    if isinstance(error, MisconfigurationException):
        return text
    if isinstance(error, ValueError) and text.startswith("`val_check_interval`"):
        return f"trainer.val_check_interval: {text}"
    if isinstance(error, RuntimeError) and text.startswith("The sizes `data_parallel_size"):
        return f"trainer.strategy: {text}"
    if isinstance(error, RuntimeError) and text.startswith("Early stopping conditioned on metric"):
        return f"trainer.callbacks: {text}"
    if isinstance(error, KeyError) and "checkpoint contains only the model" in text:
        return (
            "--ckpt_path: the checkpoint has weights alone (save_weights_only), from which fit cannot go on: give "
            "another, or export it and begin anew with model.model"
        )
    if isinstance(error, RuntimeError) and "loading state_dict" in text:
        lines = [line.strip() for line in text.splitlines()]
        return f"--ckpt_path: the checkpoint is of another model: {lines[1] if len(lines) > 1 else text}"[:500]
    return None


class CommandLine(LightningCLI):
    """LightningCLI without a checkpoint's hyperparameters, which override the config and the flags, and say nothing.
    Its ``load_from_checkpoint_support`` turns off something else."""

    def _parse_ckpt_path(self) -> None:
        pass


class PlainHyperparameters(HyperparametersMixin):
    """Mixin of a module or data module whose hyperparameters are stored in a form of their own.

    ``save_hyperparameters`` copies what it collects at once, objects and all, and calls this with it: changing
    ``hparams`` afterwards is too late for what is logged.
    """

    def plain_hparams(self, values: dict[str, Any]) -> dict[str, Any]:
        """What is stored of the arguments that ``save_hyperparameters`` has collected, a subclass's included."""
        raise NotImplementedError

    def _set_hparams(self, hp: Any) -> None:
        values = dict(vars(hp) if isinstance(hp, argparse.Namespace) else hp)
        super()._set_hparams(self.plain_hparams(values))


def trainer_of(module: pl.LightningModule) -> pl.Trainer | None:
    """A module's trainer; Lightning raises where it has none, and makes one up of a ``Fabric``."""
    try:
        return module.trainer if module.fabric is None else None
    except RuntimeError:
        return None


def came_compiled(module: pl.LightningModule) -> bool:
    """Whether a module was given as ``torch.compile(module)``, of which Lightning takes it and compiles its steps."""
    try:
        to_uncompiled(module)  # it may be given again without
    except ValueError:
        return False
    return True


# -- a fit's loops -----------------------------------------------------------------------------------------------------


def training_loader(trainer: pl.Trainer) -> Any:
    """What ``fit`` will draw its batches from: loaders given to it, the data module's or the module's own alike.
    ``trainer.train_dataloader`` is there only when their workers have been started."""
    return trainer.fit_loop._data_source.dataloader()


def shares_rows_out(trainer: pl.Trainer) -> bool:
    """Whether Lightning puts a ``DistributedSampler`` in place of a loader's sampler: an argument that it hides."""
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def logs_now(trainer: pl.Trainer) -> bool:
    """Whether what is logged in this step reaches the loggers. Lightning's own criterion: by another, values would be
    collected at steps that the loggers never see."""
    return bool(trainer._logger_connector.should_update_logs)


def count_logged_steps(trainer: pl.Trainer) -> None:
    """Before the first batch of a fit that goes on: the step that its loggers are at.

    Lightning counts it after the validation of a step. Where one is due, be it run or passed over, it will. Its own
    count in a checkpoint is of the hook at which that was written.
    """
    loop = trainer.fit_loop.epoch_loop
    assert trainer.fit_loop._data_fetcher is not None
    due = loop.restarting and loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
    loop._batches_that_stepped = trainer.global_step - 1 if due else trainer.global_step


def exchange_signals(trainer: pl.Trainer, exchange: bool) -> None:
    """Whether a fit asks before each micro-batch if rank 0 has had a SIGTERM, which takes a broadcast and a wait.
    Where it does not, Lightning's own handler, which would note one, is to be out of the way."""
    loop = trainer.fit_loop.epoch_loop
    if exchange:
        loop.__dict__.pop("_broadcast_sigterm_tensor", None)
    else:
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


# -- saving -----------------------------------------------------------------------------------------------------------


class WholeAsyncCheckpointIO(AsyncCheckpointIO):
    """Lightning's writing in a thread, which here deletes an older checkpoint after the newer one is written.

    Lightning's own deletes it at once, and whether or not the newer one could be written.
    """

    def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self._executor is None:  # nothing is being written
            super().remove_checkpoint(*args, **kwargs)
        else:
            self._executor.submit(self._remove_unless_failed, *args, **kwargs)  # its one thread takes them in turn

    def _remove_unless_failed(self, *args: Any, **kwargs: Any) -> None:
        if self._error is None:
            try:
                super().remove_checkpoint(*args, **kwargs)
            except BaseException as error:  # raised by the next save, as the thread's others are
                self._error = error


# -- strategies --------------------------------------------------------------------------------------------------------


def shard_over_all(strategy: ModelParallelStrategy) -> None:
    """Have a ``ModelParallelStrategy`` that is given no sizes, or one of them, split no tensors: all processes share
    the model's shards. Its own default splits tensors over the devices of a node; both are arguments that it hides."""
    if strategy._tensor_parallel_size == "auto":
        strategy._tensor_parallel_size = 1
    if strategy._data_parallel_size == "auto":
        processes = strategy.num_nodes * strategy.num_processes
        strategy._data_parallel_size = processes // int(strategy._tensor_parallel_size)


def checkpointing_options(strategy: FSDPStrategy) -> dict[str, Any]:
    """How an ``FSDPStrategy`` is to checkpoint activations: arguments that it hides."""
    return dict(strategy._activation_checkpointing_kwargs or {})


def saves_shards(strategy: ModelParallelStrategy) -> bool:
    """Whether a ``ModelParallelStrategy`` saves a folder of shards: an argument that it hides."""
    return bool(strategy._save_distributed_checkpoint)


@contextmanager
def saving_shards_by(save: Callable[[dict[str, Any], Path], None]) -> Iterator[None]:
    """Have ``ModelParallelStrategy`` hand a checkpoint's tensors and its folder to a function meanwhile."""
    strategies: Any = importlib.import_module("lightning.pytorch.strategies.model_parallel")
    own = strategies._distributed_checkpoint_save
    strategies._distributed_checkpoint_save = save
    try:
        yield
    finally:
        strategies._distributed_checkpoint_save = own


def saves_state_in_shards(strategy: FSDPStrategy) -> bool:
    """Whether an ``FSDPStrategy`` saves a folder of shards: an argument that it hides."""
    return strategy._state_dict_type == "sharded"
