"""Which files of a folder are of a split, by the names that the Hugging Face hub goes by."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from fsspec.utils import glob_translate
from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.data.rows.files import READERS, is_rows
from dft_lightning.data.rows.identity import files_below
from dft_lightning.errors import InputError, one_line

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_BETWEEN_WORDS = re.compile(r"[-._ 0-9]+")
_SHARDED = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_NO_DATA = ("README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_MOST_NAMED = 10


def files_of(folder: Path, split: str | None) -> list[Path]:
    """The files of a folder and the folders in it that a split's rows are in, in the order of their names.

    What is set aside is said, once. Hidden files and the cards of a dataset are no data.

    Args:
        folder: of the dataset.
        split: ``None`` where there is but one.

    Raises:
        InputError: it has no such split, or several and none is named; or a card that says more than which files.
    """
    every = _data_files(folder)
    readable = [path for path in every if is_rows(folder / path)]
    if not readable:
        raise InputError(f"{folder}: a folder without a {', '.join(READERS)} file")
    splits = splits_of(folder, readable)
    if split is None and len(splits) > 1:
        raise InputError(f"{folder}: has the splits {', '.join(splits)}: name one by class_path LocalRows and split")
    chosen = next(iter(splits)) if split is None else split
    if chosen not in splits:
        raise InputError(
            f"{folder}: no file of the split {split!r} there, but of {', '.join(map(repr, splits))}: name one by "
            "class_path LocalRows and split"
        )
    _say_aside(folder, chosen, splits, every)
    return [folder / path for path in splits[chosen]]


def names_splits(folder: Path) -> bool:
    """Whether the files of a folder say which split they are of."""
    readable = [path for path in _data_files(folder) if is_rows(folder / path)]
    return bool(_of_card(folder, readable) or _by_names(readable))


def splits_of(folder: Path, paths: list[str]) -> dict[str, list[str]]:
    """The files of a dataset by their splits: as its card says, or its names, or else all for ``train``."""
    return _of_card(folder, paths) or _by_names(paths) or {"train": paths}


def _data_files(folder: Path) -> list[str]:
    """Paths below the folder, with ``/`` between their parts."""
    found = files_below(folder, lambda name: name.startswith((".", "__")) or name in _NO_DATA)
    return [path.relative_to(folder).as_posix() for path in found]


def _by_names(paths: list[str]) -> dict[str, list[str]]:
    """The first of the hub's patterns that finds a file decides for all; in no split where none does."""
    for splits in (_of_shard, _of_folders, _of_name):
        found: dict[str, list[str]] = {}
        for path in paths:
            for split in splits(path):
                found.setdefault(split, []).append(path)
        if found:
            return {split: found[split] for split in sorted(found, key=_place)}
    return {}


def _place(split: str) -> tuple[int, str]:
    return ([*_KEYWORDS, split].index(split), split)


def _of_shard(path: str) -> Iterable[str]:
    found = _SHARDED.fullmatch(path)
    return [found[1]] if found else []


def _of_folders(path: str) -> Iterable[str]:
    return _of_words(path.split("/")[:-1])


def _of_name(path: str) -> Iterable[str]:
    return _of_words([path.rpartition("/")[2]])


def _of_words(names: list[str]) -> Iterable[str]:
    """A keyword is a whole word of a name: ``test`` of ``gsm8k_test.jsonl``, and not of ``latest.jsonl``."""
    words = {word for name in names for word in _BETWEEN_WORDS.split(name.lower())}
    return [split for split, keywords in _KEYWORDS.items() if not words.isdisjoint(keywords)]


@functools.cache
def _say_once(text: str) -> None:
    rank_zero_info(text)


def _say_aside(folder: Path, chosen: str, splits: dict[str, list[str]], every: list[str]) -> None:
    others = {path: f"{path} ({split})" for split, paths in splits.items() for path in paths}
    aside = [others.get(path, path) for path in every if path not in set(splits[chosen])]
    if aside:
        named = ", ".join(aside[:_MOST_NAMED])
        more = f" and {len(aside) - _MOST_NAMED} others" if len(aside) > _MOST_NAMED else ""
        _say_once(f"{folder}: {len(splits[chosen])} files of the split {chosen} are read; set aside: {named}{more}")


# -- the card of a dataset ---------------------------------------------------------------------------------------------


def _of_card(folder: Path, paths: list[str]) -> dict[str, list[str]]:
    """The files by splits as ``configs`` of a dataset's card names them; none where it names none.

    Raises:
        InputError: it has several configurations, or one says how its files are to be read.
    """
    configs = _configs(folder / "README.md")
    if not configs:
        return {}
    way_out = f"take class_path HubRows, path {folder} and the name of one"
    if len(configs) > 1:
        names = ", ".join(str(config.get("config_name")) for config in configs)
        raise InputError(f"{folder}: README.md names the configurations {names}: {way_out}")
    (config,) = configs
    if more := sorted(config.keys() - {"config_name", "data_files", "default"}):
        raise InputError(f"{folder}: README.md says of its configuration more than its files, {more[0]}: {way_out}")
    found = {}
    for split, patterns in _patterns(config.get("data_files"), folder).items():
        named = [re.compile(glob_translate(pattern.removeprefix("./"))) for pattern in patterns]
        found[split] = [path for path in paths if any(each.match(path) for each in named)]
        if not found[split]:
            raise InputError(f"{folder}: README.md: the split {split} has {', '.join(patterns)}: no such files")
    return found


def _configs(card: Path) -> list[dict[str, Any]]:
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    front = re.match(r"---\r?\n(.*?)\r?\n---\s*(\n|$)", text, re.DOTALL)
    try:
        values = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError as error:
        raise InputError(f"{card}: what is before its text cannot be read: {one_line(error)}") from error
    configs = values.get("configs") if isinstance(values, dict) else None
    found = configs if isinstance(configs, list) else []
    return [each for each in found if isinstance(each, dict) and ("data_files" in each or "data_dir" in each)]


def _patterns(data_files: Any, folder: Path) -> dict[str, list[str]]:
    """Patterns by split: the hub takes one or some, of ``train``, or a list of splits with theirs."""
    found: Any = [data_files] if isinstance(data_files, str) else data_files
    if isinstance(found, list) and all(isinstance(each, str) for each in found):
        return {"train": found}
    try:
        splits = {str(each["split"]): each["path"] for each in found}
        return {split: [paths] if isinstance(paths, str) else list(map(str, paths)) for split, paths in splits.items()}
    except (TypeError, KeyError, IndexError) as error:
        raise InputError(f"{folder}: README.md: data_files are no patterns, and no splits with theirs") from error
