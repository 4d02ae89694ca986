"""The files of a comparison and of a run's folder."""

from __future__ import annotations

import json
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
PROBABILITIES = "probabilities.npz"


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
