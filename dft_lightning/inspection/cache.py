"""The command ``cache``: tokenised rows on disk, listed and deleted."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Column, Table

from dft_lightning.errors import InputError
from dft_lightning.foreign.datasets import cache_folder
from dft_lightning.inspection.console import new_console

_DAY = 86_400.0


@dataclass(frozen=True)
class Entry:
    """Tokenised rows on disk.

    Attributes:
        path: of the account.
        source: where the rows came from when it was made.
        rows: how many were read.
        size: bytes on disk.
        used: when it last was, in seconds since the epoch.
    """

    path: Path
    source: str
    rows: int
    size: int
    used: float

    def delete(self) -> None:
        """The account first: without it the rows are none."""
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(".arrow").unlink(missing_ok=True)


def entries() -> list[Entry]:
    """All of them, those that were used last at the end."""
    found = []
    for path in cache_folder().glob("*-*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):  # deleted meanwhile, or of something else's making
            account = json.loads(path.read_text(encoding="utf-8"))
            size = path.stat().st_size + path.with_suffix(".arrow").stat().st_size
            found.append(Entry(path, str(account["source"]), int(account["read"]), size, path.stat().st_mtime))
    for path in cache_folder().glob("*-*.arrow"):
        account = path.with_suffix(".json")
        with contextlib.suppress(OSError):
            if not account.exists():  # its process was killed between the two
                found.append(Entry(account, "of a run that was killed", 0, path.stat().st_size, path.stat().st_mtime))
    return sorted(found, key=lambda entry: entry.used)


def cache(unused_for: float | None = None) -> None:
    """List the tokenised rows that are kept on disk, with their sizes; delete those that are no longer used.

    Every run of the same rows, tokenizer and options takes them from there. What is deleted is made again when it is
    needed. They lie in the cache of datasets: HF_DATASETS_CACHE moves it.

    Args:
        unused_for: delete what no run has used for so many days; 0 deletes all

    Raises:
        InputError: a negative number of days, or an entry that cannot be deleted.
    """
    if unused_for is not None and not unused_for >= 0:
        raise InputError(f"--unused_for must be a number of days from 0 on, got {unused_for}")
    found = entries()
    console = new_console()
    if not found:
        console.print(f"{cache_folder()}: nothing is kept there")
        return
    old = [] if unused_for is None else [each for each in found if time.time() - each.used >= unused_for * _DAY]
    columns: list[Column | str] = [Column("source", overflow="fold"), "rows", "size", "last used"]
    if old:
        columns.append("")
    table = Table(*columns, title=str(cache_folder()), title_justify="left")
    for entry in found:
        day = datetime.datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        end = ["deleted" if entry in old else ""] if old else []
        table.add_row(entry.source, f"{entry.rows:,}", _size(entry.size), day, *end)
    for entry in old:
        _delete(entry)
    console.print(table)
    console.print(f"{len(found)} entries, {_size(sum(entry.size for entry in found))}")
    if unused_for is not None:
        console.print(f"{len(old)} deleted, {_size(sum(entry.size for entry in old))}")


def _delete(entry: Entry) -> None:
    try:
        entry.delete()
    except OSError as error:
        raise InputError(f"{entry.path}: cannot be deleted: {error.strerror}") from error


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"
