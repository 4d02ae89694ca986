"""jsonargparse, where it has no option for what this command needs. Other programs' parsers stay as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from jsonargparse import ArgumentParser, _common, _typehints


def change_for(kind: type[ArgumentParser], packages: tuple[str, ...]) -> None:
    """Change it for one kind of parser.

    A class that is named anew takes no option of the class before it over: jsonargparse keeps those of the same name,
    so that SGD would get AdamW's weight decay and a focal loss another one's ``gamma``, which no config says.

    A short name that several classes have is that of the first of ``packages`` that has one, instead of an error:
    torch has a ``Muon``, bitsandbytes an ``AdamW`` once it is imported, and Lightning a ``ReduceLROnPlateau``.

    Args:
        kind: the parser's class.
        packages: prefixes of import paths.
    """
    discard, resolve = _typehints.discard_init_args_on_class_path_change, _typehints.resolve_class_path_by_name

    def discard_all(parser_or_action: Any, prev_val: Any, value: Any) -> None:
        if not isinstance(_common.parent_parser.get(), kind):
            discard(parser_or_action, prev_val, value)  # type: ignore[no-untyped-call]
        elif prev_val and "init_args" in prev_val and prev_val["class_path"] != value["class_path"]:
            prev_val.pop("init_args")

    def resolve_first(cls: Any, name: str) -> str:
        found = []
        if "." not in name and not isinstance(cls, tuple) and isinstance(_common.parent_parser.get(), kind):
            paths = _typehints.get_all_subclass_paths(cls)
            found = [path for path in paths if path.rpartition(".")[2] == name]
        for package in packages if len(found) > 1 else ():
            if chosen := [path for path in found if path.startswith(f"{package}.")]:
                return chosen[0]
        return resolve(cls, name)

    _typehints.discard_init_args_on_class_path_change = discard_all
    _typehints.resolve_class_path_by_name = resolve_first


@contextlib.contextmanager
def kept_settings() -> Iterator[None]:
    """Put back what ``set_parsing_settings`` changes meanwhile; the settings can be set alone."""
    before = dict(_common.parsing_settings)
    try:
        yield
    finally:
        _common.parsing_settings.update(before)


def actions(parser: ArgumentParser, subcommands: bool = False) -> list[Any]:
    """A parser's options as argparse has them, with ``subcommands`` those of its subcommands, too."""
    found: list[Any] = list(parser._actions)
    for action in parser._actions if subcommands else ():
        if isinstance(action.choices, dict):  # of names of subcommands, and their parsers
            found += [each for subparser in action.choices.values() for each in actions(subparser, subcommands)]
    return found


def type_of(action: Any) -> Any:
    """The type hint that an option was made from, ``None`` where it was from none."""
    return getattr(action, "_typehint", None)
