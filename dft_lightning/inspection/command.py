"""The command ``inspect``: a fit config's rows, without its model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dft_lightning.data import InstructionDataModule
from dft_lightning.data.rows.sources import FirstRows, as_source
from dft_lightning.data.text.tokenizer import end_of_turn
from dft_lightning.errors import InputError
from dft_lightning.files import write_text
from dft_lightning.fit.config import FitConfig, Split, data_of, fit_arguments, read_fit
from dft_lightning.fit.own_classes import Classes
from dft_lightning.inspection.summary import summarise

if TYPE_CHECKING:
    from rich.console import Console

STAGES = {"train": "fit", "validation": "validate", "forgetting": "validate", "test": "test", "predict": "predict"}
_OF_A_STREAM = 1000
_PAGE_WIDTH = 120


def inspect(
    split: Split = "train",
    rows: int = 3,
    first: int = 1,
    limit: int | None = None,
    output: Path | None = None,
    *,
    fit: FitConfig,
) -> None:
    """Show rows of a fit config as the model will see them, and count them. No model is loaded.

    Learnt tokens are in colour, or in ⟦brackets⟧ where there is none, after their weight where it is not 1. Where a row
    spells a special token as text, it stands in ⟪text:...⟫; in colour, those that are control are bold and underlined.
    All other options are those of fit.

    Args:
        split: which rows
        rows: how many to show
        first: the first of them, from 1
        limit: read only the first rows (of a stream: 1000)
        output: write the same as a page, FILE.html, over an older one
        fit: whose rows; in Python a config's file, a dict of its keys, or a list of these, later ones over earlier ones

    Raises:
        InputError: anything wrong with the input.
    """
    from dft_lightning.inspection.console import new_console
    from dft_lightning.inspection.show import show_counts, show_row

    _check_numbers(rows, first, limit)
    output = None if output is None else Path(output)
    _check_page(output)
    fit = fit_arguments(fit)
    data = load(read_fit(fit), split, limit, fit.classes)
    table, tokenizer = data.splits.tokenized(split), data.tokenizer
    assert tokenizer is not None
    turn_end = end_of_turn(tokenizer, data.text.chat_template_kwargs)
    if rows and first > len(table):
        raise InputError(f"--first: there is no row {first}: {split} has {len(table)} to show")
    shown = [table[i] for i in range(first - 1, min(first - 1 + rows, len(table)))]
    summary = summarise(data, split)

    def show(console: Console) -> None:
        for row in shown:
            title = f"{split} row {json.loads(row['number'])}"
            show_row(console, tokenizer, row, title, turn_end[0] if turn_end else None)
        show_counts(console, data, split, summary)
        if limit is not None and data.validation_fraction:
            console.print(f"of the first {limit} rows alone: fit divides all of them, and otherwise")

    if output is not None:  # before a reader of the terminal's text, such as head, may leave
        page = new_console(file=io.StringIO(), record=True, width=_PAGE_WIDTH, force_terminal=True, no_color=False)
        show(page)
        write_text(output, page.export_html())
    show(new_console())


def _check_numbers(rows: int, first: int, limit: int | None) -> None:
    for name, value, least in (("rows", rows, 0), ("first", first, 1), ("limit", limit, 1)):
        if value is not None and value < least:
            raise InputError(f"--{name} must be at least {least}, got {value}")


def _check_page(output: Path | None) -> None:
    if output is None:
        return
    if output.suffix not in (".html", ".htm"):  # it would go over a file of rows, say
        raise InputError(f"--output must end in .html, got {output}")
    if output.is_dir():
        raise InputError(f"--output: {output} is a folder")
    if not output.parent.is_dir():
        raise InputError(f"--output: no such folder: {output.parent}")


def load(
    config: dict[str, Any], split: str, limit: int | None, classes: Classes | None = None
) -> InstructionDataModule:
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
    streaming = data.streaming is not None and split == "train"
    if streaming:
        limit, data.streaming = limit or _OF_A_STREAM, None
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
