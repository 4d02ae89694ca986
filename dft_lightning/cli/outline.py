"""The options of ``fit``, ``validate``, ``test`` and ``predict``, as the sources of their classes have them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dft_lightning.cli.sources import Parameter, is_group, method, parameters, summary

TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
CLASSES = {
    "model": "dft_lightning.modules.causal_lm.CausalLMModule",
    "data": "dft_lightning.data.datamodule.InstructionDataModule",
}

TRAINER_DEFAULTS: dict[str, Any] = {
    # Parameters touched under inference mode cannot be trained afterwards under FSDP2 on a GPU.
    "inference_mode": False,
    "log_every_n_steps": 10,
    # A table of this package's own modules; what is trained, and the memory that it takes, is said in any case.
    "enable_model_summary": False,
}
EPOCHS = 3
"""The end of a ``fit`` that is given none; Lightning's own would be 1000 epochs."""
# Where the command does otherwise than Lightning's docstring says.
_TRAINER_DOCS = {
    "max_epochs": f"passes over the training rows; {EPOCHS} where neither this nor max_steps nor max_time is given",
    "max_steps": "optimizer steps, where these end the run; -1 for no such end",
    "logger": "a logger, or a list of them; TensorBoard and CSV where none is given, and with false none",
    "enable_progress_bar": "a bar of the run's optimizer steps; where the output is no terminal, a line a logged step",
    "default_root_dir": "folder of the runs, each with one of its own in it; the working directory unless it is given",
}
SEED: Any = 0
SEED_HINT: Any = bool | int

# What the command gives to the trainer's methods itself.
_GIVEN = ("model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule")


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Attributes:
        hint: its type.
        default: as :class:`~dft_lightning.cli.sources.Parameter` has it.
        doc: what it is.
    """

    hint: Any
    default: Any
    doc: str


@dataclass
class Outline:
    """What a command takes.

    Attributes:
        options: by their keys.
        groups: keys of the groups that they are in, and what each is.
    """

    options: dict[str, Option] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)


def path_of(cls: type) -> str:
    """The dotted path of a class, or of what stands for one."""
    return f"{cls.__module__}.{cls.__qualname__}"


def class_option(group: str) -> Option:
    """The option that names a class of one's own."""
    name = CLASSES[group].rpartition(".")[2]
    doc = f"dotted path of a subclass of {name}, whose options are here, too; also --{group} CLASS"
    return Option(str, None, doc)


def trainer_parameters() -> list[Parameter]:
    """The trainer's arguments with the command's defaults."""
    return [
        replace(
            each,
            default=TRAINER_DEFAULTS.get(each.name, each.default),
            doc=_TRAINER_DOCS.get(each.name, each.doc),
        )
        for each in parameters(TRAINER)
    ]


def method_parameters(command: str) -> list[Parameter]:
    """What a command has of the trainer's method of the same name."""
    return method(TRAINER, command, _GIVEN)


def outline(command: str) -> Outline:
    """What one of the commands that fit takes, where no class is named but the package's own."""
    found = Outline()
    found.options["config"] = Option(Path, None, "a file of keys and values; a further one goes over it")
    found.options["seed_everything"] = Option(SEED_HINT, SEED, "of every random number; true draws one")
    found.groups["trainer"] = summary(TRAINER)
    found.options.update(_options("trainer", trainer_parameters(), found))
    for group, path in CLASSES.items():
        found.groups[group] = summary(path)
        found.options.update(_options(group, parameters(path), found))
    for group in CLASSES:
        found.options[f"{group}.class_path"] = class_option(group)
    found.options.update({each.name: Option(each.hint, each.default, each.doc) for each in method_parameters(command)})
    return found


def _options(key: str, listed: list[Parameter], found: Outline) -> Iterator[tuple[str, Option]]:
    for each in listed:
        inner = f"{key}.{each.name}"
        path = path_of(each.hint) if isinstance(each.hint, type) else ""
        if is_group(path):
            found.groups[inner] = summary(path)
            yield from _options(inner, parameters(path), found)
        else:
            yield inner, Option(each.hint, each.default, each.doc)
