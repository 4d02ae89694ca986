"""What is private of other libraries stands in ``dft_lightning/foreign`` alone, and is there in their present release."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from functools import cache
from pathlib import Path

import pytest

import dft_lightning

PACKAGE = Path(dft_lightning.__file__).parent
FILES = {
    ".".join(("dft_lightning", *path.relative_to(PACKAGE).with_suffix("").parts)): path
    for path in PACKAGE.rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py", "triton_kernels.py")
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
ASKED = ("getattr", "hasattr", "setattr")
# Of Python itself: there is no other way to end a process from a handler of signals.
OF_PYTHON = {"_exit"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(tree):
    """Private names that a file gives to something of its own."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


OWN = {name for tree in TREES.values() for name in defined(tree) if is_private(name)}


def used(tree):
    """Private names in a file that are none of the package's: imported, read off an object, or asked for by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("dft_lightning"):
            for alias in node.names:
                yield from filter(is_private, (*(node.module or "").split("."), alias.name))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield from filter(is_private, alias.name.split("."))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in OWN:
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ASKED:
            asked = [argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)]
            yield from (name for name in map(str, asked) if is_private(name) and name not in OWN)


@cache
def names_of(base):
    """Private names that a class of another library defines or gives to its objects."""
    try:
        source = inspect.getsource(base)
    except (OSError, TypeError):
        return frozenset()
    return frozenset(filter(is_private, re.findall(r"(?:self\.|def )(_\w+)", source)))


def inherited(module):
    """Private names of other libraries' classes that subclasses of this package override or use."""
    for cls in vars(importlib.import_module(module)).values():
        if not inspect.isclass(cls) or cls.__module__ != module:
            continue
        theirs = [base for base in cls.__mro__[1:] if not base.__module__.startswith(("dft_lightning", "builtins"))]
        source = inspect.getsource(cls)
        ours = set(filter(is_private, re.findall(r"(?:self\.|def |super\(\)\.)(_\w+)", source)))
        for base in theirs:
            yield from ours & names_of(base)


def private_names(module):
    return {*used(TREES[module]), *inherited(module)} - OF_PYTHON


@pytest.mark.parametrize("module", [name for name in FILES if ".foreign." not in name])
def test_private_names_are_in_their_rooms(module):
    assert private_names(module) == set()


def test_how_many_there_are():
    """A new one is to be weighed: is there no public form?"""
    names = {name for module in FILES if ".foreign." in module for name in private_names(module)}
    assert len(names) <= 34, sorted(names)
