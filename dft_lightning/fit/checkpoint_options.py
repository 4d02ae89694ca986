"""The options of the run behind a checkpoint, beside those of this run: which of them count, and what is said of it.

What is given, in a config or by a flag, counts. A ``model`` option that is not given is what the checkpoint's run had,
and not its default. Every difference is printed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace

from dft_lightning.checkpoints.trust import check_classes, check_kernel, import_paths, importing_only
from dft_lightning.checkpoints.whole import META, content_of, unreadable
from dft_lightning.cli.errors import shorten
from dft_lightning.component import NotPlainError, class_path, init_parameters, named_class, to_plain
from dft_lightning.errors import InputError, shortened
from dft_lightning.losses.base import FORWARD_OPTIONS, TokenLoss

_NONE: Any = object()
_GIVE_IT = "give it (--{key} {path}) if you trust it"
# Never taken from a checkpoint: how this run's processes share the model, what is measured (classes that are imported),
# and whether a stranger's code runs.
_OF_THIS_RUN = ("model.sharding", "model.evaluation.metrics", "model.loading.trust_remote_code")


@dataclass(frozen=True)
class SavedOptions:
    """What a checkpoint says of its run.

    Attributes:
        model: the module's arguments, in plain form.
        data: the data module's, without what is no setting.
    """

    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


def read_options(path: str | Path | None) -> SavedOptions:
    """The options that a checkpoint file, or a folder of shards, holds; none without a path. No tensor is read.

    Raises:
        InputError: it cannot be read.
    """
    if path is None or not (file := Path(path) / META if Path(path).is_dir() else Path(path)).is_file():
        return SavedOptions()  # "hpc", which Lightning resolves, or shards of another program
    try:
        content = content_of(file)
    except Exception as error:  # a cut file raises whatever the unpickler stumbled on
        raise InputError(f"--ckpt_path: {path} is cut short or no checkpoint: {unreadable(error)}") from error
    found = (content.get(f"{of}hyper_parameters") or {} for of in ("", "datamodule_"))
    return SavedOptions(*({name: value for name, value in each.items() if name[:1] != "_"} for each in found))


# -- which count ---------------------------------------------------------------------------------------------------


def defaults_of(
    saved: SavedOptions, options: Namespace, parser: Any
) -> tuple[dict[str, Any], dict[str, InputError], set[str]]:
    """The checkpoint's values of ``model`` options that the run has otherwise, as defaults of the parser.

    Args:
        saved: the options of the checkpoint's run.
        options: of this run, as parsed.
        parser: of both, which raises its errors.

    Returns:
        Values by dotted key, classes with all their options; why the value of a key cannot be taken: the option has to
        be given then; and the import paths of both, for :func:`importing_only`.
    """
    named, paths = import_paths(options.model), import_paths(options)  # by the command and its configs
    found: dict[str, Any] = {}
    refused: dict[str, InputError] = {}
    for key, own, value in _leaves(options.model, saved.model, "model"):
        if _normal(own) in (_NONE, value):
            continue
        try:
            paths |= _check_taken(key, value, named)
            with importing_only(paths):
                value = parser.parse_object({key: value}, options)[key]
            value = value.as_dict() if isinstance(value, Namespace) else value
            check_classes(value, key, _GIVE_IT, named)  # a text may have named one that the trainer has
            found[key] = value
        except InputError as error:
            refused[key] = error
        except ArgumentError as error:
            refused[key] = of_the_checkpoint(error, parser)
    return found, refused, paths


def of_the_checkpoint(error: ArgumentError, parser: Any) -> InputError:
    """What to say where the parser does not take a checkpoint's value."""
    return InputError(f"{shorten(str(error), parser)} (the checkpoint's run had it; give what is to be in its place)")


def _check_taken(key: str, value: Any, named: Collection[str]) -> set[str]:
    if isinstance(value, dict) and isinstance(value.get("init_args"), str):
        raise InputError(
            f"{key}: not given, and the checkpoint holds only that its run had {value['class_path']}, whose options "
            f"were {value['init_args']}: give it"
        )
    if key == "model.loading.attn_implementation":
        check_kernel(value, key, "give it if you trust it")
    return check_classes(value, key, _GIVE_IT, named)


def _leaves(own: Any, saved: dict[str, Any], key: str) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, the run's value and the checkpoint's of each option that is none of :data:`_OF_THIS_RUN`."""
    for name, value in saved.items():
        inner = f"{key}.{name}"
        if name not in own or inner in _OF_THIS_RUN:
            continue
        if isinstance(own[name], Namespace) and "class_path" not in own[name]:  # a group, or it was no group once
            yield from _leaves(own[name], value if isinstance(value, dict) else {}, inner)
        else:
            yield inner, own[name], _normal(value)


# -- what is said --------------------------------------------------------------------------------------------------


def taken(before: Any, after: Any) -> list[str]:
    """A line for each option that is now the checkpoint's.

    Args:
        before: the run's ``model`` options.
        after: the same with those of the checkpoint in them.
    """
    return [
        f"{key}: {_shown(now)}, as the checkpoint's run had it (not given; it would be {_shown(default)})"
        for key, default, now in _differences(_normal(before), _normal(after), "model")
    ]


def differing(key: str, own: Any, saved: dict[str, Any]) -> list[str]:
    """A line for each option that is not what the checkpoint's run had.

    Args:
        key: ``"model"`` or ``"data"``.
        own: what the run's module or data module keeps of its arguments.
        saved: the same, of the checkpoint's run.
    """
    mine = {name: _normal(value) for name, value in own.items() if name in saved}
    old = {f"{key}.{name}" for name in saved if name not in mine}
    lines = []
    for name, of_mine, of_saved in _differences(mine, _normal(saved), key):
        shown = "no such option here" if name in old else _shown(of_mine)
        lines.append(f"{name}: {shown} (the checkpoint's run had {_shown(of_saved)})")
    return lines


def _differences(one: Any, other: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key and values of each leaf that differs; two classes of their own are one leaf."""
    if one is not _NONE and other is not _NONE and one == other:
        return
    if isinstance(one, dict) and isinstance(other, dict):
        if "class_path" in one or "class_path" in other:
            arguments = (one.get("init_args"), other.get("init_args"))
            if one.get("class_path") == other.get("class_path") and all(isinstance(each, dict) for each in arguments):
                yield from _differences(*arguments, key)
                return
        else:
            for name in [*one, *(name for name in other if name not in one)]:
                yield from _differences(one.get(name, _NONE), other.get(name, _NONE), f"{key}.{name}")
            return
    yield key, one, other


def _shown(value: Any) -> str:
    """As a config or a flag would say it."""
    if value is _NONE:
        return "none"
    if isinstance(value, dict) and "class_path" in value:
        package, _, name = value["class_path"].rpartition(".")
        name = name if package.startswith("dft_lightning.") else value["class_path"]
        arguments, defaults = value.get("init_args", {}), _defaults_of(named_class(value["class_path"]))
        if not isinstance(arguments, dict):
            return f"{name} ({arguments})"
        given = [f"{k}={_shown(v)}" for k, v in arguments.items() if k not in defaults or defaults[k] != v]
        return shortened(f"{name}({', '.join(given)})" if given else name, 200)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return shortened(str(value), 200)


# -- one form for equal values -------------------------------------------------------------------------------------


def _normal(value: Any) -> Any:
    """A value as a checkpoint holds it, classes by their full path and with all their options."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    try:
        return _filled(to_plain(value))
    except NotPlainError:
        return _NONE


def _filled(value: Any) -> Any:
    if isinstance(value, list):
        return [_filled(each) for each in value]
    if not isinstance(value, dict):
        return value
    values = {name: _filled(each) for name, each in value.items()}
    if not isinstance(value.get("class_path"), str) or not set(value) <= {"class_path", "init_args"}:
        return values
    cls, arguments = named_class(value["class_path"]), values.get("init_args") or {}
    if cls is not None and isinstance(arguments, dict):
        arguments = {**_defaults_of(cls), **arguments}
        if issubclass(cls, TokenLoss):  # a module has these at their defaults, and no config gives them
            arguments = {name: each for name, each in arguments.items() if name not in FORWARD_OPTIONS}
    return {"class_path": value["class_path"] if cls is None else class_path(cls), "init_args": arguments}


def _defaults_of(cls: type | None) -> dict[str, Any]:
    """A class's options and their defaults, as far as they have a plain form."""
    parameters = {} if cls is None else init_parameters(cls)
    defaults = {name: _normal(each.default) for name, each in parameters.items() if each.default is not each.empty}
    return {name: default for name, default in defaults.items() if default is not _NONE}
