"""The whole config of a ``fit``, from files, as the command would take it."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import yaml

from dft_lightning.cli import DFTLightningCLI, Parser, cli_options
from dft_lightning.data import InstructionDataModule
from dft_lightning.errors import InputError
from dft_lightning.modules import CausalLMModule


class _ConfigReader(DFTLightningCLI):
    """Parses and stops there."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": DFTLightningCLI.subcommands()["fit"]}  # the parsers of the others take most of a second

    def _set_seed(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def whole_config(self) -> dict[str, Any]:
        text = self._parser("fit").dump(self.config["fit"], skip_none=False)
        content: dict[str, Any] = yaml.safe_load(text)
        content.pop("config", None)
        return content


def read_fit_config(paths: list[Path], overrides: dict[str, Any]) -> dict[str, Any]:
    """Every key of a ``fit`` config, defaults included, checked as the command checks them.

    Args:
        paths: config files, later ones over earlier ones.
        overrides: keys over all of them.

    Raises:
        SystemExit: with status 2 after one message, where a key or value is wrong.
    """
    with contextlib.ExitStack() as stack:
        files = [str(path) for path in paths]
        if overrides:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            file = Path(folder) / "overrides.yaml"
            file.write_text(yaml.safe_dump(overrides))
            files.append(str(file))
        return read_arguments(["fit", *(argument for file in files for argument in ("--config", file))])


def read_arguments(args: list[str]) -> dict[str, Any]:
    """Every key of a ``fit`` config from the command's arguments, ``"fit"`` first; see :func:`read_fit_config`."""
    return _ConfigReader(CausalLMModule, InstructionDataModule, **cli_options(), args=args).whole_config()


def data_of(config: dict[str, Any]) -> InstructionDataModule:
    """The data module of a whole config, for what needs no trainer.

    Raises:
        InputError: options that contradict each other or are out of range.
    """
    data: InstructionDataModule = _made(InstructionDataModule, "data", config)
    data.model_hparams = config["model"]
    return data


def module_of(config: dict[str, Any]) -> CausalLMModule:
    """The module of a whole config, its model not yet loaded. Raises as :func:`data_of`."""
    module: CausalLMModule = _made(CausalLMModule, "model", config)
    return module


def _made(cls: type, group: str, config: dict[str, Any]) -> Any:
    parser = Parser(exit_on_error=True)
    parser.add_class_arguments(cls, group)
    given = parser.parse_object({group: config[group]})
    try:
        return parser.instantiate_classes(given)[group]
    except ValueError as error:  # how constructors refuse an option
        raise InputError(str(error)) from error
