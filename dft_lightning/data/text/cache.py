"""Tokenised rows on disk, under a name that says all that they depend on: a second start reads no row.

An entry is ``NAME.arrow``, a record batch a stretch, and ``NAME.json``, the account of it. The name is of what makes
the tokens and of what the source is known by. Where the source has changed, the stretches of an older entry that are
still the same are taken from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dft_lightning.component import to_plain
from dft_lightning.data.notes import WHOLE, Notes
from dft_lightning.data.options import RowForm
from dft_lightning.data.rows.identity import identity_of, identity_text, writing_to_cache
from dft_lightning.data.rows.reading import MAX_SHOWN, Problems
from dft_lightning.data.rows.sources import RowSource
from dft_lightning.data.text.preparation import Encoded, Preparation, Stretch, Tokenizing, encoded, schema
from dft_lightning.errors import InputError, one_line
from dft_lightning.files import is_being_written, partial_path, partials, remove, write_text
from dft_lightning.foreign.datasets import cache_folder
from dft_lightning.version import __version__

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

_FORMAT = 7  # of the columns, and of what makes their tokens
_OLDER = 3  # entries that are looked into for stretches


@dataclass(frozen=True)
class RowCounts:
    """What became of the rows of a split.

    Attributes:
        rows: read, bad ones included.
        truncated: cut to ``max_length``, with a target left.
        dropped: for lack of a target.
        bad: skipped by ``on_bad_rows: skip``.
    """

    rows: int
    truncated: int
    dropped: int
    bad: int = 0


@dataclass(frozen=True)
class TokenizedRows:
    """Rows of ``input_ids``, ``labels``, ``weights`` (null where all are 1), ``number``, ``part`` and ``position``.

    Also ``truncated``, and ``reference_log_prob`` (null where a row has none).

    Attributes:
        name: of the entry.
        rows: those, and with prompts ``prompt``, ``prompt_ids`` and ``answer``.
        read: rows of the source, bad ones included.
        dropped: positions of the rows without a target.
        bad: positions of the bad rows, and what is wrong with the first ones.
        notes: of each part of the source, and at :data:`WHOLE` of all.
    """

    name: str
    rows: Dataset
    read: int
    dropped: list[int]
    bad: list[tuple[int, str]]
    notes: dict[int, Notes]

    def without(self, chosen: set[int]) -> TokenizedRows:
        """All but the rows at some positions."""
        left_out = np.isin(column_of(self.rows, "position").to_numpy(), list(chosen))
        return dataclasses.replace(
            self,
            rows=self.rows.select(np.flatnonzero(~left_out)),
            read=self.read - len(chosen),
            dropped=[position for position in self.dropped if position not in chosen],
            bad=[found for found in self.bad if found[0] not in chosen],
        )

    def said(self, source: RowSource) -> list[tuple[str, bool]]:
        """What is to be said of the rows, a line each, and whether it is a warning."""
        names = {WHOLE: source.name, 0: source.name}
        names |= {part: f"{source.name} ({name})" for part, name in enumerate(source.parts)}
        by_name: dict[str, Notes] = {}
        for part, notes in self.notes.items():
            by_name.setdefault(names[part], Notes()).update(notes)
        return [line for name, notes in by_name.items() for line in notes.lines(name)]

    def problems(self, name: str) -> str:
        """What is wrong with the bad rows of a source of that name."""
        problems = Problems(name)
        problems.extend([text for _, text in self.bad if text], len(self.bad))
        return problems.report(self.read)

    @property
    def counts(self) -> RowCounts:
        """What became of the rows."""
        import pyarrow.compute

        truncated = pyarrow.compute.sum(column_of(self.rows, "truncated")).as_py() or 0
        return RowCounts(self.read, int(truncated), len(self.dropped), len(self.bad))


def column_of(rows: Dataset, name: str) -> pyarrow.ChunkedArray:
    """A column of rows as Arrow has it, of those alone that were selected."""
    table: pyarrow.Table = rows.select_columns([name]).with_format("arrow")[:]
    return table[name]


def tokenized(
    preparation: Preparation, *, name: str | None = None, num_proc: int | None = None, desc: str = "Tokenising rows"
) -> TokenizedRows:
    """Tokenised rows, from the cache where they are already there.

    Args:
        preparation: what makes them.
        name: of the entry, where another process has made it just now.
        num_proc: processes; ``None`` for this one, whose tokenizer uses every core by itself.
        desc: of the progress bar.

    Raises:
        InputError: bad rows, where they are not skipped; no rows at all; a disk that is full.
    """
    if name is None or not _is_there(name):
        recipe = recipe_of(preparation)
        name = _name(recipe, preparation)
        if name is None or not _is_there(name):
            name = _written(recipe, name, preparation, num_proc, desc)
    found = _opened(name)
    if found.bad and (preparation.reading.options.on_bad_rows == "raise" or len(found.bad) == found.read):
        raise InputError(found.problems(preparation.source.name))
    return found


def _is_there(name: str) -> bool:
    return all((cache_folder() / f"{name}{ending}").is_file() for ending in (".arrow", ".json"))


def recipe_of(preparation: Preparation) -> str:
    """What makes tokens of rows: the tokenizer, its template and special tokens, the options, this code and others'."""
    import transformers

    encoder, reading = preparation.encoder, preparation.reading
    tokenizer = encoder.tokenizer
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    rows = {name: value for name, value in vars(reading.options).items() if name != "on_bad_rows"}
    rows["form"] = rows["form"] if isinstance(rows["form"], str) else identity_of(rows["form"])
    text = {name: value for name, value in vars(encoder.options).items() if name not in ("tokenizer", "date")}
    date = str(encoder.template.date)
    content = [
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        special,
        to_plain(text),
        date,
        [encoder.piece_length, encoder.one_row],
        rows,
        [reading.last_turn, preparation.with_prompts, preparation.keep_all],
        [__version__, transformers.__version__, _FORMAT],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _name(recipe: str, preparation: Preparation) -> str | None:
    """Of the entry; ``None`` where the rows have to be read to know what is made of them."""
    form, source = preparation.reading.options.form, preparation.source
    known = None if isinstance(form, RowForm) and identity_of(form) is None else identity_text(source)
    return None if known is None else f"{recipe}-{_digest([known, source.parts, preparation.part])}"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


# -- reading -----------------------------------------------------------------------------------------------------------


def _opened(name: str) -> TokenizedRows:
    from datasets import Dataset

    path = cache_folder() / f"{name}.arrow"
    found = json.loads((account := path.with_suffix(".json")).read_text(encoding="utf-8"))
    try:
        rows = Dataset.from_file(str(path))
    except Exception as error:  # cut short by something else: what is written here is whole
        raise InputError(f"{path}: cannot be read ({one_line(error)}): delete it") from error
    parts = found["stretches"]
    kept = sum(part["kept"] for part in parts)
    if len(rows) != kept:  # a stream of Arrow that is cut between two stretches reads as if it ended there
        raise InputError(f"{path}: has {len(rows)} rows of {kept}: delete it")
    with contextlib.suppress(OSError):
        os.utime(account)  # it was used now
    dropped = [position for part in parts for position in part["dropped"]]
    bad = [(position, text) for part in parts for position, text in part["bad"]]
    notes = {int(part): Notes(counts) for part, counts in found["notes"].items()}
    return TokenizedRows(name, rows, found["read"], dropped, bad, notes)


class _Older:
    """The stretches of earlier entries of a recipe."""

    def __init__(self, recipe: str) -> None:
        self._places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        self._batches: dict[Path, list[pyarrow.RecordBatch]] = {}
        accounts = sorted(cache_folder().glob(f"{recipe}-*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for account in accounts[:_OLDER]:
            with contextlib.suppress(OSError, ValueError, KeyError):
                for index, stretch in enumerate(json.loads(account.read_text(encoding="utf-8"))["stretches"]):
                    self._places.setdefault(stretch["digest"], (account.with_suffix(".arrow"), index, stretch))

    def encoded(self, digest: str) -> Encoded | None:
        """A stretch's tokens, where they are there."""
        if digest not in self._places:
            return None
        path, index, account = self._places[digest]
        try:
            batch = self._of(path)[index]
        except (OSError, IndexError):  # deleted or cut short since
            return None
        refused = [(position, text) for position, text in account["refused"]]
        return Encoded(batch, account["dropped"], refused, account["notes"])

    def _of(self, path: Path) -> list[pyarrow.RecordBatch]:
        import pyarrow as pa

        if path not in self._batches:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                self._batches[path] = list(stream)
        return self._batches[path]


# -- writing -----------------------------------------------------------------------------------------------------------


def _written(recipe: str, name: str | None, preparation: Preparation, num_proc: int | None, desc: str) -> str:
    """The name of the entry that is written: both files, whole or not at all."""
    with writing_to_cache() as folder:
        for left in partials(folder):  # of a process that was killed
            if not is_being_written(left):
                remove(left)
        return _Writer(recipe, preparation, num_proc, desc).write(name)


class _Writer:
    def __init__(self, recipe: str, preparation: Preparation, num_proc: int | None, desc: str) -> None:
        self._recipe = recipe
        self._preparation = preparation
        self._num_proc = num_proc
        self._desc = desc
        self._rows = preparation.rows()
        self._problems = Problems(preparation.source.name)
        self._accounts: list[dict[str, Any]] = []
        self._made = Notes()
        self._read = self._noted = 0

    def write(self, name: str | None) -> str:
        partial = partial_path(cache_folder() / "rows.arrow")
        try:
            self._write_rows(partial)
            self._check()
            account = self._account()
            if name is None:  # known by what was read, and by all that is said of it
                known = {**account, "source": self._preparation.source.parts, "part": self._preparation.part}
                name = f"{self._recipe}-{_digest(known)}"
            elif _name(self._recipe, self._preparation) != name:
                raise InputError(f"{self._preparation.source.name}: it was changed while it was read: start again")
            if not _is_there(name):
                os.replace(partial, cache_folder() / f"{name}.arrow")
                write_text(cache_folder() / f"{name}.json", json.dumps(account))
        finally:
            partial.unlink(missing_ok=True)
        return name

    def _write_rows(self, path: Path) -> None:
        import pyarrow as pa

        preparation, older = self._preparation, _Older(self._recipe)
        task = Tokenizing(preparation.encoder, preparation.with_prompts, preparation.keep_all)
        found = ((stretch, older.encoded(stretch.digest)) for stretch in self._good(self._rows.stretches()))
        with path.open("xb") as file:
            with pa.ipc.new_stream(file, schema(preparation.with_prompts)) as stream:
                for stretch, made in _progress(encoded(found, task, self._num_proc), self._desc):
                    stream.write_batch(made.batch)
                    self._note(stretch, made)
            file.flush()
            os.fsync(file.fileno())

    def _good(self, found: Iterator[Stretch]) -> Iterator[Stretch]:
        """Stretches, as long as there is a use for their tokens: all rows are read in any case, and the bad counted."""
        raises = self._preparation.reading.options.on_bad_rows == "raise"
        for stretch in found:
            self._read += stretch.read
            self._problems.extend([text for _, text in stretch.bad])
            if not (raises and self._problems.count):
                yield stretch

    def _note(self, stretch: Stretch, made: Encoded) -> None:
        self._problems.extend([text for _, text in made.bad])
        found = enumerate(sorted([*stretch.bad, *made.bad]))
        bad = [[place, text if i < MAX_SHOWN else ""] for i, (place, text) in found]
        self._made.update(Notes(made.notes))
        self._noted += stretch.read
        if made.bad and self._problems.count >= MAX_SHOWN and self._preparation.reading.options.on_bad_rows == "raise":
            raise InputError(self._problems.report(self._noted, "the first "))  # all are like it, most often
        self._accounts.append(
            {
                "digest": stretch.digest,
                "kept": len(made.batch),
                "dropped": made.dropped,
                "bad": bad,
                "refused": made.bad,
                "notes": made.notes,
            }
        )

    def _check(self) -> None:
        """Whether there is something to keep."""
        source, problems, options = self._preparation.source, self._problems, self._preparation.reading.options
        if problems.count and (options.on_bad_rows == "raise" or problems.count == self._read):
            raise InputError(problems.report(self._read))
        if not self._read:
            raise InputError(f"{source.name}: no rows")

    def _account(self) -> dict[str, Any]:
        notes = {part: found.plain() for part, found in self._rows.notes.items()}
        notes[WHOLE] = self._made.plain()
        return {
            "source": self._preparation.source.name,
            "read": self._read,
            "notes": notes,
            "stretches": self._accounts,
        }


def _progress(found: Iterator[tuple[Stretch, Encoded]], desc: str) -> Iterator[tuple[Stretch, Encoded]]:
    from datasets.utils import tqdm

    with tqdm(desc=desc, unit=" rows", delay=2) as bar:  # what takes no time needs no bar
        for stretch, made in found:
            yield stretch, made
            bar.update(stretch.read)
