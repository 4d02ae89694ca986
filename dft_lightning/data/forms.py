"""The forms of rows, each a function from a row to a conversation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from dft_lightning.data.references import read_reference
from dft_lightning.data.turns import BadRow, Message, as_text, as_weight, read_tools, read_turns

RowForm = Literal["auto", "prompt_completion", "alpaca", "messages", "sharegpt", "preference", "text"]
LastTurn = Literal["any", "assistant", "optional"]


@dataclass(frozen=True)
class RowColumns:
    """How rows are read.

    Attributes:
        form: ``"auto"`` recognises the form by the first row's columns.
        prompt: column of the prompt: a text, or a list of messages.
        completion: column of the completion, likewise.
        messages: column of the messages.
        text: column of plain text.
        weight: column of the row's weight, where a row has it; ``None`` recognises ``weight``, ``reward`` and
            ``advantage``.
        system_prompt: the system message of conversations that have none.
        prompt_suffix: what every user message ends with.
        weighted: whether rows and messages may have weights other than 1.
        unsigned: why an ``advantage`` may not be negative; empty where it may.
    """

    form: RowForm = "auto"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    text: str = "text"
    weight: str | None = None
    system_prompt: str | None = None
    prompt_suffix: str | None = None
    weighted: bool = True
    unsigned: str = ""


@dataclass(frozen=True)
class Conversation:
    """What a row says.

    Attributes:
        messages: dicts of ``role``, ``content``, what else a template reads, and a ``weight`` of assistant messages
            where it is not 1. Empty for plain text.
        tools: function schemas.
        text: plain text in place of messages.
        weight: of plain text.
        reference_log_prob: of the row's targets under a reference model, as
            :func:`~dft_lightning.data.references.read_reference` returns them; ``None`` where the row has none.
        reference_fingerprint: of the row as it was scored.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    weight: float = 1.0
    reference_log_prob: str | None = None
    reference_fingerprint: str | None = None


class UnknownForm(BadRow):
    """A row whose columns fit no form."""


def recognise_form(row: dict[str, Any], columns: RowColumns, completion_required: bool = True) -> RowForm:
    """The form of a row by its columns, unless ``columns.form`` says it.

    Raises:
        UnknownForm: the columns fit no form.
    """
    if columns.form != "auto":
        return columns.form
    if columns.messages in row:
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    if "chosen" in row:
        return "preference"
    if columns.prompt in row and (columns.completion in row or not completion_required):
        return "prompt_completion"
    if "instruction" in row and ("output" in row or not completion_required):
        return "alpaca"
    if columns.text in row:
        return "text"
    raise UnknownForm(
        f"cannot tell the row form from the columns {sorted(map(str, row))}: expected {columns.messages!r}, or "
        f"'conversations', or {columns.prompt!r} and {columns.completion!r}, or 'instruction' and 'output', or "
        f"'chosen', or {columns.text!r}; name the columns by data.prompt_column and data.completion_column, or set "
        "data.row_form"
    )


def convert_row(row: dict[str, Any], form: RowForm, columns: RowColumns, last_turn: LastTurn) -> Conversation:
    """A row as a conversation.

    Raises:
        BadRow: what is wrong with it.
    """
    conversation, reference = _converted(row, form, columns, last_turn), read_reference(row)
    if reference is None:
        return conversation
    return replace(conversation, reference_log_prob=reference[0], reference_fingerprint=reference[1])


def _converted(row: dict[str, Any], form: RowForm, columns: RowColumns, last_turn: LastTurn) -> Conversation:
    weight = _row_weight(row, columns)
    if weight == 0 and last_turn == "any":
        last_turn = "optional"  # nothing of it is learnt: a sampled answer may be empty, and is wrong
    if form == "text":
        if last_turn != "any":
            raise BadRow(f"{columns.text}: plain text has no prompt to complete: give rows of another form")
        return Conversation([], text=_text(row, columns.text, filled=True), weight=weight)
    messages, asked = _MESSAGES[form](row, columns, last_turn)
    for message in messages[asked:]:
        _check_weight(message.get("weight", 1.0), columns, f"weight of a message of role {message['role']}")
    messages = [*map(_unlearnt, messages[:asked]), *messages[asked:]]
    column = {"messages": columns.messages, "sharegpt": "conversations", "preference": "chosen"}.get(form)
    _check_turns(messages, column or columns.prompt, last_turn)
    messages = _with_prompts(messages, columns)
    return Conversation([_weighed(message, weight) for message in messages], read_tools(row.get("tools"), "tools"))


_WEIGHTS = ("weight", "reward", "advantage")
_SIGNED = "advantage"


def weight_column(row: dict[str, Any], columns: RowColumns) -> str | None:
    """The column that a row is weighted by; ``None`` where it has no weight.

    Raises:
        BadRow: it has several, and none is named.
    """
    names = _WEIGHTS if columns.weight is None else (columns.weight,)
    found = [name for name in names if row.get(name) is not None]
    if len(found) > 1:
        raise BadRow(f"{' and '.join(found)}: two weights of one row: name the column to take by data.weight_column")
    return found[0] if found else None


def _row_weight(row: dict[str, Any], columns: RowColumns) -> float:
    column = weight_column(row, columns)
    if column is None:
        return 1.0
    try:
        weight = as_weight(row[column], column, signed=column == _SIGNED)
    except BadRow as problem:
        if column == "weight" or columns.weight is not None:
            raise
        advice = "what is no weight of the row is left alone with data.weight_column: weight"
        raise BadRow(f"{problem}; only an advantage may be negative, and {advice}") from None
    if weight < 0 and columns.unsigned:
        raise BadRow(f"{column}: {weight:g}, and {columns.unsigned}")
    _check_weight(weight, columns, column)
    return weight


def _check_weight(weight: float, columns: RowColumns, where: str) -> None:
    if weight != 1 and not columns.weighted:
        raise BadRow(f"{where}: {weight:g}, and data.train_on_prompts learns every token with weight 1")


def _unlearnt(message: Message) -> Message:
    return {**message, "weight": 0.0} if message["role"] == "assistant" else message


def _weighed(message: Message, weight: float) -> Message:
    """With the row's weight, which is left out where it makes one, or where nothing is learnt anyhow."""
    total = as_weight(message.get("weight", 1.0) * weight, "weight, of message and row together", signed=True)
    message = {key: value for key, value in message.items() if key != "weight"}
    return message if total == 1 or message["role"] != "assistant" else {**message, "weight": total}


def _with_prompts(messages: list[Message], columns: RowColumns) -> list[Message]:
    if columns.prompt_suffix:
        suffix = columns.prompt_suffix
        messages = [{**m, "content": m["content"] + suffix} if m["role"] == "user" else m for m in messages]
    if columns.system_prompt and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": columns.system_prompt}, *messages]
    return messages


def _check_turns(messages: list[Message], column: str, last_turn: LastTurn) -> None:
    if messages[0]["role"] == "assistant":
        raise BadRow(f"{column}[0].role: a conversation cannot begin with the assistant")
    if last_turn != "optional" and not any(message["role"] == "assistant" for message in messages):
        raise BadRow(f"{column}: no assistant message to learn from")
    if last_turn == "assistant" and messages[-1]["role"] != "assistant":
        raise BadRow(f"{column}: must end in an assistant message, to score against")


def _text(row: dict[str, Any], column: str, *, required: bool = True, filled: bool = False) -> str:
    value = row.get(column)
    if value is None:
        if required:
            raise BadRow(f"{column}: missing" if column not in row else f"{column}: null")
        return ""
    value = as_text(value, column)
    if filled and not value.strip():
        raise BadRow(f"{column}: empty")
    return value


def _turns(prompt: str, completion: str) -> list[Message]:
    user = {"role": "user", "content": prompt}
    return [user, {"role": "assistant", "content": completion}] if completion else [user]


def _completed(row: dict[str, Any], prompt: str, completion: str, last_turn: LastTurn) -> Turns:
    """A prompt and its completion, each a text or a list of messages; only the completion is learnt."""
    needed = last_turn != "optional"
    if not isinstance(row.get(prompt), list):
        answer = _text(row, completion, required=needed, filled=needed)
        return _turns(_text(row, prompt), answer), 1
    asked = read_turns(row[prompt], prompt)
    if row.get(completion) is None and not needed:
        return asked, len(asked)
    if isinstance(row.get(completion), str):
        answer = _text(row, completion, filled=needed)
        return [*asked, *([{"role": "assistant", "content": answer}] if answer else [])], len(asked)
    return [*asked, *read_turns(row.get(completion), completion)], len(asked)


def _prompt_completion(row: dict[str, Any], columns: RowColumns, last_turn: LastTurn) -> Turns:
    return _completed(row, columns.prompt, columns.completion, last_turn)


def _preference(row: dict[str, Any], columns: RowColumns, last_turn: LastTurn) -> Turns:
    """``chosen`` after ``prompt``, which it may repeat; without one, its last message after the others."""
    chosen, prompt = row.get("chosen"), row.get(columns.prompt)
    if not isinstance(chosen, list) and prompt is not None:
        return _completed(row, columns.prompt, "chosen", last_turn)
    if isinstance(chosen, str):
        raise BadRow(f"{columns.prompt}: missing (chosen is a text, so the prompt must stand there)")
    turns = read_turns(chosen, "chosen")
    if prompt is None:
        return turns, len(turns) - 1
    asked = read_turns(prompt, columns.prompt) if isinstance(prompt, list) else _turns(_text(row, columns.prompt), "")
    repeats = next((i for i in range(len(turns)) if turns[i : i + len(asked)] == asked), None)
    if repeats is not None:  # after a system message, perhaps
        return turns, repeats + len(asked)
    if turns[0]["role"] in ("system", "developer", "user"):
        raise BadRow(f"chosen[0].role: {turns[0]['role']}, and chosen has not the messages of {columns.prompt}")
    return [*asked, *turns], len(asked)


def _alpaca(row: dict[str, Any], columns: RowColumns, last_turn: LastTurn) -> Turns:
    needed = last_turn != "optional"
    prompt = _text(row, "instruction")
    extra = _text(row, "input", required=False)
    output = _text(row, "output", required=needed, filled=needed)
    return _turns(f"{prompt}\n\n{extra}" if extra.strip() else prompt, output), 1


def _messages(row: dict[str, Any], columns: RowColumns, last_turn: LastTurn) -> Turns:
    return read_turns(row.get(columns.messages), columns.messages), 0


def _sharegpt(row: dict[str, Any], columns: RowColumns, last_turn: LastTurn) -> Turns:
    turns = read_turns(row.get("conversations"), "conversations")
    system = _text(row, "system", required=False)
    if system.strip() and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    return turns, 0


Turns = tuple[list[Message], int]  # and how many of them are the prompt
_MESSAGES: dict[str, Callable[[dict[str, Any], RowColumns, LastTurn], Turns]] = {
    "prompt_completion": _prompt_completion,
    "preference": _preference,
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
}
