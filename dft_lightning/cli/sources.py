"""What classes and functions take, read from their source: nothing is imported that takes long.

A type hint is evaluated as far as it is of Python itself. A class of a library or of this package is a stand-in of its
name, which says where the class is.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

PACKAGE = "dft_lightning"
_READ = (PACKAGE, "lightning")  # packages whose sources are looked into
REQUIRED = inspect.Parameter.empty


class Elsewhere:
    """Base of the classes that stand for those which are not imported; ``__module__`` and ``__name__`` are theirs."""


class Named(str):
    """The name of a class that a default is an instance of, or makes.

    Args:
        path: of the class.
        options: that are given to it.
    """

    def __new__(cls, path: str, options: dict[str, Any] | None = None) -> Named:
        self = super().__new__(cls, path.rpartition(".")[2])
        self.path, self.options = path, options or {}
        return self

    path: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Parameter:
    """An argument of a function or a field of a group of options.

    Attributes:
        name: of it.
        hint: its type.
        default: literal values as they are, a class's as :class:`Named`; :data:`REQUIRED` where there is none.
        doc: what the docstring says of it.
        kind: of ``inspect.Parameter``.
    """

    name: str
    hint: Any
    default: Any
    doc: str
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD


@dataclass(frozen=True)
class _Place:
    """Where a name leads: a definition in a module that is read, or a dotted path outside of them."""

    module: str
    node: Any = None
    name: str = ""


# -- modules -----------------------------------------------------------------------------------------------------------


@functools.cache
def _bindings(module: str) -> dict[str, Any]:
    """The definitions, assignments and imports of a module, by the name that they bind."""
    top, *rest = module.split(".")
    spec = find_spec(top)  # of a package alone, which imports nothing
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]).joinpath(*rest)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found: dict[str, Any] = {}
    for node in _statements(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found[node.name] = node
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.update({each.asname or each.name: (node.module, each.name) for each in node.names})
        elif isinstance(node, ast.Import):
            found.update({each.asname or each.name.split(".")[0]: (each.name, "") for each in node.names})
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found[node.target.id] = node.value
    return found


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module, those under ``if TYPE_CHECKING`` and ``try`` included."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements([*node.body, *node.orelse])
        else:
            yield node


def _place(name: str, module: str) -> _Place:
    """What a dotted name means in a module."""
    first, _, rest = name.partition(".")
    bound = _bindings(module).get(first)
    if bound is None:
        return _Place("builtins", name=name)
    if not isinstance(bound, tuple):
        return _Place(module, bound, name)
    source, attribute = bound
    path = ".".join(filter(None, (source, attribute, rest)))
    if source.split(".")[0] not in _READ:
        outer, _, last = path.rpartition(".")
        return _Place(outer, name=last)
    outer, _, last = path.rpartition(".")
    return _place(last, outer)


def _at(path: str) -> _Place:
    module, _, name = path.rpartition(".")
    return _place(name, module)


# -- values and types --------------------------------------------------------------------------------------------------


def value_at(path: str) -> Any:
    """The value that a dotted path names, as :attr:`Parameter.default` has it."""
    place = _at(path)
    return _value(place.node, place.module)


def _value(node: Any, module: str) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        pass
    if isinstance(node, (ast.Name, ast.Attribute)):
        place = _place(ast.unparse(node), module)
        if isinstance(place.node, ast.expr):
            return _value(place.node, place.module)
        return Named(f"{place.module}.{place.name}")
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func).rpartition(".")[2] == "partial"
        named = _value(node.args[0] if called else node.func, module)
        return Named(named.path, {str(each.arg): _value(each.value, module) for each in node.keywords})
    return ast.unparse(node)


def _hint(node: Any, module: str) -> Any:
    if isinstance(node, ast.Constant):
        return _hint(ast.parse(node.value, mode="eval").body, module) if isinstance(node.value, str) else node.value
    if isinstance(node, ast.BinOp):
        return _hint(node.left, module) | _hint(node.right, module)
    if isinstance(node, ast.Subscript):
        kind = _hint(node.value, module)
        if kind is Literal:
            return kind[ast.literal_eval(node.slice)]
        inner = _hint(node.slice, module)
        return kind[inner]
    if isinstance(node, ast.Tuple):
        return tuple(_hint(each, module) for each in node.elts)
    if isinstance(node, ast.List):
        return [_hint(each, module) for each in node.elts]
    place = _place(ast.unparse(node), module)
    if isinstance(place.node, ast.expr):
        return _hint(place.node, place.module)
    if place.node is None and place.module.split(".")[0] in sys.stdlib_module_names:
        return getattr(builtins if place.module == "builtins" else import_module(place.module), place.name)
    return _stand_in(place.module, place.name.rpartition(".")[2])


@functools.cache
def _stand_in(module: str, name: str) -> type:
    return type(name, (Elsewhere,), {"__module__": module})


def classes_in(hint: Any) -> list[type]:
    """The classes in a type hint that are none of Python's own."""
    if isinstance(hint, type) and not get_args(hint):
        return [hint] if hint.__module__.split(".")[0] not in sys.stdlib_module_names else []
    arguments = [each for part in get_args(hint) for each in (part if isinstance(part, list) else [part])]
    return [cls for each in arguments for cls in classes_in(each)]


# -- classes and functions ---------------------------------------------------------------------------------------------


def parameters(path: str) -> list[Parameter]:
    """The arguments of a function or of a class, or the fields of a group of options."""
    place, found = _at(path), list[Parameter]()
    if isinstance(place.node, ast.FunctionDef):
        found = _arguments(place.node, place.module, _sections(_doc(place.node)))
    elif is_group(path):
        docs = _sections(_doc(place.node))
        fields = [node for node in place.node.body if isinstance(node, ast.AnnAssign)]
        found = [_parameter(node.target, node.annotation, node.value, place.module, docs) for node in fields]
    else:
        made = ((cls, each, module) for cls, module in _above(place) if (each := _method(cls, "__init__")) is not None)
        for cls, each, module in itertools.islice(made, 1):
            found = _arguments(each, module, {**_sections(_doc(cls)), **_sections(_doc(each))})[1:]
    return found


def method(path: str, name: str, skip: tuple[str, ...] = ()) -> list[Parameter]:
    """The arguments of a class's method, but for those to skip."""
    place = _at(path)
    node = _method(place.node, name)
    return [each for each in _arguments(node, place.module, _sections(_doc(node)))[1:] if each.name not in skip]


def is_group(path: str) -> bool:
    """Whether a path names a dataclass of this package: a group of options."""
    place = _at(path) if path.startswith(f"{PACKAGE}.") else _Place("")
    decorators = place.node.decorator_list if isinstance(place.node, ast.ClassDef) else []
    return any(ast.unparse(each).partition("(")[0] == "dataclass" for each in decorators)


def summary(path: str) -> str:
    """The first sentence of the docstring of a function or class, or else of the class's constructor."""
    node = _at(path).node
    return first_sentence(_doc(node) or _doc(_method(node, "__init__")))


def function_at(path: str) -> Any:
    """A function that takes what the one of this path does and has its docstring, and does nothing."""
    listed = parameters(path)

    def stand_in(*_: Any, **__: Any) -> None: ...

    stand_in.__doc__ = _doc(_at(path).node)
    stand_in.__annotations__ = {each.name: each.hint for each in listed}
    stand_in.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(each.name, each.kind, default=each.default, annotation=each.hint) for each in listed]
    )
    return stand_in


def subclasses(path: str) -> list[str]:
    """Paths of the classes of this package that its room shows to users and that are below one of the room's own."""
    base = _at(path)
    room = ".".join(base.module.split(".")[:2])
    found = []
    for name in _bindings(room) if room.startswith(f"{PACKAGE}.") else ():
        place = _place(name, room)
        if isinstance(place.node, ast.ClassDef) and place.node is not base.node:
            found += [f"{room}.{name}"] * any(each is base.node for each, _ in _above(place))
    return sorted(found)


def _above(place: _Place) -> Iterator[tuple[ast.ClassDef, str]]:
    """A class and those above it, as far as their sources are read, and their modules."""
    if isinstance(place.node, ast.ClassDef):
        yield place.node, place.module
        for base in place.node.bases:
            if isinstance(base, (ast.Name, ast.Attribute)):
                yield from _above(_place(ast.unparse(base), place.module))


def _method(node: ast.ClassDef, name: str) -> Any:
    return next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == name), None)


def _arguments(node: ast.FunctionDef, module: str, docs: dict[str, str]) -> list[Parameter]:
    spec = node.args
    named = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(named) - len(spec.defaults)) + list(spec.defaults)
    found = [_parameter(*pair, module, docs) for pair in zip(named, map(_annotation, named), defaults, strict=True)]
    if spec.vararg is not None:
        rest = inspect.Parameter.VAR_POSITIONAL
        found.append(_parameter(spec.vararg, _annotation(spec.vararg), None, module, docs, rest))
    kind = inspect.Parameter.KEYWORD_ONLY
    for argument, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True):
        found.append(_parameter(argument, _annotation(argument), default, module, docs, kind))
    return found


def _annotation(argument: ast.arg) -> Any:
    return argument.annotation


def _parameter(
    target: Any,
    annotation: Any,
    default: Any,
    module: str,
    docs: dict[str, str],
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD,
) -> Parameter:
    name = target.arg if isinstance(target, ast.arg) else target.id
    hint = Any if annotation is None else _hint(annotation, module)
    value = REQUIRED if default is None else _value(default, module)
    return Parameter(name, hint, value, docs.get(name, ""), kind)


# -- docstrings --------------------------------------------------------------------------------------------------------


def _doc(node: Any) -> str:
    return inspect.cleandoc(ast.get_docstring(node) or "")


def _sections(doc: str) -> dict[str, str]:
    """What ``Args:`` or ``Attributes:`` of a docstring say, by name."""
    found: dict[str, list[str]] = {}
    section = re.search(r"(?ms)^(?:Args|Attributes):\n(.*?)(?=^\S|\Z)", doc)
    for line in section.group(1).splitlines() if section else ():
        if named := re.match(r"    (\w+)(?: \([^)]*\))?: ?(.*)", line):
            found[named.group(1)] = [named.group(2)]
        elif found:
            found[next(reversed(found))].append(line.strip())
    return {name: " ".join(filter(None, lines)) for name, lines in found.items()}


def first_sentence(doc: str) -> str:
    """Of a docstring, on one line."""
    paragraph = " ".join(doc.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", paragraph)[0]
