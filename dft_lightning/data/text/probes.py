"""What a chat template leaves out of what rows have: found by putting words in its place that nothing else has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dft_lightning.data.rows.turns import Message
from dft_lightning.data.text.span_weights import thoughts
from dft_lightning.data.text.time_limit import EndlessTemplateError
from dft_lightning.errors import InputError

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys under which messages have what was thought before their content."""

_INSIDE = "thoughts in contents"
_PROBE = "\uf8f1"  # of a private area, which templates have no opinion on
_TOOL = "dft_probe_tool"
_MOST_SHAPES = 1000
Item = tuple[int, str]  # a message's place, and its key


class Probes:
    """What a chat template leaves out.

    Args:
        apply: the template: from messages and tools to text.
    """

    def __init__(self, apply: Callable[[list[Message], Any], str]) -> None:
        self._apply = apply
        self._writes_tool_calls: dict[bool, bool] = {}
        self._left_out: dict[Any, list[str]] = {}

    def check_tool_calls(self, messages: list[Message], tools: Any) -> None:
        """Many templates know nothing of tool calls, and would have the model learn to say nothing there.

        Raises:
            InputError: there are tool calls, which the template leaves out.
        """
        if not any(message.get("tool_calls") for message in messages):
            return
        has_tools = tools is not None
        if has_tools not in self._writes_tool_calls:
            call = {"type": "function", "function": {"name": _TOOL, "arguments": {}}}
            asked: Message = {"role": "user", "content": "x"}
            text = self._tried([asked, {"role": "assistant", "content": "", "tool_calls": [call]}], tools)
            self._writes_tool_calls[has_tools] = text is None or _TOOL in text  # for the real messages to say
        if not self._writes_tool_calls[has_tools]:
            raise InputError(
                "the chat template leaves out tool calls; set data.text.chat_template to one that writes them"
            )

    def left_out(self, messages: list[Message], tools: Any, text: str) -> list[str]:
        """Names of what is not in the text: thoughts and contents of messages, and tools.

        An assistant message of weight 0 is not asked for: templates take the thoughts out of earlier turns.
        """
        missing = list(_missing(messages, text))
        if not missing and not tools:
            return []
        shape = (tuple((message["role"], *message) for message in messages), tuple(missing), bool(tools))
        if shape not in self._left_out:
            if len(self._left_out) == _MOST_SHAPES:
                self._left_out.clear()
            self._left_out[shape] = self._find(messages, tools, missing)
        return self._left_out[shape]

    def _find(self, messages: list[Message], tools: Any, missing: list[Item]) -> list[str]:
        """Of what is missing, what the template would not write in another way either (escaped, or divided)."""
        probe = [dict(message) for message in messages]
        words = {item: f"{_PROBE}{i}{_PROBE}" for i, item in enumerate(missing)}
        for (i, key), word in words.items():
            if key == _INSIDE:
                content = messages[i]["content"]
                start, end = thoughts(content) or (0, 0)
                key, word = "content", f"{content[:start]}{word}{content[end:]}"
            probe[i][key] = word
        text = self._tried(probe, [_renamed(tool) for tool in tools] if tools else tools)
        if text is None:
            return []
        found = {
            key if key != "content" else f"{key} of {messages[i]['role']} messages": None
            for (i, key), word in words.items()
            if word not in text
        }
        return [*found, *(["tools"] if tools and _TOOL not in text else [])]

    def _tried(self, messages: list[Message], tools: Any) -> str | None:
        try:
            return self._apply(messages, tools)
        except EndlessTemplateError:
            raise
        except InputError:
            return None


def _missing(messages: list[Message], text: str) -> Iterator[Item]:
    """Contents that are not in the text as they stand, but for white space around them; and all thoughts, which may
    say what the answer does."""
    place = 0  # to look on from there: a text of many messages is not to be searched from its beginning for each
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("weight") == 0:
            continue
        content = message["content"]
        found = text.find(content.strip(), place)
        if found >= 0:
            place = found
        elif content.strip() not in text:
            yield i, _INSIDE if message["role"] == "assistant" and thoughts(content) else "content"
        for key in THOUGHTS if len(message) > 2 else ():
            value = message.get(key)
            if value and not (isinstance(value, str) and value.isspace()):
                yield i, key


def _renamed(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    return {**tool, "function": {**function, "name": _TOOL}} if isinstance(function, dict) else {**tool, "name": _TOOL}
