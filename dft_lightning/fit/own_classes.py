"""Modules and data modules of one's own: which classes a command is for, and how its arguments and configs name them.

``--model my.Module`` or ``model: {class_path: my.Module, init_args: {...}}`` names a subclass. The command's parser is
then built for that class, so that its options are read and checked as those of the package's own are.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

from jsonargparse import Namespace

from dft_lightning.cli.class_paths import without_classes, without_flags
from dft_lightning.component import class_path, imported
from dft_lightning.data import InstructionDataModule
from dft_lightning.errors import InputError, one_line
from dft_lightning.modules import CausalLMModule

GROUPS: dict[str, type] = {"model": CausalLMModule, "data": InstructionDataModule}


@dataclass(frozen=True)
class Classes:
    """The classes that a command is for.

    Attributes:
        model: the module's.
        data: the data module's.
        script: what Python is given to run the script that has these classes once more, with arguments of ``fit``
            behind it; ``None`` where no script has, or it would not read them.
    """

    model: type[CausalLMModule] = CausalLMModule
    data: type[InstructionDataModule] = InstructionDataModule
    script: tuple[str, ...] | None = None

    def path(self, group: str) -> str | None:
        """How a config names the class of ``"model"`` or ``"data"``; ``None`` for the package's own."""
        cls = getattr(self, group)
        return None if cls is GROUPS[group] else class_path(cls)

    def named(self, group: str, path: str | None) -> type:
        """The class of a group by the path that a config has for it, imported; without one it is the command's.

        Raises:
            InputError: there is no such class, or it is no subclass of the package's own.
        """
        own: type = getattr(self, group)
        return own if path in (None, class_path(own)) else _imported(path or "", GROUPS[group], f"{group}.class_path")

    def program(self, config: dict[str, Any]) -> tuple[str, ...]:
        """What Python is given to run a whole config in a process of its own, the command's arguments behind it.

        Raises:
            InputError: a class of the config cannot be had there.
        """
        if self.script is not None:
            return self.script
        for group in GROUPS:
            path = config[group].get("class_path") or ""
            if path.startswith("__main__.") or "<locals>" in path:
                raise InputError(
                    f"{group}.class_path: {path} cannot be imported by the runs, which are processes of their own: "
                    "move the class into a module, or run a script that calls main() without args"
                )
        return "-m", "dft_lightning"


PACKAGE = Classes()


def _imported(path: str, base: type, key: str) -> Any:
    module, _, name = path.rpartition(".")
    if not module:
        raise InputError(f"{key}: unknown class {path!r}; give the dotted path of your own")
    if module == "__main__" and not hasattr(sys.modules[module], name):
        raise InputError(f"{key}: {path} is of a script: run that with this config, or move the class into a module")
    try:
        found = imported(path)
    except Exception as error:  # whatever the module's own code raises
        raise InputError(f"{key}: cannot import {path!r}: {one_line(error)}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(f"{key}: {path} is not a subclass of {base.__name__}")
    return found


def this_script(args: list[str] | None) -> tuple[str, ...] | None:
    """What Python was given to run this process's script; ``None`` where the arguments of ``main`` are not its own."""
    script = sys.modules["__main__"]
    if args is not None and args != sys.argv[1:]:
        return None
    if getattr(script, "__spec__", None) is not None:
        return "-m", script.__spec__.name.removesuffix(".__main__")  # type: ignore[union-attr]
    return (sys.argv[0],) if hasattr(script, "__file__") else None


# -- what arguments say ------------------------------------------------------------------------------------------------


def read_classes(args: Any, classes: Classes) -> tuple[Any, Classes, dict[str, list[str]]]:
    """The classes that the arguments of a command and their configs name.

    Args:
        args: a list of them, or a config as a dict.
        classes: of the command, for what names none.

    Returns:
        The arguments without those that name a class, the classes, and for each group all paths that name one, the last
        of which counts.

    Raises:
        InputError: no such class, or none of the kind.
    """
    found: dict[str, list[str]] = {group: [] for group in GROUPS}
    if isinstance(args, (dict, Namespace)):
        args = without_classes(args.as_dict() if isinstance(args, Namespace) else args, found)
    else:
        args = list(without_flags(list(args), found))
    named: dict[str, Any] = {group: classes.named(group, paths[-1]) for group, paths in found.items() if paths}
    return args, replace(classes, **named), found
