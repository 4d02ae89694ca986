"""One message of a conversation, as OpenAI's, Hugging Face's or ShareGPT's rows write it."""

from __future__ import annotations

from typing import Any

from dft_lightning.data.files import BrokenText, load_json

Message = dict[str, Any]
_LARGEST_WEIGHT = 3.4028234663852886e38  # of float32
_DEEPEST = 100

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


class BadRow(Exception):
    """What is wrong with a row, beginning with the column."""


def as_text(value: Any, where: str) -> str:
    """A string that is text.

    Raises:
        BadRow: it is no string, or has what no tokenizer can take: half a surrogate pair, or a NUL.
    """
    if not isinstance(value, str):
        raise BadRow(f"{where}: expected a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{where}: half a surrogate pair at character {error.start}, which is not text") from error
    if "\0" in value:
        raise BadRow(f"{where}: a NUL at character {value.index(chr(0))}, which is not text")
    return value


def as_weight(value: Any, where: str, signed: bool = False) -> float:
    """A weight of tokens' losses: a number that float32 holds, and not negative unless ``signed``."""
    if isinstance(value, str):  # of a CSV file
        try:
            value = float(value)
        except ValueError:
            raise BadRow(f"{where}: expected a number, got {value!r}") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow(f"{where}: expected a number, got {type(value).__name__}")
    if not (-_LARGEST_WEIGHT if signed else 0) <= value <= _LARGEST_WEIGHT:  # nor NaN
        raise BadRow(f"{where}: expected a number from {'-3.4e38' if signed else 0} to 3.4e38, got {value}")
    return float(value)


def read_turns(turns: Any, column: str) -> list[Message]:
    """The messages of a column: dicts of ``role`` and ``content``, or ShareGPT's ``from`` and ``value``.

    Raises:
        BadRow: anything else, by the message's place.
    """
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{column}: " + ("missing" if turns is None else "expected a list of at least one message"))
    return [_turn(turn, f"{column}[{i}]") for i, turn in enumerate(turns)]


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"{where}: expected an object with role and content, got {type(turn).__name__}")
    turn = {key: value for key, value in turn.items() if value is not None}  # Arrow fills keys that others have
    message = _sharegpt(turn, where) if "from" in turn and "role" not in turn else _openai(turn, where)
    if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
        raise BadRow(f"{where}.{'value' if 'from' in turn else 'content'}: empty")
    if "weight" in turn:
        message["weight"] = as_weight(turn["weight"], f"{where}.weight")
    return message


def _openai(turn: dict[str, Any], where: str) -> Message:
    role = turn.get("role")
    if role not in ROLES:
        raise BadRow(f"{where}.role: expected one of {', '.join(ROLES)}, got {role!r}")
    message = {as_text(key, where): _extra(turn[key], f"{where}.{key}") for key in turn if key not in _READ}
    calls = turn.get("tool_calls")
    content = turn.get("content", "" if calls else None)
    message |= {"role": role, "content": _content(content, f"{where}.content")}
    if calls:
        if role != "assistant":
            raise BadRow(f"{where}.tool_calls: of a message of role {role!r}")
        if not isinstance(calls, list):
            raise BadRow(f"{where}.tool_calls: expected a list, got {type(calls).__name__}")
        message["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return message


_READ = ("role", "content", "tool_calls", "weight")


def _content(content: Any, where: str) -> str:
    """A string, or a list of parts that are text."""
    if not isinstance(content, list):
        return as_text(content, where)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BadRow(f"{where}[{i}]: expected a part of type text, got {kind!r}")
        texts.append(as_text(part.get("text"), f"{where}[{i}].text"))
    return "".join(texts)


def _extra(value: Any, where: str, depth: int = 0) -> Any:
    """What a template may read beside role and content (a name, a reasoning), with its strings checked."""
    if isinstance(value, str):
        return as_text(value, where)
    if depth == _DEEPEST:  # Python's own recursion ends at a thousand calls, from wherever it began
        raise BadRow(f"{where}: nested more than {_DEEPEST} deep")
    if isinstance(value, dict):
        return {as_text(key, where): _extra(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_extra(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise BadRow(f"{where}: expected text, a number, a list or an object, got {type(value).__name__}")


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A call with its arguments as an object, which is what templates take; OpenAI writes them as a string."""
    if not isinstance(call, dict):
        raise BadRow(f"{where}: expected an object, got {type(call).__name__}")
    function = call.get("function")
    if not isinstance(function, dict):
        raise BadRow(f"{where}.function: expected an object with name and arguments")
    called = {"name": as_text(function.get("name"), f"{where}.function.name")}
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{where}.function.arguments")
    if not isinstance(arguments, dict):
        raise BadRow(f"{where}.function.arguments: expected an object, got {type(arguments).__name__}")
    others = _extra({key: value for key, value in call.items() if key != "function"}, where)
    arguments = _extra(arguments, f"{where}.function.arguments")
    return {"type": "function", **others, "function": {**called, "arguments": arguments}}


def parse_json(text: str, where: str) -> Any:
    """JSON that stands in a string of a row."""
    try:
        return load_json(as_text(text, where))
    except BrokenText as error:
        raise BadRow(f"{where}: {error}") from error


def _sharegpt(turn: dict[str, Any], where: str) -> Message:
    speaker = turn["from"]
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise BadRow(f"{where}.from: expected one of {', '.join(SHAREGPT_ROLES)}, got {speaker!r}")
    content = as_text(turn.get("value"), f"{where}.value")
    if speaker != "function_call":
        return {"role": role, "content": content}
    call = {"function": parse_json(content, f"{where}.value")}
    return {"role": role, "content": "", "tool_calls": [_tool_call(call, f"{where}.value")]}


def read_tools(value: Any, column: str) -> list[dict[str, Any]] | None:
    """Function schemas: a list of objects, or the same as JSON in a string; ``None`` where there are none."""
    if isinstance(value, str):
        value = parse_json(value, column) if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(f"{column}: expected a list of function schemas")
    return [_extra(tool, f"{column}[{i}]") for i, tool in enumerate(value)]
