"""Tools and the calls of them, as OpenAI's, Hugging Face's or ShareGPT's rows write them."""

from __future__ import annotations

from typing import Any

from dft_lightning.data.rows.checks import BadRow, as_plain, as_text, from_text, is_there, parse_json
from dft_lightning.data.rows.values import kind_of

Calls = list[dict[str, Any]]


def read_tools(row: dict[str, Any]) -> Calls | None:
    """A row's function schemas, from ``tools`` or OpenAI's older ``functions``; ``None`` where there are none.

    A list of objects, or the same as JSON in a string. ShareGPT's rows leave out what is around a schema, which
    templates read: it is put there.
    """
    if "tools" not in row and "functions" not in row:  # most rows
        return None
    found = {column: value for column in ("tools", "functions") if (value := _schemas(row.get(column), column))}
    if len(found) > 1:
        raise BadRow("functions: beside tools: leave one out")
    return next(iter(found.values()), None)


def _schemas(value: Any, column: str) -> Calls | None:
    value = from_text(value, column)
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(f"{column}: expected a list of function schemas")
    return [_schema(as_plain(tool, f"{column}[{i}]")) for i, tool in enumerate(value)]


def _schema(tool: dict[str, Any]) -> dict[str, Any]:
    if "function" in tool or "name" not in tool or tool.get("type", "function") != "function":
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def read_calls(turn: dict[str, Any], where: str) -> Calls:
    """The calls of a message, in ``tool_calls`` or OpenAI's older ``function_call``."""
    calls, call = turn.get("tool_calls"), turn.get("function_call")
    if is_there(call):
        if is_there(calls):
            raise BadRow(f"{where}.function_call: beside tool_calls: leave one out")
        return [_call({"function": call}, f"{where}.function_call", "")]
    if not is_there(calls):
        return []
    if not isinstance(calls, list):
        raise BadRow(f"{where}.tool_calls: expected a list, got {kind_of(calls)}")
    return [_call(each, f"{where}.tool_calls[{i}]", ".function") for i, each in enumerate(calls)]


def calls_of_text(value: Any, where: str) -> Calls:
    """The calls that a turn of calls alone consists of, in JSON: one, or a list of several.

    Each has a name and arguments, or those within ``function``.
    """
    found = parse_json(value, where) if isinstance(value, str) else value
    several = isinstance(found, list)
    if several and not found:
        raise BadRow(f"{where}: empty")
    calls = []
    for i, call in enumerate(found if several else [found]):
        place = f"{where}[{i}]" if several else where
        whole = isinstance(call, dict) and "function" in call
        calls.append(_call(call if whole else {"function": call}, place, ".function" if whole else ""))
    return calls


def _call(call: Any, where: str, inner: str) -> dict[str, Any]:
    """A call with its arguments as an object, which is what templates take; OpenAI writes them as a string.

    Args:
        call: an object with ``function`` in it.
        where: it stands.
        inner: where the function stands from there.
    """
    if not isinstance(call, dict):
        raise BadRow(f"{where}: expected an object, got {kind_of(call)}")
    function, where_function = call.get("function"), f"{where}{inner}"
    if not isinstance(function, dict):
        raise BadRow(f"{where_function}: expected an object with name and arguments")
    called = {"name": as_text(function.get("name"), f"{where_function}.name")}
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{where_function}.arguments")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise BadRow(f"{where_function}.arguments: expected an object, got {kind_of(arguments)}")
    others = as_plain({key: value for key, value in call.items() if key != "function"}, where)
    arguments = as_plain(arguments, f"{where_function}.arguments")
    return {"type": "function", **others, "function": {**called, "arguments": arguments}}
