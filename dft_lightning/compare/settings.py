"""The comparison's own config: which losses, learning rates and seeds, over which base."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from dft_lightning.cli.class_paths import GROUPS, flat
from dft_lightning.cli.parsers import raising_input_errors
from dft_lightning.cli.shipped_configs import hint
from dft_lightning.compare.files import slug_of
from dft_lightning.compare.recorder import Evaluation
from dft_lightning.component import NotPlainError, to_plain
from dft_lightning.errors import InputError, did_you_mean, one_line
from dft_lightning.evaluation.measures import check_measures, default_measures
from dft_lightning.fit.parser import Parser
from dft_lightning.losses import TokenLoss


@dataclass(frozen=True)
class Comparison:
    """A grid of runs: losses x learning rates x seeds, over one base ``fit`` config.

    Attributes:
        base: the ``fit`` config, or several that compose; paths are relative to the comparison's own file.
        losses: each with the name that the report gives it.
        learning_rates: the sweep of every loss.
        seeds: of the sweep. A seed decides the order of rows and whatever else is random in a run.
        overrides: keys of the ``fit`` config, over the base, for every run.
        seeds_at_best: further seeds, run at the learning rate that was best for a loss on validation rows.
        best_by: the measures that choose those learning rates.
        measures: what the report compares on test rows, each at the learning rate that was best by it; ``None`` for
            exact match (greedy, sampled, pass@k), ``nll`` and ``token_accuracy``.
        evaluation: what is measured of every run, and when.
    """

    base: str | list[str]
    losses: dict[str, TokenLoss]
    learning_rates: list[float]
    seeds: list[int] = field(default_factory=lambda: [0])
    overrides: dict[str, Any] = field(default_factory=dict)
    seeds_at_best: list[int] = field(default_factory=list)
    best_by: list[str] = field(default_factory=lambda: ["greedy", "sampled"])
    measures: list[str] | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)


@dataclass(frozen=True)
class Settings:
    """A comparison as read from its file.

    Attributes:
        path: of the file, or of the last of several.
        base: paths of the base configs.
        losses: class path and options of each, by name.
        learning_rates: those of :class:`Comparison`.
        seeds: those of :class:`Comparison`.
        overrides: those of :class:`Comparison`.
        seeds_at_best: those of :class:`Comparison`.
        best_by: those of :class:`Comparison`.
        measures: those of :class:`Comparison`, or its defaults.
        evaluation: that of :class:`Comparison`, as plain values.
    """

    path: Path
    base: list[Path]
    losses: dict[str, dict[str, Any]]
    learning_rates: list[float]
    seeds: list[int]
    overrides: dict[str, Any]
    seeds_at_best: list[int]
    best_by: list[str]
    measures: list[str]
    evaluation: dict[str, Any]


def read_settings(given: Sequence[str | Path | Mapping[str, Any]]) -> Settings:
    """Read and check a comparison's config.

    Args:
        given: its files or dicts of its keys, later ones over earlier ones: ``overrides`` and ``evaluation`` key by
            key, the rest whole. Paths in a dict are seen from the working directory.

    Raises:
        InputError: a file or something in it is wrong.
    """
    content: dict[str, Any] = {}
    path = Path()
    for each in given:
        path = Path("config" if isinstance(each, Mapping) else each)
        content = _merged(content, _of_one(path, _in_plain(each)) if isinstance(each, Mapping) else _read_one(path))
    if not content.get("losses"):
        raise InputError(f"{path}: losses: name at least one loss to compare")
    for name in content["losses"]:
        if not isinstance(name, str):
            raise InputError(f"{path}: losses: {name} is no text: put the name in quotes")
    parser = Parser(prog="python -m dft_lightning compare", env_prefix="DFT_LIGHTNING_COMPARE")
    parser.add_class_arguments(Comparison, None)
    overrides = content.get("overrides")
    # Classes in them are those of fit, whose parser reads them.
    with raising_input_errors():
        config = parser.parse_object({**content, "overrides": {}} if isinstance(overrides, dict) else content)
    try:
        parser.instantiate_classes(config)
    except Exception as error:  # whatever a loss's own constructor raises
        raise InputError(f"{path}: {one_line(error)}") from error
    plain: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_none=False))
    base = [plain["base"]] if isinstance(plain["base"], str) else plain["base"]
    measures = plain["measures"] or default_measures(plain["evaluation"]["num_samples"])
    plain["overrides"] = overrides or {}
    settings = Settings(**{**plain, "path": path, "base": [Path(file) for file in base], "measures": measures})
    _check(settings)
    return settings


def _read_one(path: Path) -> dict[str, Any]:
    """A file's content, with the paths of its base seen from here."""
    return _of_one(path, _read_strictly(path), path.parent)


def _in_plain(given: Mapping[Any, Any]) -> dict[str, Any]:
    """A dict of Python's as a file would have it, losses by their class paths."""
    try:
        plain: dict[str, Any] = to_plain(dict(given))
    except NotPlainError as error:
        raise InputError(f"config: {error}: give what a file can hold, classes by their paths") from error
    return plain


def _of_one(path: Path, given: Mapping[str, Any], folder: Path = Path()) -> dict[str, Any]:
    """The content of a file or dict; a base's path in it is seen from a folder."""
    content = dict(given)
    known = [key.name for key in fields(Comparison)]
    for key in content:
        if key not in known:
            end = did_you_mean(str(key), known, f"; known: {', '.join(known)}")
            raise InputError(f"{path}: unknown key {key}{end}")
    if isinstance(content.get("overrides"), dict):
        content["overrides"] = flat(content["overrides"])
    base = content.get("base")
    if isinstance(base, str):
        content["base"] = os.path.normpath(folder / base)
    elif isinstance(base, list):
        content["base"] = [os.path.normpath(folder / str(file)) for file in base]
    return content


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    for key in ("overrides", "evaluation"):
        if isinstance(below.get(key), dict) and isinstance(above.get(key), dict):
            merged[key] = _deep(below[key], above[key])
    return merged


def _deep(below: dict[str, Any], above: dict[str, Any], key: str = "") -> dict[str, Any]:
    """Key by key; another class takes the place of one with its options, but for the module's and the data module's."""
    if "class_path" in above and key not in GROUPS:
        return above
    both = {
        k: _deep(below[k], v, k) if isinstance(v, dict) and isinstance(below.get(k), dict) else v
        for k, v in above.items()
    }
    return {**below, **both}


def _check(settings: Settings) -> None:
    where = settings.path
    for file in settings.base:
        if not file.is_file():
            raise InputError(f"{where}: base: no such file: {file}")
    if not settings.base:
        raise InputError(f"{where}: base: name a fit config")
    for name in ("learning_rates", "seeds"):
        if not getattr(settings, name):
            raise InputError(f"{where}: {name}: give at least one")
    for name in ("learning_rates", "seeds", "seeds_at_best", "best_by", "measures"):
        _check_distinct(getattr(settings, name), f"{where}: {name}")
    if both := set(settings.seeds) & set(settings.seeds_at_best):
        raise InputError(f"{where}: seeds_at_best: {min(both)} is among seeds already")
    if any(not 0 < rate < math.inf for rate in settings.learning_rates):
        raise InputError(f"{where}: learning_rates must be finite and more than 0, got {settings.learning_rates}")
    _check_distinct([f"{rate:g}" for rate in settings.learning_rates], f"{where}: learning_rates")
    if any(seed < 0 for seed in (*settings.seeds, *settings.seeds_at_best)):
        raise InputError(f"{where}: seeds must not be negative")
    _check_overrides(settings)
    slugs: dict[str, str] = {slug: slug for slug in ("base", "base-model")}
    for name in settings.losses:
        slug = slug_of(name)
        if name.startswith("_"):
            raise InputError(f"{where}: losses: {name!r} begins with an underscore, which legends leave out: rename it")
        if not slug or slug in slugs:
            other = f"{slugs[slug]!r} has the same" if slug else "it has neither letters nor digits"
            raise InputError(f"{where}: losses: {name!r} gives its runs the name {slug!r}; {other}: rename it")
        slugs[slug] = name
    check_measures([*settings.best_by, *settings.measures], settings.evaluation["num_samples"], str(where))


def _check_overrides(settings: Settings) -> None:
    """What the grid sets for each run cannot be overridden for all of them."""
    rates = (("model", "optimizer", "lr"), ("model", "optimizer", "init_args", "lr"))
    for keys in (("seed_everything",), ("model", "loss"), *rates, ("data", "batches", "seed")):
        below: Any = settings.overrides
        for key in keys:
            below = below.get(key) if isinstance(below, dict) else None
        if below is not None:
            name = {"loss": "losses", "lr": "learning_rates"}.get(keys[-1], "seeds")
            raise InputError(f"{settings.path}: overrides: {'.'.join(keys)} is set for each run: use {name}")


def _check_distinct(values: list[Any], key: str) -> None:
    for value in values:
        if values.count(value) > 1:
            raise InputError(f"{key}: {value} is there twice, and would give two runs one name")


class _StrictLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses a key that is there twice, of which YAML would keep the last and lose the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise InputError(f"{key!r} is there twice, in lines {seen[key]} and {key_node.start_mark.line + 1}")
            seen[key] = key_node.start_mark.line + 1
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


# YAML 1.1 takes 1e-4 for a string; people mean the number.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_strictly(path: Path) -> dict[str, Any]:
    """A YAML file of keys and values.

    Raises:
        InputError: no such file, broken YAML, a key that is there twice, or no mapping.
    """
    if not path.is_file():
        raise InputError(f"--config: no such file: {path}{hint(str(path))}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: broken YAML: {one_line(error)}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values: base, losses, learning_rates")
    return content
