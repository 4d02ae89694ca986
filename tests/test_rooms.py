"""The rooms of the package in their order: a file imports from its own room and from those below it alone."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import dft_lightning

PACKAGE = Path(dft_lightning.__file__).parent
# From the ground up. Rooms of one line know nothing of each other.
ROOMS = [
    {"errors", "component", "files", "progress", "version"},
    {"foreign"},
    {"assets"},
    {"losses"},
    {"ops"},
    {"distributed"},
    {"checkpoints"},
    {"models"},
    {"integrations"},
    {"metrics"},
    {"data"},
    {"engine"},
    {"modules"},
    {"evaluation"},
    {"export"},
    {"callbacks"},
    {"cli"},
    {"fit"},
    {"inspection", "sampling", "scoring", "compare"},
    {"__main__"},
]
FLOORS = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
GROUND = ("errors", "component", "files", "progress", "version")


def imports(name):
    """The package's files that one names in its imports, in functions and for type checks, too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "dft_lightning":
            assert node.level == 0
            module = node.module.removeprefix("dft_lightning").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                found.add(inner if inner in FILES else f"{module}.__init__".removeprefix("."))
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("dft_lightning") for alias in node.names)
    return {name if name in FILES else name.removesuffix(".__init__") for name in found}


@cache
def all_imports():
    return {name: imports(name) for name in FILES}


def room_of(name):
    return name.partition(".")[0]


def test_every_room_has_its_place():
    assert {room_of(name) for name in FILES} - {"__init__"} == FLOORS.keys()
    for name, inner in all_imports().items():
        assert inner <= FILES.keys(), name


DATA = ["options", "notes", "rows", "text", "requirements", "batches", "splits", "datamodule", "__init__"]


def test_the_rooms_of_data_are_above_each_other_too():
    def floor(name):
        return DATA.index(name.split(".")[1])

    for name, inner in all_imports().items():
        for other in inner:
            if room_of(name) == room_of(other) == "data":
                assert floor(other) <= floor(name), f"{name} imports {other}"


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"__init__"}))
def test_no_import_climbs(name):
    for other in all_imports()[name]:
        assert other != "__init__", "the package's root is for users"
        same = room_of(other) == room_of(name)
        assert same or FLOORS[room_of(other)] < FLOORS[room_of(name)] or {name, other} <= set(GROUND), other


def test_no_circles():
    """Within the rooms, where a package's ``__init__`` collects what users import."""
    left = {name: {other for other in inner if not other.endswith("__init__")} for name, inner in all_imports().items()}
    while free := [name for name, inner in left.items() if not inner & left.keys()]:
        for name in free:
            del left[name]
    assert not left, {name: sorted(inner & left.keys()) for name, inner in left.items()}
