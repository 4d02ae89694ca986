"""What makes optimizers and schedules: a class and its options, as Python and configs give them and as checkpoints hold
them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dft_lightning.component import NotPlainError, class_path, imported, init_parameters, to_plain
from dft_lightning.errors import did_you_mean, one_line

Values = dict[str, Any]  # {"class_path": ..., "init_args": {...}}


def factory_values(
    given: Any,
    base: type,
    key: str,
    default: functools.partial[Any] | type,
    names: Mapping[str, Any],
    check: Callable[[Any], None],
) -> Values:
    """A class and its options in the plain form ``{"class_path": ..., "init_args": {...}}``.

    Args:
        given: a class, a ``functools.partial`` of one, or a dict of that form or of options of the default's class. A
            dict that names the default's class keeps the default's options that it does not give, and a class or
            partial the class's own.
        base: what the class has to be a subclass of.
        key: what messages call the option.
        default: as the option's default is.
        names: what needs no dotted path, the classes among it.
        check: raises ``ValueError`` for a class that is not taken, whatever its options.

    Raises:
        ValueError: there is no such class, it has no such option, or something has no plain form.
    """
    default_class, default_options = _opened(default, key)
    if isinstance(given, dict):
        cls, options = _of_dict(given, default_class, base, key, names)
        if cls is default_class:
            options = {**default_options, **options}
    else:
        cls, options = _opened(given, key)
        if cls is default_class:  # said, as the dict that this makes is to mean the same
            own = parameters_of(cls)
            options = {**{name: own[name].default for name in default_options}, **options}
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"{key}: {getattr(cls, '__name__', cls)} is not a subclass of {base.__name__}")
    if "<locals>" in cls.__qualname__:
        raise ValueError(f"{key}: {cls.__name__} is made inside a function, where no checkpoint finds it: move it out")
    check(cls)
    _check_names(cls, options, key)
    return {"class_path": class_path(cls), "init_args": _plain(options, key)}


def class_of(values: Values) -> Any:
    """The class that values in plain form name."""
    return imported(values["class_path"])


def options_of(values: Values) -> dict[str, Any]:
    """The options for the class's constructor: lists are tuples there."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values["init_args"].items()}


def parameters_of(cls: type) -> dict[str, inspect.Parameter]:
    """A class's own options, those that it hands on by ``**kwargs`` included; the first argument is none of them."""
    return init_parameters(cls, 1, (object, Optimizer, LRScheduler))


def tried(values: Values, key: str, *arguments: Any) -> None:
    """Make one of a class, so that it checks its options. Raises ``ValueError`` where it refuses them."""
    cls = class_of(values)
    try:
        cls(*arguments, **options_of(values))
    except Exception as error:  # whatever a constructor stumbles on
        text = one_line(error)
        names_it = text.partition(" ")[0].rstrip(":") in parameters_of(cls)
        raise ValueError(f"{key}{'.' if names_it else ': '}{text}") from error


def _opened(given: Any, key: str) -> tuple[Any, dict[str, Any]]:
    """Class and options. What jsonargparse makes has the class behind functions that call it."""
    if not isinstance(given, functools.partial):
        if not isinstance(given, type):
            raise ValueError(
                f"{key} must be a class, a functools.partial of one or a dict with class_path and init_args, got "
                f"{type(given).__name__}"
            )
        return given, {}
    parts = [given.func, *given.args]
    classes = [part for part in parts if isinstance(part, type)]
    if len(classes) != 1 or parts[-1] is not classes[0]:
        raise ValueError(f"{key}: give a functools.partial of a class and of options by name alone")
    return classes[0], dict(given.keywords)


def _of_dict(
    given: dict[str, Any], default: type, base: type, key: str, names: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    if "class_path" not in given:
        return default, dict(given)
    if unknown := set(given) - {"class_path", "init_args"}:
        raise ValueError(f"{key}: beside class_path there is init_args alone, got {', '.join(sorted(unknown))}")
    options = given.get("init_args") or {}
    if not isinstance(options, dict):
        raise ValueError(f"{key}: init_args must be a dict of options, got {options!r}")
    return _named(str(given["class_path"]), base, key, names), dict(options)


def _named(path: str, base: type, key: str, names: Mapping[str, Any]) -> Any:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name, None) if module else names.get(name)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{key}: cannot import {path!r}: {error}") from error
    if found is None:
        known = sorted(name for name, each in names.items() if isinstance(each, type) and issubclass(each, base))
        raise ValueError(f"{key}: unknown class {path!r}{did_you_mean(name, known)}")
    return found


def _check_names(cls: type, options: dict[str, Any], key: str) -> None:
    parameters = parameters_of(cls)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in options:
        if name not in parameters and not open_ended:
            hint = did_you_mean(name, parameters, f"; it has {', '.join(parameters)}")
            raise ValueError(f"{key}.{name}: {cls.__name__} has no option {name!r}{hint}")
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and parameter.kind in by_name and name not in options:
            raise ValueError(f"{key}.{name}: required, but not given")


def _plain(options: dict[str, Any], key: str) -> dict[str, Any]:
    plain = {}
    for name, value in options.items():
        try:
            plain[name] = to_plain(value)
        except NotPlainError as error:
            raise ValueError(f"{key}.{name}: no config and no checkpoint can hold it: {error}") from error
    return plain
