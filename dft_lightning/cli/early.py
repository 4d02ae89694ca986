"""Mistakes that are found before the imports that take seconds.

A parser is built of what the sources say. What it cannot judge it takes as it is: classes of libraries and of one's
own. It refuses nothing that the command takes, and says what the command would say.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from dft_lightning.cli import FITS
from dft_lightning.cli.class_paths import GROUPS, dumped, is_class_path, loaded, without_flags
from dft_lightning.cli.errors import shorten
from dft_lightning.cli.outline import CLASSES, SEED, SEED_HINT, method_parameters, path_of, trainer_parameters
from dft_lightning.cli.parsers import OneMessage, refuse_nulls
from dft_lightning.cli.sources import REQUIRED, Parameter, classes_in, is_group, parameters
from dft_lightning.errors import InputError

_LOSS = "model.loss"
_KNOWN = ("dft_lightning", "lightning", "torch")  # what they name is of no use to a short name of one's own


def check(args: list[str]) -> None:
    """Look at the arguments of a command that fits.

    Args:
        args: the command's name first.

    Raises:
        InputError: one of them is wrong, or something in a config.
    """
    if not _is_judged(args):
        return
    if not args or args[0] not in FITS:
        _Command("".join(args[:1])).parse(args[1:])
        return
    named: dict[str, list[str]] = {group: [] for group in GROUPS}
    given = [each for each in without_flags(args[1:], named) if not each.startswith("--print_config")]
    texts = [text for arg in given for text in (arg, *_strings(loaded(f"{{value: {arg.partition('=')[2] or arg}}}")))]
    texts += [text for config in _configs(given) for text in _texts(config)]
    if any(named.values()) or any(map(_is_read_once, texts)):
        return
    command = _Command(args[0])
    if (options := command.parse(given)) is None:
        return
    loss = command.default(_LOSS)
    is_named = options[_LOSS] != loss or any(each.startswith(f"--{_LOSS}") for each in given)
    if is_named and not any(is_class_path(text) and text.partition(".")[0] not in _KNOWN for text in texts):
        from dft_lightning.losses import LOSSES, TokenLoss  # torch alone

        _Command(args[0], (_LOSS, TokenLoss, LOSSES[loss]())).parse([*_of_the_loss(given)])
    command.check_nulls(options, given)


# -- what is judged ----------------------------------------------------------------------------------------------------


def _is_judged(args: list[str]) -> bool:
    """Whether it is for this process to say what is wrong, and its arguments are of the usual form."""
    is_first = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"
    begins = not args or not args[0].startswith("-")  # with the command, and no config before it
    unusual = any(each == "--" or each.partition("=")[0].endswith(".help") for each in args)
    return is_first and begins and not unusual and "JSONARGPARSE_DEFAULT_ENV" not in os.environ


def _configs(args: list[str]) -> Iterator[str]:
    """The configs among arguments: files or their text."""
    for arg, following in zip(args, [*args, ""][1:], strict=True):
        flag, equals, value = arg.partition("=")
        if flag in ("--config", "-c"):
            yield value if equals else following


def _of_the_loss(args: list[str]) -> Iterator[str]:
    """The arguments that the loss may be in."""
    left = iter(zip(args, [*args, "--"][1:], strict=True))
    for arg, following in left:
        flag, equals, _ = arg.partition("=")
        if flag in ("--config", "-c", f"--{_LOSS}") or flag.startswith(f"--{_LOSS}."):
            yield arg
            if not equals:
                yield following
                next(left, None)


def _texts(config: str) -> Iterator[str]:
    """All texts in a config and in the one that it is over, their own names among them."""
    yield config
    if os.path.isfile(config):
        content = loaded(Path(config).read_text(encoding="utf-8", errors="replace"))
        yield from _strings(content)
        if isinstance(content.get("config"), str):
            yield from _texts(str(Path(config).parent / content["config"]))
    else:
        yield from _strings(loaded(config))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for each in value:
            yield from _strings(each)
    elif isinstance(value, str):
        yield value


def _is_read_once(text: str) -> bool:
    """Whether a text may be the name of what cannot be read here and once more."""
    for name in (text, text.partition("=")[2], text[2:]):
        try:
            mode = os.stat(name).st_mode
        except (OSError, ValueError):  # no name of a file
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            return True
    return text == "-"


# -- the parser --------------------------------------------------------------------------------------------------------


class _Parser(OneMessage):
    """Its message is an exception, and of what is taken as it is nothing is read in configs."""

    opaque: Collection[str] = ()
    alone: str | None = None  # the key of the one option that it has

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        found = loaded(content)
        judged = _outside(found, self.opaque) if self.alone is None else _within(found, self.alone)
        content = content if judged == found else dumped(judged)
        return super().parse_string(content, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        if not self.exit_on_error:  # a parser for a class's options: the outer one adds the key
            super().error(message, ex)
        raise _Mistake(shorten(message, self))


def _outside(content: dict[str, Any], keys: Collection[str], prefix: str = "") -> dict[str, Any]:
    """A config without what is inside of the values of some keys."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if not key.startswith(tuple(f"{each}." for each in keys)):
            found[name] = _outside(value, keys, f"{key}.") if isinstance(value, dict) else value
    return found


def _within(content: dict[str, Any], key: str) -> dict[str, Any]:
    """What a config says of one key."""
    found = {name: value for name, value in content.items() if name == key or name.startswith(f"{key}.")}
    group, _, rest = key.partition(".")
    return {**found, group: _within(content[group], rest)} if isinstance(content.get(group), dict) and rest else found


class _Mistake(Exception):
    pass


class _Command:
    """The command's parser, with the options of the one of its commands that is given.

    Args:
        command: the one; for any other than those that fit, none has options.
        only: an option whose class is imported, and its type and default: the parser has no other.
    """

    def __init__(self, command: str = "", only: tuple[str, type, Any] | None = None) -> None:
        self.command = command
        self.opaque: list[str] = []  # keys of what is taken as it is
        self.parser = _Parser()
        self._options = _Parser()
        for parser in (self.parser, self._options):
            parser.add_argument("-c", "--config", action="config")
        subcommands = self.parser.add_subcommands()
        if only is not None:
            key, hint, default = only
            group, _, name = key.partition(".")
            self._options.alone = key
            self._options.add_class_arguments(_made([(name, hint, default)]), group, fail_untyped=False)
        elif command in FITS:
            self._add_options()
            self._options.opaque = self.opaque
        for name in FITS:
            subcommands.add_subcommand(name, self._options if name == command else _Parser())

    def parse(self, args: list[str]) -> Namespace | None:
        """The options; ``None`` where it cannot be known whether they are right.

        Raises:
            InputError: they are not.
        """
        appends = {f"--{key}+": f"--{key}" for key in self.opaque}
        parts = (arg.partition("=") for arg in args)
        words = [*filter(None, [self.command]), *("".join([appends.get(flag, flag), *rest]) for flag, *rest in parts)]
        try:
            options: Namespace = self.parser.parse_args(words)[self.command]
        except _Mistake as mistake:
            raise InputError(str(mistake)) from None
        except Exception:  # in jsonargparse, by what is taken as it is; all is looked at once more
            return None
        return options

    def check_nulls(self, options: Namespace, args: list[str]) -> None:
        """Raise ``InputError`` for a null of a config that is none of an option's values."""
        flags = {arg.partition("=")[0] for arg in args}
        if not any(f"--{key}" in flags and options.get(key) is None for key in self.opaque):  # refused for what it is
            refuse_nulls(self._options, options)

    def default(self, key: str) -> Any:
        """The default of an option."""
        return self._options.get_default(key)

    def _add_options(self) -> None:
        self._options.add_argument("--seed_everything", type=SEED_HINT, default=SEED)
        listed = {"trainer": trainer_parameters(), **{group: parameters(path) for group, path in CLASSES.items()}}
        for group, arguments in listed.items():
            self._options.add_class_arguments(_made(self._typed(group, arguments)), group, fail_untyped=False)
        for group in CLASSES:
            self._options.add_argument(f"--{group}.class_path", type=str)
        self._options.add_class_arguments(_made(self._typed("", method_parameters(self.command))), as_group=False)

    def _group(self, key: str, cls: type) -> type:
        """A group of options like the one that a stand-in is for."""
        fields = [
            (name, hint, dataclasses.field(default=default))
            for name, hint, default in self._typed(key, parameters(path_of(cls)))
        ]
        return dataclasses.make_dataclass(cls.__name__, fields, frozen=True)

    def _typed(self, key: str, listed: list[Parameter]) -> Iterator[tuple[str, Any, Any]]:
        for each in listed:
            inner = f"{key}.{each.name}".removeprefix(".")
            hint: Any = self._hint(inner, each.hint)
            if hint is Any and each.hint is not Any:
                self.opaque.append(inner)
            is_left_out = dataclasses.is_dataclass(hint) and each.default is not REQUIRED
            yield each.name, hint, hint() if is_left_out else each.default

    def _hint(self, key: str, hint: Any) -> Any:
        """The type that is judged: ``Any`` where there are classes in it other than groups of options."""
        if not (classes := classes_in(hint)):
            return hint
        return self._group(key, hint) if hint is classes[0] and is_group(path_of(hint)) else Any


def _made(arguments: Iterable[tuple[str, Any, Any]]) -> type:
    """A class with arguments of these names, types and defaults."""
    listed = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    for name, hint, default in arguments:
        listed.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=hint, default=default))

    def init(self: Any, **_: Any) -> None: ...

    init.__signature__ = inspect.Signature(listed)  # type: ignore[attr-defined]
    return type("Arguments", (), {"__init__": init})
