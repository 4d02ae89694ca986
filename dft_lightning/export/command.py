"""The command ``export``: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from dft_lightning.cli.errors import CommandParser
from dft_lightning.export.checkpoint import open_checkpoint
from dft_lightning.export.folder import DTYPES, OF_A_MODEL, check_shard_size, export_folder
from dft_lightning.files import check_replaceable
from dft_lightning.fit.command import quiet, report


def main(args: list[str]) -> int:
    """Run the command; returns the exit status, 2 after one message on standard error where the input was wrong."""
    parser = CommandParser(
        prog="python -m dft_lightning export",
        description="Write a checkpoint's model as a Hugging Face folder: safetensors, config, generation config, "
        "tokenizer with chat template, and a model card. Of a LoRA run: the adapter as peft reads it, or with --merge "
        "the whole.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="PATH",
        help="a checkpoint file, a folder of shards, or the folder of a run, of which the newest whole one is taken",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new folder, or an empty one")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is in the folder")
    parser.add_argument(
        "--merge", action="store_true", help="write a LoRA adapter and its base as one model (default: the adapter)"
    )
    parser.add_argument("--base", metavar="MODEL", help="the adapter's base, where the run's own is no longer there")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="with --merge, run code that comes with the base"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="convert to (default: as trained)")
    parser.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="of a file (default: 5GB)")
    options = parser.parse_args(args)
    quiet()
    try:
        # Before gigabytes are read.
        check_replaceable(options.output, options.overwrite, OF_A_MODEL, "--output")
        check_shard_size(options.max_shard_size)
        trained = open_checkpoint(options.checkpoint)
        parameters = export_folder(
            trained,
            options.output,
            dtype=options.dtype,
            overwrite=options.overwrite,
            max_shard_size=options.max_shard_size,
            merge=options.merge,
            base=options.base,
            trust_remote_code=options.trust_remote_code,
        )
    except Exception as error:
        return report(error)
    print(f"{options.output}: {parameters:,} parameters of {trained.path}, step {trained.global_step}")
    if not trained.record["tokenizer"]:
        print("without a tokenizer: the run had none, so save one there")
    return 0
