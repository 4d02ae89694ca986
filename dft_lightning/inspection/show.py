"""Rows and counts on a terminal, or in a page."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dft_lightning.data.tokens import IGNORE_INDEX
from dft_lightning.inspection.summary import SplitSummary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dft_lightning.data import InstructionDataModule

_BINS = 12
_BAR = 40


def show_row(console: Console, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], title: str) -> None:
    """A row's tokens: what is learnt in colour, or in ⟦brackets⟧ where there is none, with weights that are not 1."""
    learnt = sum(label != IGNORE_INDEX for label in row["labels"])
    cut = ", truncated" if row["truncated"] else ""
    console.rule(f"{title}: {len(row['input_ids'])} tokens, {learnt} targets{cut}", align="left")
    text = Text(overflow="fold")
    for ids, weight in _passages(row):
        words = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        words = words.replace("\n", "↵\n")
        if weight is None:
            text.append(words, style="dim")
            continue
        of_weight = "" if weight == 1 else f"{weight:g}* "
        coloured = console.color_system is not None
        text.append(of_weight, style="bold yellow")
        text.append(words if coloured else f"⟦{words}⟧", style="black on green" if weight >= 1 else "black on yellow")
    console.print(text)


def _passages(row: dict[str, Any]) -> Iterator[tuple[list[int], float | None]]:
    """Tokens in a row that are learnt with the same weight; ``None`` for those that are not."""
    weights = row["weights"] or [1.0] * len(row["labels"])
    keys = [None if label == IGNORE_INDEX else weight for label, weight in zip(row["labels"], weights, strict=True)]
    place = 0
    for key, group in groupby(keys):
        size = len(list(group))
        yield row["input_ids"][place : place + size], key
        place += size


def show_counts(console: Console, data: InstructionDataModule, split: str, summary: SplitSummary) -> None:
    """Tables of rows, tokens and lengths, and what batches will look like."""
    counts = data.counts[split]
    console.rule(f"{split}: {counts.rows} rows read", align="left")
    to_length = "" if data.max_length is None else f" to {data.max_length} tokens"
    console.print(
        f"{counts.bad} bad and skipped, {counts.dropped} dropped without a target, "
        f"{counts.truncated} truncated{to_length}"
    )
    console.print(_sources_table(summary))
    console.print(_histogram(summary))
    if split == "train" and data.packs is not None and data.max_length is not None:
        packs = data.packs
        console.print(
            f"packed: {len(packs.pieces)} documents in {len(packs)} rows of {data.max_length} tokens, "
            f"{packs.efficiency(data.max_length):.2%} full"
        )
    elif data.padding_free:
        console.print("padding-free: rows are joined, none are padded")
    else:
        size = data.batch_size if split == "train" else data.eval_batch_size
        console.print(f"padded in batches of {size}: about {summary.padding(size):.0%} of the tokens are padding")


def _sources_table(summary: SplitSummary) -> Table:
    table = Table("source", "rows", "tokens", "targets", "of tokens", "mean weight")
    for source in [*summary.sources, *([summary.total] if len(summary.sources) > 1 else [])]:
        share = f"{source.targets / source.tokens:.1%}" if source.tokens else "-"
        weight = f"{source.weight / source.targets:.3g}" if source.targets else "-"
        table.add_row(source.name, f"{source.rows:,}", f"{source.tokens:,}", f"{source.targets:,}", share, weight)
    return table


def _histogram(summary: SplitSummary) -> Table:
    lengths = summary.lengths
    table = Table("tokens of a row", "rows", "", title=_quantiles(lengths), title_justify="left", title_style="")
    counts, edges = np.histogram(lengths, bins=min(_BINS, int(np.ptp(lengths)) + 1))
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "█" * round(_BAR * int(count) / int(counts.max()))
        last = int(np.floor(high)) if high == edges[-1] else int(np.ceil(high)) - 1
        table.add_row(f"{int(np.ceil(low))} to {last}", f"{count:,}", bar)
    return table


def _quantiles(lengths: Any) -> str:
    low, middle, high, most = (int(value) for value in np.quantile(lengths, [0, 0.5, 0.95, 1], method="nearest"))
    return f"shortest {low}, median {middle}, 95% up to {high}, longest {most}"
