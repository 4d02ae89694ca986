"""The files of a comparison and of a run's folder: names, and writing that is never left half done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

SETTINGS = "compare.yaml"
CONFIG = "config.yaml"
FIT = "fit.json"
TEST = "test.json"
PROBABILITIES = "probabilities.npz"


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file; an older one of the name is replaced when the new one is whole."""
    write_text(path, json.dumps(content, indent=None, separators=(",", ":")))


def write_text(path: Path, text: str) -> None:
    """Write a text file; an older one of the name is replaced when the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """The content, or ``None`` where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
