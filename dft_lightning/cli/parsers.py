"""The parser of configs: one mistake, one message; classes with their own options alone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, get_args

from jsonargparse import ArgumentParser

from dft_lightning.cli.class_paths import GROUPS, text_without_classes
from dft_lightning.cli.errors import shorten
from dft_lightning.errors import InputError
from dft_lightning.foreign.jsonargparse import actions, change_for, type_of


class OneMessage(ArgumentParser):
    """One mistake, one message: no usage wall. Keys are written out: an abbreviation may mean another key one day.

    A class that is named has its own options and defaults alone. A loss's options for direct calls are none here.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.class_paths: dict[str, list[str]] = {group: [] for group in GROUPS}  # that it is built for

    def add_class_arguments(self, class_type: Any, *args: Any, **kwargs: Any) -> Any:
        losses: Any = sys.modules.get("dft_lightning.losses.base")  # imported with each class that is a loss
        if losses and isinstance(class_type, type) and issubclass(class_type, losses.TokenLoss):
            kwargs["skip"] = {*(kwargs.get("skip") or ()), *losses.FORWARD_OPTIONS}
        # With sub-configs, jsonargparse reads any file that a flag names as YAML first: data files, too.
        return super().add_class_arguments(class_type, *args, **{**kwargs, "sub_configs": False})

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        return super().parse_string(text_without_classes(content, self.class_paths), *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        if not self.exit_on_error:  # a parser for a class's options: the outer one adds the key
            super().error(message, ex)
        if _raising.get():
            raise _Refused(shorten(message, self))
        sys.stderr.write(f"error: {shorten(message, self)}\n")
        raise SystemExit(2)


class _Refused(SystemExit):
    """What a parser refuses, on its way past all that takes a ``ValueError`` for its own."""


_raising: ContextVar[bool] = ContextVar("raising", default=False)


@contextlib.contextmanager
def raising_input_errors() -> Iterator[None]:
    """Have what parsers refuse meanwhile raise ``InputError``, and not end the process after a message."""
    before = _raising.set(True)
    try:
        yield
    except _Refused as refused:
        raise InputError(str(refused)) from None
    finally:
        _raising.reset(before)


change_for(OneMessage, ("dft_lightning", "torch"))


def refuse_nulls(parser: Any, options: Any) -> None:
    """Raise ``InputError`` for a null where there has to be a class or a group of options: jsonargparse lets it pass.

    Args:
        parser: of the options.
        options: of ``model`` and ``data``, as it parsed them.
    """
    found = [action for action in actions(parser) if type_of(action) is not None]
    typed = {action.dest: action for action in found if action.dest.partition(".")[0] in GROUPS}
    groups = {key.rpartition(".")[0] for key in typed}
    for key in sorted({*typed, *groups} - {*GROUPS}):
        action = typed.get(key)
        optional = action is not None and (action.default is None or type(None) in get_args(type_of(action)))
        if not optional and key in options and options[key] is None:
            raise InputError(f"{key}: null is none of its values: leave it out for the default")
