"""What the model is asked: a split's prompts, in the form that ``fit`` reads back to the same tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from dft_lightning.data import InstructionDataModule
from dft_lightning.data.forms import Conversation, RowColumns, convert_row, recognise_form
from dft_lightning.data.messages import Conversations, Problems, load_conversation
from dft_lightning.data.sources import FirstRows, as_source
from dft_lightning.data.tokens import ConversationEncoder, attempt
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
        columns: how ``fit`` reads the lines.
        digest: of all that decides what lines say beside the model's own words.
    """

    rows: Conversations
    ids: list[IntArray]
    columns: RowColumns
    digest: str

    def __len__(self) -> int:
        return len(self.ids)

    def question(self, index: int) -> dict[str, Any]:
        """The columns of a line that ask: the prompt, and ``tools`` where there are some."""
        return question_of(self._conversation(index), self.columns)

    def answer(self, index: int) -> str | None:
        """What a completion is scored against: the row's final assistant turn; ``None`` where it has none."""
        return answer_of(self._conversation(index))

    def answers(self) -> Iterator[str | None]:
        """Of all prompts in their order."""
        return map(self.answer, range(len(self)))

    def _conversation(self, index: int) -> Conversation:
        return load_conversation(self.rows.table[index]["conversation"])


def question_of(conversation: Conversation, columns: RowColumns) -> dict[str, Any]:
    """A row's prompt: a text where it is one message of a user, messages otherwise."""
    messages = conversation.messages
    before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    before = [{key: value for key, value in message.items() if key != "weight"} for message in before]
    alone = len(before) == 1 and before[0].keys() == {"role", "content"} and before[0]["role"] == "user"
    tools = {} if conversation.tools is None else {"tools": conversation.tools}
    return {columns.prompt: before[0]["content"] if alone else before, **tools}


def answer_of(conversation: Conversation) -> str | None:
    """A row's final assistant turn."""
    last = conversation.messages[-1] if conversation.messages else {"role": ""}
    return str(last["content"]) if last["role"] == "assistant" else None


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
    common = {name: config["data"][name] for name in ("system_prompt", "prompt_suffix")}
    data = data_of({**config, "data": {**config["data"], **dict.fromkeys(common)}}, classes)
    columns = replace(data.columns, form="prompt_completion", **common)
    check_columns(columns)
    data.streaming = False
    source = data.sources[split]
    divided = bool(data.validation_fraction) and split in ("train", "validation")
    if limit is not None and source is not None and not divided:
        data.sources[split] = FirstRows(as_source(source, "test" if split == "predict" else split), limit)
    rows, encoder = data.read_split(split)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    rows, ids = _encoded(rows, encoder, columns, skip=data.on_bad_rows == "skip")
    digest = hashlib.sha256(f"{rows.digest} {columns.prompt} {columns.completion}".encode())
    for tokens in ids:
        digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    return data, Prompts(rows, ids, columns, digest.hexdigest())


def check_columns(columns: RowColumns) -> None:
    """Whether lines with these columns are read as what they are.

    Raises:
        InputError: names the option.
    """
    names = (columns.prompt, columns.completion, "tools", *KEYS)
    for option, name in (("prompt_column", columns.prompt), ("completion_column", columns.completion)):
        if names.count(name) > 1:
            raise InputError(f"data.{option}: {name} is another column of the samples: rename it by rename_columns")
    if columns.weight not in (None, "reward"):
        raise InputError(
            f"data.weight_column: {columns.weight} leaves the samples' reward out, so that wrong answers were learnt "
            "as right ones: leave it out, or set reward"
        )
    if recognise_form(dict.fromkeys(names), replace(columns, form="auto")) != "prompt_completion":
        raise InputError(
            f"data.prompt_column: rows with the columns {columns.prompt} and {columns.completion} are not read as "
            "prompt and completion: rename them by rename_columns"
        )


def _encoded(
    rows: Conversations, encoder: ConversationEncoder, columns: RowColumns, skip: bool
) -> tuple[Conversations, list[IntArray]]:
    """Rows that have a prompt, and its tokens: those that ``fit`` makes of the line."""
    ids: list[IntArray] = []
    kept: list[int] = []
    problems = Problems(rows.name)
    for place, (conversation, number) in enumerate(zip(rows, rows.numbers, strict=True)):
        if conversation.text is not None:
            raise InputError(f"{rows.name}: plain text has no prompt to generate from: give rows of another form")
        line = {**question_of(conversation, columns), columns.completion: "."}  # any: a prompt ends before it
        found = attempt(encoder.prompt, convert_row(line, "prompt_completion", columns, "any"))
        if isinstance(found, InputError):
            problems.add(number, found)
        else:
            ids.append(np.array(found[1], np.int32))
            kept.append(place)
    if problems.count and (not skip or not ids):
        raise InputError(problems.report(len(rows)))
    if problems.count:
        rank_zero_warn(f"data.on_bad_rows: skip\n{problems.report(len(rows))}")
        rows = rows.select(kept)
    return rows, ids


def jobs_by_length(lengths: Sequence[int], k: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """Batches of (prompt, sample): prompts of about the same length together, longest first, ``k`` samples of each.

    A fixed function of its arguments, so that a run that was stopped knows what is left.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    jobs = [(index, sample) for index in order for sample in range(k)]
    return [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
