"""Mistakes of a user's input, told apart from faults of the program."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Something a user gave is wrong: a file, a row, an option. The message says what, where and what to do.

    The command prints the message alone and exits with status 2.
    """


def one_line(error: Exception, limit: int = 300) -> str:
    """An error's text on one line, cut to ``limit`` characters; its type where it has no text."""
    return shortened(" ".join(str(error).split()) or type(error).__name__, limit)


def printable(text: str) -> str:
    """A text without what a terminal would obey: a file's names may be in it."""
    return text.translate(_CONTROLS)


_CONTROLS = {code: f"\\x{code:02x}" for code in [*range(0x20), *range(0x7F, 0xA0)] if chr(code) not in "\t\n"}


def shortened(text: str, limit: int = 1000) -> str:
    """A text cut to ``limit`` characters: what it quotes of a row may be megabytes."""
    return text if len(text) <= limit else text[:limit] + " ..."


def check_one_of(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise ``InputError`` where the value of an option is none of its choices."""
    choices = list(choices)
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that somebody who wrote another meant; ``None`` where none is like it."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """How a message about an unknown name ends: with the known name that is like it, or ``otherwise``.

    Example:
        >>> did_you_mean("lora_alpa", ["r", "lora_alpha"]), did_you_mean("x", ["r"], ": there is r")
        ('; did you mean lora_alpha?', ': there is r')
    """
    near = nearest(name, known)
    return f"; did you mean {near}?" if near else otherwise
