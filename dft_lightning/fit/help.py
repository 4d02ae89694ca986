"""The help of a command whose module or data module is one's own: what its parser takes."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

from dft_lightning.cli import FITS, help
from dft_lightning.cli.outline import CLASSES, Option, Outline, outline
from dft_lightning.cli.sources import REQUIRED, Named
from dft_lightning.foreign.jsonargparse import actions, groups_of, type_of


def help_text(args: list[str], parsers: list[Any]) -> str:
    """The help that arguments ask for, of parsers that are built: the first is that of the command which is given.

    Raises:
        InputError: there is no such group.
    """
    command = next((arg for arg in args if arg in FITS), None)
    return help.help_text(args, None if command is None else outline_of(parsers[0], command))


def outline_of(parser: Any, command: str) -> Outline:
    """What a command takes, ``model`` and ``data`` as its parser has them."""
    found = outline(command)
    found.options = {key: option for key, option in found.options.items() if not _is_of_a_class(key)}
    groups = {key: text if text.endswith(".") else f"{text}." for key, text in groups_of(parser).items()}
    known = {key: text for key, text in found.groups.items() if key not in CLASSES}
    found.groups = {key: known.get(key, text) for key, text in groups.items() if key != command}
    for action in actions(parser):
        if type_of(action) is not None and _is_of_a_class(action.dest) and not action.dest.endswith(".help"):
            default = REQUIRED if action.required else _default(action.default)
            found.options[action.dest] = Option(type_of(action), default, action.help or "")
    return found


def _is_of_a_class(key: str) -> bool:
    return key.partition(".")[0] in CLASSES


def _default(value: Any) -> Any:
    """As the outline has it: a class and its options by its name."""
    value = value.as_dict() if isinstance(value, Namespace) else value
    if isinstance(value, dict) and "class_path" in value:
        return Named(value["class_path"], value.get("init_args") or {})
    return None if value == "==SUPPRESS==" else value
