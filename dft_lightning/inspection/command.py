"""The command ``inspect``: a fit config's rows, without its model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from dft_lightning.cli import Parser, quiet, user_message
from dft_lightning.compare.base_config import read_arguments
from dft_lightning.data import InstructionDataModule, RowSource
from dft_lightning.data.sources import Row, as_source
from dft_lightning.errors import InputError
from dft_lightning.inspection.summary import summarise

STAGES = {"train": "fit", "validation": "validate", "forgetting": "validate", "test": "test", "predict": "predict"}
_OF_A_STREAM = 1000


class FirstRows(RowSource):
    """The first rows of a source."""

    def __init__(self, source: RowSource, limit: int) -> None:
        self.source = source
        self.limit = limit

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def parts(self) -> list[str]:
        return self.source.parts

    def rows(self) -> Iterator[tuple[int | str, Row]]:
        return islice(self.source.rows(), self.limit)

    def rows_of_parts(self) -> Iterator[tuple[int, int | str, Row]]:
        return islice(self.source.rows_of_parts(), self.limit)


def main(args: list[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dft_lightning inspect",
        description="Show rows of a fit config as the model will see them, and count them. No model is loaded.",
        epilog="Every other option is one of fit: --config FILE, --data.max_length 1024, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--split", choices=list(STAGES), default="train", help="which rows (default: train)")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="how many to show (default: 3)")
    parser.add_argument("--first", type=int, default=1, metavar="I", help="the first of them, from 1")
    parser.add_argument("--limit", type=int, metavar="N", help="read only the first N rows (of a stream: 1000)")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="write the same as a page")
    options, of_fit = parser.parse_known_args(args)
    for name in ("rows", "first", "limit"):
        value = getattr(options, name)
        if value is not None and value < (0 if name == "rows" else 1):
            parser.error(f"--{name}: {value}")
    if options.output is not None and not options.output.parent.is_dir():
        parser.error(f"--output: no such folder: {options.output.parent}")
    quiet()
    try:
        inspect(options, of_fit)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        sys.stderr.write(f"error: {message}\n")
        return 2
    return 0


def inspect(options: argparse.Namespace, of_fit: list[str]) -> None:
    """Load a split and show it.

    Args:
        options: the command's own.
        of_fit: arguments as ``fit`` takes them.
    """
    from rich.console import Console

    from dft_lightning.inspection.show import show_counts, show_row

    data = load(read_arguments(["fit", *of_fit]), options.split, options.limit)
    console = Console(record=options.output is not None, soft_wrap=False)
    rows = data.tokenized(options.split)
    assert data.tokenizer is not None
    for i in range(options.first - 1, min(options.first - 1 + options.rows, len(rows))):
        number = json.loads(rows[i]["number"])
        show_row(console, data.tokenizer, rows[i], f"{options.split} row {number}")
    show_counts(console, data, options.split, summarise(data, options.split))
    if options.output is not None:
        console.save_html(str(options.output))


def load(config: dict[str, Any], split: str, limit: int | None) -> InstructionDataModule:
    """The data module of a config with a split loaded, as ``fit`` would.

    Args:
        config: of a fit.
        split: which rows.
        limit: rows that are read at most.

    Raises:
        InputError: as the data module's.
    """
    parser = Parser(exit_on_error=True)
    parser.add_class_arguments(InstructionDataModule, "data")
    data: InstructionDataModule = parser.instantiate_classes(parser.parse_object({"data": config["data"]})).data
    data.model_hparams = config["model"]
    if data.streaming and split == "train":
        limit, data.streaming = limit or _OF_A_STREAM, False
    if limit is not None and data.validation_fraction and split in ("train", "validation"):
        raise InputError("--limit: data.validation_fraction divides all the rows, not the first ones: leave it out")
    source = data.sources[split]
    if limit is not None and source is not None:
        data.sources[split] = FirstRows(as_source(source, "test" if split == "predict" else split), limit)
    data.load(STAGES[split], only=split)
    return data
