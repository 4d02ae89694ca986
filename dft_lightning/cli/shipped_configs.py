"""The command ``configs``: the configs that come with the package, listed or copied."""

from __future__ import annotations

import os
import posixpath
from pathlib import Path

import yaml

from dft_lightning.errors import InputError, nearest
from dft_lightning.files import write_text

_PREFIX = "configs/"


def shipped() -> dict[str, Path]:
    """Every config that comes with the package: the name that the README has for it, and its file.

    Raises:
        FileNotFoundError: the package has none, which is a fault of its installation.
    """
    package = Path(__file__).parents[1]
    # A wheel has them in the package. In a checkout they are beside it, and a folder of that name beside an installed
    # package may be anybody's.
    folders = [package / "configs"]
    if (package.parent / "pyproject.toml").is_file():
        folders.append(package.parent / "configs")
    for folder in folders:
        paths = [(path.relative_to(folder).as_posix(), path) for path in folder.rglob("*.yaml")]
        if paths:
            # A folder's own files come before those of its sub-folders.
            return {_PREFIX + name: path for name, path in sorted(paths, key=lambda pair: (pair[0].count("/"), pair))}
    raise FileNotFoundError(f"{package} was installed without its configs: install dft-lightning again")


def describe(path: Path) -> str:
    """What a config is for: its first line, a comment."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def copy(names: list[str], folder: Path, overwrite: bool = False) -> list[Path]:
    """Copy shipped configs, sub-folders kept; files that are there already and the same are left alone.

    Nothing is written where one of them may not be.

    Args:
        names: of :func:`shipped`.
        folder: takes the place of ``configs``.
        overwrite: replace files that differ.

    Returns:
        What was written.

    Raises:
        InputError: a file that differs is there and ``overwrite`` is off, or a folder cannot be.
    """
    configs = shipped()
    wanted: dict[Path, bytes] = {}
    differing = []
    for name in names:
        target, content = folder / name.removeprefix(_PREFIX), configs[name].read_bytes()
        for above in target.parents:
            if above.exists() and not above.is_dir():
                raise InputError(f"--output: {above} is a file")
        if target.is_dir():
            raise InputError(f"--output: {target} is a folder")
        if target.is_file() and target.read_bytes() == content:
            continue
        if os.path.lexists(target):  # a link that leads nowhere is something of the user's, too
            differing.append(target)
        wanted[target] = content
    if differing and not overwrite:
        differ = f"and {len(differing) - 1} more are there and differ" if differing[1:] else "is there and differs"
        raise InputError(f"--output: {differing[0]} {differ}: give another folder, or --overwrite")
    for target, content in wanted.items():
        write_text(target, content.decode("utf-8"))
    return list(wanted)


def hint(path: str) -> str:
    """What to add to a message that says there is no such file: how to get it, where it is a shipped config's name."""
    known = Path.cwd() / path in {Path.cwd() / name for name in shipped()}
    return "; it comes with the package: `python -m dft_lightning configs --output configs` copies it" if known else ""


def _select(names: list[str]) -> list[str]:
    """The shipped configs of some names, and the fit configs that comparisons among them are over."""
    configs = shipped()
    short = {name.removeprefix(_PREFIX).removesuffix(".yaml"): name for name in configs}
    chosen = []
    for name in names:
        key = posixpath.normpath(name).removeprefix(_PREFIX).removesuffix(".yaml")
        if key not in short:
            ends = {posixpath.basename(other): other for other in reversed(short)}
            near = nearest(key, short) or ends.get(str(nearest(posixpath.basename(key), ends)))
            rest = f"did you mean {short[near]}?" if near else "`python -m dft_lightning configs` lists them"
            raise InputError(f"no such config: {name}; {rest}")
        base = yaml.safe_load(configs[short[key]].read_text(encoding="utf-8")).get("base", [])
        for path in [base] if isinstance(base, str) else base:
            chosen.append(_PREFIX + posixpath.normpath(posixpath.join(posixpath.dirname(key), path)))
        chosen.append(short[key])
    return [name for name in configs if name in chosen]


def configs(*names: str, output: Path | None = None, overwrite: bool = False) -> None:
    """List the configs that come with the package, or copy them to where commands can name them.

    After ``configs --output configs`` the README's commands work as they are written. With names, such as
    ``quickstart`` or ``compare/half``, it is these alone; what a comparison is over comes along.

    Args:
        names: of configs
        output: copy them there
        overwrite: replace files that differ

    Raises:
        InputError: there is no such config, or a file that differs is in its place.
    """
    if overwrite and output is None:
        raise InputError("--overwrite: give --output FOLDER, too")
    found = shipped()
    chosen = _select(list(names)) if names else list(found)
    if output is None:
        width = max(map(len, chosen))
        for name in chosen:
            print(f"{name:{width}}  {describe(found[name])}")
        return
    written = copy(chosen, output, overwrite)
    there = f", {len(chosen) - len(written)} were there already" if len(written) < len(chosen) else ""
    print(f"{output}: {len(written)} copied{there}")
