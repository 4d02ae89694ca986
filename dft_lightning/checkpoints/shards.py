"""What a folder of shards may have in it: torch reads its index and small values as pickles, which can run any code."""

from __future__ import annotations

import io
import pathlib
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from dft_lightning.checkpoints.whole import INDEX, unreadable, whole_problem
from dft_lightning.errors import InputError

_OF_AN_INDEX = {
    metadata: (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    filesystem: ("_StorageInfo", "_StoragePrefix"),
    torch: ("Size", "device"),
    torch.serialization: ("_get_layout",),
    pathlib: ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
}
_ALLOWED = {(module.__name__, name) for module, names in _OF_AN_INDEX.items() for name in names}
_ALLOWED |= {(f"pathlib.{part}", name) for part in ("_local", "_abc") for _, name in _ALLOWED if name.endswith("Path")}
_ALLOWED |= {("collections", "OrderedDict")}


class _IndexUnpickler(pickle.Unpickler):
    """Of what an index is made of, and of nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an index of shards")


class ShardReader(FileSystemReader):
    """torch's reader, which runs no code for an index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / INDEX).open("rb") as file:
            found = _IndexUnpickler(file).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"it is a {type(found).__name__}")
        if found.storage_meta is None:
            found.storage_meta = metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


def check_shards(folder: str | Path) -> None:
    """Refuse a folder of shards that would have code run or files beyond it read.

    Lightning's strategies read with torch's own reader, which unpickles the index and each value that is no tensor,
    whatever these hold. So the index is read by a reader that knows its classes alone, and each such value as
    ``torch.load`` reads it with ``weights_only``.

    Raises:
        InputError: it has anything else in it, or cannot be read.
    """
    try:
        found = ShardReader(folder).read_metadata()
        for index, place in found.storage_data.items():
            _check_place(Path(folder), place)
            if isinstance(found.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
                with (Path(folder) / place.relative_path).open("rb") as file:
                    file.seek(place.offset)
                    torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
    except Exception as error:  # whatever an unpickler stumbled on
        raise InputError(f"{folder} is cut short, or no checkpoint to open: {unreadable(error)}") from error


def guard_loading(strategy: Strategy) -> None:
    """Have a strategy load no checkpoint that would have code run.

    Lightning's own unpickle a folder's index and values, and FSDP1's a file, whatever ``weights_only`` is.
    """
    load = strategy.load_checkpoint
    if hasattr(load, "guarded"):
        return

    def load_checkpoint(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(checkpoint_path).is_dir():
            check_shards(checkpoint_path)
        elif isinstance(strategy, FSDPStrategy) and (problem := whole_problem(checkpoint_path)) is not None:
            raise InputError(f"{checkpoint_path} {problem}")
        return load(checkpoint_path, *args, **kwargs)

    load_checkpoint.guarded = True  # type: ignore[attr-defined]
    strategy.load_checkpoint = load_checkpoint  # type: ignore[method-assign]


def _check_place(folder: Path, place: Any) -> None:
    path = PurePosixPath(place.relative_path)
    if len(path.parts) != 1 or path.name == ".." or (folder / path).is_symlink():
        raise ValueError(f"it leads to {place.relative_path}, out of its folder")
    if place.transform_descriptors:
        raise ValueError(f"{path} is transformed by {place.transform_descriptors}")
