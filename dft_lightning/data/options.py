"""The groups of options of the data module; their docstrings are their documentation."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from dft_lightning.component import Component, from_plain, group_of
from dft_lightning.errors import check_one_of

RowFormName = Literal["auto", "prompt_completion", "alpaca", "messages", "sharegpt", "preference", "text"]
OnBadRows = Literal["raise", "skip"]
TrainTurns = Literal["all", "each", "last"]
Packing = Literal["bfd", "bfd_split"]

GROUPS = ("rows", "text", "batches", "streaming")
"""Names of the arguments that are groups of options."""


class RowForm(Component):
    """Makes of a row of one's own one in a form that is known. Subclass and write :meth:`read`."""

    _to_write = ("read",)

    def read(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row in one of the known forms: ``messages``, ``prompt`` and ``completion``, and so on.

        With ``tools``, ``weight``, ``chat_template_kwargs`` and the other columns of such a form, where it has them.
        What the row itself has beside is its own business, and nothing is said of it.

        Raises:
            ValueError: the row is bad; the message says why, beginning with the column.
        """
        raise NotImplementedError  # a class without it is not made


@dataclass(frozen=True)
class RowOptions:
    """How rows are read.

    Attributes:
        form: ``"auto"`` recognises the form by the first row's columns; or ``"prompt_completion"``, ``"alpaca"``,
            ``"messages"``, ``"sharegpt"``, ``"preference"`` or ``"text"``; or a subclass of ``RowForm`` that makes one
            of these of a row.
        prompt_column: column of the prompt: a text, or a list of messages.
        completion_column: column of the completion, likewise.
        messages_column: column of the messages.
        text_column: column of plain text.
        weight_column: column of the rows' weights, where they have it; ``None`` recognises ``weight``, ``reward`` and
            ``advantage``, which alone may be negative.
        system_prompt: system message of the rows that have none, in training and generation.
        prompt_suffix: what every user message ends with, in training and generation.
        on_bad_rows: ``"raise"``, or ``"skip"`` to leave out rows that cannot be read, rendered or masked; they are
            counted, and the first ten shown.
    """

    form: RowFormName | RowForm = "auto"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    messages_column: str = "messages"
    text_column: str = "text"
    weight_column: str | None = None
    system_prompt: str | None = None
    prompt_suffix: str | None = None
    on_bad_rows: OnBadRows = "raise"

    def __post_init__(self) -> None:
        if isinstance(self.form, dict):  # of a checkpoint
            object.__setattr__(self, "form", from_plain(self.form, RowForm))
        if not isinstance(self.form, RowForm):
            check_one_of("form", self.form, get_args(RowFormName))
        check_one_of("on_bad_rows", self.on_bad_rows, get_args(OnBadRows))


@dataclass(frozen=True)
class TextOptions:
    """How conversations become tokens, and which of these are learnt.

    Attributes:
        tokenizer: hub name, local folder or ``asset://NAME``; ``None`` takes the model's.
        chat_template: Jinja text or ``.jinja`` file in place of the tokenizer's own.
        chat_template_kwargs: further variables of the chat template, such as ``enable_thinking``.
        date: the day, as ``YYYY-MM-DD``, that a template is told which writes today's date; ``None`` for today.
        allow_special_tokens: let rows spell special tokens (``<|im_end|>``) as control; a list of some allows these
            alone. Otherwise they are text.
        max_length: rows longer than this keep their first ``max_length`` tokens; a row with no target left is
            dropped and counted.
        train_turns: learn ``"all"`` assistant turns of a conversation, or the ``"last"`` alone; ``"each"`` makes a row
            of each, which ends in that turn and has the ones before it as the model meets them in use.
        prompt_weight: weight of the tokens that no assistant turn has; 0 does not learn them.
        span_weights: weights, from 0 on, of what regular expressions find in assistant turns; they multiply the
            turn's own.
        train_empty_thoughts: learn to write thoughts that are empty (``<think></think>``), too.
    """

    tokenizer: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    date: str | None = None
    allow_special_tokens: bool | list[str] = False
    max_length: int | None = None
    train_turns: TrainTurns = "all"
    prompt_weight: float = 0.0
    span_weights: dict[str, float] | None = None
    train_empty_thoughts: bool = False

    def __post_init__(self) -> None:
        check_one_of("train_turns", self.train_turns, get_args(TrainTurns))
        check_positive(max_length=self.max_length)
        weights = {"prompt_weight": self.prompt_weight, **(self.span_weights or {})}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name}: a weight must be a number from 0 on, got {weight}")
        for pattern in self.span_weights or {}:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"span_weights: {pattern!r} is no regular expression: {error}") from error
        try:
            json.dumps(self.chat_template_kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(f"chat_template_kwargs: a value that JSON does not hold: {error}") from error
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError as error:
                raise ValueError(f"date: expected a day such as 2026-01-31, got {self.date!r}") from error


@dataclass(frozen=True)
class BatchOptions:
    """How tokenised rows become batches.

    The rows of an optimizer step are dealt to ranks and micro-batches by their tokens, so that ranks hardly wait for
    each other: the step's gradient is the same however they are dealt.

    Attributes:
        packing: pack the training rows into rows of ``text.max_length`` tokens, best-fit decreasing: ``"bfd"`` cuts
            longer rows off, ``"bfd_split"`` into pieces. ``batch_size`` then counts packed rows. They stay separate
            documents.
        padding_free: join the rows of a micro-batch into one instead of padding them; they stay separate documents to
            the model, which is checked. ``model.loading.attn_implementation`` should be ``documents`` or a flash
            attention.
        group_by_length: let training batches have rows of about the same length.
        max_tokens: at most so many tokens in a micro-batch, padding included, and any number of rows: those of a step,
            ``global_batch_size``, are cut into as many micro-batches as the largest step needs, the same number on
            every rank. ``batch_size`` then counts in validation alone. ``None`` makes micro-batches of ``batch_size``.
        pad_to_multiple_of: batch lengths are rounded up to a multiple of this.
        shuffle: a new row order in each epoch, by ``seed``; the same for any number of ranks.
        seed: of the order and, unless ``split_seed`` is given, of the split.
        split_seed: of the split by ``validation_fraction``.
    """

    packing: Packing | None = None
    padding_free: bool = False
    group_by_length: bool = False
    max_tokens: int | None = None
    pad_to_multiple_of: int = 1
    shuffle: bool = True
    seed: int = 0
    split_seed: int | None = None

    def __post_init__(self) -> None:
        check_one_of("packing", self.packing, (None, *get_args(Packing)))
        check_positive(pad_to_multiple_of=self.pad_to_multiple_of, max_tokens=self.max_tokens)
        if self.packing is not None and self.group_by_length:
            raise ValueError("packed rows are all of one length: leave group_by_length out")
        if self.max_tokens is not None and (self.packing is not None or self.group_by_length):
            raise ValueError(
                "max_tokens makes micro-batches of rows of like lengths: leave group_by_length out, and packing, whose "
                "rows are all of one length"
            )
        if self.padding_free and self.pad_to_multiple_of != 1:
            raise ValueError("padding_free batches have nothing to pad: leave pad_to_multiple_of at 1")

    @property
    def seed_of_split(self) -> int:
        """Of the division by ``validation_fraction``."""
        return self.seed if self.split_seed is None else self.split_seed


@dataclass(frozen=True)
class StreamOptions:
    """How training rows are read as training goes, pass after pass, without a cache.

    Attributes:
        shuffle_buffer_size: rows among which the next is drawn, for each worker.
        pack_buffer_size: rows that are packed together.
    """

    shuffle_buffer_size: int = 10_000
    pack_buffer_size: int = 1000

    def __post_init__(self) -> None:
        check_positive(shuffle_buffer_size=self.shuffle_buffer_size, pack_buffer_size=self.pack_buffer_size)


def whole_options(values: dict[str, Any]) -> dict[str, Any]:
    """A data module's arguments as they are kept, with all that was left out of a group."""
    whole: dict[str, Callable[[Any], Any]] = {
        "rows": partial(group_of, RowOptions, key="rows"),
        "text": partial(group_of, TextOptions, key="text"),
        "batches": partial(group_of, BatchOptions, key="batches"),
        "streaming": lambda given: None if given is None else group_of(StreamOptions, given, "streaming"),
    }
    return {name: whole[name](value) if name in whole else value for name, value in values.items()}


def check_positive(**values: int | None) -> None:
    """Whole numbers from 1 on, or ``None``.

    Raises:
        ValueError: another.
    """
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_together(
    text: TextOptions,
    batches: BatchOptions,
    streaming: StreamOptions | None,
    *,
    validation: Any,
    forgetting: Any,
    validation_fraction: float,
    num_workers: int,
    global_batch_size: int | None,
) -> None:
    """What each group cannot see by itself.

    Raises:
        ValueError: options that contradict each other, or are out of range.
    """
    if batches.packing is not None and (text.max_length is None or text.max_length < 2):
        raise ValueError(f"packing needs max_length, the tokens of a packed row, at least 2; got {text.max_length}")
    if streaming is not None and (batches.group_by_length or validation_fraction):
        raise ValueError(
            "a stream has no known rows to group or divide: leave group_by_length and validation_fraction out, and "
            "give validation"
        )
    if batches.max_tokens is not None and (streaming is not None or global_batch_size is None):
        raise ValueError(
            "max_tokens cuts the rows of a step into micro-batches: set global_batch_size, the rows of a step, and "
            "leave streaming out"
        )
    if num_workers < 0:
        raise ValueError(f"num_workers must not be negative, got {num_workers}")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie in [0, 1), got {validation_fraction}")
    if forgetting is not None and validation is None and not validation_fraction:
        raise ValueError("forgetting is a second validation set: give validation or validation_fraction as well")
    if validation_fraction and validation is not None:
        raise ValueError("give validation or validation_fraction, not both")
