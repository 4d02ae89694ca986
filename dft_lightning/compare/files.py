"""The files of a comparison and of a run's folder: their names, and how they are written and read."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import yaml

from dft_lightning.errors import InputError, one_line
from dft_lightning.files import write_text

SETTINGS = "compare.yaml"
CALLS = "calls.json"
CONFIG = "config.yaml"
FIT = "fit.json"
TEST = "test.json"
CHECKPOINT = "last.ckpt"
PART = "part.ckpt"
PROBABILITIES = "probabilities.npz"


def slug_of(name: str) -> str:
    """The name of a loss as it stands in the names of folders and files.

    Example:
        >>> slug_of("CE, then DFT")
        'ce-then-dft'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file; an older one of the name is replaced when the new one is whole."""
    write_text(path, json.dumps(content, indent=None, separators=(",", ":")))


def read_json(path: Path) -> Any:
    """The content, or ``None`` where there is no such file.

    Raises:
        InputError: it is no JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: broken record: {one_line(error)}; move its folder away and run it again") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of keys and values, as this package wrote it.

    Raises:
        InputError: there is none, or it is something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values")
    return content


class Clock:
    """Keeps when a call of the command ran something, in the comparison's folder: how long it takes by the clock.

    A call that is killed has lost what came after the end of its last run.

    Args:
        output: the folder.
    """

    def __init__(self, output: Path) -> None:
        self._path = output / CALLS
        self._before = read_calls(output)
        self._began = time.time()

    def tick(self) -> None:
        """Something ran until now."""
        write_json(self._path, [*self._before, {"began": self._began, "ended": time.time()}])


def read_calls(output: Path) -> list[dict[str, float]]:
    """``began`` and ``ended`` of each call, in seconds since 1970; none where all runs were made by hand.

    Raises:
        InputError: the file is broken.
    """
    calls: list[dict[str, float]] = read_json(output / CALLS) or []
    return calls
