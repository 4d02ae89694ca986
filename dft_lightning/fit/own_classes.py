"""Modules and data modules of one's own: which classes a command is for, and how its arguments and configs name them.

``--model my.Module`` or ``model: {class_path: my.Module, init_args: {...}}`` names a subclass. The command's parser is
then built for that class, so that its options are read and checked as those of the package's own are. Within the
package a config has ``class_path`` beside the options; ``init_args`` is another way to write it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, get_loader

from dft_lightning.component import class_path, imported
from dft_lightning.data import InstructionDataModule
from dft_lightning.errors import InputError, one_line
from dft_lightning.modules import CausalLMModule

GROUPS: dict[str, type] = {"model": CausalLMModule, "data": InstructionDataModule}
_COMMANDS = ("fit", "validate", "test", "predict")


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
        args = list(_without_flags(list(args), found))
    named: dict[str, Any] = {group: classes.named(group, paths[-1]) for group, paths in found.items() if paths}
    return args, replace(classes, **named), found


def _without_flags(args: list[str], found: dict[str, list[str]]) -> Iterator[str]:
    """``--model my.Module`` and ``--model.class_path my.Module`` left out, ``--model.init_args.x`` as ``--model.x``."""
    left = iter(zip(args, [*args, ""][1:], strict=True))
    for arg, following in left:
        flag, equals, value = arg.partition("=")
        value = value if equals else following
        group, _, rest = flag.removeprefix("--").partition(".")
        if flag in ("--config", "-c"):
            _look_into(value, found)
        if not flag.startswith("--") or group not in GROUPS:
            yield arg
        elif rest == "class_path" or (not rest and _is_class_path(value)):
            found[group].append(value)
            if not equals:
                next(left, None)
        else:
            yield arg.replace(".init_args.", ".", 1) if rest.startswith("init_args.") else arg


def _look_into(config: str, found: dict[str, list[str]]) -> None:
    """Find the class paths of a config: a file, or its text."""
    folder = Path(config).parent
    if os.path.isfile(config):  # no pipe, which can be read but once
        config = Path(config).read_text(encoding="utf-8", errors="replace")
    content = _loaded(config)
    if isinstance(content.get("config"), str):  # one within another, which is read first
        _look_into(str(folder / content["config"]), found)
    without_classes(content, found)


def _is_class_path(value: Any) -> bool:
    dotted = isinstance(value, str) and "." in value and all(map(str.isidentifier, value.split(".")))
    return dotted and not os.path.isfile(value)  # a group's options may be in a file


# -- configs -----------------------------------------------------------------------------------------------------------


def without_classes(config: dict[str, Any], found: dict[str, list[str]]) -> dict[str, Any]:
    """A config that names no classes; the paths that it has are added to ``found``. Raises as :func:`flat`."""
    plain = flat(config)
    for key, value in plain.items():
        if key in GROUPS and isinstance(value, dict) and "class_path" in value:
            found[key].append(str(value["class_path"]))
            plain[key] = {name: option for name, option in value.items() if name != "class_path"}
        elif _is_command(key, value):
            plain[key] = without_classes(value, found)
    return plain


def text_without_classes(text: str, known: dict[str, list[str]]) -> str:
    """A config's text, written anew where it names classes.

    Args:
        text: of the config.
        known: the paths that :func:`read_classes` has found.

    Raises:
        InputError: there is another.
    """
    content, found = _loaded(text), dict[str, list[str]]({group: [] for group in GROUPS})
    plain = without_classes(content, found)
    for group, paths in found.items():
        for path in paths:
            check_known(group, path, known[group])
    return text if plain == content else yaml.dump(plain, Dumper=_QuotingDumper, sort_keys=False)


class _QuotingDumper(yaml.SafeDumper):  # type: ignore[misc]
    """Texts in quotes: one that looks like a number would be read as one."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"')


_QuotingDumper.add_representer(str, _QuotingDumper.represent_text)


def check_known(group: str, path: str | None, known: list[str]) -> None:
    """Raise ``InputError`` for a class path that is found when the parser is built already, and not for it."""
    if path is not None and path not in known:
        raise InputError(
            f"{group}.class_path: {path} is in a config that can be read but once, or in one of {group} alone: "
            f"give --{group} {path}, too"
        )


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """A config with ``class_path`` beside the options of its groups, where it has them in ``init_args``.

    Raises:
        InputError: an option is there twice.

    Example:
        >>> flat({"model": {"class_path": "my.Module", "init_args": {"loss": "DFTLoss"}}})
        {'model': {'class_path': 'my.Module', 'loss': 'DFTLoss'}}
    """
    return {
        key: _flat_group(key, value) if key in GROUPS else flat(value) if _is_command(key, value) else value
        for key, value in config.items()
    }


def _is_command(key: str, value: Any) -> bool:
    return key in _COMMANDS and isinstance(value, dict)


def _flat_group(group: str, value: Any) -> Any:
    if _is_class_path(value):
        return {"class_path": value}
    if not isinstance(value, dict) or "init_args" not in value:
        return value
    rest = {name: option for name, option in value.items() if name != "init_args"}
    options = value["init_args"] or {}
    if not isinstance(options, dict):
        raise InputError(f"{group}.init_args: expected the class's options, got {options!r}")
    if both := sorted(rest.keys() & options.keys()):
        raise InputError(f"{group}.{both[0]}: given twice, in init_args and beside it")
    return {**rest, **options}


def _loaded(text: str) -> dict[str, Any]:
    """A config's content; nothing of what is none, which the parser will refuse."""
    try:
        content = get_loader("yaml")(text)
    except Exception:  # the parser says where it is broken
        return {}
    return content if isinstance(content, dict) else {}
