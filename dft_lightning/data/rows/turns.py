"""Messages of a conversation, as OpenAI's, Hugging Face's or ShareGPT's rows write them."""

from __future__ import annotations

from typing import Any

from dft_lightning.data.rows.checks import (
    BadRow,
    Noted,
    as_content,
    as_plain,
    as_text,
    is_there,
    own_weight,
    without_places,
)
from dft_lightning.data.rows.toolcalls import calls_of_text, read_calls
from dft_lightning.data.rows.unread import LEFT, OF_TEMPLATES, kind_of_key
from dft_lightning.data.rows.values import kind_of

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_SHAREGPT |= {"tool": "tool", "observation": "tool"}
_CALL = "call"  # an assistant's turn whose text is a call
_OTHERS = {"function_call": _CALL, "tool_call": _CALL, "function": "tool", "tool_response": "tool"}
_SPEAKERS = {"role": {**dict(zip(ROLES, ROLES, strict=True)), **_OTHERS}, "from": {**_SHAREGPT, **_OTHERS}}
_OF_CALLS = ("tool_calls", "function_call")
_READ = frozenset((*_OF_CALLS, "weight", "loss", "train"))
_OF_PARTS = frozenset(("type", "text", "weight", "loss", "train"))


def read_turns(turns: Any, column: str, noted: Noted) -> list[Message]:
    """The messages of a column: dicts of ``role`` and ``content``, or ShareGPT's ``from`` and ``value``.

    An object of lists, ``{"from": [...], "value": [...]}``, is the same messages.

    Raises:
        BadRow: anything else, by the message's place.
    """
    if _are_lists(turns):
        turns = _turns_of_lists(turns, column)
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{column}: " + ("missing" if turns is None else "expected a list of at least one message"))
    return [_turn(turn, f"{column}[{i}]", noted) for i, turn in enumerate(turns)]


def are_turns(value: Any) -> bool:
    """Whether a value is meant as messages, and not as a text."""
    return isinstance(value, list) or _are_lists(value)


def _are_lists(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(each, list) for each in value.values()):
        return False
    return value.keys() >= {"from", "value"} or value.keys() >= {"role", "content"}


def _turns_of_lists(turns: dict[str, list[Any]], column: str) -> list[dict[str, Any]]:
    if len({len(each) for each in turns.values()}) > 1:
        lengths = ", ".join(f"{len(each)} of {key}" for key, each in turns.items())
        raise BadRow(f"{column}: expected lists of one length, got {lengths}")
    return [dict(zip(turns, turn, strict=True)) for turn in zip(*turns.values(), strict=True)]


def _turn(turn: Any, where: str, noted: Noted) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"{where}: expected an object with role and content, got {kind_of(turn)}")
    turn = {key: value for key, value in turn.items() if value is not None}  # Arrow fills keys that others have
    speaker, text = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    said, roles = turn.get(speaker), _SPEAKERS[speaker]
    role = roles.get(said) if isinstance(said, str) else None
    if role is None:
        usual = ", ".join(ROLES if speaker == "role" else (*_SHAREGPT, "function_call"))
        raise BadRow(f"{where}.{speaker}: expected one of {usual}, got {said!r}")
    more = len(turn) > 2 or text not in turn  # than the speaker and a text, as most have
    if more and role not in ("assistant", _CALL) and any(is_there(turn.get(key)) for key in _OF_CALLS):
        raise BadRow(f"{where}.tool_calls: of a message of role {said!r}")
    weights: list[list[Any]] = []
    if role == _CALL:
        content, calls = "", calls_of_text(turn.get(text), f"{where}.{text}")
    else:
        calls = read_calls(turn, where) if more else []
        content, weights = _content(turn.get(text, "" if calls else None), f"{where}.{text}", noted)
    message = {
        **(_others(turn, (speaker, text), where, noted) if more else {}),
        "role": "assistant" if role == _CALL else role,
        "content": content,
    }
    if calls:
        message["tool_calls"] = calls
    if message["role"] != "assistant":
        if (more and own_weight(turn, where)) or any(weight for *_, weight in weights):
            noted.add(("steering", f"a weight of messages of role {said}"))
        return message
    if not content.strip() and not calls:
        raise BadRow(f"{where}.{text}: empty")
    weight = own_weight(turn, where) if more else None
    if weight is not None:
        message["weight"] = weight
    if any(weight != 1 for *_, weight in weights):
        message["content_weights"] = [each for each in weights if each[2] != 1]
    return message


def _others(turn: dict[str, Any], read: tuple[str, str], where: str, noted: Noted) -> Message:
    """What the message has for the template: keys that templates are known to read, and others that some may."""
    message = {}
    for key, value in turn.items():
        if key in read or key in _READ:
            continue
        name = f"{where}.{as_text(key, where)}"
        if key in OF_TEMPLATES:
            message[key] = as_plain(value, name)
            continue
        kind = kind_of_key(key)
        try:
            message[key] = as_plain(value, name)
        except BadRow:  # bytes, say, which no template writes
            kind = "unread" if kind == LEFT else kind
        if is_there(value):
            noted.add((kind, without_places(name)))
    return message


def _content(content: Any, where: str, noted: Noted) -> tuple[str, list[list[Any]]]:
    """A string, or a list of parts that are text, and the characters of each part that has a weight."""
    if not isinstance(content, list):
        return as_content(content, where, noted), []
    text, weights = "", []
    for i, part in enumerate(content):
        place = f"{where}[{i}]"
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else kind_of(part)
            raise BadRow(f"{place}: expected a part of type text, got {kind!r}")
        start, text = len(text), text + as_text(part.get("text"), f"{place}.text")
        weight = own_weight(part, place)
        if weight is not None and len(text) > start:
            weights.append([start, len(text), weight])
        for key in part.keys() - _OF_PARTS:
            if is_there(part[key]):
                noted.add(("unread", without_places(f"{place}.{as_text(key, place)}")))
    return text, weights


def joined(messages: list[Message], noted: Noted) -> list[Message]:
    """With the assistant's messages in a row made one, where nothing is lost by it.

    The texts are put together as they are, with a line break between where neither has space there, and the calls after
    them. Two messages stay two where a text follows calls, where both have another key, or where the second alone is
    not learnt: what ends a turn is its last message's.
    """
    found: list[Message] = []
    for message in messages:
        both = _both(found[-1], message) if found else None
        if both is None:
            found.append(message)
        else:
            found[-1] = both
            noted.add(("joined", "assistant messages in a row"))
    return found


def _both(first: Message, second: Message) -> Message | None:
    if first["role"] != "assistant" or second["role"] != "assistant":
        return None
    weights = [message.get("weight", 1.0) for message in (first, second)]
    before, after = first["content"], second["content"]
    if (weights[0] and not weights[1]) or both_have(first, second):
        return None
    if first.get("tool_calls") and (after or weights[0] != weights[1]):
        return None
    glued = before and after and not (before[-1].isspace() or after[0].isspace())
    return continued(first, second, "\n" if glued else "")


_TOGETHER = {"role", "content", "tool_calls", "weight", "content_weights"}


def both_have(first: Message, second: Message) -> list[str]:
    """Keys of two messages that say different things, and cannot be put together."""
    return [key for key in first if key in second and key not in _TOGETHER and first[key] != second[key]]


def continued(first: Message, second: Message, between: str = "") -> Message:
    """Two messages of the assistant as one, each text with its own weight; the whole has the second's."""
    weight = second.get("weight", 1.0)
    start = len(first["content"]) + len(between)
    weights = _weights(first, first.get("weight", 1.0) / weight if weight else 1.0)
    weights += [[a + start, b + start, each] for a, b, each in second.get("content_weights", ())]
    calls = [*first.get("tool_calls", ()), *second.get("tool_calls", ())]
    message = {**first, **second, "content": f"{first['content']}{between}{second['content']}", "weight": weight}
    message |= {"tool_calls": calls} if calls else {}
    message.pop("content_weights", None)
    return {**message, "content_weights": weights} if weights else message


def _weights(message: Message, factor: float) -> list[list[Any]]:
    """The characters of a message whose weight is not 1, with their weights times ``factor``."""
    found, at = [], 0
    for start, end, weight in [*message.get("content_weights", ()), [len(message["content"])] * 2 + [1.0]]:
        found += [[at, start, factor], [start, end, weight * factor]]
        at = end
    return [[start, end, weight] for start, end, weight in found if start < end and weight != 1]
