"""Files that come with the package, named ``asset://NAME`` in configs so that an installed wheel finds them too."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from dft_lightning.errors import InputError

SCHEME = "asset://"


def resolve(name: str | os.PathLike[str], key: str = "name") -> str:
    """The path of ``asset://NAME``; a hub name or the path of a folder is returned as it is.

    Args:
        name: asset, hub name or folder.
        key: what an error message calls it.

    Raises:
        InputError: the package has no such asset, or what looks like a folder is none.
    """
    text = os.fspath(name)
    if not text.strip():
        raise InputError(f"{key}: empty")
    if not text.startswith(SCHEME):
        if _looks_local(text) and not Path(text).is_dir():
            raise InputError(f"{key}: no such folder: {text}")
        return text
    root = Path(str(files(__name__)))
    path = root / text.removeprefix(SCHEME)
    if path.parent != root or not path.is_dir():
        known = ", ".join(sorted(SCHEME + p.name for p in root.iterdir() if (p / "config.json").is_file()))
        raise InputError(f"{key}: {text}: no such asset; the package has {known or 'none'}")
    return str(path)


def _looks_local(path: str) -> bool:
    """Hub names have one slash at most, and no dot, slash or tilde in front."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/") or Path(path).exists()
