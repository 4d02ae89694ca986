"""What rows are known by before one of them is read: digests of files, of values, of a class and its arguments."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import io
import json
import os
import pickle
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dft_lightning.component import Component, NotPlainError, class_path, to_plain
from dft_lightning.errors import InputError, one_line
from dft_lightning.files import write_text
from dft_lightning.foreign.datasets import cache_folder, fingerprint_of

_SETTLED = 2 * 10**9  # nanoseconds: a file that is changed again within them may keep its times (a disk's clock ticks)
_AT_ONCE = 1 << 20
_MOST_FILES = 10_000  # of a folder that is an argument


@contextlib.contextmanager
def writing_to_cache() -> Iterator[Path]:
    """The folder, made where it is not there.

    Raises:
        InputError: nothing can be written to it.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written: {error.strerror or one_line(error)}: make room there, or set "
            "HF_DATASETS_CACHE to another folder"
        ) from error


def digest_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal digits, from a record where the file is unchanged since.

    A record is of the file's size, times and inode. It is kept in the cache of ``datasets``, and holds where the file
    was not just being written when it was made.

    Args:
        path: of the file.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        found = os.stat(path)
        record = _record_of(path)
        kept = _read_record(record)
        if kept is not None and kept["stat"] == _stamp(found) and kept["settled"]:
            return str(kept["sha256"])
        begun = time.time_ns()
        digest = _sha256(path)
        if _stamp(os.stat(path)) != _stamp(found):  # written meanwhile: nobody knows what was read
            return digest
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    settled = max(found.st_mtime_ns, found.st_ctime_ns) + _SETTLED <= begun
    with contextlib.suppress(OSError):  # without a record it is read again
        write_text(record, json.dumps({"stat": _stamp(found), "settled": settled, "sha256": digest}))
    return digest


def _stamp(found: os.stat_result) -> list[int]:
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _record_of(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return cache_folder() / "digests" / f"{name}.json"


def _read_record(record: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or of something else's making
        return None
    return found if isinstance(found, dict) and found.keys() == {"stat", "settled", "sha256"} else None


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while content := file.read(_AT_ONCE):
            total.update(content)
    return total.hexdigest()


def files_below(folder: Path, leave_out: Callable[[str], bool] = lambda name: False) -> list[Path]:
    """Every file of a folder and the folders in it, in the order of their names, but for names to leave out."""
    found, seen = [], {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, followlinks=True):
        inner = [name for name in folders if not leave_out(name)]
        real = {name: os.path.realpath(os.path.join(root, name)) for name in inner}
        folders[:] = [name for name in inner if real[name] not in seen]  # a link may lead back
        seen.update(real.values())
        found += [Path(root, name) for name in names if not leave_out(name)]
    return sorted(found)


def digests_of(files: Iterable[Path], folder: Path) -> list[list[str]]:
    """Of each file its path below the folder and its digest."""
    return [[file.relative_to(folder).as_posix(), digest_of(file)] for file in files]


def digest_of_rows(rows: Iterable[Any]) -> str | None:
    """Of rows in memory, by their values and the types of these; ``None`` where one has what cannot be written down."""
    total = hashlib.sha256()
    try:
        for row in rows:
            file = io.BytesIO()
            pickler = pickle.Pickler(file, protocol=4)
            pickler.fast = True  # says nothing of which objects are one
            pickler.dump(row)
            total.update(file.tell().to_bytes(8, "big") + file.getbuffer())
    except Exception:  # whatever its classes raise
        return None
    return total.hexdigest()


# -- of a class and what it was made with ------------------------------------------------------------------------------


def known_by(source: Component, /, **content: Any) -> Any:
    """What a source of this package is known by: its content, and of a subclass of one's own all that it may add.

    Returns:
        What JSON holds; ``None`` where the rows are to be read every time.
    """
    cls = type(source)
    own = cls.__module__.partition(".")[0] != __name__.partition(".")[0]
    known = identity_of(source) if own else {"class": class_path(cls)}
    return None if known is None else {**known, **content}


def identity_of(component: Component) -> Any:
    """A component's class, the code of it and of the classes above it, its arguments, the files that these name.

    Returns:
        What JSON holds; ``None`` where a class stands in no file, or an argument has no plain form.
    """
    cls = type(component)
    try:
        arguments = {name: _described(value) for name, value in component._init_values.items()}
        return {"class": class_path(cls), "code": _code_of(cls), "arguments": arguments}
    except (NotPlainError, InputError):
        return None


def identity_text(source: Any) -> str | None:
    """What a source's ``identity`` returns as JSON; ``None`` where the rows are to be read every time.

    Raises:
        InputError: one of somebody's own fails, or returns what JSON does not hold.
    """
    try:
        known = source.identity()
        return None if known is None else json.dumps(known)
    except InputError:
        raise
    except Exception as error:
        where = f"{source.name}: {type(source).__name__}.identity"
        raise InputError(
            f"{where}: {type(error).__name__}: {one_line(error)}: have it return what JSON holds, or None"
        ) from error


def _code_of(cls: type) -> list[str]:
    """Digests of the files that a class and those above it stand in, and of what these import that nobody installed."""
    files: dict[str, None] = {}  # in order
    try:
        for each in cls.__mro__:
            if each not in (Component, object):
                files[inspect.getfile(each)] = None
                _add_imported(each.__module__, files, set())
        return [digest_of(Path(file)) for file in files]
    except (TypeError, OSError) as error:  # typed in, or run from a text
        raise NotPlainError(f"{class_path(cls)} stands in no file") from error


def _add_imported(name: str, files: dict[str, None], seen: set[str]) -> None:
    """Add the file of a module, and those of the modules that it imports, but for installed ones."""
    file = _file_of(name)
    if name in seen or file is None or name.partition(".")[0] == __name__.partition(".")[0]:
        return
    seen.add(name)
    if not _is_installed(Path(file)):
        files[file] = None
        for inner in sorted(_imports(Path(file), name)):
            _add_imported(inner, files, seen)


def _is_installed(file: Path) -> bool:
    python = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    return not {"site-packages", "dist-packages"}.isdisjoint(file.parts) or any(map(file.is_relative_to, python))


def _file_of(name: str) -> str | None:
    """Of a module, which may not be imported yet; a package's own need not be."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None)
    parent = name.rpartition(".")[0]
    if parent and parent not in sys.modules:  # which would be imported to look
        return None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):  # it is no module, but something in one
        return None
    return spec.origin if spec is not None and spec.has_location else None


def _imports(file: Path, name: str) -> set[str]:
    """Names of the modules that a module's text imports, and of what it imports from them, wherever in it."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):  # compiled
        return set()
    package = getattr(sys.modules.get(name), "__package__", None) or name
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            with contextlib.suppress(ImportError):  # beyond the top
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                found.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
    return found | {each.rpartition(".")[0] for each in found if "." in each}


def _described(value: Any) -> Any:
    """An argument's value, with the digests of what it names."""
    if isinstance(value, Component):
        found = value.identity() if hasattr(value, "identity") else identity_of(value)
        if found is None:
            raise NotPlainError(f"{value!r} is known by nothing")
        return found
    if (fingerprint := fingerprint_of(value)) is not None:
        return fingerprint
    if isinstance(value, dict):
        return {"items": [[to_plain(key), _described(item)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_described(item) for item in value]
    return _with_files(os.fspath(value)) if isinstance(value, (str, os.PathLike)) else to_plain(value)


def _with_files(text: str) -> Any:
    """A text, which may be a path: with the digest of the file, or of all files of the folder."""
    try:
        path = Path(text)
        if path.is_file():
            return {"path": text, "files": [digest_of(path)]}
        if not text.strip() or not path.is_dir():
            return text
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return text
    files = files_below(path)
    if len(files) > _MOST_FILES:
        raise NotPlainError(f"{text}: a folder of {len(files)} files")
    return {"path": text, "files": digests_of(files, path)}
