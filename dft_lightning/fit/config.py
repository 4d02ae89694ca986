"""The whole config of a ``fit``, from files, as the command would take it."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import Strategy

from dft_lightning.cli.commands import FitArguments
from dft_lightning.cli.parsers import raising_input_errors
from dft_lightning.cli.shipped_configs import hint
from dft_lightning.component import NotPlainError, to_plain
from dft_lightning.data import InstructionDataModule
from dft_lightning.errors import InputError
from dft_lightning.fit.command import DFTLightningCLI, cli_options
from dft_lightning.fit.own_classes import PACKAGE, Classes
from dft_lightning.fit.parser import Parser
from dft_lightning.fit.run_folder import named_strategy
from dft_lightning.modules import CausalLMModule

Split = Literal["train", "validation", "forgetting", "test", "predict"]
"""Rows of a config that a command may be asked to look at."""


class _ConfigReader(DFTLightningCLI):
    """Parses, and stops there by :class:`_Parsed`, before it seeds or makes anything."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        raise _Parsed(self.options_parser().dump(self.config["fit"], skip_none=False))


class _Parsed(Exception):
    """The whole config, as text."""


def read_fit_config(paths: list[Path], *overrides: dict[str, Any], classes: Classes = PACKAGE) -> dict[str, Any]:
    """Every key of a ``fit`` config, defaults included, checked as the command checks them.

    Args:
        paths: config files, later ones over earlier ones.
        overrides: keys over all of them, later ones over earlier ones.
        classes: of the command, where no config names any; the config that is returned names what is one's own.

    Raises:
        InputError: a key or value is wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = list(paths)
        for number, keys in enumerate(each for each in overrides if each):
            files.append(Path(folder) / f"overrides_{number}.yaml")
            files[-1].write_text(yaml.safe_dump(keys))
        return read_arguments(["fit", *(argument for file in files for argument in ("--config", str(file)))], classes)


def read_arguments(args: list[str], classes: Classes = PACKAGE) -> dict[str, Any]:
    """Every key of a ``fit`` config from the command's arguments, ``"fit"`` first; see :func:`read_fit_config`."""
    try:
        with raising_input_errors():
            _ConfigReader(classes.model, classes.data, **cli_options(), args=args)
    except _Parsed as parsed:
        content: dict[str, Any] = yaml.safe_load(str(parsed))
    content.pop("config", None)
    return content


FitConfig = FitArguments | str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]]
"""What a function beside a command takes as the config of a fit."""


def fit_arguments(fit: FitConfig) -> FitArguments:
    """The arguments of ``fit`` that a config is: a file, its keys and values, or several, later ones over earlier ones.

    Raises:
        InputError: there is no such file, or it is no config.
    """
    if isinstance(fit, FitArguments):
        return fit
    args: list[str] = []
    for each in fit if isinstance(fit, (list, tuple)) else [fit]:
        if isinstance(each, Mapping):
            try:
                args += ["--config", json.dumps(to_plain(dict(each)))]
            except NotPlainError as error:
                raise InputError(f"fit: {error}: name a class by its path, and rows by their file") from error
        elif isinstance(each, (str, Path)) and Path(each).is_file():
            args += ["--config", str(each)]
        else:
            is_path = isinstance(each, (str, Path))
            found = f"no such file: {each}{hint(str(each))}" if is_path else f"got {type(each).__name__}"
            raise InputError(f"fit: expected a config's file, a dict of its keys, or a list of these; {found}")
    return FitArguments(tuple(args))


def read_fit(fit: FitArguments) -> dict[str, Any]:
    """Every key of the fit config that a command is given; see :func:`read_fit_config`."""
    return read_arguments(["fit", *fit.args], fit.classes or PACKAGE)


def data_of(config: dict[str, Any], classes: Classes | None = None) -> InstructionDataModule:
    """The data module of a whole config, for what needs no trainer.

    Args:
        config: as it was read.
        classes: of the command; ``None`` for the package's.

    Raises:
        InputError: options that contradict each other or are out of range.
    """
    data: InstructionDataModule = _made("data", config, classes)
    data.model_hparams = _split(config["model"])[1]
    return data


def module_of(config: dict[str, Any], classes: Classes | None = None) -> CausalLMModule:
    """The module of a whole config, its model not yet loaded. Arguments and errors as of :func:`data_of`."""
    module: CausalLMModule = _made("model", config, classes)
    return module


def strategy_of(given: Any) -> str | Strategy:
    """The strategy that a whole config's trainer names, and the object where it has options."""
    given = named_strategy(given)
    if isinstance(given, (str, Strategy)):
        return given
    parser = Parser(exit_on_error=True)
    parser.add_argument("--strategy", type=Strategy)
    with raising_input_errors():
        made: Strategy = parser.instantiate_classes(parser.parse_object({"strategy": copy.deepcopy(given)})).strategy
    return made


def _made(group: str, config: dict[str, Any], classes: Classes | None) -> Any:
    path, options = _split(config[group])
    parser = Parser(exit_on_error=True)
    parser.add_class_arguments((classes or PACKAGE).named(group, path), group)
    with raising_input_errors():
        # jsonargparse parses the elements of a list in their place.
        given = parser.parse_object({group: copy.deepcopy(options)})
    try:
        return parser.instantiate_classes(given)[group]
    except ValueError as error:  # how constructors refuse an option
        raise InputError(str(error)) from error


def _split(group: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """A group's class path, where it has one, and its options."""
    return group.get("class_path"), {name: value for name, value in group.items() if name != "class_path"}
