"""Files that come with the package, named ``asset://NAME`` in configs so that an installed wheel finds them too."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from dft_lightning.errors import InputError

SCHEME = "asset://"


def resolve(name: str | os.PathLike[str]) -> str:
    """The path of ``asset://NAME``; any other name or path is returned as it is.

    Raises:
        InputError: the package has no such asset.
    """
    text = os.fspath(name)
    if not text.startswith(SCHEME):
        return text
    root = Path(str(files(__name__)))
    path = root / text.removeprefix(SCHEME)
    if path.parent != root or not path.is_dir():
        known = ", ".join(sorted(SCHEME + p.name for p in root.iterdir() if (p / "config.json").is_file()))
        raise InputError(f"{text}: no such asset; the package has {known or 'none'}")
    return str(path)
