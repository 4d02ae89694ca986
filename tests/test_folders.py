"""Folders of files: which are of a split, as the hub tells it; packed files; what is set aside is said."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os

import pytest
from datasets.data_files import DataFilesPatternsDict, get_data_patterns

from dft_lightning.data import HubRows, LocalRows
from dft_lightning.data.rows import folders
from dft_lightning.data.rows.forms import Reading
from dft_lightning.data.rows.reading import read_messages
from dft_lightning.data.rows.sources import as_source
from dft_lightning.errors import InputError


@pytest.fixture(autouse=True)
def said(monkeypatch):
    found = []
    monkeypatch.setattr(folders, "rank_zero_info", found.append)
    folders._say_once.cache_clear()
    return found


def line(text):
    return json.dumps({"prompt": text, "completion": "2"}) + "\n"


def fill(folder, *names):
    """Files whose row says their name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = line(name)
        path.write_text(f"[{content}]" if name.lower().endswith(".json") else content)
    return folder


def prompts(source):
    return [messages[0]["content"] for messages in read_messages(source, Reading()).messages]


LISTINGS = {
    "a snapshot": ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"),
    "shards in data": (
        "data/train-00000-of-00001.jsonl",
        "data/extra-00000-of-00001.jsonl",
        "data/test.jsonl",
        "x.jsonl",
    ),
    "shards and folders": ("data/train-00000-of-00001.jsonl", "test/a.jsonl"),
    "files": ("train.jsonl", "valid.jsonl", "test.jsonl", "other.jsonl"),
    "words": ("gsm8k_train.jsonl", "gsm8k_dev.jsonl", "my-eval.v2.jsonl", "latest.jsonl", "pretraining.jsonl"),
    "other words": ("training 1.jsonl", "evaluation.jsonl", "val2.jsonl"),
    "folders": ("train/a.jsonl", "deep/validation-set/b/c.jsonl", "test/train.jsonl", "train.jsonl"),
    "both": ("train_test.jsonl", "test.jsonl"),
    "none": ("a.jsonl", "b/c.jsonl", "latest.jsonl"),
    "test alone": ("test.jsonl", "a.jsonl"),
    "no data": ("train.jsonl", ".hidden/test.jsonl", ".test.jsonl", "__pycache__/test.jsonl", "config.json"),
}


@pytest.mark.parametrize("name", LISTINGS)
def test_splits_are_the_hubs(tmp_path, name):
    fill(tmp_path, *LISTINGS[name])
    expected = DataFilesPatternsDict.from_patterns(get_data_patterns(str(tmp_path))).resolve(str(tmp_path))
    expected = {
        str(split): sorted(os.path.relpath(path, tmp_path) for path in paths) for split, paths in expected.items()
    }
    assert folders.splits_of(tmp_path, folders._data_files(tmp_path)) == expected
    for split, paths in expected.items():
        assert prompts(LocalRows(tmp_path, split)) == paths


def test_each_split_of_the_data_module_takes_its_own_files(tmp_path, said):
    fill(tmp_path, *LISTINGS["a snapshot"], "notes.txt", "README.md")
    assert prompts(as_source(str(tmp_path), "train")) == list(LISTINGS["a snapshot"][:2])
    assert prompts(as_source(tmp_path, "test")) == [LISTINGS["a snapshot"][2]]
    assert prompts(as_source(str(tmp_path), "train"))
    assert said == [  # once
        f"{tmp_path}: 2 files of the split train are read; set aside: notes.txt, test-00000-of-00001.jsonl (test)",
        f"{tmp_path}: 1 files of the split test are read; set aside: notes.txt, train-00000-of-00002.jsonl (train), "
        "train-00001-of-00002.jsonl (train)",
    ]
    with pytest.raises(
        InputError, match="no file of the split 'validation' there, but of 'train', 'test': name one by"
    ):
        prompts(as_source(str(tmp_path), "validation"))
    with pytest.raises(InputError, match="has the splits train, test: name one by class_path LocalRows and split"):
        prompts(LocalRows(tmp_path))
    renamed = LocalRows(tmp_path, "test", {"prompt": "question"})
    assert [sorted(row) for _, row in renamed.rows()] == [["completion", "question"]]


def test_a_folder_that_names_no_split_is_whole(tmp_path, said):
    fill(tmp_path, *LISTINGS["none"])
    for split in ("train", "validation", "forgetting"):
        source = as_source(str(tmp_path), split)
        assert prompts(source) == list(LISTINGS["none"])
        assert source.name == str(tmp_path)
    assert said == []
    assert read_messages(LocalRows(tmp_path), Reading()).numbers == ["a.jsonl:1", "b/c.jsonl:1", "latest.jsonl:1"]
    with pytest.raises(InputError, match="no file of the split 'test' there, but of 'train'"):
        prompts(LocalRows(tmp_path, "test"))


def test_another_letter_case(tmp_path):
    """The hub would have all of them for ``train``."""
    fill(tmp_path, "Train.JSONL", "TEST.JsonL", "Validation.JSON")
    assert prompts(as_source(str(tmp_path), "train")) == ["Train.JSONL"]
    assert prompts(as_source(str(tmp_path), "test")) == ["TEST.JsonL"]
    assert prompts(as_source(str(tmp_path), "validation")) == ["Validation.JSON"]
    assert prompts(as_source(str(tmp_path / "Train.JSONL"), "test")) == ["Train.JSONL"]


def test_links_that_lead_back(tmp_path):
    fill(tmp_path, "data/train/a.jsonl", "blobs/x")
    (tmp_path / "data/train/back").symlink_to(tmp_path)
    (tmp_path / "data/train/b.jsonl").symlink_to(tmp_path / "data/train/a.jsonl")
    assert prompts(as_source(str(tmp_path), "train")) == ["data/train/a.jsonl"] * 2


# -- packed files ------------------------------------------------------------------------------------------------------

PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize(
    ("form", "content"),
    [
        (".jsonl", line("1") + line("2")),
        (".json", f"[{line('1')}, {line('2')}]"),
        (".CSV", "prompt,completion\n1,a\n2,b\n"),
    ],
)
def test_packed_files(tmp_path, packed, form, content):
    path = tmp_path / f"train{form}{packed.upper() if form == '.CSV' else packed}"
    path.write_bytes(PACKERS[packed](content.encode()))
    (tmp_path / "test.jsonl").write_text(line("3"))
    for source in (as_source(str(path), "train"), as_source(str(tmp_path), "train")):
        assert prompts(source) == ["1", "2"]
    whole = path.read_bytes()
    for broken in (whole[:-9], b"not at all", whole[:4] + b"\xff" * 20):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="cannot be read: "):
            prompts(as_source(str(path), "train"))


@pytest.mark.parametrize("name", ["train.jsonl.zst", "train.parquet.gz"])
def test_packed_files_that_are_not_read_are_named(tmp_path, said, name):
    (tmp_path / name).write_bytes(b"1")
    (tmp_path / "test.jsonl").write_text(line("3"))
    for source in (as_source(str(tmp_path / name), "train"), as_source(str(tmp_path), "train")):
        with pytest.raises(InputError, match=rf"{name}: \.\w+\.\w+ is not read: unpack it"):
            prompts(source)
    assert prompts(as_source(str(tmp_path), "test")) == ["3"]
    assert said[-1].endswith(f"set aside: {name} (train)")


# -- the card of a dataset ---------------------------------------------------------------------------------------------


def card(folder, configs):
    (folder / "README.md").write_text(f"---\nlicense: mit\nconfigs: {json.dumps(configs)}\n---\n# Rows\n")
    return folder


def test_a_card_says_which_files_are_of_a_split(tmp_path):
    data_files = [{"split": "train", "path": "raw/a*"}, {"split": "test", "path": ["raw/b.jsonl", "train.jsonl"]}]
    fill(card(tmp_path, [{"config_name": "default", "data_files": data_files}]), "raw/a1.jsonl", "raw/a2.jsonl")
    fill(tmp_path, "raw/b.jsonl", "raw/c.jsonl", "train.jsonl")
    for split, expected in (("train", ["raw/a1.jsonl", "raw/a2.jsonl"]), ("test", ["raw/b.jsonl", "train.jsonl"])):
        assert prompts(as_source(str(tmp_path), split)) == expected
        assert sorted(prompts(HubRows(str(tmp_path), split=split))) == expected


@pytest.mark.parametrize("data_files", ["raw/**", ["raw/a.jsonl", "./raw/b.jsonl"]])
def test_a_card_with_one_split(tmp_path, data_files):
    fill(card(tmp_path, [{"config_name": "x", "data_files": data_files}]), "raw/a.jsonl", "raw/b.jsonl", "test.jsonl")
    assert prompts(as_source(str(tmp_path), "train")) == ["raw/a.jsonl", "raw/b.jsonl"]


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        (
            [{"config_name": "a", "data_files": "a*"}, {"config_name": "b", "data_files": "b*"}],
            "README.md names the configurations a, b: take class_path HubRows, path",
        ),
        ([{"config_name": "a", "data_dir": "x"}], "README.md says of its configuration more than its files, data_dir"),
        ([{"config_name": "a", "data_files": "a*", "sep": ";"}], "more than its files, sep: take class_path HubRows"),
        ([{"config_name": "a", "data_files": "none*"}], "README.md: the split train has none\\*: no such files"),
        (
            [{"config_name": "a", "data_files": {"train": "a*"}}],
            "data_files are no patterns, and no splits with theirs",
        ),
        (
            [{"config_name": "a", "data_files": [{"split": "a"}]}],
            "data_files are no patterns, and no splits with theirs",
        ),
        ([{"config_name": "a", "data_files": "/etc/*"}], "the split train has /etc/\\*: no such files"),
    ],
)
def test_cards_that_are_refused(tmp_path, configs, expected):
    fill(card(tmp_path, configs), "a.jsonl")
    with pytest.raises(InputError, match=expected):
        prompts(as_source(str(tmp_path), "train"))


def test_cards_that_say_nothing_of_files(tmp_path):
    fill(tmp_path, "train.jsonl", "test.jsonl")
    for text in ("# Rows", "---\nlicense: mit\n---\n", "---\nconfigs: 3\n---\n", "---\n- 1\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert prompts(as_source(str(tmp_path), "train")) == ["train.jsonl"]
    (tmp_path / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(InputError, match="README.md: what is before its text cannot be read"):
        as_source(str(tmp_path), "train")
