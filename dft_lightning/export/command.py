"""The command ``export``: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from dft_lightning.export.checkpoint import open_checkpoint
from dft_lightning.export.folder import OF_A_MODEL, DType, check_shard_size, export_folder
from dft_lightning.files import check_replaceable


def export(
    checkpoint: Path,
    output: Path,
    overwrite: bool = False,
    merge: bool = False,
    base: str | None = None,
    trust_remote_code: bool = False,
    dtype: DType | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a checkpoint's model as a Hugging Face folder: safetensors, config, generation config, tokenizer with chat
    template, and a model card. Of a LoRA run: the adapter as peft reads it, or with ``--merge`` the whole.

    Args:
        checkpoint: a checkpoint file, a folder of shards, or a run's folder, of which the newest whole one is taken
        output: a new folder, or an empty one
        overwrite: replace a model that is in the folder
        merge: write a LoRA adapter and its base as one model, not the adapter alone
        base: the adapter's base, where the run's own is no longer there
        trust_remote_code: with ``--merge``, run code that comes with the base
        dtype: convert to; as trained by default
        max_shard_size: of a file

    Raises:
        InputError: no such checkpoint, or what is in its way.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    # Before gigabytes are read.
    check_replaceable(output, overwrite, OF_A_MODEL, "--output")
    check_shard_size(max_shard_size)
    trained = open_checkpoint(checkpoint)
    parameters = export_folder(
        trained,
        output,
        dtype=dtype,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        merge=merge,
        base=base,
        trust_remote_code=trust_remote_code,
    )
    print(f"{output}: {parameters:,} parameters of {trained.path}, step {trained.global_step}")
    if not trained.record["tokenizer"]:
        print("without a tokenizer: the run had none, so save one there")
