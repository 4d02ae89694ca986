"""Rows and counts on a terminal, or in a page."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from dft_lightning.data.text.special_tokens import special_tokens
from dft_lightning.inspection.summary import SplitSummary
from dft_lightning.losses.base import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dft_lightning.data import InstructionDataModule

_BINS = 12
_BAR = 40
_BESIDE_BAR = 30
# What a terminal would obey is shown as a picture of it, and a line break as an arrow and a line break.
_CONTROLS = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "␡"}
_CONTROLS |= {code: f"\\x{code:x}" for code in range(0x80, 0xA0)} | {ord("\n"): "↵\n"}


def show_row(
    console: Console,
    tokenizer: PreTrainedTokenizerBase,
    row: dict[str, Any],
    title: str,
    turn_end: str | None = None,
) -> None:
    """A row's tokens: what is learnt in colour, or in ⟦brackets⟧ where there is none, with weights that are not 1.

    The name of a special token that is none here, but text, is ⟪text:...⟫. In colour, those that are control are bold
    and underlined.

    Args:
        console: to show it on.
        tokenizer: of the row.
        row: of a tokenised split.
        title: of it.
        turn_end: what ends a turn: control, whether or not the tokenizer calls it special.
    """
    learnt = sum(label != IGNORE_INDEX for label in row["labels"])
    cut = ", truncated" if row["truncated"] else ""
    console.rule(f"{title}: {len(row['input_ids'])} tokens, {learnt} targets{cut}", align="left")
    text = Text(overflow="fold")
    coloured = console.color_system is not None and not console.no_color
    special = special_tokens(tokenizer, turn_end)
    pieces = _named(list(_pieces(tokenizer, row, special)), special)
    before: float | None = None
    for weight, passage in groupby(pieces, lambda piece: piece.weight):
        style = "dim" if weight is None else "black on green" if weight >= 1 else "black on yellow"
        brackets = not coloured and weight is not None
        # Green beside green has no border.
        if weight not in (None, 1) or (coloured and weight == 1 and before not in (None, 1)):
            text.append(f"{weight:g}* ", style="bold yellow")
        text.append("⟦" if brackets else "")
        for piece in passage:
            control = "bold underline not dim" if piece.control else ""
            text.append(piece.text.translate(_CONTROLS), style=f"{style} {control}".strip())
        text.append("⟧" if brackets else "")
        before = weight
    console.print(text)


@dataclass(frozen=True)
class _Piece:
    """Tokens of a kind in a row: their text, their weight (``None`` where they are not learnt), whether control."""

    text: str
    weight: float | None
    control: bool


def _pieces(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], special: Container[int]) -> Iterator[_Piece]:
    ids, weights = row["input_ids"], row["weights"] or [1.0] * len(row["labels"])
    kinds = [
        (None if label == IGNORE_INDEX else weight, token in special)
        for token, label, weight in zip(ids, row["labels"], weights, strict=True)
    ]
    before, stop = "", 0
    for (weight, control), group in groupby(kinds):
        stop += len(list(group))
        # Of the row up to here: some tokenizers drop the space that a text begins with.
        through = str(tokenizer.decode(ids[:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        yield _Piece(through[len(before) :], weight, control)
        before = through


def _named(pieces: list[_Piece], special: dict[int, str]) -> Iterator[_Piece]:
    """The pieces, with the names of special tokens marked that are text, in whole or in part."""
    names = "|".join(map(re.escape, sorted(special.values(), key=len, reverse=True))) or "(?!)"
    whole = "".join(piece.text for piece in pieces)
    is_control = [piece.control for piece in pieces for _ in piece.text]
    spelled = [found for found in re.finditer(names, whole) if not all(is_control[found.start() : found.end()])]
    begin, end = {found.start() for found in spelled}, {found.end() - 1 for found in spelled}
    place = 0
    for piece in pieces:
        marked = (
            f"{'⟪text:' * (i in begin)}{character}{'⟫' * (i in end)}" for i, character in enumerate(piece.text, place)
        )
        yield replace(piece, text="".join(marked) if spelled else piece.text)
        place += len(piece.text)


def show_counts(console: Console, data: InstructionDataModule, split: str, summary: SplitSummary) -> None:
    """Tables of rows, tokens and lengths, and what batches will look like."""
    counts = data.splits.counts[split]
    console.rule(f"{split}: {counts.rows} rows read", align="left")
    to = "" if data.text.max_length is None else f" to {data.text.max_length} tokens"
    console.print(
        f"{counts.bad} bad and skipped, {counts.dropped} dropped without a target, {counts.truncated} truncated{to}"
    )
    console.print(_sources_table(summary))
    bar = "#" if console.options.ascii_only else "█"
    console.print(_histogram(summary, bar * min(_BAR, max(console.width - _BESIDE_BAR, 1))))
    if split == "train" and data.packs is not None and data.text.max_length is not None:
        packs = data.packs
        console.print(
            f"packed: {len(packs.pieces)} documents in {len(packs)} rows of {data.text.max_length} tokens, "
            f"{packs.efficiency(data.text.max_length):.2%} full"
        )
    elif data.batches.padding_free:
        console.print("padding-free: rows are joined, none are padded")
    elif split == "train" and data.batches.max_tokens is not None:
        limit = data.batches.max_tokens
        console.print(f"padded in micro-batches of at most {limit:,} tokens, rows of like lengths together")
    else:
        size = data.batch_size if split == "train" else data.eval_batch_size
        step = data.global_batch_size if split == "train" and data.global_batch_size else size
        share = summary.padding(size, max(step // size, 1) * size)
        console.print(f"padded in batches of {size}: about {share:.0%} of the tokens are padding")


def _sources_table(summary: SplitSummary) -> Table:
    table = Table(Column("source", overflow="fold"))
    for heading in ("rows", "tokens", "targets", "of tokens", "mean weight"):
        table.add_column(heading, justify="right", overflow="fold")
    for source in [*summary.sources, *([summary.total] if len(summary.sources) > 1 else [])]:
        share = f"{source.targets / source.tokens:.1%}" if source.tokens else "-"
        weight = f"{source.weight / source.targets:.3g}" if source.targets else "-"
        table.add_row(source.name, f"{source.rows:,}", f"{source.tokens:,}", f"{source.targets:,}", share, weight)
    return table


def _histogram(summary: SplitSummary, longest_bar: str) -> Table:
    lengths = summary.lengths
    table = Table("tokens of a row", "rows", "", title=_quantiles(summary), title_justify="left", title_style="")
    counts, edges = np.histogram(lengths, bins=min(_BINS, int(np.ptp(lengths)) + 1))
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = longest_bar[: round(len(longest_bar) * int(count) / int(counts.max()))]
        first, last = int(np.ceil(low)), int(np.floor(high) if high == edges[-1] else np.ceil(high) - 1)
        table.add_row(str(first) if first == last else f"{first} to {last}", f"{count:,}", bar)
    return table


def _quantiles(summary: SplitSummary) -> str:
    lengths, positions = summary.lengths, summary.positions
    low, middle, high, most = (int(value) for value in np.quantile(lengths, [0, 0.5, 0.95, 1], method="nearest"))
    found = f"shortest {low}, median {middle}, 95% up to {high}, longest {most}"
    if positions is None:
        return found
    longer = int((lengths > positions).sum())
    beyond = f", and {longer} row{'s are' if longer > 1 else ' is'} longer" if longer else ""
    return f"{found}; the model has {positions} positions{beyond}"
