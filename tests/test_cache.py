"""Tokenised rows are kept on disk: what is read and tokenised again, and what is not."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
import torch

import commands
from dft_lightning import CausalLMModule, InstructionDataModule
from dft_lightning.data import ArithmeticRows, LocalRows, MixedRows, RowForm, RowSource
from dft_lightning.data.rows.forms import Reading
from dft_lightning.data.rows.reading import RowReader, read_messages
from dft_lightning.data.text import cache, preparation
from dft_lightning.data.text.preparation import SourceRows
from dft_lightning.data.text.tokens import ConversationEncoder
from dft_lightning.errors import InputError
from dft_lightning.files import partial_path
from dft_lightning.foreign.datasets import cache_folder
from dft_lightning.inspection.cache import entries
from small_runs import TINY_ARITHMETIC, data_options, on_two_processes, trainer

TOKENIZER = "asset://arithmetic-base"
DATED = "{% for m in messages %}{{ strftime_now('%d') + '|' + m.content }}{{ '$' }}{% endfor %}"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dft_lightning"


def rows_of(count, first=1):
    return [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(first, first + count)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Noted(RowSource):
    """Rows whose every reading leaves a line in a file."""

    def __init__(self, count, log):
        self.count = count
        self.log = log

    @property
    def name(self):
        return "noted"

    def identity(self):
        return ["noted", self.count]

    def rows(self):
        with open(self.log, "a") as file:
            file.write("read\n")
        return iter(enumerate(rows_of(self.count), start=1))


def loaded(train, stage="fit", **options):
    data = InstructionDataModule(train, **data_options(**{"tokenizer": TOKENIZER, **options}))
    data.prepare_data()
    data.setup(stage)
    return data


def text_of(data, row):
    return "".join(data.tokenizer.convert_ids_to_tokens(data.splits.tokenized("train")[row]["input_ids"]))


@pytest.fixture
def counted(monkeypatch):
    """Counts of rows that are read from sources, and of conversations that are tokenised."""
    counts = {"read": 0, "encoded": 0}
    encode, read = ConversationEncoder.encode, RowReader.read

    def encoding(self, conversations):
        counts["encoded"] += len(conversations)
        return encode(self, conversations)

    def reading(self):
        for found in read(self):
            counts["read"] += 1
            yield found

    monkeypatch.setattr(ConversationEncoder, "encode", encoding)
    monkeypatch.setattr(RowReader, "read", reading)
    return counts


def spent(counts, function):
    before = dict(counts)
    function()
    return tuple(counts[name] - before[name] for name in ("read", "encoded"))


# -- a second start --------------------------------------------------------------------------------------------------


def saved(tmp_path):
    datasets.Dataset.from_list(rows_of(30)).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def foldered(tmp_path):
    (tmp_path / "rows").mkdir()
    return str(write(tmp_path / "rows" / "rows.jsonl", rows_of(30)).parent)


SOURCES = {
    "a file": lambda tmp_path: str(write(tmp_path / "rows.jsonl", rows_of(30))),
    "a folder": foldered,
    "a saved dataset": saved,
    "generated": lambda tmp_path: ArithmeticRows(30, seed=1),
    "one's own": lambda tmp_path: Noted(30, str(tmp_path / "log")),
    "in memory": lambda tmp_path: rows_of(30),
    "a dataset": lambda tmp_path: datasets.Dataset.from_list(rows_of(30)),
}


@pytest.mark.parametrize("options", [{}, {"validation_fraction": 0.2}, {"num_proc": 2}], ids=str)
@pytest.mark.parametrize("kind", SOURCES)
def test_a_second_start_reads_no_row(tmp_path, counted, kind, options):
    source = SOURCES[kind](tmp_path)
    first = loaded(source, **options)
    assert spent(counted, lambda: None) == (0, 0)
    found = []
    assert spent(counted, lambda: found.append(loaded(source, **options))) == (0, 0)
    for split in ("train", *(["validation"] if "validation_fraction" in options else [])):
        assert found[0].splits.tokenized(split).to_dict() == first.splits.tokenized(split).to_dict()
        assert found[0].splits.counts[split] == first.splits.counts[split]
    assert found[0].splits.counts["train"].rows == (24 if "validation_fraction" in options else 30)


def test_the_rows_of_a_mixture_are_read_once(tmp_path, counted):
    parts = {"a": str(write(tmp_path / "rows.jsonl", rows_of(9))), "b": ArithmeticRows(5)}
    loaded(MixedRows(parts))
    assert spent(counted, lambda: loaded(MixedRows(parts))) == (0, 0)
    write(tmp_path / "rows.jsonl", rows_of(10))
    assert spent(counted, lambda: loaded(MixedRows(parts)))[0] > 0


def readings(strategy, devices, log, fraction):
    """How often a fit of two processes reads its rows, and what each has."""
    run = trainer(devices=devices, strategy=strategy, max_steps=1)
    data = InstructionDataModule(Noted(40, log), validation_fraction=fraction, text={"tokenizer": TOKENIZER})
    run.fit(CausalLMModule(TINY_ARITHMETIC), datamodule=data)
    run.strategy.barrier()
    total = torch.tensor(len(data.splits.tokenized("train")))
    torch.distributed.all_reduce(total)
    return [Path(log).read_text().count("read"), int(total)]


def test_one_of_two_ranks_reads_and_a_second_start_none(tmp_path):
    cases = [{"strategy": "ddp", "log": str(tmp_path / "log"), "fraction": each} for each in (0.0, 0.0, 0.25, 0.25)]
    assert on_two_processes(readings, cases) == [[1, 80], [1, 80], [2, 60], [2, 60]]


def test_a_machine_with_other_rows_is_named(tmp_path):
    data = loaded(str(write(tmp_path / "rows.jsonl", rows_of(3))))
    data.splits.follow(dict(data.splits.names))
    with pytest.raises(InputError, match="data.train: this machine's rows, tokenizer or versions differ from those of"):
        data.splits.follow({"train": "another"})


def test_what_is_said_is_said_again(tmp_path, monkeypatch):
    said = []
    for name in ("rank_zero_info", "rank_zero_warn"):
        monkeypatch.setattr(f"dft_lightning.data.splits.{name}", said.append)
    rows = [{**row, "id": 7, "reward": 0.5, "images": ["a.png"]} for row in rows_of(3)]
    path = str(write(tmp_path / "rows.jsonl", [*rows, {"prompt": 1}]))
    loaded(path, on_bad_rows="skip")
    first, said[:] = list(said), []
    loaded(path, on_bad_rows="skip")
    assert said == first
    assert any("not read: id (3 rows)" in line for line in said)
    assert any("images" in line for line in said)
    assert any("the column reward" in line for line in said)
    assert any("1 of 4 rows are bad" in line for line in said)


# -- what is read and tokenised again --------------------------------------------------------------------------------


def test_a_file_changed_in_place_is_read_again(tmp_path, counted):
    """Of the same size, with its old time put back."""
    path = write(tmp_path / "rows.jsonl", rows_of(4))
    loaded(str(path))
    before = path.stat()
    path.write_text(path.read_text().replace("1+1=", "7+1="))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    found = []
    assert spent(counted, lambda: found.append(loaded(str(path)))) == (4, 4)
    assert "7 + 1 =" in " ".join(
        found[0].tokenizer.convert_ids_to_tokens(found[0].splits.tokenized("train")[0]["input_ids"])
    )


def test_a_touched_or_moved_file_is_not(tmp_path, counted):
    path = write(tmp_path / "rows.jsonl", rows_of(4))
    loaded(str(path))
    os.utime(path, (1, 1))
    assert spent(counted, lambda: loaded(str(path))) == (0, 0)
    path.rename(tmp_path / "again.jsonl")
    assert spent(counted, lambda: loaded(str(tmp_path / "again.jsonl"))) == (0, 0)


@pytest.mark.parametrize(
    "changed",
    [
        {"max_length": 7},
        {"prompt_weight": 0.5},
        {"train_turns": "last"},
        {"system_prompt": "1"},
        {"prompt_suffix": "+0"},
        {"chat_template": "{% for m in messages %}{{ '^' + m.content + '$' }}{% endfor %}"},
        {"allow_special_tokens": True},
        {"span_weights": {"[0-9]": 2.0}},
        {"form": "prompt_completion"},
    ],
    ids=str,
)
def test_options_that_decide_tokens_make_others(tmp_path, counted, changed):
    path = str(write(tmp_path / "rows.jsonl", rows_of(3)))
    loaded(path)
    assert spent(counted, lambda: loaded(path, **changed)) == (3, 3)
    assert spent(counted, lambda: loaded(path, **changed)) == (0, 0)
    assert spent(counted, lambda: loaded(path)) == (0, 0)


@pytest.mark.parametrize("same", [{"batch_size": 3}, {"seed": 4}, {"on_bad_rows": "skip"}, {"num_proc": 2}], ids=str)
def test_options_that_do_not_leave_them(tmp_path, counted, same):
    path = str(write(tmp_path / "rows.jsonl", rows_of(3)))
    loaded(path)
    assert spent(counted, lambda: loaded(path, **same)) == (0, 0)


def test_the_date_is_part_of_the_name(tmp_path, counted):
    path = str(write(tmp_path / "rows.jsonl", rows_of(3)))
    options = {"chat_template": DATED}
    days = {day: loaded(path, date=f"2026-01-{day}", **options) for day in ("01", "31")}
    assert counted["encoded"] == 6
    for day, data in days.items():
        assert text_of(data, 0).startswith(f"{day}|1+1=$")
    assert spent(counted, lambda: loaded(path, date="2026-01-31", **options)) == (0, 0)


def test_todays_date_is_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("dft_lightning.data.splits.rank_zero_info", said.append)
    loaded(str(write(tmp_path / "rows.jsonl", rows_of(3))), chat_template=DATED)
    assert any(f"today's date, {time.strftime('%Y-%m-%d')}: data.text.date pins a day" in line for line in said)


def test_one_more_row_is_tokenised_alone(tmp_path, counted):
    """But for those of its stretch."""
    path = write(tmp_path / "rows.jsonl", rows_of(700))
    loaded(str(path))
    with path.open("a") as file:
        file.write(json.dumps(rows_of(1, 900)[0]))
    found = []
    assert spent(counted, lambda: found.append(loaded(str(path)))) == (701, 201)
    anew = InstructionDataModule(rows_of(700) + rows_of(1, 900), text={"tokenizer": TOKENIZER})
    cache_folder().rename(tmp_path / "elsewhere")
    anew.setup("fit")
    assert found[0].splits.tokenized("train").to_dict() == anew.splits.tokenized("train").to_dict()
    assert found[0].splits.counts["train"].rows == 701


def test_another_division_tokenises_its_validation_rows_alone(tmp_path, counted):
    path = str(write(tmp_path / "rows.jsonl", rows_of(60)))
    loaded(path, validation_fraction=0.1, seed=1)
    assert counted["encoded"] == 66
    found = []
    assert spent(counted, lambda: found.append(loaded(path, validation_fraction=0.1, seed=2))) == (60, 6)
    parts = [found[0].splits.tokenized(split)["number"][:] for split in ("train", "validation")]
    assert [len(part) for part in parts] == [54, 6]
    assert sorted(map(int, parts[0] + parts[1])) == list(range(1, 61))


def test_a_source_that_is_known_by_nothing_is_read_and_not_tokenised(tmp_path, counted):
    class Unknown(Noted):
        def identity(self):
            return None

    source = Unknown(30, str(tmp_path / "log"))
    loaded(source)
    assert spent(counted, lambda: loaded(source)) == (30, 0)
    assert spent(counted, lambda: loaded(Unknown(31, str(tmp_path / "log")))) == (31, 31)


def test_what_is_wrong_and_unread_is_said_of_the_rows_as_they_are(tmp_path, monkeypatch):
    """Of a source that is known by nothing, whose good rows are the same."""

    class Changing(Noted):
        bad: ClassVar[dict[str, Any]] = {}

        def identity(self):
            return None

        def rows(self):
            yield from super().rows()
            yield 5, {"prompt": "1+1=", "completion": "2", **self.bad}

    said = []
    for name in ("rank_zero_info", "rank_zero_warn"):
        monkeypatch.setattr(f"dft_lightning.data.splits.{name}", said.append)
    for bad, expected in (
        ({"completion": None}, "row 5: completion: null"),
        ({"prompt": True}, "row 5: prompt: expected a string, got bool"),
        ({"id": 7}, "not read: id (1 row)"),
        ({"source": "x"}, "not read: source (1 row)"),
    ):
        Changing.bad = bad
        said.clear()
        loaded(Changing(4, str(tmp_path / "log")), on_bad_rows="skip")
        assert any(expected in line for line in said), said


# -- size and room ---------------------------------------------------------------------------------------------------


def test_a_cache_that_is_no_folder_is_one_message(tmp_path, monkeypatch):
    path = str(write(tmp_path / "rows.jsonl", rows_of(4)))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path)
    for reading in (loaded, lambda path: InstructionDataModule(path).splits.read("train")):
        with pytest.raises(InputError, match="rows.jsonl.*: cannot be written: .*HF_DATASETS_CACHE to another folder"):
            reading(path)


@pytest.mark.parametrize("options", [{}, {"validation_fraction": 0.5}], ids=str)
def test_a_file_that_is_changed_while_it_is_read_leaves_no_entry(tmp_path, folder, monkeypatch, options):
    path = write(tmp_path / "rows.jsonl", rows_of(4))
    read = RowReader.read

    def changing(self):
        yield from read(self)
        write(path, rows_of(4, first=5))

    monkeypatch.setattr(RowReader, "read", changing)
    with pytest.raises(InputError, match="rows.jsonl: it was changed while it was read: start again"):
        loaded(str(path), **options)
    assert list(folder.glob("*.*")) == []


class Lambda(RowForm):
    def __init__(self, answer):
        self.answer = answer

    def read(self, row):
        return {"prompt": row["prompt"], "completion": self.answer(row)}


def test_a_form_that_is_known_by_nothing_is_asked_every_time(tmp_path, counted):
    path = str(write(tmp_path / "rows.jsonl", rows_of(4)))
    typed = "class Typed(RowForm):\n def read(self, row): return {'prompt': row['prompt'], 'completion': %s}"
    for answer in ("row['completion']", "'7'"):
        space = {"RowForm": RowForm, "__name__": "nowhere"}
        exec(typed % answer, space)
        for form in (space["Typed"](), Lambda(eval(f"lambda row: {answer}"))):
            expected = "^1+1=2$" if answer != "'7'" else "^1+1=7$"
            assert text_of(loaded(path, form=form), 0) == expected
    assert spent(counted, lambda: loaded(path, form=Lambda(lambda row: "7"))) == (4, 0)


class Broken(Noted):
    def __init__(self, identity=None, error=None):
        self._identity = identity
        self._error = error

    def identity(self):
        if isinstance(self._identity, Exception):
            raise self._identity
        return self._identity

    def rows(self):
        yield from enumerate(rows_of(2), start=1)
        raise self._error


@pytest.mark.parametrize("options", [{}, {"validation_fraction": 0.5}], ids=str)
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"identity": {1}}, "noted: Broken.identity: TypeError: Object of type set is not JSON serializable: have it "),
        ({"identity": KeyError("x")}, "noted: Broken.identity: KeyError: 'x': have it return what JSON holds, or None"),
        ({"error": FileNotFoundError(2, "No such file", "x")}, "noted: cannot be read: [Errno 2] No such file: 'x'"),
        ({"error": ConnectionError("lost it")}, "noted: cannot be read: lost it"),
    ],
)
def test_a_source_of_ones_own_that_fails_is_named(given, expected, options):
    with pytest.raises(InputError) as error:
        loaded(Broken(**given), **options)
    assert str(error.value).startswith(expected)


def test_stretches_are_bounded_by_what_they_hold(tmp_path):
    long = [{"prompt": "1" * 400_000, "completion": "2"}] * 12
    found = list(SourceRows(LocalRows(write(tmp_path / "long.jsonl", long)), Reading()).stretches())
    assert [len(stretch.rows) for stretch in found] == [5, 5, 2]
    found = list(SourceRows(LocalRows(write(tmp_path / "short.jsonl", rows_of(600))), Reading()).stretches())
    assert [len(stretch.rows) for stretch in found] == [250, 250, 100]


def test_few_stretches_wait_for_processes(tmp_path):
    """However fast they are read."""
    read = []
    source = SourceRows(LocalRows(write(tmp_path / "rows.jsonl", rows_of(5000))), Reading())
    encoder = loaded(rows_of(1)).splits.encoder("train")
    found = ((read.append(1) or stretch, None) for stretch in source.stretches())
    done = preparation.encoded(found, preparation.Tokenizing(encoder, False, False), 2)
    for number, _ in enumerate(done, start=1):
        assert len(read) <= number + 5
    assert len(read) == 20


def test_what_killed_runs_left_is_removed_and_what_is_written_stays(tmp_path, folder, monkeypatch):
    folder.mkdir(parents=True)
    with monkeypatch.context() as context:
        context.setattr(os, "getpid", lambda: 2**22 + 1)  # of no process
        left = partial_path(folder / "rows.arrow")
    written = partial_path(folder / "rows.arrow")
    for path in (left, written):
        path.write_text("half")
    loaded(str(write(tmp_path / "rows.jsonl", rows_of(3))))
    assert not left.exists()
    assert written.exists()


KILLED = """
import os, sys, time
from datasets import config
from dft_lightning.data import ArithmeticRows, InstructionDataModule
from dft_lightning.data.text import preparation

config.HF_DATASETS_CACHE = sys.argv[1]

def waiting(rows):
    os.write(1, f"{os.getpid()}\\n".encode())  # at once: two of them share the pipe
    time.sleep(1000)

preparation.Tokenizing.__call__ = lambda self, rows: waiting(rows)
data = InstructionDataModule(ArithmeticRows(1000), text={"tokenizer": "asset://arithmetic-base"}, num_proc=2)
data.prepare_data()
"""


def test_a_killed_run_leaves_no_process(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        try:
            others = [int(first.stdout.readline()) for _ in range(2)]
        finally:
            first.kill()
        try:
            assert first.communicate(timeout=30) == ("", None)  # which ends when all that hold the pipe have ended
        except subprocess.TimeoutExpired:
            for other in others:
                os.kill(other, signal.SIGKILL)
            raise


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("where", "options"), [("tokens", {}), ("rows", {"validation_fraction": 0.5})], ids=str)
def test_a_full_disk_is_one_message(tmp_path, folder, monkeypatch, where, options):
    def full(*_):
        raise FULL

    monkeypatch.setattr(*((cache.os, "fsync") if where == "tokens" else (pickle, "dump")), full)
    path = str(write(tmp_path / "rows.jsonl", rows_of(6)))
    with pytest.raises(InputError) as error:
        loaded(path, **options)
    assert str(error.value) == (
        f"{folder}: cannot be written: No space left on device: make room there, or set HF_DATASETS_CACHE to another "
        "folder"
    )
    assert [each for each in folder.rglob("*") if each.is_file() and each.parent == folder] == []
    monkeypatch.undo()


@pytest.mark.parametrize(
    "read",
    [lambda path: read_messages(LocalRows(path), Reading()), lambda path: loaded(str(path), validation_fraction=0.5)],
    ids=["for sampling", "to be split"],
)
def test_a_disk_that_fills_with_the_last_of_the_rows_is_one_message(tmp_path, folder, read):
    path = write(tmp_path / "rows.jsonl", [{"prompt": f"{i}" * 400, "completion": "1"} for i in range(6)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # bytes of a file, fewer than are written at once
    try:
        with pytest.raises(InputError) as error:
            read(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value).startswith(f"{folder}: cannot be written: File too large: make room there")
    assert [each for each in folder.iterdir() if each.is_file()] == []


def test_rows_that_are_all_refused_end_it_early(tmp_path, counted):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "1?", "completion": "2"}] * 2000)
    with pytest.raises(InputError, match="250 of the first 250 rows are bad"):
        loaded(str(path))
    assert counted["encoded"] == 250


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_lists_and_deletes(tmp_path, folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert commands.cache([]) == 0
    assert f"{folder}: nothing is kept there" in capsys.readouterr().out.replace("\n", "")
    for name, count in (("old", 3), ("new", 4)):
        loaded(str(write(tmp_path / f"{name}.jsonl", rows_of(count))))
    old = next(entry for entry in entries() if entry.source.endswith("old.jsonl"))
    os.utime(old.path, (time.time() - 40 * 86400,) * 2)
    assert commands.cache([]) == 0
    shown = capsys.readouterr().out
    assert "old.jsonl" in shown
    assert "2 entries" in shown
    assert commands.cache(["--unused_for", "30"]) == 0
    assert "1 deleted" in capsys.readouterr().out
    (left,) = entries()
    assert left.source.endswith("new.jsonl")
    assert left.size == sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    left.path.unlink()  # as where a run is killed between its two files
    (orphan,) = entries()
    assert (orphan.source, orphan.size) == ("of a run that was killed", left.path.with_suffix(".arrow").stat().st_size)
    assert commands.cache(["--unused_for", "-1"]) == 2
    assert "must be a number of days from 0 on" in capsys.readouterr().err
    assert commands.cache(["--unused_for", "0"]) == 0
    assert entries() == []
    assert not list(folder.glob("*.arrow"))


def test_a_use_is_noted(tmp_path):
    path = str(write(tmp_path / "rows.jsonl", rows_of(3)))
    loaded(path)
    (entry,) = entries()
    os.utime(entry.path, (1, 1))
    loaded(path)
    assert entries()[0].used > time.time() - 60
