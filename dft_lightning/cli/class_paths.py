"""How arguments and configs name classes for ``model`` and ``data``. Nothing is imported by what they say.

``--model my.Module`` or ``model: {class_path: my.Module, init_args: {...}}`` names a subclass. Within the package a
config has ``class_path`` beside the options; ``init_args`` is another way to write it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from dft_lightning.cli import FITS
from dft_lightning.errors import InputError

GROUPS = ("model", "data")


def without_flags(args: list[str], found: dict[str, list[str]]) -> Iterator[str]:
    """``--model my.Module`` and ``--model.class_path my.Module`` left out, ``--model.init_args.x`` as ``--model.x``.

    The paths of these and of configs are added to ``found``. Raises as :func:`flat`.
    """
    left = iter(zip(args, [*args, ""][1:], strict=True))
    for arg, following in left:
        flag, equals, value = arg.partition("=")
        value = value if equals else following
        group, _, rest = flag.removeprefix("--").partition(".")
        if flag in ("--config", "-c"):
            _look_into(value, found)
        if not flag.startswith("--") or group not in GROUPS:
            yield arg
        elif rest == "class_path" or (not rest and is_class_path(value)):
            found[group].append(value)
            if not equals:
                next(left, None)
        else:
            yield arg.replace(".init_args.", ".", 1) if rest.startswith("init_args.") else arg


def names_classes(args: list[str]) -> bool:
    """Whether arguments or their configs name a class, or are wrong."""
    found: dict[str, list[str]] = {group: [] for group in GROUPS}
    try:
        list(without_flags(args, found))
    except InputError:
        return True
    return any(found.values())


def _look_into(config: str, found: dict[str, list[str]]) -> None:
    """Find the class paths of a config: a file, or its text."""
    folder = Path(config).parent
    if os.path.isfile(config):  # no pipe, which can be read but once
        config = Path(config).read_text(encoding="utf-8", errors="replace")
    content = loaded(config)
    if isinstance(content.get("config"), str):  # one within another, which is read first
        _look_into(str(folder / content["config"]), found)
    without_classes(content, found)


def is_class_path(value: Any) -> bool:
    """Whether a text is a dotted path rather than a file's."""
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
        known: the paths that :func:`without_flags` has found.

    Raises:
        InputError: there is another.
    """
    content, found = loaded(text), dict[str, list[str]]({group: [] for group in GROUPS})
    plain = without_classes(content, found)
    for group, paths in found.items():
        for path in paths:
            check_known(group, path, known[group])
    return text if plain == content else dumped(plain)


def dumped(content: dict[str, Any]) -> str:
    """A config's text; a text in it that looks like a number stays a text."""
    text: str = yaml.dump(content, Dumper=_QuotingDumper, sort_keys=False)
    return text


class _QuotingDumper(yaml.SafeDumper):  # type: ignore[misc]
    """Texts in quotes."""

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
    return key in FITS and isinstance(value, dict)


def _flat_group(group: str, value: Any) -> Any:
    if is_class_path(value):
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


def loaded(text: str) -> dict[str, Any]:
    """A config's content; nothing of what is none, which the parser will refuse."""
    try:
        content = get_loader("yaml")(text)
    except Exception:  # the parser says where it is broken
        return {}
    return content if isinstance(content, dict) else {}
