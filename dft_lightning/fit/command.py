"""The command: ``fit``, ``validate``, ``test`` and ``predict`` from a config, through LightningCLI."""

from __future__ import annotations

import inspect
import os
import re
import sys
from argparse import SUPPRESS
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.callbacks import EngineAnswers, InterruptionCheckpoint, PredictionWriter, StepProgress
from dft_lightning.checkpoints import keep_whole, newest_saved, refused_write, resolve_checkpoint
from dft_lightning.checkpoints.trust import importing_only
from dft_lightning.checkpoints.whole import written
from dft_lightning.cli import COMMANDS
from dft_lightning.cli.class_paths import check_known
from dft_lightning.cli.commands import report, run
from dft_lightning.cli.help import help_asked
from dft_lightning.cli.outline import EPOCHS, SEED, TRAINER_DEFAULTS, class_option
from dft_lightning.cli.parsers import refuse_nulls
from dft_lightning.data import InstructionDataModule
from dft_lightning.distributed.strategies import check_half_precision, check_precision
from dft_lightning.errors import InputError, printable
from dft_lightning.fit.checkpoint_options import (
    SavedOptions,
    defaults_of,
    differing,
    of_the_checkpoint,
    read_options,
    taken,
)
from dft_lightning.fit.help import help_text
from dft_lightning.fit.own_classes import GROUPS, Classes, read_classes, this_script
from dft_lightning.fit.parser import Parser
from dft_lightning.fit.processes import ending_together
from dft_lightning.fit.run_folder import RunConfig, RunTrainer, default_loggers, named_strategy
from dft_lightning.foreign.jsonargparse import constructor_problem
from dft_lightning.foreign.lightning import CommandLine, quiet
from dft_lightning.foreign.transformers import no_bars_in_files
from dft_lightning.modules import CausalLMModule


class DFTLightningCLI(CommandLine):
    """LightningCLI with this project's defaults, each replaceable by config.

    Adds TensorBoard and CSV loggers (into one folder), a ``ModelCheckpoint`` of the newest state, an
    ``InterruptionCheckpoint``, a ``StepProgress`` and a ``PredictionWriter``, where the config has none of the kind;
    and an end after three epochs, where it has none. No checkpoint is chosen by its ``nll``, which rises under DFT.
    Checkpoints are loaded with ``weights_only=True``. With one, ``model`` options that are not given are those of its
    run, and every difference is printed.

    Args:
        model_class: the module, where neither the arguments nor their configs name another.
        datamodule_class: the data module, where neither the arguments nor their configs name another.
        args: of the command; ``None`` takes ``sys.argv``.
        on_trainer: called before anything runs, which it does in here.
        kwargs: of LightningCLI.
    """

    def __init__(
        self,
        model_class: type[CausalLMModule],
        datamodule_class: type[InstructionDataModule],
        *,
        args: Any = None,
        on_trainer: Callable[[pl.Trainer], None] | None = None,
        **kwargs: Any,
    ) -> None:
        self._on_trainer = on_trainer
        given = sys.argv[1:] if args is None else args
        args, self._classes, self._class_paths = read_classes(given, Classes(model_class, datamodule_class))
        for group, paths in self._class_paths.items():
            if not paths and (own := self._classes.path(group)):
                paths.append(own)
        self._parsers: list[LightningArgumentParser] = []  # of the subcommands, in their order
        first, known = args[:1] if isinstance(args, list) else [], self.subcommands()
        if first and first[0] in known:  # the others' parsers are of no use
            self.subcommands = lambda: {first[0]: known[first[0]]}  # type: ignore[method-assign]
        super().__init__(self._classes.model, self._classes.data, args=args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser: Any = super().init_parser(**kwargs)
        parser.class_paths = self._class_paths
        return parser  # type: ignore[no-any-return]

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_core_arguments_to_parser(parser)
        self._parsers.append(parser)
        for group in GROUPS:
            named = self._class_paths[group][-1:] or [SUPPRESS]
            option = class_option(group)
            parser.add_argument(f"--{group}.class_path", type=option.hint, default=named[0], help=option.doc)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        if isinstance(args, list) and help_asked(args) is not None:
            print(help_text(args, self._parsers), end="")
            raise SystemExit(0)
        check_environment()
        # Lightning's own warns of args beside sys.argv, which every in-process caller (a test, a notebook) has.
        self._args = args
        self.config = self._parse(parser)
        refuse_nulls(self.options_parser(), self.config[self.config.subcommand])
        for group, paths in self._class_paths.items():  # a file of a group alone is not looked at before
            check_known(group, (self.config.get(self.config.subcommand) or {}).get(f"{group}.class_path"), paths[-1:])

    def _parse(self, parser: LightningArgumentParser) -> Namespace:
        given = isinstance(self._args, (dict, Namespace))
        parsed: Namespace = (parser.parse_object if given else parser.parse_args)(self._args)
        return parsed

    def options_parser(self) -> LightningArgumentParser:
        """The parser of the subcommand that runs."""
        return dict(zip(self.subcommands(), self._parsers, strict=True))[self.config.subcommand]

    def instantiate_classes(self) -> None:
        """The trainer first, which knows where checkpoints are: their options count before there is a model."""
        lines: list[str] = []
        try:
            self.config_init = self._instantiate(leave_out=("model", "data"))
            self.trainer = self.instantiate_trainer()
            self._checkpoint = resolve_checkpoint(self._options(self.config).ckpt_path, self.trainer)
            cast(RunTrainer, self.trainer).begin_in_folder(goes_on=self._checkpoint is not None)
            saved = read_options(self._checkpoint)
            lines += self._take_options(saved)
            made = self._instantiate(leave_out=("trainer",))
        except ValueError as error:  # how constructors refuse an option; while a run goes on it would be a fault
            raise InputError("\n  ".join([_of_a_constructor(str(error)), *lines])) from error
        options, own = self._options(self.config_init), self._options(made)
        self.model, self.datamodule = options["model"], options["data"] = own.model, own.data
        options["ckpt_path"] = self._checkpoint
        options["weights_only"] = True if options.weights_only is None else options.weights_only
        lines += differing("model", self.model.hparams, saved.model)
        lines += differing("data", getattr(self.datamodule, "hparams", {}), saved.data)
        if self._checkpoint is None and self.subcommand in ("validate", "test", "predict"):
            rank_zero_info(f"no --ckpt_path: {self.subcommand} takes the model of model.model as it is")
        if lines:
            rank_zero_info(printable("\n  ".join([f"options, beside those of {self._checkpoint}:", *lines])))

    def after_fit(self) -> None:
        """Say what has come of it, and what may come next."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        begun = 0 if self._checkpoint is None else written(Path(self._checkpoint))[1]
        if self.trainer.global_step == begun:
            rank_zero_info(f"nothing was trained: step {begun} is the last of trainer.max_steps or trainer.max_epochs")
        elif (saved := newest_saved(self.trainer)) is not None:
            rank_zero_info(f"saved {saved}; `test --ckpt_path` and `export --checkpoint` take it")

    def _options(self, config: Namespace) -> Namespace:
        options: Namespace = config if self.subcommand is None else config[self.subcommand]
        return options

    def _instantiate(self, leave_out: tuple[str, ...]) -> Namespace:
        """Make what the config says, but for some of its groups."""
        config = self.config.clone()
        for group in leave_out:
            self._options(config).pop(group)
        for group in GROUPS.keys() - set(leave_out):
            self._options(config)[group] = _without_class(self._options(config)[group])
        skip = [(lambda *_, **__: None, getattr(self._classes, group), True) for group in GROUPS if group in leave_out]
        made: Namespace = self.parser.instantiate(config, instantiators=skip)
        return made

    def _take_options(self, saved: SavedOptions) -> list[str]:
        """Parse once more, with what the checkpoint's run had as the defaults of ``model``; say what changes."""
        if not saved.model:
            return []
        self._check_configs_are_files()
        parser, options = self.options_parser(), self._options(self.config)
        self.parser.exit_on_error = parser.exit_on_error = False
        defaults, refused, paths = defaults_of(saved, options, parser)
        parser.set_defaults({**defaults, **dict.fromkeys(refused, SUPPRESS)})
        try:
            with importing_only(paths):
                found = self._options(self._parse(self.parser)).model
        except ArgumentError as error:  # what is given of a class is of none of the checkpoint's
            raise next(iter(refused.values()), of_the_checkpoint(error, parser)) from error
        for reason in (reason for key, reason in refused.items() if key.removeprefix("model.") not in found):
            raise reason
        before, options["model"] = options.model, found  # so that the saved config has it, too
        return taken(_without_class(before), _without_class(found))

    def _set_end(self, trainer: Namespace, callbacks: list[Callback]) -> None:
        """Give a ``fit`` an end that has none, in the saved config, too."""
        timed = any(isinstance(callback, Timer) for callback in callbacks) or trainer.max_time is not None
        if self.subcommand != "fit" or timed or trainer.max_epochs is not None or trainer.max_steps >= 0:
            return
        trainer.max_epochs = self._options(self.config).trainer.max_epochs = EPOCHS
        rank_zero_info(f"trainer.max_epochs: {EPOCHS}, as neither it nor trainer.max_steps is given")

    def _check_configs_are_files(self) -> None:
        for path in self._options(self.config).config or []:
            if not Path(path).is_file():
                raise InputError(f"--config: {path} can be read but once, and --ckpt_path takes two: give a file")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self._options(self.config_init).trainer
        config.strategy = named_strategy(config.strategy)
        check_precision(config.get("strategy"), config.get("precision"))
        callbacks = config.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        callbacks += default_callbacks(callbacks, config)
        self._set_end(config, callbacks)
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
        check_half_precision(trainer, config.get("precision"))
        keep_whole(trainer)
        if self._on_trainer is not None:
            self._on_trainer(trainer)
        return trainer


def _without_class(options: Namespace) -> Namespace:
    """Options of a module or data module alone."""
    alone: Namespace = options.clone()
    alone.pop("class_path", None)
    return alone


def _of_a_constructor(message: str) -> str:
    """What a logger, a callback or a strategy says of its options or of a package that it needs, in one line."""
    problem = constructor_problem(message)
    if problem is None:
        return message
    class_path, reason = problem
    if lacking := re.search(r"Requirement '([^']+)' not met", reason):
        reason = f"needs {re.split('[<>=!~ ]', lacking[1])[0]}, which is not installed: pip install '{lacking[1]}'"
    return ": ".join(filter(None, ["trainer", class_path.rpartition(".")[2], reason]))


def check_environment() -> None:
    """Raise ``InputError`` where a variable of Lightning's or of LightningCLI's sets an option.

    The command gives a trainer every option, which would be above the variables, and no word of them; the commands
    that make a small trainer of their own would follow them.
    """
    options = inspect.signature(pl.Trainer).parameters
    for name in sorted(name for name, value in os.environ.items() if value):
        found = re.fullmatch(r"PL_(?:(?:FIT|VALIDATE|TEST|PREDICT)__)?(TRAINER|MODEL|DATA)(__?)(\w+)", name)
        if found and (found[2] == "__" or (found[1] == "TRAINER" and found[3].lower() in options)):
            key = f"{found[1]}.{found[3]}".replace("__", ".").lower()
            raise InputError(
                f"{name}: options are not read from the environment: unset it, and give --{key} or a config"
            )


def default_callbacks(given: list[Callback], trainer_config: Any) -> list[Callback]:
    """The callbacks of the command that the config has none of its own of."""
    defaults: list[tuple[Callback, type]] = [(PredictionWriter(), PredictionWriter), (EngineAnswers(), EngineAnswers)]
    if trainer_config.get("enable_progress_bar") is not False:
        defaults.append((StepProgress(), ProgressBar))
    if trainer_config.get("enable_checkpointing") is not False and not trainer_config.get("fast_dev_run"):
        saving = (ModelCheckpoint(), InterruptionCheckpoint())
        defaults += [(callback, type(callback)) for callback in saving]
    return [callback for callback, kind in defaults if not any(isinstance(other, kind) for other in given)]


def cli_options() -> dict[str, Any]:
    """How :class:`DFTLightningCLI` is built, but for its classes and arguments."""
    return {
        "trainer_class": RunTrainer,
        "trainer_defaults": dict(TRAINER_DEFAULTS),
        "seed_everything_default": SEED,
        "parser_class": Parser,
        "parser_kwargs": {"prog": "python -m dft_lightning"},
        "auto_configure_optimizers": False,
        "save_config_callback": RunConfig,
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
        datamodule_class: the data module, for a project with its own subclass.

    Returns:
        The CLI, with ``trainer``, ``model`` and ``datamodule``, when the run has ended.

    Raises:
        SystemExit: with status 2, after one message on standard error, where the input was wrong. ``compare``,
            ``inspect`` and the others beside ``fit``, ``validate``, ``test`` and ``predict`` end with their status
            always.
    """
    own = (module_class, datamodule_class) != (CausalLMModule, InstructionDataModule)
    classes = Classes(module_class, datamodule_class, this_script(args) if own else None)
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and given and given[0] in COMMANDS:
        raise SystemExit(run(given[0], given[1:], classes))
    quiet()
    no_bars_in_files()
    trainers: list[pl.Trainer] = []
    try:
        with ending_together(trainers):
            return _command((module_class, datamodule_class), args, trainers)
    except Exception as error:
        raise SystemExit(report(error)) from None


def _command(classes: tuple[type, type], args: list[str] | None, trainers: list[pl.Trainer]) -> DFTLightningCLI:
    try:
        return DFTLightningCLI(*classes, **cli_options(), args=args, on_trainer=trainers.append)
    except Exception as error:
        raise next(filter(None, (refused_write(error, trainer) for trainer in trainers)), error) from error
