"""What the model is asked: a split's prompts, in the form that ``fit`` reads back to the same tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from dft_lightning.data import InstructionDataModule
from dft_lightning.data.options import RowOptions
from dft_lightning.data.rows.forms import Conversation, Reading, convert_row, recognise_form
from dft_lightning.data.rows.reading import Conversations, Problems
from dft_lightning.data.rows.sources import FirstRows, as_source
from dft_lightning.data.text.tokens import ConversationEncoder, attempt
from dft_lightning.errors import InputError
from dft_lightning.fit.config import data_of
from dft_lightning.fit.own_classes import Classes

IntArray = np.ndarray[Any, np.dtype[np.int32]]
# What a line has beside prompt, completion and tools; many a data set calls its completions "answer".
KEYS = ("gold_answer", "correct", "reward", "log_prob", "num_tokens", "finished", "index", "sample")


@dataclass(frozen=True)
class Prompts:
    """Prompts of a split. Texts stay on disk.

    Attributes:
        rows: their conversations, without what the data options put into every one.
        ids: tokens of each prompt as the model is given it.
        options: how ``fit`` reads the lines.
        digest: of all that decides what lines say beside the model's own words.
    """

    rows: Conversations
    ids: list[IntArray]
    options: RowOptions
    digest: str

    def __len__(self) -> int:
        return len(self.ids)

    def question(self, index: int) -> dict[str, Any]:
        """The columns of a line that ask: the prompt, and ``tools`` where there are some."""
        return question_of(self.rows[index], self.options)

    def answer(self, index: int) -> str | None:
        """What a completion is scored against: the row's final assistant turn; ``None`` where it has none."""
        return self.rows[index].answer

    def answers(self) -> Iterator[str | None]:
        """Of all prompts in their order."""
        return map(self.answer, range(len(self)))


def question_of(conversation: Conversation, options: RowOptions) -> dict[str, Any]:
    """A row's prompt: a text where it is one message of a user, messages otherwise; with its tools and variables."""
    *before, last = conversation.messages
    begun = last["content"][: last.get("prefix_length", 0)]  # of the answer, where the prompt begins it
    if last["role"] != "assistant":
        before = [*before, last]
    elif begun:
        before = [*before, {"role": "assistant", "content": begun}]
    before = [{key: value for key, value in message.items() if key not in _WEIGHTS} for message in before]
    alone = len(before) == 1 and before[0].keys() == {"role", "content"} and before[0]["role"] == "user"
    others = {"tools": conversation.tools, "chat_template_kwargs": conversation.template_kwargs}
    prompt = {options.prompt_column: before[0]["content"] if alone else before}
    return prompt | {column: value for column, value in others.items() if value is not None}


_WEIGHTS = ("weight", "content_weights")


def read_prompts(
    config: dict[str, Any], split: str, limit: int | None, classes: Classes | None = None
) -> tuple[InstructionDataModule, Prompts]:
    """The data module of a whole ``fit`` config, with its tokenizer, and a split's prompts.

    Args:
        config: of the fit.
        split: which rows.
        limit: take the first so many.
        classes: of the command.

    Raises:
        InputError: no such rows, bad ones, or ones without a prompt; columns that lines have for something else.
    """
    # What is put into every row is put in by ``fit`` again: lines are without.
    rows_of = config["data"]["rows"]
    common = {name: rows_of[name] for name in ("system_prompt", "prompt_suffix")}
    data = data_of({**config, "data": {**config["data"], "rows": {**rows_of, **dict.fromkeys(common)}}}, classes)
    options = replace(data.rows, form="prompt_completion", **common)
    check_columns(options)
    data.streaming = None
    source = data.sources[split]
    divided = bool(data.validation_fraction) and split in ("train", "validation")
    if limit is not None and source is not None and not divided:
        data.sources[split] = FirstRows(as_source(source, "test" if split == "predict" else split), limit)
    rows, encoder = data.splits.read(split), data.splits.encoder(split)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    rows, ids = _encoded(rows, encoder, options)
    digest = hashlib.sha256(f"{rows.digest} {options.prompt_column} {options.completion_column}".encode())
    for tokens in ids:
        digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    return data, Prompts(rows, ids, options, digest.hexdigest())


def check_columns(options: RowOptions) -> None:
    """Whether lines with these columns are read as what they are.

    Raises:
        InputError: names the option.
    """
    names = (options.prompt_column, options.completion_column, "tools", "chat_template_kwargs", *KEYS)
    for option, name in (("prompt_column", options.prompt_column), ("completion_column", options.completion_column)):
        if names.count(name) > 1:
            raise InputError(
                f"data.rows.{option}: {name} is another column of the samples: rename it by rename_columns"
            )
    if options.weight_column not in (None, "reward"):
        raise InputError(
            f"data.rows.weight_column: {options.weight_column} leaves the samples' reward out, so that wrong answers "
            "were learnt as right ones: leave it out, or set reward"
        )
    if recognise_form(dict.fromkeys(names), replace(options, form="auto")) != "prompt_completion":
        raise InputError(
            f"data.rows.prompt_column: rows with the columns {options.prompt_column} and {options.completion_column} "
            "are not read as prompt and completion: rename them by rename_columns"
        )


def _encoded(
    rows: Conversations, encoder: ConversationEncoder, options: RowOptions
) -> tuple[Conversations, list[IntArray]]:
    """Rows that have a prompt, and its tokens: those that ``fit`` makes of the line."""
    ids: list[IntArray] = []
    kept: list[int] = []
    problems = Problems(rows.name)
    for place, (conversation, number) in enumerate(zip(rows, rows.numbers, strict=True)):
        if conversation.text is not None:
            raise InputError(f"{rows.name}: plain text has no prompt to generate from: give rows of another form")
        line = {**question_of(conversation, options), options.completion_column: "."}  # any: a prompt ends before it
        found = attempt(encoder.prompt, convert_row(line, "prompt_completion", Reading(options)))
        if isinstance(found, InputError):
            problems.add(number, found)
        else:
            ids.append(np.array(found[1], np.int32))
            kept.append(place)
    if problems.count and (options.on_bad_rows == "raise" or not ids):
        raise InputError(problems.report(len(rows)))
    if problems.count:
        rank_zero_warn(f"data.rows.on_bad_rows: skip\n{problems.report(len(rows))}")
        rows = rows.select(kept)
    return rows, ids


def jobs_by_length(lengths: Sequence[int], k: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """Batches of (prompt, sample): prompts of about the same length together, longest first, ``k`` samples of each.

    A fixed function of its arguments, so that a run that was stopped knows what is left.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    jobs = [(index, sample) for index in order for sample in range(k)]
    return [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
