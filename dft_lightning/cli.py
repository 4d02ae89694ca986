"""The command: ``fit``, ``validate``, ``test`` and ``predict`` from a config, through LightningCLI."""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from dft_lightning.callbacks import PredictionWriter
from dft_lightning.checkpoints import keep_whole, refused_write, resolve_checkpoint
from dft_lightning.cli_errors import shorten
from dft_lightning.data import InstructionDataModule
from dft_lightning.distributed.strategies import check_precision
from dft_lightning.errors import InputError
from dft_lightning.modules import CausalLMModule

_DESCRIPTION = (
    "Fine-tune causal language models with a pluggable token loss. Four more commands have options of their own, "
    "shown by `compare --help` and so on: compare runs a grid of losses, learning rates and seeds and reports on it; "
    "inspect shows a fit config's rows as the model will see them; export writes a checkpoint as a Hugging Face "
    "folder; configs lists and copies the configs that come with the package."
)

TRAINER_DEFAULTS: dict[str, Any] = {
    # Parameters touched under inference mode cannot be trained afterwards under FSDP2 on a GPU.
    "inference_mode": False,
    "log_every_n_steps": 10,
}


class Parser(LightningArgumentParser):
    """One mistake, one message: no usage wall. Keys are written out: an abbreviation may mean another key one day."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:
        # With sub-configs, jsonargparse reads any file that a flag names as YAML first: data files, too.
        return super().add_class_arguments(*args, **{**kwargs, "sub_configs": False})

    def error(self, message: str, ex: Exception | None = None) -> Any:
        if not self.exit_on_error:  # a parser for a class's options: the outer one adds the key
            super().error(message, ex)
        sys.stderr.write(f"error: {shorten(message, self)}\n")
        raise SystemExit(2)


class DFTLightningCLI(LightningCLI):
    """LightningCLI with this project's defaults, each replaceable by config.

    Adds TensorBoard and CSV loggers (into one folder), a ``ModelCheckpoint`` of the newest state, a
    ``LearningRateMonitor`` and a ``PredictionWriter``, where the config has none of the kind. No checkpoint is chosen
    by its ``nll``, which rises under DFT. Checkpoints are loaded with ``weights_only=True``.
    """

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Lightning's own warns of args beside sys.argv, which every in-process caller (a test, a notebook) has.
        self.config = parser.parse_object(args) if isinstance(args, (dict, Namespace)) else parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Lightning's own lets the checkpoint's options override the config and the flags, silently."""

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # how constructors refuse an option; while a run goes on it would be a fault
            raise InputError(str(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self._get(self.config_init, "trainer")
        check_precision(config.get("strategy"), config.get("precision"))
        callbacks = config.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        callbacks += default_callbacks(callbacks, config)
        logger = config.get("logger")
        if logger is None or logger is True:
            logger = default_loggers(config.get("default_root_dir"))
        if config.get("accumulate_grad_batches", 1) < 1:
            raise InputError(
                f"trainer.accumulate_grad_batches: must be at least 1, not {config.accumulate_grad_batches}"
            )
        try:
            trainer = super().instantiate_trainer(callbacks=callbacks, logger=logger, **kwargs)
        except TypeError as error:  # Lightning's way of refusing a value of trainer.devices
            raise InputError(f"trainer: {error}") from error
        if str(config.get("precision")) in ("16", "16-mixed") and trainer.precision != "16-mixed":
            raise InputError("trainer.precision: 16-mixed needs a GPU (Lightning would run bf16-mixed): ask for that")
        keep_whole(trainer)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            refused = refused_write(error, self.trainer)
            if refused is None:
                raise
            raise refused from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["ckpt_path"] = resolve_checkpoint(kwargs.get("ckpt_path"), self.trainer)
        if kwargs.get("weights_only") is None:
            kwargs["weights_only"] = True
        return kwargs


def default_callbacks(given: list[Callback], trainer_config: Any) -> list[Callback]:
    """The callbacks of the command that the config has none of its own of."""
    defaults: list[Callback] = [PredictionWriter()]
    if trainer_config.get("enable_checkpointing") is not False and not trainer_config.get("fast_dev_run"):
        defaults.append(ModelCheckpoint())
    if trainer_config.get("logger") is not False and not trainer_config.get("fast_dev_run"):
        defaults.append(LearningRateMonitor(logging_interval="step"))
    return [callback for callback in defaults if not any(isinstance(other, type(callback)) for other in given)]


def default_loggers(root: str | Path | None) -> list[Logger]:
    """TensorBoard and CSV in the same numbered folder, ``ROOT/lightning_logs/version_N``."""
    folder = str(root or Path.cwd())
    board = TensorBoardLogger(folder, name="lightning_logs")
    return [board, CSVLogger(folder, name="lightning_logs", version=board.version)]


def quiet() -> None:
    """Advice that is wrong or no use here."""
    # The two default loggers share a folder, so it is never empty; nothing in it is deleted.
    warnings.filterwarnings("ignore", message=r"Experiment logs directory .* exists and is not empty")
    # Rows come tokenised: collating them is cheap, and data.num_workers is there.
    warnings.filterwarnings("ignore", message=r".*does not have many workers")
    # A fit without validation rows is what was asked for.
    warnings.filterwarnings("ignore", message=r"Total length of `list` across ranks is zero")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    # The module's own values are reduced before they are logged; advice on anybody else's stays.
    ours = "loss|nll|perplexity|token_accuracy|entropy|mean_weight|target_tokens|exact_match"
    stages = "val|forgetting|test"
    warnings.filterwarnings("ignore", message=rf"It is recommended to use `self\.log\('({stages})/({ours})'")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )

    if not isinstance(threading.excepthook, functools.partial):  # once
        threading.excepthook = functools.partial(_thread_ends, threading.excepthook)


def _thread_ends(otherwise: Callable[[threading.ExceptHookArgs], Any], ended: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer meets a full disk in a thread of its own, and says so again where the run ends by it."""
    if not isinstance(ended.exc_value, OSError) or type(ended.thread).__name__ != "_AsyncWriterThread":
        otherwise(ended)


def user_message(error: Exception) -> str | None:
    """What to tell a person of an error that a change of their input mends; ``None`` for any other."""
    text = str(error).strip()
    if isinstance(error, (InputError, MisconfigurationException)):
        return text
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError) and text.startswith("`val_check_interval`"):
        return f"trainer.val_check_interval: {text}"
    if isinstance(error, RuntimeError) and text.startswith("The sizes `data_parallel_size"):
        return f"trainer.strategy: {text}"
    if isinstance(error, RuntimeError) and text.startswith("SaveConfigCallback expected "):
        path = text.removeprefix("SaveConfigCallback expected ").partition(" to NOT exist")[0]
        return f"{path} is of an earlier run, and is kept: set another trainer.default_root_dir, or a trainer.logger"
    if isinstance(error, RuntimeError) and "loading state_dict" in text:
        lines = [line.strip() for line in text.splitlines()]
        return f"--ckpt_path: the checkpoint is of another model: {lines[1] if len(lines) > 1 else text}"[:500]
    return None


def report(error: Exception, aloud: bool = True) -> int:
    """Write what to tell a person of an error to standard error, if ``aloud``, and return the exit status.

    Called where the error is handled: any other than :func:`user_message` knows goes on its way.
    """
    message = user_message(error)
    if message is None:
        raise error
    if aloud:
        sys.stderr.write(f"error: {message}\n")
    return 2


def _first_on_its_node() -> bool:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) == 0


def cli_options() -> dict[str, Any]:
    """How :class:`DFTLightningCLI` is built, but for its classes and arguments."""
    return {
        "trainer_defaults": dict(TRAINER_DEFAULTS),
        "seed_everything_default": 0,
        "parser_class": Parser,
        "parser_kwargs": {"prog": "python -m dft_lightning", "description": _DESCRIPTION},
        "auto_configure_optimizers": False,
        "load_from_checkpoint_support": False,
    }


def main(
    args: list[str] | None = None,
    module_class: type[CausalLMModule] = CausalLMModule,
    datamodule_class: type[InstructionDataModule] = InstructionDataModule,
) -> LightningCLI:
    """Run the command.

    Args:
        args: command-line arguments without the program's name; ``None`` takes ``sys.argv``.
        module_class: the module, for a project with its own subclass.
        datamodule_class: the data module, likewise.

    Returns:
        The CLI, with ``trainer``, ``model`` and ``datamodule``, when the run has ended.

    Raises:
        SystemExit: with status 2 after one message on standard error, where the input was wrong.
    """
    quiet()
    try:
        return DFTLightningCLI(
            module_class,
            datamodule_class,
            **cli_options(),
            args=args,
        )
    except Exception as error:
        raise SystemExit(report(error, aloud=_first_on_its_node())) from None  # every rank there meets the same mistake
