"""A trained model written as a Hugging Face folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from dft_lightning.errors import InputError, one_line
from dft_lightning.export.adapter import adapter_model, merged_model, save_adapter
from dft_lightning.export.card import model_card
from dft_lightning.export.checkpoint import TrainedCheckpoint
from dft_lightning.export.model import converted, end_turns, trained_model
from dft_lightning.files import check_replaceable, replacing_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DType = Literal["float32", "bfloat16", "float16", "float64"]
OF_A_MODEL = ("config.json", "adapter_config.json")
"""What a folder that may be replaced has one of."""


def export_folder(
    trained: TrainedCheckpoint,
    output: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    merge: bool = False,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Write safetensors, config, generation config, tokenizer with chat template, and a model card.

    The folder is made beside its place and moved there when it is whole. Tensors are bit for bit those of the
    checkpoint unless ``dtype`` is given; tied ones are written once. Of a checkpoint with an adapter, that alone is
    written as peft reads it, or with ``merge`` the model that it makes of its base.

    Args:
        trained: the checkpoint.
        output: the folder: a new one, an empty one or, with ``overwrite``, one that has a model.
        dtype: to convert floating-point tensors to.
        overwrite: replace a model folder.
        max_shard_size: of a safetensors file.
        merge: write base and adapter as one model.
        base: the adapter's base, where it is no longer at the name or folder that the run had it from.
        trust_remote_code: run code that comes with the base, whatever the checkpoint says of it.

    Returns:
        The number of parameters.

    Raises:
        InputError: the folder is there and not empty, the checkpoint is of no transformers model, there is no adapter
            to merge, or its base is not the one that it was trained on.
    """
    check_replaceable(output, overwrite, OF_A_MODEL, "--output")
    if trained.record["adapter"] is None and (merge or base is not None):
        option = "--merge" if merge else "--base"
        raise InputError(f"{option}: {trained.path} has no adapter, it holds the whole model: leave it out")
    wanted = None if dtype is None else getattr(torch, dtype)
    try:
        if trained.record["adapter"] is not None and not merge:
            return _write_adapter(trained, output, wanted, base)
        whole = trained.record["adapter"] is None
        model = trained_model(trained, wanted) if whole else merged_model(trained, base, wanted, trust_remote_code)
        return _write_model(trained, output, model, max_shard_size)
    except InputError:
        raise
    except Exception as error:  # whatever transformers, peft, safetensors and the disk raise
        raise InputError(f"{trained.path} cannot be written to {output}: {one_line(error)}") from error


def check_shard_size(size: str) -> None:
    """Raise ``InputError`` where it is none that transformers understands."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?(KB|MB|GB|TB)", size):
        raise InputError(f"max_shard_size: expected a size such as 5GB or 500MB, got {size!r}")


def _write_model(trained: TrainedCheckpoint, output: Path, model: PreTrainedModel, max_shard_size: str) -> int:
    end_turns(model, trained.record)
    count = sum(parameter.numel() for parameter in model.parameters())

    def save(folder: Path) -> None:
        model.save_pretrained(folder, max_shard_size=max_shard_size)

    return _write(trained, output, save, count, str(model.dtype))


def _write_adapter(trained: TrainedCheckpoint, output: Path, dtype: torch.dtype | None, base: str | None) -> int:
    model, config = adapter_model(trained, base)
    tensors = {name: converted(name, tensor, dtype) for name, tensor in trained.tensors.items()}
    count = sum(tensor.numel() for tensor in tensors.values())

    def save(folder: Path) -> None:
        save_adapter(folder, model, config, tensors)

    return _write(
        trained, output, save, count, str(next(iter(tensors.values())).dtype), str(config.base_model_name_or_path)
    )


def _write(
    trained: TrainedCheckpoint,
    output: Path,
    save: Callable[[Path], None],
    count: int,
    dtype: str,
    adapter_of: str | None = None,
) -> int:
    with replacing_folder(output) as folder:
        save(folder)
        for name, content in trained.record["tokenizer"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise InputError(f"{trained.path}: its tokenizer has a file outside of its folder: {name}")
            if (folder / name).exists():
                raise InputError(f"{trained.path}: its tokenizer has a file of the model's: {name}")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        card = model_card(trained, count, dtype, adapter_of)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return count
