"""What a checkpoint may have imported.

Code is run because the command, its config or the caller says so, never because a file does. A checkpoint names
classes: those of this package are imported, and others are taken if this process has imported them already, as their
code has run then. Anything else is refused and named. What is taken must be a
:class:`~dft_lightning.component.Component`, an optimizer or a schedule, so that a file cannot have any other class
called with arguments of its choice.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import fsspec
import torch
from jsonargparse import ArgumentError, Namespace, set_parsing_settings
from lightning.pytorch.core.saving import (
    CHECKPOINT_PAST_HPARAMS_KEYS,
    load_hparams_from_tags_csv,
    load_hparams_from_yaml,
)
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dft_lightning.checkpoints.whole import unreadable
from dft_lightning.component import Component, class_path, init_parameters, named_class, not_saved
from dft_lightning.errors import InputError, one_line, shortened
from dft_lightning.foreign.jsonargparse import kept_settings
from dft_lightning.foreign.transformers import wants_code


def check_classes(values: Any, key: str, way_out: str, allowed: Collection[str] = ()) -> set[str]:
    """Refuse values that name a class whose code would be run because a file says so.

    Args:
        values: of a file: scalars, lists, dicts and Namespaces; each with ``class_path`` names a class.
        key: what an error message calls them.
        way_out: how to allow one, with ``{key}`` and ``{path}`` for which it is.
        allowed: class paths that the command or the caller names.

    Returns:
        What :func:`importing_only` needs to know of the values' classes.

    Raises:
        InputError: one is neither allowed nor a component of this package or of a module that is imported already.
    """
    found = list(_class_paths(values, key))
    for where, path in found:
        if path not in allowed and not _is_component(path):
            named = shortened(path, 200)
            raise InputError(
                f"{where}: {named} is not imported because a file names it: {way_out.format(key=where, path=named)}"
            )
    return import_paths([path for _, path in found])


def check_kernel(attn_implementation: Any, key: str, way_out: str) -> None:
    """Refuse a file's ``attn_implementation`` where it is a kernel on the hub, which is code as well.

    Raises:
        InputError: it is.
    """
    if "/" in (named := str(attn_implementation)):
        raise InputError(f"{key}: the checkpoint wants attention code of {shortened(named, 200)} to be run: {way_out}")


def code_refused(path: str, key: str, error: Exception) -> InputError | None:
    """What to say where a model or tokenizer was not loaded, if that is for want of trust in code that it brings along.

    Args:
        path: a folder or hub name.
        key: of the option that has it.
        error: transformers' own.
    """
    if not wants_code(error):
        return None
    files = [Path(path) / name for name in ("config.json", "tokenizer_config.json")]
    texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    named = sorted({name for text in texts for name in _strings(json.loads(text).get("auto_map"))})
    what = f" ({shortened(', '.join(named), 300)})" if named else ""
    return InputError(
        f"{key}: {path} wants code of its own to be run{what}, which is not done unasked: if you trust it, set "
        "model.loading.trust_remote_code: true (export: --trust_remote_code, load_from_checkpoint: "
        "trust_remote_code=True)"
    )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)
    elif isinstance(value, str):
        yield value.replace("--", ": ")  # of another repository


def _class_paths(values: Any, key: str) -> Iterator[tuple[str, str]]:
    """Dotted key and class path of each class that values name."""
    if isinstance(values, Namespace):
        values = values.as_dict()
    if isinstance(values, dict):
        if isinstance(values.get("class_path"), str):
            yield key, values["class_path"]
        for name, value in values.items():
            yield from _class_paths(value, key if name == "init_args" else f"{key}.{name}")
    elif isinstance(values, (list, tuple)):
        for i, value in enumerate(values):
            yield from _class_paths(value, f"{key}.{i}")


def _is_component(path: str) -> bool:
    found = named_class(path)
    if found is None:  # of another version of this package, which the one that makes it says
        return path.partition(".")[0] == "dft_lightning"
    return issubclass(found, (Component, Optimizer, LRScheduler))


def import_paths(values: Any) -> set[str]:
    """All texts in values that have the form of an import path; of those that name a class, its own paths, too."""
    if isinstance(values, Namespace):
        values = values.as_dict()
    if isinstance(values, (dict, list, tuple)):
        return set().union(*map(import_paths, values.values() if isinstance(values, dict) else values))
    if not isinstance(values, str) or "." not in values or not all(map(str.isidentifier, values.split("."))):
        return set()
    found = named_class(values)
    return {values} if found is None else {values, class_path(found), f"{found.__module__}.{found.__qualname__}"}


@contextlib.contextmanager
def importing_only(paths: Collection[str]) -> Iterator[None]:
    """Have jsonargparse import nothing for a value but this package, torch's optimizers and ``paths``.

    It makes no object of what is typed ``Any``, either. A text may name a class as well as a ``class_path`` does, so
    that looking at the values is not enough.
    """
    allowed = ["dft_lightning", "torch.optim", *sorted(path for path in paths if not path.startswith("jsonargparse."))]
    with kept_settings():
        set_parsing_settings(
            import_path_denylist=["*"], import_path_allowlist=allowed, instantiate_subclass_spec_in_any=False
        )
        yield


@contextlib.contextmanager
def loading_options(
    cls: Any,
    checkpoint_path: Any,
    hparams_file: Any,
    weights_only: bool | None,
    given: dict[str, Any],
    groups: Collection[str] = (),
) -> Iterator[dict[str, Any]]:
    """For ``load_from_checkpoint`` of a module or data module: it makes objects of a file's options meanwhile.

    Args:
        cls: what is loaded.
        checkpoint_path: see there.
        hparams_file: see there.
        weights_only: see there; with ``False`` the caller lets the file run any code as it is.
        given: options that the caller gives.
        groups: names of those that are groups of options; other dicts are taken as they are given.

    Yields:
        The options that the caller gives; of a group, or of the same class, of which a part is given, with the rest
        from the checkpoint.

    Raises:
        InputError: the checkpoint cannot be read, names a class that would have to be imported, or does not hold an
            option of a group; or there is no such argument.
    """
    _check_arguments(cls, given)
    try:
        content = _content(checkpoint_path, weights_only is not False)
        keys = (cls.CHECKPOINT_HYPER_PARAMS_KEY, *CHECKPOINT_PAST_HPARAMS_KEYS)
        options = {name: value for key in keys for name, value in dict(content.get(key) or {}).items()}
    except Exception as error:  # whatever the unpickler stumbled on
        raise InputError(f"{checkpoint_path} cannot be read as a checkpoint: {unreadable(error)}") from error
    if lacking := [key for key in ("pytorch-lightning_version", "state_dict") if key not in content]:
        raise InputError(f"{checkpoint_path} is no checkpoint of Lightning: it has no {lacking[0]}")
    if hparams_file is not None:
        load = load_hparams_from_tags_csv if str(hparams_file).lower().endswith(".csv") else load_hparams_from_yaml
        options |= load(hparams_file)
    for name, parameter in init_parameters(cls).items():
        if parameter.default is parameter.empty and name not in {**options, **given}:
            raise InputError(f"{checkpoint_path} holds no {name} of {cls.__name__}: pass it to load_from_checkpoint")
    if lost := [name for name in options if name[:1] != "_" and name not in init_parameters(cls)]:
        rank_zero_warn(
            f"{cls.__name__} has no {', '.join(map(str, lost))}, which the checkpoint's run had: where that was of a "
            "subclass, load the checkpoint by it"
        )
    whole = {name: _with_rest(name, value, options.get(name), groups) for name, value in given.items()}
    left = _of_the_file(options, given, groups)
    evaluation = left.get("evaluation")
    if isinstance(evaluation, dict) and evaluation.get("metrics"):  # no checkpoint of this package's has any
        raise InputError("evaluation.metrics: a file names classes to import: pass them to load_from_checkpoint")
    for key, said in not_saved({name: left[name] for name in groups if name in left}, cls.__name__):
        raise InputError(f"{key}: {said}: pass it to load_from_checkpoint")
    if weights_only is False:
        yield whole
        return
    # By the caller; what is given in part may still have its class from the file.
    named = import_paths(given) | {path for _, path in _class_paths(given, cls.__name__)}
    named |= check_classes({**left, **whole}, cls.__name__, _IMPORT_IT, named)
    kernel = (left.get("loading") or {}).get("attn_implementation")
    check_kernel(
        kernel, f"{cls.__name__}.loading.attn_implementation", "pass it to load_from_checkpoint if you trust it"
    )
    try:
        with importing_only(named):
            yield whole
    except ArgumentError as error:
        raise InputError(f"{checkpoint_path}: {one_line(error)}") from error


_IMPORT_IT = "import its module first, or pass the option to load_from_checkpoint, if you trust it"


def _check_arguments(cls: type, given: dict[str, Any]) -> None:
    """Raise ``InputError`` for an argument that a class does not take: Lightning would drop it."""
    if unknown := sorted(set(given) - set(init_parameters(cls))):
        raise InputError(f"{cls.__name__} has no argument {', '.join(unknown)}")


def _with_rest(name: str, given: Any, saved: Any, groups: Collection[str]) -> Any:
    """A group of options, or the options of a class, of which a part is given, whole."""
    if not isinstance(given, dict) or not isinstance(saved, dict):
        return given
    if name in groups:
        return {**saved, **{each: _with_rest(each, value, saved.get(each), groups) for each, value in given.items()}}
    if not isinstance(saved.get("class_path"), str) or not isinstance(saved.get("init_args"), dict):
        return given
    path, named = saved["class_path"], given.get("class_path")
    if named is not None and not f".{path}".endswith(f".{named}"):
        return given
    options = given.get("init_args") or {} if "class_path" in given else given  # of the same class
    return {"class_path": path, "init_args": {**saved["init_args"], **options}}


def _of_the_file(options: dict[str, Any], given: dict[str, Any], groups: Collection[str]) -> dict[str, Any]:
    """What is not given, of groups as well."""
    left = {}
    for name, saved in options.items():
        if name not in given:
            left[name] = saved
        elif name in groups and isinstance(given[name], dict) and isinstance(saved, dict):
            left[name] = {each: value for each, value in saved.items() if each not in given[name]}
    return left


def _content(path: Any, weights_only: bool) -> dict[str, Any]:
    """A checkpoint without its tensors."""
    if isinstance(path, (str, Path)):
        with fsspec.open(str(path), "rb") as file:
            return dict(torch.load(file, map_location="meta", weights_only=weights_only))
    start = path.tell()
    try:
        return dict(torch.load(path, map_location="meta", weights_only=weights_only))
    finally:
        path.seek(start)
