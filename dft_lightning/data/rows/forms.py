"""The forms of rows, each a function from a row to a conversation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from dft_lightning.data.options import RowForm, RowFormName, RowOptions
from dft_lightning.data.rows.checks import BadRow, Noted, as_content, as_plain, as_text, as_weight, from_text, is_there
from dft_lightning.data.rows.references import FINGERPRINT, LOG_PROB, read_reference
from dft_lightning.data.rows.toolcalls import read_tools
from dft_lightning.data.rows.turns import Message, are_turns, both_have, continued, joined, read_turns
from dft_lightning.data.rows.unread import WEIGHTS
from dft_lightning.data.rows.values import kind_of
from dft_lightning.errors import did_you_mean, one_line

LastTurn = Literal["any", "assistant", "optional"]


@dataclass(frozen=True)
class Reading:
    """How the rows of a split are read.

    Attributes:
        options: of the data module.
        last_turn: ``"any"`` needs an assistant turn somewhere (to learn), ``"assistant"`` needs it last (to score),
            ``"optional"`` needs none (to predict).
        unsigned: why an ``advantage`` may not be negative; empty where it may.
    """

    options: RowOptions = RowOptions()  # noqa: RUF009 (frozen)
    last_turn: LastTurn = "any"
    unsigned: str = ""


@dataclass(frozen=True)
class Conversation:
    """What a row says.

    Attributes:
        messages: dicts of ``role``, ``content`` and what else a template reads; empty for plain text. Those of the
            assistant have a ``weight`` where it is not 1, ``content_weights`` (start, end and weight of characters of
            the content, which multiplies the message's) where some have another than 1, and the last may have a
            ``prefix_length``: so many characters of its content belong to the prompt.
        tools: function schemas.
        text: plain text in place of messages.
        weight: of the row, which those of the messages have in them.
        reference_log_prob: of the row's targets under a reference model, as
            :func:`~dft_lightning.data.rows.references.read_reference` returns them; ``None`` where the row has none.
        reference_fingerprint: of the row as it was scored.
        template_kwargs: the row's own variables of the chat template.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    weight: float = 1.0
    reference_log_prob: str | None = None
    reference_fingerprint: str | None = None
    template_kwargs: dict[str, Any] | None = None

    @property
    def answer(self) -> str | None:
        """What a completion is scored against: the final assistant turn, without what of it the prompt has.

        ``None`` where there is none, or the prompt has all of it.
        """
        last: Message = self.messages[-1] if self.messages else {"role": ""}
        given = last.get("prefix_length") or 0
        if last["role"] != "assistant" or (given and given >= len(last["content"])):
            return None
        return str(last["content"])[given:]


class UnknownForm(BadRow):
    """A row whose columns fit no form."""


def recognise_form(row: dict[str, Any], options: RowOptions, completion_required: bool = True) -> RowFormName:
    """The form of a row by its columns, unless ``options.form`` names one.

    Raises:
        UnknownForm: the columns fit no form.
    """
    if isinstance(options.form, str) and options.form != "auto":
        return options.form
    if options.messages_column in row:
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    if "chosen" in row:
        return "preference"
    if options.prompt_column in row and (options.completion_column in row or not completion_required):
        return "prompt_completion"
    if "instruction" in row and ("output" in row or not completion_required):
        return "alpaca"
    if options.text_column in row:
        return "text"
    begin = f"cannot tell the row form from the columns {sorted(map(str, row))}:"
    if wrong := _wrong_column(row, options, completion_required):
        raise UnknownForm(f"{begin} {wrong}")
    raise UnknownForm(
        f"{begin} expected {options.messages_column!r}, or "
        f"'conversations', or {options.prompt_column!r} and {options.completion_column!r}, or 'instruction' and "
        f"'output', or 'chosen', or {options.text_column!r}; name the columns by data.rows.prompt_column and "
        "data.rows.completion_column, or set data.rows.form"
    )


def _wrong_column(row: dict[str, Any], options: RowOptions, completion_required: bool) -> str | None:
    """What to say of a column that the options name and the row lacks, or that it has the half of."""
    for name in ("prompt_column", "completion_column")[: 1 + completion_required]:
        column = getattr(options, name)
        if column != getattr(RowOptions, name) and column not in row:
            return f"there is no {column!r}, which data.rows.{name} names{did_you_mean(column, map(str, row))}"
    if options.prompt_column in row:
        return f"there is {options.prompt_column!r} and no {options.completion_column!r} (data.rows.completion_column)"
    return None


def own_row(row: dict[str, Any], form: RowForm) -> dict[str, Any]:
    """What a form of one's own makes of a row; what ``score`` has written to it stays.

    Raises:
        BadRow: it refuses the row, or fails.
    """
    try:
        found: Any = form.read(row)
    except BadRow:
        raise
    except ValueError as error:
        raise BadRow(one_line(error)) from error
    except Exception as error:  # whatever runs into what it did not think of
        raise BadRow(f"{type(form).__name__}.read: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise BadRow(f"{type(form).__name__}.read: expected an object of columns, got {kind_of(found)}")
    return {**{name: row[name] for name in (LOG_PROB, FINGERPRINT) if name in row}, **found}


def convert_row(row: dict[str, Any], form: RowFormName, reading: Reading, noted: Noted | None = None) -> Conversation:
    """A row as a conversation.

    Args:
        row: by columns.
        form: of it.
        reading: how it is read.
        noted: takes what is to be said of the row.

    Raises:
        BadRow: what is wrong with it.
    """
    conversation = _converted(row, form, reading, set() if noted is None else noted)
    reference = read_reference(row)
    if reference is None:
        return conversation
    return replace(conversation, reference_log_prob=reference[0], reference_fingerprint=reference[1])


def _converted(row: dict[str, Any], form: RowFormName, reading: Reading, noted: Noted) -> Conversation:
    options, last_turn = reading.options, reading.last_turn
    weight = _row_weight(row, reading, noted)
    if weight == 0 and last_turn == "any":
        last_turn = "optional"  # nothing of it is learnt: a sampled answer may be empty, and is wrong
    if form == "text":
        if reading.last_turn == "optional":
            raise BadRow(f"{options.text_column}: plain text has no prompt to complete: give rows of another form")
        return Conversation([], text=_text(row, options.text_column, noted, filled=True), weight=weight)
    asked, answered = _MESSAGES[form](row, _Form(options, last_turn, noted))
    messages = _with_answer(joined([_unlearnt(message) for message in asked], noted), joined(answered, noted))
    column = {"messages": options.messages_column, "sharegpt": "conversations", "preference": "chosen"}.get(form)
    _check_turns(messages, column or options.prompt_column, last_turn)
    messages = _with_prompts(_with_system(messages, row), options)
    messages = [_weighed(message, weight) for message in messages]
    return Conversation(messages, read_tools(row), weight=weight, template_kwargs=_template_kwargs(row))


_SIGNED = "advantage"


def weight_column(row: dict[str, Any], options: RowOptions) -> str | None:
    """The column that a row is weighted by; ``None`` where it has no weight.

    Raises:
        BadRow: it has several, and none is named.
    """
    names = WEIGHTS if options.weight_column is None else (options.weight_column,)
    found = [name for name in names if row.get(name) is not None]
    if len(found) > 1:
        raise BadRow(
            f"{' and '.join(found)}: two weights of one row: name the column to take by data.rows.weight_column"
        )
    return found[0] if found else None


def _row_weight(row: dict[str, Any], reading: Reading, noted: Noted) -> float:
    options = reading.options
    column = weight_column(row, options)
    if column is None:
        return 1.0
    if column != "weight" and options.weight_column is None:
        noted.add(("weighted by", column))
    try:
        weight = as_weight(row[column], column, signed=column == _SIGNED)
    except BadRow as problem:
        if column == "weight" or options.weight_column is not None:
            raise
        advice = "what is no weight of the row is left alone with data.rows.weight_column: weight"
        raise BadRow(f"{problem}; only an advantage may be negative, and {advice}") from None
    if weight < 0 and reading.unsigned:
        raise BadRow(f"{column}: {weight:g}, and {reading.unsigned}")
    return weight


def _unlearnt(message: Message) -> Message:
    return {**message, "weight": 0.0} if message["role"] == "assistant" else message


def _weighed(message: Message, weight: float) -> Message:
    """With the row's weight, which is left out where it makes one, or where nothing is learnt anyhow."""
    if weight == 1 and "weight" not in message:
        return message
    total = as_weight(message.get("weight", 1.0) * weight, "weight, of message and row together", signed=True)
    message = {key: value for key, value in message.items() if key != "weight"}
    return message if total == 1 or message["role"] != "assistant" else {**message, "weight": total}


def _with_prompts(messages: list[Message], options: RowOptions) -> list[Message]:
    if options.prompt_suffix:
        suffix = options.prompt_suffix
        messages = [{**m, "content": m["content"] + suffix} if m["role"] == "user" else m for m in messages]
    if options.system_prompt and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": options.system_prompt}, *messages]
    return messages


def _with_answer(asked: list[Message], answered: list[Message]) -> list[Message]:
    """A prompt and what follows. What the assistant has begun in the prompt is continued: it stays one turn."""
    if not asked or asked[-1]["role"] != "assistant":
        return [*asked, *answered]
    begun = len(asked[-1]["content"])
    if not answered:
        return [*asked[:-1], {**asked[-1], "prefix_length": begun}]
    if answered[0]["role"] != "assistant" or asked[-1].get("tool_calls"):
        return [*asked, *answered]
    if names := both_have(asked[-1], answered[0]):
        raise BadRow(f"{names[0]}: of the prompt's last message and of the answer, which continues it: leave one out")
    whole = continued(asked[-1], answered[0])
    if len(answered) == 1:
        whole["prefix_length"] = begun
    return [*asked[:-1], whole, *answered[1:]]


def _with_system(messages: list[Message], row: dict[str, Any]) -> list[Message]:
    """After the column ``system``."""
    value = row.get("system")
    system = "" if value is None else as_text(value, "system")
    if not system.strip():
        return messages
    if messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise BadRow(f"system: another than the message of role {messages[0]['role']}: leave one out")
    return messages


def _template_kwargs(row: dict[str, Any]) -> dict[str, Any] | None:
    column = "chat_template_kwargs"
    value = from_text(row.get(column), column)
    if not is_there(value):
        return None
    if not isinstance(value, dict):
        raise BadRow(f"{column}: expected an object, got {kind_of(value)}")
    if taken := value.keys() & _OF_THE_ROW:
        raise BadRow(f"{column}.{sorted(taken)[0]}: is none of the template's own variables")
    found: dict[str, Any] = as_plain(value, column)
    return found


_OF_THE_ROW = {"messages", "conversation", "tools", "chat_template", "add_generation_prompt", "tokenize"}


def _check_turns(messages: list[Message], column: str, last_turn: LastTurn) -> None:
    if messages[0]["role"] == "assistant":
        raise BadRow(f"{column}[0].role: a conversation cannot begin with the assistant")
    if last_turn != "optional" and not any(message["role"] == "assistant" for message in messages):
        raise BadRow(f"{column}: no assistant message to learn from")
    if last_turn == "assistant" and messages[-1]["role"] != "assistant":
        raise BadRow(f"{column}: must end in an assistant message, to score against")
    if last_turn == "assistant" and not messages[-1]["content"][messages[-1].get("prefix_length", 0) :].strip():
        raise BadRow(f"{column}: ends in a tool call, which is no text to score against")


def _text(row: dict[str, Any], column: str, noted: Noted, *, required: bool = True, filled: bool = False) -> str:
    value = row.get(column)
    if value is None:
        if required:
            raise BadRow(f"{column}: missing" if column not in row else f"{column}: null")
        return ""
    value = as_content(value, column, noted)
    if filled and not value.strip():
        raise BadRow(f"{column}: empty")
    return value


@dataclass(frozen=True)
class _Form:
    """What the forms below are told."""

    options: RowOptions
    last_turn: LastTurn
    noted: Noted

    def question(self, row: dict[str, Any], column: str) -> list[Message]:
        """A text of the user's, or messages."""
        if are_turns(row.get(column)):
            return read_turns(row[column], column, self.noted)
        return [{"role": "user", "content": _text(row, column, self.noted)}]

    def answer(self, row: dict[str, Any], column: str) -> list[Message]:
        """A text of the assistant's, or messages; none where none are needed."""
        needed = self.last_turn != "optional"
        if are_turns(row.get(column)):
            return read_turns(row[column], column, self.noted)
        answer = _text(row, column, self.noted, required=needed, filled=needed)
        return [{"role": "assistant", "content": answer}] if answer else []


def _prompt_completion(row: dict[str, Any], form: _Form) -> Turns:
    column = form.options.prompt_column
    answer, asked = form.answer(row, form.options.completion_column), form.question(row, column)
    if are_turns(row[column]):  # which has the turns before
        if is_there(row.get("history")):
            form.noted.add(("steering", "history"))
        return asked, answer
    return [], [*_history(row, form.noted), *asked, *answer]


def _preference(row: dict[str, Any], form: _Form) -> Turns:
    """``chosen`` after ``prompt``, which it may repeat; without one, its last message after the others."""
    column = form.options.prompt_column
    chosen, prompt = row.get("chosen"), row.get(column)
    if not are_turns(chosen) and prompt is not None:
        answer = form.answer(row, "chosen")
        return form.question(row, column), answer
    if isinstance(chosen, str):
        raise BadRow(f"{column}: missing (chosen is a text, so the prompt must stand there)")
    turns = read_turns(chosen, "chosen", form.noted)
    if prompt is None:
        return turns[:-1], turns[-1:]
    asked = form.question(row, column)
    repeats = next((i for i in range(len(turns)) if turns[i : i + len(asked)] == asked), None)
    if repeats is not None:  # after a system message, perhaps
        return turns[: repeats + len(asked)], turns[repeats + len(asked) :]
    if turns[0]["role"] in ("system", "developer", "user"):
        raise BadRow(f"chosen[0].role: {turns[0]['role']}, and chosen has not the messages of {column}")
    return asked, turns


def _alpaca(row: dict[str, Any], form: _Form) -> Turns:
    prompt, extra = _text(row, "instruction", form.noted), _text(row, "input", form.noted, required=False)
    asked = [{"role": "user", "content": f"{prompt}\n\n{extra}" if extra.strip() else prompt}]
    return [], [*_history(row, form.noted), *asked, *form.answer(row, "output")]


def _history(row: dict[str, Any], noted: Noted) -> list[Message]:
    """The turns before this one: pairs of what the user says and what the assistant answers, which is learnt too."""
    pairs = from_text(row.get("history"), "history")
    if not is_there(pairs):
        return []
    if not isinstance(pairs, list):
        raise BadRow(f"history: expected a list of pairs of texts, got {kind_of(pairs)}")
    turns = []
    for i, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BadRow(f"history[{i}]: expected a pair of texts, what was asked and what was answered")
        asked, answer = (as_content(text, f"history[{i}][{j}]", noted) for j, text in enumerate(pair))
        if not answer.strip():
            raise BadRow(f"history[{i}][1]: empty")
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return turns


def _messages(row: dict[str, Any], form: _Form) -> Turns:
    return [], read_turns(row.get(form.options.messages_column), form.options.messages_column, form.noted)


def _sharegpt(row: dict[str, Any], form: _Form) -> Turns:
    return [], read_turns(row.get("conversations"), "conversations", form.noted)


Turns = tuple[list[Message], list[Message]]  # the prompt, of which nothing is learnt, and what follows
_MESSAGES: dict[str, Callable[[dict[str, Any], _Form], Turns]] = {
    "prompt_completion": _prompt_completion,
    "preference": _preference,
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
}
