"""Rows to messages: the three row forms, and what can be wrong with a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from dft_lightning.data.files import BrokenRow
from dft_lightning.data.sources import RowSource
from dft_lightning.errors import InputError

Message = dict[str, str]
RowForm = Literal["auto", "prompt_completion", "alpaca", "messages"]

LastTurn = Literal["any", "assistant", "optional"]

ROLES = ("system", "user", "assistant")
MAX_SHOWN = 10


@dataclass(frozen=True)
class RowColumns:
    """How rows are read.

    Attributes:
        form: ``"auto"`` recognises the form by the first row's columns.
        prompt: column of the prompt.
        completion: column of the completion.
        messages: column of the messages.
    """

    form: RowForm = "auto"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"


@dataclass(frozen=True)
class Conversations:
    """Rows as messages.

    Attributes:
        name: of the source.
        numbers: of each row, as the source counts.
        messages: a list of ``{"role", "content"}`` per row.
    """

    name: str
    numbers: list[int | str]
    messages: list[list[Message]]

    def select(self, chosen: Sequence[int]) -> Conversations:
        """Some of the rows, by position."""
        return Conversations(self.name, [self.numbers[i] for i in chosen], [self.messages[i] for i in chosen])


class _BadRow(Exception):
    """What is wrong with a row, beginning with the column."""


def read_messages(source: RowSource, columns: RowColumns, *, last_turn: LastTurn = "any") -> Conversations:
    """Read a whole source as conversations.

    Args:
        source: where rows come from.
        columns: how they are read.
        last_turn: ``"any"`` needs an assistant turn somewhere (to learn), ``"assistant"`` needs it last (to score),
            ``"optional"`` needs none (to predict).

    Raises:
        InputError: no rows, or bad ones: names the source, row and column of up to ten, and how many there are.
    """
    conversations = Conversations(source.name, [], [])
    problems: list[str] = []
    convert: Callable[[dict[str, Any]], list[Message]] | None = None
    for number, row in source.rows():
        try:
            if isinstance(row, BrokenRow):
                raise _BadRow(row.reason)
            if convert is None:
                form = recognise_form(row, columns, source.name, last_turn != "optional")
                convert = partial(_CONVERT[form], columns=columns, last_turn=last_turn)
            conversations.messages.append(convert(row))
            conversations.numbers.append(number)
        except _BadRow as problem:
            problems.append(f"row {number}: {problem}")
    if problems:
        raise InputError(report_rows(source.name, problems, len(conversations.messages) + len(problems)))
    if not conversations.messages:
        raise InputError(f"{source.name}: no rows")
    return conversations


def report_rows(name: str, problems: list[str], total: int) -> str:
    """The first ten problems and how many there are."""
    shown = [f"  {problem}" for problem in problems[:MAX_SHOWN]]
    if len(problems) > MAX_SHOWN:
        shown.append(f"  ... and {len(problems) - MAX_SHOWN} more")
    return "\n".join([f"{name}: {len(problems)} of {total} rows are bad", *shown])


def recognise_form(row: dict[str, Any], columns: RowColumns, name: str, completion_required: bool = True) -> RowForm:
    """The form of a row by its columns, unless ``columns.form`` says it.

    Raises:
        InputError: the columns fit no form.
    """
    if columns.form != "auto":
        return columns.form
    if columns.messages in row:
        return "messages"
    if columns.prompt in row and (columns.completion in row or not completion_required):
        return "prompt_completion"
    if "instruction" in row and ("output" in row or not completion_required):
        return "alpaca"
    raise InputError(
        f"{name}: cannot tell the row form from the columns {sorted(row)}: expected {columns.messages!r}, or "
        f"{columns.prompt!r} and {columns.completion!r}, or 'instruction' and 'output'; "
        "name the columns by data.prompt_column and data.completion_column, or set data.row_form"
    )


def _text(row: dict[str, Any], column: str, *, required: bool = True, filled: bool = False) -> str:
    value = row.get(column)
    if value is None:
        if required:
            raise _BadRow(f"{column}: missing" if column not in row else f"{column}: null")
        return ""
    value = _string(value, column)
    if filled and not value.strip():
        raise _BadRow(f"{column}: empty")
    return value


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _BadRow(f"{where}: expected a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadRow(f"{where}: half a surrogate pair at character {error.start}, which is not text") from error
    return value


def _turns(prompt: str, completion: str) -> list[Message]:
    user = {"role": "user", "content": prompt}
    return [user, {"role": "assistant", "content": completion}] if completion else [user]


def _prompt_completion(row: dict[str, Any], columns: RowColumns, last_turn: LastTurn) -> list[Message]:
    needed = last_turn != "optional"
    completion = _text(row, columns.completion, required=needed, filled=needed)
    return _turns(_text(row, columns.prompt), completion)


def _alpaca(row: dict[str, Any], columns: RowColumns, last_turn: LastTurn) -> list[Message]:
    needed = last_turn != "optional"
    prompt = _text(row, "instruction")
    extra = _text(row, "input", required=False)
    output = _text(row, "output", required=needed, filled=needed)
    return _turns(f"{prompt}\n\n{extra}" if extra.strip() else prompt, output)


def _messages(row: dict[str, Any], columns: RowColumns, last_turn: LastTurn) -> list[Message]:
    column = columns.messages
    turns = row.get(column)
    if not isinstance(turns, list) or not turns:
        raise _BadRow(f"{column}: " + ("missing" if turns is None else "expected a list of at least one message"))
    messages = [_message(turn, f"{column}[{i}]") for i, turn in enumerate(turns)]
    if messages[0]["role"] == "assistant":
        raise _BadRow(f"{column}[0].role: a conversation cannot begin with the assistant")
    if last_turn != "optional" and not any(message["role"] == "assistant" for message in messages):
        raise _BadRow(f"{column}: no assistant message to learn from")
    if last_turn == "assistant" and messages[-1]["role"] != "assistant":
        raise _BadRow(f"{column}: must end in an assistant message, to score against")
    return messages


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise _BadRow(f"{where}: expected an object with role and content, got {type(turn).__name__}")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise _BadRow(f"{where}.role: expected one of {', '.join(ROLES)}, got {role!r}")
    content = _string(content, f"{where}.content")
    if role == "assistant" and not content.strip():
        raise _BadRow(f"{where}.content: empty")
    return {"role": role, "content": content}


_CONVERT: dict[str, Callable[..., list[Message]]] = {
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "messages": _messages,
}
