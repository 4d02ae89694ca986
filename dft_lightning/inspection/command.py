"""The command ``inspect``: a fit config's rows, without its model."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dft_lightning.cli.errors import CommandParser
from dft_lightning.cli.own_classes import PACKAGE, Classes
from dft_lightning.data import InstructionDataModule
from dft_lightning.data.sources import FirstRows, as_source
from dft_lightning.errors import InputError
from dft_lightning.files import write_text
from dft_lightning.fit.command import quiet, report
from dft_lightning.fit.config import data_of, read_arguments
from dft_lightning.inspection.summary import summarise

if TYPE_CHECKING:
    from rich.console import Console

STAGES = {"train": "fit", "validation": "validate", "forgetting": "validate", "test": "test", "predict": "predict"}
_OF_A_STREAM = 1000
_PAGE_WIDTH = 120


def main(args: list[str], classes: Classes = PACKAGE) -> int:
    """Run the command, with classes of one's own or without; returns the exit status, 2 after one message on standard
    error where the input was wrong."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # rows have characters that not every encoding has
    parser = CommandParser(
        prog="python -m dft_lightning inspect",
        description="Show rows of a fit config as the model will see them, and count them. No model is loaded.",
        epilog="Learnt tokens are in colour, or in ⟦brackets⟧ where there is none, after their weight where it is not "
        "1. In colour, special tokens are bold and underlined where they are control, and not where a row spells them "
        "as text. Every other option is one of fit: --config FILE, --data.max_length 1024, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--split", choices=list(STAGES), default="train", help="which rows (default: train)")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="how many to show (default: 3)")
    parser.add_argument("--first", type=int, default=1, metavar="I", help="the first of them, from 1")
    parser.add_argument("--limit", type=int, metavar="N", help="read only the first N rows (of a stream: 1000)")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="write the same as a page, over an older one")
    options, of_fit = parser.parse_known_args(args)
    for name in ("rows", "first", "limit"):
        value = getattr(options, name)
        if value is not None and value < (0 if name == "rows" else 1):
            parser.error(f"--{name} must be at least {0 if name == 'rows' else 1}, got {value}")
    if options.output is not None:
        if options.output.suffix not in (".html", ".htm"):  # it would go over a file of rows, say
            parser.error(f"--output must end in .html, got {options.output}")
        if options.output.is_dir():
            parser.error(f"--output: {options.output} is a folder")
        if not options.output.parent.is_dir():
            parser.error(f"--output: no such folder: {options.output.parent}")
    quiet()
    try:
        inspect(options, of_fit, classes)
    except Exception as error:
        return report(error)
    return 0


def inspect(options: argparse.Namespace, of_fit: list[str], classes: Classes) -> None:
    """Load a split and show it.

    Args:
        options: the command's own.
        of_fit: arguments as ``fit`` takes them.
        classes: of the command.
    """
    from dft_lightning.inspection.show import new_console, show_counts, show_row

    data = load(read_arguments(["fit", *of_fit], classes), options.split, options.limit, classes)
    table, tokenizer = data.tokenized(options.split), data.tokenizer
    assert tokenizer is not None
    if options.rows and options.first > len(table):
        raise InputError(f"--first: there is no row {options.first}: {options.split} has {len(table)} to show")
    rows = [table[i] for i in range(options.first - 1, min(options.first - 1 + options.rows, len(table)))]
    summary = summarise(data, options.split)

    def show(console: Console) -> None:
        for row in rows:
            show_row(console, tokenizer, row, f"{options.split} row {json.loads(row['number'])}")
        show_counts(console, data, options.split, summary)
        if options.limit is not None and data.validation_fraction:
            console.print(f"of the first {options.limit} rows alone: fit divides all of them, and otherwise")

    if options.output is not None:  # before a reader of the terminal's text, such as head, may leave
        page = new_console(file=io.StringIO(), record=True, width=_PAGE_WIDTH, force_terminal=True, no_color=False)
        show(page)
        write_text(options.output, page.export_html())
    show(new_console())


def load(config: dict[str, Any], split: str, limit: int | None, classes: Classes = PACKAGE) -> InstructionDataModule:
    """The data module of a config with a split loaded, as ``fit`` would.

    Args:
        config: of a fit.
        split: which rows.
        limit: rows that are read at most.
        classes: of the command.

    Raises:
        InputError: as the data module's.
    """
    data = data_of(config, classes)
    streaming = data.streaming and split == "train"
    if streaming:
        limit, data.streaming = limit or _OF_A_STREAM, False
    # Where validation is a part of the training rows, those are read.
    origin = "train" if split == "validation" and data.validation_fraction else split
    source = data.sources[origin]
    if limit is not None and source is not None:
        source = as_source(source, "test" if origin == "predict" else origin)
        if streaming:
            source.stream()
        data.sources[origin] = FirstRows(source, limit)
    data.load(STAGES[split], only=split)
    return data
