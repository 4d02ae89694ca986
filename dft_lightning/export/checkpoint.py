"""What is read of a checkpoint: weights and the record of the model, from one file or a folder of shards."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dft_lightning.checkpoints.whole import INDEX, META, checkpoints_below, unreadable, whole_problem, written
from dft_lightning.errors import InputError
from dft_lightning.foreign.torch import loading_alone
from dft_lightning.modules.resume.saved import RECORD

_PREFIX = "model."
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedCheckpoint:
    """A checkpoint's language model.

    Attributes:
        path: where it was read.
        tensors: by the model's own names; mapped from the file where it is one.
        record: see :meth:`dft_lightning.modules.resume.saved.Checkpoints.record`.
        hyper_parameters: of the module.
        global_step: optimizer steps behind the weights.
        epoch: as Lightning counts.
    """

    path: Path
    tensors: dict[str, Tensor]
    record: dict[str, Any]
    hyper_parameters: dict[str, Any]
    global_step: int
    epoch: int


def open_checkpoint(path: Path) -> TrainedCheckpoint:
    """Read a checkpoint file, a folder of shards, or the newest whole checkpoint below a run's folder.

    Raises:
        InputError: there is none; it is cut short, no checkpoint or one of another program.
    """
    if not path.exists():
        raise InputError(f"--checkpoint: no such file or folder: {path}")
    if path.is_file() or _is_sharded(path):
        return _read(path)
    problems = []
    for candidate in sorted(checkpoints_below(path), key=written, reverse=True):
        try:
            return _read(candidate)
        except InputError as error:
            problems.append(str(error))
            _logger.warning("passed over %s", error)
    if problems:
        raise InputError(f"--checkpoint: none of the {len(problems)} checkpoints in {path} is whole: {problems[0]}")
    raise InputError(f"--checkpoint: {path} has no checkpoint (*.ckpt), nor is it one in shards")


def _is_sharded(path: Path) -> bool:
    return (path / META).is_file() or (path / INDEX).is_file()


def _read(path: Path) -> TrainedCheckpoint:
    if (problem := whole_problem(path)) is not None:
        raise InputError(f"{path} {problem}")
    return _checked(path, *(_read_shards(path) if path.is_dir() else _read_file(path)))


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    content = _load(path, path)
    return content, content["state_dict"]


def _load(file: Path, path: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a cut file raises whatever the unpickler stumbled on
        raise InputError(f"{path} is cut short or no checkpoint: {unreadable(error)}") from error


def _read_shards(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The model's tensors, put together from all ranks' files; the optimizer's are not read."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    from dft_lightning.checkpoints.shards import ShardReader, check_shards

    content = _load(path / META, path)
    check_shards(path)
    try:
        reader = ShardReader(path)
        entries = reader.read_metadata().state_dict_metadata
        root = "state_dict." if any(name.startswith("state_dict.") for name in entries) else "model."  # FSDP2, FSDP1
        wanted = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if name.startswith(root + _PREFIX) and isinstance(entry, TensorStorageMetadata)
        }
        with loading_alone():
            load(wanted, storage_reader=reader, no_dist=True)
    except Exception as error:  # a file that is missing or cut raises whatever its reader stumbled on
        raise InputError(f"{path} is cut short or no checkpoint: {unreadable(error)}") from error
    return content, {name.removeprefix(root): tensor for name, tensor in wanted.items()}


def _checked(path: Path, content: dict[str, Any], state: dict[str, Tensor]) -> TrainedCheckpoint:
    record = content.get(RECORD)
    if not isinstance(record, dict):
        raise InputError(
            f"{path} has no record of its model: it is not of a CausalLMModule, or of a subclass whose "
            "on_save_checkpoint does not call super()"
        )
    return TrainedCheckpoint(
        path,
        language_model_tensors(state),
        {"adapter": None, **record},  # which older ones do not speak of
        dict(content.get("hyper_parameters", {})),
        int(content.get("global_step", 0)),
        int(content.get("epoch", 0)),
    )


def language_model_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a module's state dict has of its language model, by that one's own names."""
    return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
