"""The help: the commands, what most runs set, and each group of options by itself."""

from __future__ import annotations

import collections.abc
import re
import shutil
import textwrap
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from dft_lightning.cli import COMMANDS, FITS
from dft_lightning.cli.outline import Option, Outline, outline, path_of
from dft_lightning.cli.sources import (
    PACKAGE,
    REQUIRED,
    Named,
    classes_in,
    is_group,
    parameters,
    subclasses,
    summary,
    value_at,
)
from dft_lightning.errors import InputError, did_you_mean

_PROGRAM = "python -m dft_lightning"
# What most runs set, in fewer words than the docstrings have for it.
IN_FRONT = {
    "model.model": "hub name or folder of the model",
    "model.loss": "DFTLoss, FocalLoss ...: --help.model.loss lists them",
    "model.optimizer.lr": "peak of the learning rate",
    "model.peft": "LoRA, by its options: '{r: 16}'",
    "data.train": "rows: a .jsonl, .json, .csv or .parquet file, or a hub name",
    "data.validation_fraction": "share of them that is set apart for validation",
    "data.text.max_length": "longest row, in tokens",
    "data.batch_size": "rows of a micro-batch",
    "data.global_batch_size": "rows of an optimizer step",
    "trainer.max_epochs": "passes over the rows",
    "trainer.max_steps": "optimizer steps, where these end the run",
    "trainer.devices": "how many GPUs, or which",
    "trainer.precision": "bf16-mixed, 32-true ...",
    "trainer.default_root_dir": "folder of the runs",
    "config": "file with keys and values; a further one goes over it",
    "ckpt_path": "go on from a checkpoint: its file, last or auto",
    "seed_everything": "seed of the run",
}


def help_asked(args: list[str]) -> str | None:
    """The group that ``--help`` or ``--help.GROUP`` among arguments asks for, "" for none; ``None`` without them."""
    for arg in args:
        if arg in ("-h", "--help") or arg.startswith("--help."):
            return arg.partition(".")[2]
    return None


def help_text(args: list[str], found: Outline | None = None) -> str:
    """The help that arguments ask for.

    Args:
        args: of the command.
        found: what it takes; ``None`` for what it takes where no class is named.

    Raises:
        InputError: there is no such group.
    """
    command = next((arg for arg in args if arg in FITS), None)
    if command is None:
        return _of_commands()
    found, key = found or outline(command), help_asked(args)
    return _of_group(key, found) if key else _of_fit(command, found)


def _of_commands() -> str:
    listed = {**FITS, **{name: summary(path) for name, path in COMMANDS.items()}}
    about = _wrapped("Fine-tune causal language models with a pluggable token loss.")
    lines = [f"{_PROGRAM} COMMAND ...", "", *about, ""]
    for name, text in listed.items():
        lines += _wrapped(f"{name:11}{_plain(text)}", "  ", 11)
    return _page([*lines, "", *_wrapped(f"{_PROGRAM} COMMAND --help says what a command takes.")])


def _of_fit(command: str, found: Outline) -> str:
    lines = [f"{_PROGRAM} {command} [--config FILE]... [--KEY VALUE]...", "", FITS[command]]
    lines += _wrapped("A config is YAML with the same keys; what comes later goes over what comes before.")
    lines += ["", "Most runs set:"]
    width = max(map(len, IN_FRONT)) + 4
    for key, text in IN_FRONT.items():
        option = _option(key, found)  # a class of one's own may have none of it
        if option is not None:
            default = "" if option.default in (REQUIRED, None) else f" ({_value_text(option.default)})"
            lines += _wrapped(f"{'--' + key:{width}}{text}{default}", "  ", width)
    lines += ["", "The rest, by group:"]
    groups = {key: text for key, text in found.groups.items() if key.count(".") < 2}
    for key, text in groups.items():
        lines.append(_cut(f"  {'--help.' + key:{width + 5}}{_plain(text)}"))
    rest = [f"--{key}" for key in found.options if "." not in key and key not in IN_FRONT]
    return _page(
        [*lines, "", *_wrapped(f"Beside them: {', '.join([*rest, '--print_config'])}; --help.KEY for one key.")]
    )


def _of_group(key: str, found: Outline) -> str:
    if (option := _option(key, found)) is not None:
        return _page([*_entry(key, option), *_fields(key, option), *_classes(key, option)])
    if key not in found.groups:
        known = [*found.groups, *found.options]
        raise InputError(f"--help.{key}: no such key{did_you_mean(key, known, '; --help names the groups')}")
    lines = [*_wrapped(_plain(found.groups[key])), ""]
    for name, option in found.options.items():
        if name.rpartition(".")[0] == key:
            lines += _entry(name, option)
    inner = {name: text for name, text in found.groups.items() if name.rpartition(".")[0] == key}
    for name, text in inner.items():
        lines += ["", _cut(f"--help.{name}"), *_wrapped(_plain(text), " " * 6)]
    return _page(lines)


def _option(key: str, found: Outline) -> Option | None:
    """An option, or one of the class that another makes by default."""
    outer, _, name = key.rpartition(".")
    if key in found.options or outer not in found.options:
        return found.options.get(key)
    return dict(_inner(found.options[outer])).get(name)


# -- what an option takes ----------------------------------------------------------------------------------------------


def _inner(option: Option) -> Iterator[tuple[str, Option]]:
    """The options of a group that may be left out, or of the class that is the default."""
    for cls in classes_in(option.hint):
        if is_group(path_of(cls)):
            yield from ((each.name, Option(each.hint, each.default, each.doc)) for each in parameters(path_of(cls)))
    if isinstance(option.default, Named):
        of_class = parameters(option.default.path) if option.default.path.startswith(PACKAGE) else []
        makes = get_origin(option.hint) is collections.abc.Callable  # of a first argument that is not an option
        for each in of_class[1 if makes else 0 :]:
            yield each.name, Option(each.hint, each.default, each.doc)
        for name, value in option.default.options.items():
            yield name, Option(type(value), value, f"of {option.default}")


def _fields(key: str, option: Option) -> Iterator[str]:
    if subclasses_of(option):
        return
    for name, inner in _inner(option):
        yield from _entry(f"{key}.{name}", inner)


def subclasses_of(option: Option) -> list[str]:
    """Paths of the package's own classes that an option takes."""
    return [path for cls in classes_in(option.hint) for path in subclasses(path_of(cls))]


def _classes(key: str, option: Option) -> Iterator[str]:
    skip = value_at("dft_lightning.losses.base.FORWARD_OPTIONS")  # a loss's, for direct calls
    for path in subclasses_of(option):
        listed = [each for each in parameters(path) if each.name not in skip]
        texts = [f"{each.name}: {type_text(each.hint)}{_equals(each.default)}" for each in listed]
        yield from ["", *_wrapped(f"{path.rpartition('.')[2]}({', '.join(texts)})", "  ", 4)]
        yield from _wrapped(_plain(summary(path)), " " * 6)
    if any(not is_group(path_of(cls)) for cls in classes_in(option.hint)):
        text = (
            f"A class is given by its name, one of your own by its dotted path; --{key}.help CLASS says what it takes."
        )
        yield from ["", *_wrapped(text)]


def _equals(default: Any) -> str:
    return "" if default is REQUIRED else f" = {_value_text(default)}"


def type_text(hint: Any) -> str:
    """A type hint as the help says it: ``int|null``, and a class that is made by its name."""
    if hint is None or hint is type(None):
        return "null"
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is collections.abc.Callable:
        return type_text(arguments[1])
    if origin in (Union, types.UnionType):
        return "|".join(dict.fromkeys(text for each in arguments for text in type_text(each).split("|")))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(type_text, arguments))}]"
    return str(getattr(hint, "__name__", hint))


def _value_text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _entry(key: str, option: Option) -> Iterator[str]:
    yield from _wrapped(f"--{key} {type_text(option.hint)}", "  ", 4)
    default = "required" if option.default is REQUIRED else f"default: {_value_text(option.default)}"
    yield from _wrapped(f"{_plain(option.doc)} ({default})".strip(), " " * 6)


# -- text --------------------------------------------------------------------------------------------------------------


def _plain(doc: str) -> str:
    """A docstring's words on one line, without its marks, and without the default that a library has."""
    text = re.sub(r":\w+:`[~.]?(?:[\w.]+\.)?(\w+)`", r"\1", " ".join(doc.split()))
    text = re.sub(r"`{1,2}([^`]+)`{1,2}(?:_+)?", r"\1", text)
    return re.sub(r"\s*Default: \S+\.?$", "", text)


def _width() -> int:
    return max(60, min(shutil.get_terminal_size().columns, 120))


def _wrapped(text: str, indent: str = "", hanging: int = 0) -> list[str]:
    return textwrap.wrap(
        text, _width(), initial_indent=indent, subsequent_indent=indent + " " * hanging, break_long_words=False
    )


def _cut(text: str) -> str:
    """On one line, as far as it goes."""
    return text if len(text) <= _width() else text[: _width() - 4].rstrip() + " ..."


def _page(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
