"""jsonargparse's messages, cut to what a person needs: the key, what is wrong, what would be right."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

from dft_lightning.cli import COMMANDS
from dft_lightning.cli.other_names import COMMANDS_OF_OTHERS, meant_class, meant_key, meant_option
from dft_lightning.cli.shipped_configs import hint
from dft_lightning.component import imported, subclasses
from dft_lightning.errors import did_you_mean
from dft_lightning.foreign.jsonargparse import (
    actions,
    factory_named,
    keys_of,
    kind_of,
    kind_of_factory,
    of_key,
    reasons_of,
    type_of,
    without_class_advice,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def shorten(message: str, parser: ArgumentParser) -> str:
    """One or two lines for a parsing error."""
    if found := kind_of(message):
        kind, match = found
        return _RULES[kind](match, message, parser)
    key, reasons = _key_of(message), reasons_of(message)
    text = "; ".join(reasons[:3] or [message])
    return f"{key}: {text}" if key else text


def _key_of(message: str) -> str:
    """The dotted key that a message is about."""
    return ".".join(map(_strip_subcommand, keys_of(message)))


def _strip_subcommand(key: str) -> str:
    return re.sub(r"^(fit|validate|test|predict)\.", "", key)


def _unrecognized(match: re.Match[str], message: str, parser: ArgumentParser) -> str:
    if not match.group(1).startswith("-") and "unrecognized arguments" in message:
        word = match.group(1)
        return f"{word}: an argument of no option: a config is --config {word}, rows are --data.train {word}"
    key = match.group(1).lstrip("-").split("=")[0]
    stripped = _strip_subcommand(key)
    if stripped != key and stripped.split(".")[0] in ("model", "data", "trainer") and stripped in _known_keys(parser):
        return f"unknown key {key}: a config holds {stripped} at the top; take it out of its {key.split('.')[0]}: level"
    return _unknown_key(stripped, parser)


def _group_option(match: re.Match[str], message: str, parser: ArgumentParser) -> str:
    return _unknown_key(_strip_subcommand(f"{match.group(1)}.{match.group(2)}"), parser)


def _unknown_key(key: str, parser: ArgumentParser) -> str:
    near = meant_key(key, _known_keys(parser))
    return f"unknown key {key}; " + (f"did you mean {near}?" if near else "see --help for the known ones")


def _known_keys(parser: Any) -> list[str]:
    """Options of the parser and, for the root one, of its subcommands."""
    keys = {
        option[2:]
        for action in actions(parser, subcommands=True)
        for option in action.option_strings
        if option[:2] == "--"
    }
    return sorted(key for key in keys if not key.endswith(".help") and not key.startswith("print_"))


def _unknown_class(match: re.Match[str], message: str, parser: ArgumentParser) -> str:
    key = _key_of(message)
    if key == "trainer.logger":
        return (
            f"trainer.logger: unknown class {match.group(1)!r}: none is false, and configs/logger/ has overlays for "
            "WandbLogger, MLFlowLogger, TensorBoardLogger and CSVLogger"
        )
    known = sorted(known_classes(key, parser))
    choices = f"known: {', '.join(known)}, or the" if known else "give the"
    near = meant_class(match.group(1), known)
    end = f"; did you mean {near}?" if near else ""
    return f"{key}: unknown class {match.group(1)!r}{end}\n{choices} dotted path of your own"


def known_classes(key: str, parser: Any) -> list[str]:
    """Short names of the classes that a key takes, as far as they need no path."""
    bases = [
        base
        for action in actions(parser, subcommands=True)
        if _names(action, key)
        for base in _classes_in(type_of(action))
    ]
    return sorted({cls.__name__ for base in bases for cls in subclasses(base) if _is_own(cls)})


def _names(action: Any, key: str) -> bool:
    return type_of(action) is not None and key in (action.dest, *(option[2:] for option in action.option_strings))


def _classes_in(typehint: Any) -> list[type]:
    """The classes inside a type hint: ``TokenLoss``, or ``RowSource`` of ``RowSource | str | None``."""
    nested = [cls for argument in get_args(typehint) for cls in _classes_in(argument)]
    return [typehint, *nested] if isinstance(typehint, type) and typehint not in (str, type(None)) else nested


def _is_own(cls: type) -> bool:
    """This package's, and torch's where a short name is enough for them."""
    return cls.__module__.startswith(("dft_lightning.", "torch.optim")) and not cls.__name__.startswith("_")


def _not_subclass(match: re.Match[str], message: str, parser: ArgumentParser) -> str:
    return f"{_key_of(message)}: {match.group(1)} is not a subclass of {match.group(2)}"


def _import_failed(match: re.Match[str], message: str, parser: ArgumentParser) -> str:
    return f"{_key_of(message)}: cannot import {match.group(1)!r}: {match.group(2)}"


def _not_imported(match: re.Match[str], message: str, parser: ArgumentParser) -> str:
    return f"{_key_of(message)}: {match.group(1)} is not imported because a file names it"


def _bad_option(match: re.Match[str], message: str, parser: ArgumentParser) -> str:
    return _no_option(_key_of(message), match.group(1), match.group(2), 1)


def _no_option(key: str, class_path: str, name: str, left_out: int) -> str:
    """``left_out``: how many of the constructor's arguments are no options."""
    cls, class_name = imported(class_path), class_path.rpartition(".")[2]
    options = list(inspect.signature(cls.__init__).parameters)[left_out:]
    from dft_lightning.losses.base import FORWARD_OPTIONS, TokenLoss  # torch, which a mistyped key does not wait for

    if issubclass(cls, TokenLoss):
        options = [each for each in options if each not in FORWARD_OPTIONS]
    near = meant_option(name, options)
    it = f"did you mean {near}? It" if near else "it"
    return f"{key}.{name}: {class_name} has no option {name!r}; {it} has {', '.join(options) or 'none'}"


def _factory(match: re.Match[str], message: str, parser: ArgumentParser) -> str:
    """Of a class that is named without being made: an optimizer, a schedule."""
    key, reason, value = _key_of(message[: match.start()]), match.group(1), match.group(2)
    kind, found = kind_of_factory(reason) or ("", match)
    if kind == "option" and (named := factory_named(value)):
        return _no_option(key, named, found.group(1), 2)
    if kind == "no subclass":
        return f"{key}: {found.group(1)} is not a subclass of {found.group(2)}"
    if kind == "import":
        return f"{key}: cannot import {value!r}: {reason}"
    if kind == "no class":
        return f"{key}: expected a class: its path, or class_path and init_args; got {value[:80]}"
    return shorten(of_key(key, without_class_advice(reason)), parser)


def _required(match: re.Match[str], message: str, parser: ArgumentParser) -> str:
    outer = _key_of(message)
    names = [_strip_subcommand(name.strip()) for name in match.group(1).splitlines()[0].split(",")]
    keys = [f"{outer}.{name}" if outer else name for name in names]
    return f"{', '.join(keys)}: required, but not given"


def _missing_file(match: re.Match[str], message: str, parser: ArgumentParser) -> str:
    return f"{_key_of(message) or 'config'}: no such file: {match.group(1)}{hint(match.group(1))}"


def _option_of_text(match: re.Match[str], message: str, parser: ArgumentParser) -> str:
    key = _key_of(message)
    return f"{key}.{match.group(2)}: {key} is {match.group(1)!r}, which has no options; name a class first"


def _broken_config(match: re.Match[str], message: str, parser: ArgumentParser) -> str:
    return "config: broken YAML: " + " ".join(match.group(1).split()).replace('in "<unicode string>", ', "at ")


def _unknown_command(match: re.Match[str], message: str, parser: ArgumentParser) -> str:
    known = [*re.findall(r"\w+", match.group(2)), *COMMANDS]
    if meant := COMMANDS_OF_OTHERS.get(match.group(1)):
        return f"unknown command {match.group(1)!r}; did you mean {meant}?"
    return f"unknown command {match.group(1)!r}{did_you_mean(match.group(1), known, f': {_one_of(known)}')}"


def _no_command(match: re.Match[str], message: str, parser: ArgumentParser) -> str:
    return f"no command: {_one_of([*match.group(1).split(','), *COMMANDS])}"


def _one_of(commands: list[str]) -> str:
    return f"give one of {', '.join(commands)}; see --help"


def _no_mapping(match: re.Match[str], message: str, parser: ArgumentParser) -> str:
    return f"config: expected a file of keys and values, got one of {match.group(1).strip()[:80] or 'nothing'}"


_RULES: dict[str, Callable[[re.Match[str], str, Any], str]] = {
    "factory": _factory,
    "unrecognized": _unrecognized,
    "group option": _group_option,
    "subcommand option": _unrecognized,
    "option of a text": _option_of_text,
    "broken config": _broken_config,
    "no mapping": _no_mapping,
    "option of a class": _bad_option,
    "import": _import_failed,
    "import not allowed": _not_imported,
    "no subclass": _not_subclass,
    "unknown class": _unknown_class,
    "required": _required,
    "no file": _missing_file,
    "unknown command": _unknown_command,
    "no command": _no_command,
}
