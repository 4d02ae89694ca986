"""What rows are known by before they are read: the same for the same rows, another for each change of them."""

from __future__ import annotations

import datetime
import decimal
import importlib
import json
import os
import sys
import time

import pytest
from datasets import Dataset, DatasetDict, config

from dft_lightning.data import ArithmeticRows, HubRows, LocalRows, MixedRows, RowSource
from dft_lightning.data.rows import identity
from dft_lightning.data.rows.identity import digest_of, digest_of_rows
from dft_lightning.data.rows.sources import FirstRows

PAIR = '{"prompt": "1+1=", "completion": "2"}\n'
LONG_AGO = time.time() - 1000


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def reads(monkeypatch):
    """Paths whose bytes were read."""
    found = []
    real = identity._sha256
    monkeypatch.setattr(identity, "_sha256", lambda path: (found.append(path.name), real(path))[1])
    return found


def old(path, text=PAIR):
    """A file that was written long ago; its inode was changed just now, as far as anybody can set it."""
    path.write_text(text)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def as_if_later(monkeypatch, seconds):
    now = time.time_ns()
    monkeypatch.setattr(identity.time, "time_ns", lambda: now + int(seconds * 1e9))


# -- digests of files --------------------------------------------------------------------------------------------------


def test_a_settled_file_is_read_once(tmp_path, monkeypatch, reads):
    import hashlib

    path = old(tmp_path / "a.jsonl")
    as_if_later(monkeypatch, 5)
    assert digest_of(path) == hashlib.sha256(PAIR.encode()).hexdigest()
    assert digest_of(path) == hashlib.sha256(PAIR.encode()).hexdigest()
    assert reads == ["a.jsonl"]


def test_a_young_file_is_read_again(tmp_path, monkeypatch, reads):
    path = old(tmp_path / "a.jsonl")
    digest_of(path)
    digest_of(path)
    assert reads == ["a.jsonl"] * 2
    as_if_later(monkeypatch, 5)
    digest_of(path)  # the record was made when it was young, and is not of use for its age now
    digest_of(path)
    assert reads == ["a.jsonl"] * 3


@pytest.mark.parametrize("change", ["bytes", "size", "another file", "a link elsewhere"])
def test_a_changed_file_is_read_again(tmp_path, monkeypatch, change):
    """Its modification time is set back to what it was, as copying and unpacking do."""
    path, other = old(tmp_path / "a.jsonl"), old(tmp_path / "b.jsonl", PAIR.replace("2", "3"))
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    as_if_later(monkeypatch, 5)
    before = digest_of(link)
    if change == "bytes":
        old(path, PAIR.replace("2", "3"))
    elif change == "size":
        old(path, PAIR + PAIR)
    elif change == "another file":
        os.replace(other, path)
    else:
        link.unlink()
        link.symlink_to(other)
    assert digest_of(link) != before


def test_records_that_are_broken_or_cannot_be_written(tmp_path, monkeypatch, reads):
    path = old(tmp_path / "a.jsonl")
    as_if_later(monkeypatch, 5)
    expected = digest_of(path)
    (record,) = (tmp_path / "cache/dft_lightning/digests").iterdir()
    whole = json.loads(record.read_text())
    for broken in ("", "{", "[]", "{}", '{"stat": 1}', json.dumps({**whole, "stat": None})):
        record.write_text(broken)
        assert digest_of(path) == expected
    assert reads == ["a.jsonl"] * 7
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", path / "cache")
    assert digest_of(path) == expected


def test_a_file_that_is_written_meanwhile_is_not_recorded(tmp_path, monkeypatch):
    path = old(tmp_path / "a.jsonl")
    as_if_later(monkeypatch, 5)
    real = identity._sha256
    monkeypatch.setattr(identity, "_sha256", lambda path: (real(path), old(path, PAIR * 2))[0])
    digest_of(path)
    assert not (tmp_path / "cache/dft_lightning/digests").exists()


# -- rows in memory ----------------------------------------------------------------------------------------------------

VALUES = [
    1, 1.0, True, "1", b"1", None, [1], (1,), {"1": 1}, {1: 1}, {"1": "1"}, float("nan"), -0.0, 0.0, 10**30, "é",
    "e\u0301", {"a": 1, "b": 2}, {"b": 2, "a": 1}, [["a"]], [[], "a"], datetime.date(2026, 1, 1),
    datetime.datetime(2026, 1, 1), ["datetime.date", "x"],
    "2026-01-01", datetime.timedelta(1), decimal.Decimal("1"), decimal.Decimal("1.0"),
    [datetime.date(2026, 1, 1), 1], [datetime.date(2026, 1, 1), True], [datetime.date(2026, 1, 1), "1"],
]  # fmt: skip


def test_rows_in_memory_are_told_by_their_values_and_types():
    import numpy as np

    values = [*VALUES, np.int64(1), np.float32(1), np.array([1, 2]), np.array([[1, 2]]), np.array([1, 2], np.int8)]
    digests = [digest_of_rows([{"x": value}]) for value in values]
    assert None not in digests
    assert len(set(digests)) == len(values)
    assert digests == [digest_of_rows([{"x": value}]) for value in values]
    shared = ["a"]
    assert digest_of_rows([{"x": [shared, shared]}]) == digest_of_rows([{"x": [["a"], ["a"]]}])
    assert digest_of_rows([{"x": 1}, {"y": 1}]) != digest_of_rows([{"x": 1, "y": 1}])
    assert digest_of_rows([{"x": lambda: 1}]) is None
    endless = []
    endless.append(endless)
    assert digest_of_rows([{"x": endless}]) is None


# -- sources -----------------------------------------------------------------------------------------------------------


def test_local_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(PAIR)
    known = LocalRows(path).identity()
    assert json.loads(json.dumps(known)) == known
    (tmp_path / "there").mkdir()
    (tmp_path / "there/a.jsonl").write_text(PAIR)
    assert LocalRows(str(tmp_path / "there/a.jsonl")).identity() == known  # wherever it lies
    assert LocalRows(path, rename_columns={"prompt": "question"}).identity() != known
    assert LocalRows(path, split="test").identity() != known
    assert LocalRows(path.rename(tmp_path / "a.csv")).identity() != known  # which is read otherwise
    path.write_text(PAIR + PAIR)
    assert LocalRows(path).identity() != known


def test_folders_of_files(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text(PAIR)
    (folder / "README.md").write_text("one")
    known = LocalRows(folder).identity()
    (folder / "README.md").write_text("another")
    assert LocalRows(folder).identity() == known
    (folder / "b.jsonl").write_text(PAIR)
    both = LocalRows(folder).identity()
    (folder / "b.jsonl").rename(folder / "c.jsonl")
    assert len({json.dumps(each) for each in (known, both, LocalRows(folder).identity())}) == 3


def test_saved_datasets(tmp_path):
    rows = Dataset.from_list([json.loads(PAIR)] * 3)
    rows.save_to_disk(tmp_path / "a")
    known = LocalRows(tmp_path / "a").identity()
    (tmp_path / "a/cache-0123.arrow").write_text("what datasets keeps of its work")
    assert LocalRows(tmp_path / "a").identity() == known
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "b")
    train, test = (LocalRows(tmp_path / "b", split).identity() for split in ("train", "test"))
    assert train != test
    (file,) = (tmp_path / "b/train").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert LocalRows(tmp_path / "b", "train").identity() != train


def test_datasets_of_the_hub(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(PAIR * 3)

    def known(**options):
        return json.dumps(HubRows(str(folder), **options).identity())

    found = {known(), known(split="train[:1]"), known(num_rows=2), known(num_rows=2, seed=1)}
    found |= {known(rename_columns={"prompt": "question"})}
    assert len(found) == 5
    assert known() in found
    assert HubRows(str(folder), streaming=True).identity() is None
    (folder / "rows.jsonl").write_text(PAIR * 4)
    assert known() not in found


def test_generated_rows_and_mixtures(tmp_path):
    def arithmetic(**options):
        return ArithmeticRows(**{"num_rows": 3, "seed": 1, **options})

    class Private(RowSource):
        def rows(self):
            yield from ()

        def identity(self):
            return None

    sources = [
        arithmetic(),
        arithmetic(seed=2),
        arithmetic(digit_weights=[1, 2, 3]),
        arithmetic(digit_weights=[1, 2, 3.0]),
        FirstRows(arithmetic(), 2),
        FirstRows(arithmetic(), 1),
        MixedRows({"a": arithmetic(), "b": arithmetic(seed=2)}),
        MixedRows({"b": arithmetic(), "a": arithmetic(seed=2)}),
        MixedRows({"a": arithmetic(), "b": arithmetic(seed=2)}, {"a": 1, "b": 2}),
        MixedRows({"a": arithmetic(), "b": arithmetic(seed=2)}, {"a": 1, "b": 2}, seed=1),
        MixedRows({"a": arithmetic(), "b": arithmetic(seed=2)}, {"a": 1, "b": 2}, "all_exhausted"),
    ]
    found = [json.dumps(source.identity()) for source in sources]
    assert len(set(found)) == len(found)
    assert arithmetic().identity() == arithmetic().identity()
    assert FirstRows(Private(), 1).identity() is None
    assert MixedRows({"a": arithmetic(), "b": Private()}).identity() is None


OWN = """
from dft_lightning.data import LocalRows, RowSource

class Squares(RowSource):
    def __init__(self, highest=9, file=None, **others):
        self.highest = highest

    def rows(self):
        return iter([(1, {"prompt": "1", "completion": "2"})])

class Short(LocalRows):
    def __init__(self, path, longest=3):
        super().__init__(path)

    def rows(self):
        return super().rows()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "own_squares.py").write_text(OWN)
    yield importlib.import_module("own_squares")
    sys.modules.pop("own_squares")


def test_sources_of_ones_own(tmp_path, own):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(PAIR)
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner/x.txt").write_text("1")

    def known():
        sources = [own.Squares(), own.Squares(3), own.Squares(file=str(rows)), own.Squares(file=[{"x": folder}])]
        sources += [own.Squares(other=ArithmeticRows(3)), own.Squares(other=Dataset.from_list([{"x": 1}]))]
        sources += [own.Short(rows), own.Short(rows, longest=2), LocalRows(rows)]
        return [json.dumps(source.identity()) for source in sources]

    first = known()
    assert len(set(first)) == len(first)
    assert known() == first
    rows.write_text(PAIR * 2)
    (folder / "inner/x.txt").write_text("2")
    assert [a == b for a, b in zip(first, known(), strict=True)] == [1, 1, 0, 0, 1, 1, 0, 0, 0]
    second = known()
    (tmp_path / "own_squares.py").write_text(OWN.replace('"2"', '"4"'))
    assert [a == b for a, b in zip(second, known(), strict=True)] == [0] * 8 + [1]
    assert own.Squares(object()).identity() is None
    assert own.Squares(other=own.Squares(object())).identity() is None


HELPED = {
    "helped/__init__.py": "",
    "helped/source.py": """
import json
from dft_lightning.data import RowSource
from .numbers import ANSWER
import helped.deep.inner

class Helped(RowSource):
    def rows(self):
        import own_late
        return iter([(1, {"prompt": "1", "completion": ANSWER + own_late.END})])
""",
    "helped/numbers.py": "from helped.further import ANSWER",
    "helped/further.py": "from helped import numbers\nANSWER = '2'",
    "helped/deep/__init__.py": "",
    "helped/deep/inner.py": "",
    "helped/other.py": "",
    "own_late.py": "END = '.'",
}


def test_what_a_source_of_ones_own_imports(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name, text in HELPED.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    source = importlib.import_module("helped.source").Helped()
    known = source.identity()
    assert list(source.rows()) == [(1, {"prompt": "1", "completion": "2."})]
    assert source.identity() == known  # what is imported late was known before
    for name, text in HELPED.items():
        (tmp_path / name).write_text(text + "\n# changed")
        assert (source.identity() == known) == (name == "helped/other.py"), name
        (tmp_path / name).write_text(text)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("helped", "own_late")]:
        del sys.modules[name]


def test_a_class_that_stands_in_no_file_is_read_every_time():
    space = {"__name__": "nowhere"}
    exec(OWN, space)
    assert space["Squares"]().identity() is None


def test_a_folder_of_very_many_files_is_no_argument_to_digest(tmp_path, own, monkeypatch):
    monkeypatch.setattr(identity, "_MOST_FILES", 2)
    for name in "abc":
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "x").write_text("1")
    assert own.Squares(file=str(tmp_path / "a")).identity() is not None
    assert own.Squares(file=str(tmp_path)).identity() is None
