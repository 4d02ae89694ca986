"""Components named by class path and options: what configs say of them and what checkpoints keep.

A checkpoint must load with ``weights_only=True``, so it cannot hold a loss object. It holds the class path and the
arguments the object was made from, and the module makes an equal one again.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Collection, Mapping
from importlib import import_module
from numbers import Integral, Real
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from dft_lightning.errors import InputError, did_you_mean, nearest

T = TypeVar("T")

_PLAIN_SCALARS = (bool, int, float, str)


class NotPlainError(TypeError):
    """A value that neither YAML nor a ``weights_only`` checkpoint can hold."""


class Component:
    """Mixin that remembers the arguments of ``__init__`` (in ``_init_values``), whatever the subclass.

    Raises:
        InputError: the class leaves out a method of ``_to_write``, which its base class leaves to it.
    """

    _init_values: dict[str, Any]
    _to_write: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        _check_written(cls)
        # Copying and unpickling call __new__ without arguments and restore the attribute themselves.
        self = super().__new__(cls)
        object.__setattr__(self, "_init_values", _bound_values(cls, args, kwargs))
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self._init_values.items())})"


def _check_written(cls: type) -> None:
    for base in cls.__mro__:
        for name in vars(base).get("_to_write", ()):
            if getattr(cls, name) is (method := vars(base)[name]):
                others = [own for own, value in vars(cls).items() if inspect.isfunction(value) and own != name]
                misspelt = nearest(name, others)
                raise InputError(
                    f"{cls.__name__} must define {name}({', '.join(inspect.signature(method).parameters)})"
                    + (f", and has {misspelt}" if misspelt else "")
                )


def _bound_values(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    try:
        values = dict(signature.bind(None, *args, **kwargs).arguments)
    except TypeError:  # wrong arguments: __init__ is about to raise the error that a user should see
        return {}
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            values.update(values.pop(name, {}))
    values.pop(next(iter(signature.parameters)), None)
    return values


def to_plain(value: Any) -> Any:
    """Turn components, dataclasses and paths into dicts, lists and scalars.

    Raises:
        NotPlainError: something has no plain form.
    """
    if value is None:
        return None
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    for kind in _PLAIN_SCALARS:
        if isinstance(value, kind):
            return kind(value)  # subclasses are no plain values
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Component):
        return {"class_path": class_path(type(value)), "init_args": _plain_init_args(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_plain(dataclasses.asdict(value))
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    raise NotPlainError(f"{type(value).__module__}.{type(value).__qualname__} has no plain form")


def plain_values(values: dict[str, Any], way_out: str) -> dict[str, Any]:
    """The values that have a plain form; of any other a warning says that checkpoints will not hold it."""
    from lightning.pytorch.utilities import rank_zero_warn

    plain = {}
    for name, value in values.items():
        try:
            plain[name] = to_plain(value)
        except NotPlainError as error:
            rank_zero_warn(f"checkpoints will not hold {name!r}: {error}; {way_out}")
    return plain


def brief_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values in plain form; of what has none, or is data rather than a setting, only that it is not saved."""
    return {str(name): _brief(value) for name, value in values.items()}


def _brief(value: Any) -> Any:
    try:
        plain = to_plain(value)
    except NotPlainError as error:
        return f"not saved: {error}"
    if isinstance(plain, dict):
        return brief_values(plain)
    if isinstance(plain, list):
        return [_brief(item) for item in plain] if len(plain) <= _MOST else f"not saved: {len(plain)} items"
    if isinstance(plain, str) and len(plain) > _LONGEST:
        return f"not saved: {len(plain)} characters"
    return plain


_MOST, _LONGEST = 100, 20_000


def not_saved(values: Any, key: str) -> list[tuple[str, str]]:
    """Dotted keys of what values in plain form say that it is not saved, and what they say of it."""
    if isinstance(values, str) and values.startswith("not saved: "):
        return [(key, values)]
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [found for name, item in items for found in not_saved(item, f"{key}.{name}")]


def class_path(cls: type) -> str:
    """Dotted path of a class; of one of ``torch.optim`` there, and not inside of it, where it may move."""
    if getattr(sys.modules.get("torch.optim"), cls.__name__, None) is cls:
        return f"torch.optim.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def named_class(path: str) -> type | None:
    """The class that a file names: of this package, or of a module that is imported already; ``None`` for another.

    A file does not decide what else is imported.
    """
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] == __name__.partition(".")[0]:
        try:
            found = getattr(import_module(module), name, None)
        except ImportError:
            return None
    else:
        found = vars(sys.modules[module]).get(name) if module in sys.modules else None
    return found if isinstance(found, type) else None


def _plain_init_args(component: Component) -> dict[str, Any] | str:
    constructor = type(component).__init__  # object's own takes *args, on paper
    kinds = [parameter.kind for parameter in inspect.signature(constructor).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds and constructor is not object.__init__:
        return "not saved: its __init__ takes *args"
    try:
        return {name: to_plain(value) for name, value in component._init_values.items()}
    except NotPlainError as error:
        # Said when it is loaded: a run that is never loaded again loses nothing.
        return f"not saved: {error}"


def imported(path: str) -> Any:
    """What a dotted path names. Raises ``ImportError``, ``AttributeError`` or ``ValueError`` where it names nothing."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def init_parameters(cls: type, first: int = 0, bases: Collection[type] = (object,)) -> dict[str, inspect.Parameter]:
    """A class's arguments by name, with those of the classes above it that it hands on by ``**kwargs``.

    Args:
        cls: the class.
        first: leave out so many of each constructor's arguments.
        bases: classes whose own arguments are none of it.
    """
    found: dict[str, inspect.Parameter] = {}
    for each in cls.__mro__:
        if each in bases:
            break
        if "__init__" not in vars(each):
            continue
        parameters = list(inspect.signature(vars(each)["__init__"]).parameters.values())[1:]
        for parameter in parameters[first:]:
            found.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return {name: p for name, p in found.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return found


def from_plain(value: T | dict[str, Any], base: type[T]) -> T:
    """Make a component from its class's name or ``{"class_path": ..., "init_args": {...}}``; one is returned as it is.

    The class is imported: what a file says is to be looked at first, by :mod:`dft_lightning.checkpoints.trust`.

    Raises:
        TypeError: the class path names no subclass of ``base``, or ``value`` is neither form.
        ValueError: the class path cannot be imported.
    """
    if isinstance(value, base):
        return value
    if isinstance(value, type):
        raise TypeError(f"{value.__name__} is a class: give {value.__name__}(...), an object of it")
    if isinstance(value, str) and "." not in value:  # a path, which is imported, is not said by a text of a file alone
        value = {"class_path": value}
    if not isinstance(value, dict) or "class_path" not in value:
        raise TypeError(
            f"expected a {base.__name__} or a dict with class_path and init_args, got {type(value).__name__}: {value!r}"
        )
    try:
        cls = _of_short_name(str(value["class_path"]), base) or imported(str(value["class_path"]))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"cannot import {value['class_path']!r} ({error}); make it importable, or pass the {base.__name__} itself"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise TypeError(f"{value['class_path']} is not a subclass of {base.__name__}")
    init_args = value.get("init_args") or {}
    if not isinstance(init_args, dict):
        raise ValueError(f"the options of {value['class_path']} were {init_args}; pass the {base.__name__} itself")
    if lacking := not_saved(init_args, cls.__name__):
        raise ValueError(f"{lacking[0][0]} was {lacking[0][1]}; pass the {base.__name__} itself")
    return cls(**{name: _rebuild(item) for name, item in init_args.items()})


def _of_short_name(name: str, base: type) -> type | None:
    """The class of this package, or of what is imported, that a name without a path means; ``None`` for a path."""
    if "." in name:
        return None
    named = [cls for cls in subclasses(base) if not cls.__name__.startswith("_")]
    ours = [cls for cls in named if cls.__module__.startswith("dft_lightning.")]
    known = {cls.__name__: cls for cls in reversed([*ours, *named])}  # of two of a name this package's
    if name not in known:
        raise ValueError(
            f"unknown {base.__name__} {name!r}{did_you_mean(name, known)}; of your own give the dotted path, or the "
            "object itself"
        )
    return known[name]


def subclasses(base: type) -> list[type]:
    """The classes below one, as far as they are imported."""
    direct: list[type] = base.__subclasses__()
    return [cls for child in direct for cls in (child, *subclasses(child))]


def _rebuild(value: Any) -> Any:
    """Components inside components."""
    if isinstance(value, dict):
        if set(value) == {"class_path", "init_args"}:
            return from_plain(value, Component)
        return {key: _rebuild(item) for key, item in value.items()}
    return [_rebuild(item) for item in value] if isinstance(value, list) else value


def group_of(cls: type[T], given: T | Mapping[str, Any], key: str) -> T:
    """A group of options, from itself or from a dict of its fields.

    Raises:
        ValueError: the dict has a key that is no field, or a value of another type; or ``given`` is neither.
    """
    if isinstance(given, cls):
        return given
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if not isinstance(given, Mapping):
        raise ValueError(f"{key}: expected {cls.__name__} or a dict of its fields, got {type(given).__name__}")
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{key}: {cls.__name__} has no {', '.join(map(str, unknown))}; it has {', '.join(known)}")
    hints = get_type_hints(cls)
    for name, value in given.items():
        _check_scalar(f"{key}.{name}", value, hints[name])
    return cls(**given)


def _check_scalar(key: str, value: Any, hint: Any) -> None:
    """Where a field is of nothing but plain scalars: ``"false"`` would be true, and a length of 5.5 is none."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if any(kind not in (*_NUMBERS, str, type(None)) for kind in kinds):
        return
    given = next((kind for kind, name in _NUMBERS.items() if isinstance(value, name)), type(value))
    if given not in kinds and not (given is int and float in kinds):
        names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{key}: expected {names}, got {value!r}")


_NUMBERS: dict[type, type] = {bool: bool, int: Integral, float: Real}  # numpy's, too; a bool is an Integral as well
