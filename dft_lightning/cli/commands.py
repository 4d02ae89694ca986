"""How a command of the table runs: its function's arguments read from the command line, its end told in one line."""

from __future__ import annotations

import inspect
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from dft_lightning.cli import COMMANDS, READ_AS
from dft_lightning.cli.class_paths import names_classes
from dft_lightning.cli.early import check
from dft_lightning.cli.errors import shorten
from dft_lightning.cli.help import help_asked, help_text
from dft_lightning.cli.sources import function_at
from dft_lightning.component import imported
from dft_lightning.errors import InputError, printable
from dft_lightning.foreign.jsonargparse import actions


@dataclass(frozen=True)
class FitArguments:
    """What a command knows of the fit whose config it reads.

    Attributes:
        args: options as ``fit`` takes them.
        classes: the module and data module of one's own, ``dft_lightning.fit.own_classes.Classes``; ``None`` for the
            package's.
    """

    args: tuple[str, ...] = ()
    classes: Any = None


class Stopped(Exception):
    """The user has ended a command.

    Args:
        message: what is kept, and how to go on.
        status: the exit status.
    """

    def __init__(self, message: str, status: int = 130) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def handling(signals: Sequence[int], handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Have a command's own handler for signals meanwhile.

    In another thread than the main one, where Python lets none be set, they do what they did before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def run(name: str, args: list[str], classes: Any = None) -> int:
    """Run a command of the table.

    Args:
        name: of the command.
        args: what follows it on the command line.
        classes: as :class:`FitArguments` has them.

    Returns:
        The exit status: what the function returns, 0 for nothing; 2 after one message on standard error where the input
        was wrong; 130 where the user ended it.
    """
    return ended(lambda: _call(name, args, classes))


def ended(call: Callable[[], int | None]) -> int:
    """Call what a command is, and return the exit status as :func:`run` has it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # rows have characters that not every encoding has
    try:
        status = call() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads the output, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be written
        return 1
    except SystemExit as ending:  # of a parser, after its message or the help
        return ending.code if isinstance(ending.code, int) else 1
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        return stopped.status
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130
    except Exception as error:
        return report(error)


def answered(args: list[str]) -> int | None:
    """Answer what needs nothing that takes seconds to import: help, and mistakes of arguments and configs.

    Args:
        args: of a command that fits, its name first.

    Returns:
        The exit status; ``None`` where the command has to run.
    """
    if "lightning" in sys.modules:  # the command itself answers as fast
        return None
    if help_asked(args) is None:
        return ended(lambda: check(args)) or None
    return None if names_classes(args) else ended(lambda: print(help_text(args), end=""))


def _call(name: str, args: list[str], classes: Any) -> int | None:
    taken = function_at(COMMANDS[name])
    own, others, fit_args = _divided(args, taken)
    parser = _OptionParser(
        prog=f"python -m dft_lightning {name}",
        description=taken.__doc__.split("\n\nArgs:")[0].replace("``", ""),
        exit_on_error=True,
    )
    parser.add_function_arguments(taken, as_group=False, skip=set(_GIVEN), sub_configs=False)
    options = parser.parse_args(own).as_dict()
    given = {"fit": FitArguments(tuple(fit_args), classes), "classes": classes}
    given = {key: value for key, value in given.items() if key in inspect.signature(taken).parameters}
    if "fit" in given and (early := answered([READ_AS.get(name, "fit"), *fit_args])) is not None:
        return early
    function = imported(COMMANDS[name])
    if "lightning" in sys.modules:
        from dft_lightning.foreign.lightning import quiet

        quiet()
    status: int | None = function(*others, **options, **given)
    return status


# Arguments of a function that are no options.
_GIVEN = ("fit", "classes")


class _OptionParser(ArgumentParser):
    """One mistake, one message: no usage wall."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = shorten(message, self)
        keys, colon, reason = text.partition(":")
        if {f"--{key}" for key in keys.split(", ")} <= {name for each in actions(self) for name in each.option_strings}:
            text = ", ".join(f"--{key}" for key in keys.split(", ")) + colon + reason
        sys.stderr.write(f"error: {text.replace('unknown key ', 'unknown option --')}\n")
        raise SystemExit(2)


def report(error: Exception) -> int:
    """Write what to tell a person of an error to standard error, and return the exit status.

    Called where the error is handled: any other than :func:`user_message` knows goes on its way.
    """
    message = user_message(error)
    if message is None:
        raise error
    sys.stderr.write(f"error: {printable(message)}\n")
    return 2


def user_message(error: Exception) -> str | None:
    """What to tell a person of an error that a change of their input mends; ``None`` for any other."""
    if isinstance(error, InputError):
        return str(error).strip()
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if "lightning" not in sys.modules:
        return None
    from dft_lightning.foreign.lightning import mistake

    return mistake(error)


# -- the command line --------------------------------------------------------------------------------------------------


def _divided(args: list[str], function: Callable[..., Any]) -> tuple[list[str], list[str], list[str]]:
    """Arguments for the function's options as jsonargparse takes them, those that belong to no option, and fit's.

    An option of several values (``--splits train test``, also given several times) becomes a list; one of yes or no
    needs no value; a dash in its name may be an underscore.
    """
    parameters = inspect.signature(function).parameters
    hints, takes_fit = get_type_hints(function), "fit" in parameters
    own: list[str] = []
    others: list[str] = []
    of_fit: list[str] = []
    lists: dict[str, list[str]] = {}
    for words in _runs(args):
        name, equals, value = words[0].removeprefix("--").partition("=")
        name = name.replace("-", "_")
        values = [value, *words[1:]] if equals else words[1:]
        if words[0] in ("--help", "-h"):
            own += words
        elif not words[0].startswith("-"):
            (of_fit if takes_fit else others).extend(words)
        elif not words[0].startswith("--") or name not in parameters or name in _GIVEN:
            (of_fit if takes_fit else own).extend(words)
        elif values and any(get_origin(hint) is list for hint in (hints[name], *get_args(hints[name]))):
            lists.setdefault(name, []).extend(values)
        else:
            flag = hints[name] is bool and not (values and values[0] in ("true", "false"))
            own += [f"--{name}=true"] if flag else [f"--{name}={each}" for each in values[:1]] or [f"--{name}"]
            (of_fit if takes_fit else others).extend(values if flag else values[1:])
    own += [f"--{name}={json.dumps(values)}" for name, values in lists.items()]
    if others and not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values()):
        raise InputError(f"{others[0]}: an argument of no option; see --help for the options")
    return own, others, of_fit


def _runs(args: list[str]) -> list[list[str]]:
    """Each option with the values that follow it."""
    runs: list[list[str]] = [[]]
    for arg in args:
        if arg.startswith("-") and not arg[1:2].isdigit():
            runs.append([])
        runs[-1].append(arg)
    return [run for run in runs if run]
