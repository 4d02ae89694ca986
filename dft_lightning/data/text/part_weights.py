"""Where parts of contents stand in a text, and what of it no turn has: for weights below and beside the turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dft_lightning.data.rows.turns import Message
from dft_lightning.data.text.rendering import Rendering, weight_of
from dft_lightning.data.text.span_weights import Span, unmarked_places
from dft_lightning.data.text.time_limit import EndlessTemplateError
from dft_lightning.errors import InputError

_BORDER = "\uf8f7"  # of a private area, which templates have no opinion on
_USER: Message = {"role": "user", "content": "x"}
Masked = tuple[str, list[Span]]
Part = tuple[int, int, float]  # start, end and weight in a content


class PartWeights:
    """Finds them.

    Args:
        rendering: by the template.
        masked: text and spans of messages with tools.
        turn_end: what ends a turn; ``None`` where the template has nothing that does.
    """

    def __init__(
        self, rendering: Rendering, masked: Callable[[list[Message], Any], Masked], turn_end: str | None
    ) -> None:
        self._rendering = rendering
        self._masked = masked
        self._turn_end = turn_end

    # -- parts of contents ---------------------------------------------------------------------------------------

    def of_contents(
        self,
        text: str,
        turns: Sequence[Span],
        messages: list[Message],
        tools: Any,
        mark: str | None,
        with_prompts: bool,
    ) -> list[Span]:
        """The parts of contents that have a weight, by ``content_weights`` of the messages.

        They are found by another rendering, with a character of a private area at their borders, which has to be the
        same but for that. White space around a content may have been trimmed, and what begins a content may have been
        written anew, as thoughts are: a part that begins the content then begins where its turn does.

        Args:
            text: of the messages.
            turns: that are learnt.
            messages: of the text.
            tools: of the text.
            mark: a character that the places of parts do not count.
            with_prompts: find those of messages that are no turns, too.

        Raises:
            InputError: the template writes a content otherwise, so that its parts have no place there.
        """
        if not any("content_weights" in message for message in messages):
            return []
        learnt = [i for i, message in enumerate(messages) if weight_of(message)]
        begins = {i: turn.start for i, turn in zip(learnt, turns, strict=True)} if len(learnt) == len(turns) else {}
        weighed = {
            i: _parts(message, mark)
            for i, message in enumerate(messages)
            if message.get("content_weights") and (i in learnt or (with_prompts and message["role"] != "assistant"))
        }
        if not any(weighed.values()):
            return []
        for trimmed, begun in ((False, False), (True, False), (True, True)):
            found = self._found(text, messages, tools, weighed, begins if begun else {}, trimmed)
            if found is not None:
                return found
        named = ", ".join(f"{i + 1} ({messages[i]['role']})" for i in sorted(weighed))
        raise InputError(
            f"the chat template writes the content of message {named} otherwise than it is, so that its parts cannot "
            "have weights of their own: set data.text.span_weights in their place, or another data.text.chat_template"
        )

    def _found(
        self,
        text: str,
        messages: list[Message],
        tools: Any,
        weighed: dict[int, list[Part]],
        begins: dict[int, int],
        trimmed: bool,
    ) -> list[Span] | None:
        probe = list(messages)
        parts: list[tuple[int | None, float]] = []  # where they begin, if that is known, and their weight
        for i, given in weighed.items():
            content = messages[i]["content"]
            first = len(content) - len(content.lstrip()) if trimmed else 0
            last = len(content.rstrip()) if trimmed else len(content)
            inside = [(max(start, first), min(end, last), weight) for start, end, weight in given]
            inside = [part for part in inside if part[1] > part[0]]
            # The start of those that begin where the turn does is known, and is left out.
            known = [begins.get(i) if start == first else None for start, _, _ in inside]
            borders = [
                place
                for (start, end, _), begin in zip(inside, known, strict=True)
                for place in ((start, end) if begin is None else (end,))
            ]
            probe[i] = {**messages[i], "content": _bordered(content, borders)}
            parts += [(begin, weight) for (*_, weight), begin in zip(inside, known, strict=True)]
        places = self._borders(text, probe, tools)
        if places is None or len(places) != sum(1 if begin is not None else 2 for begin, _ in parts):
            return None
        border = iter(places)
        return [Span(next(border) if begin is None else begin, next(border), weight) for begin, weight in parts]

    def _borders(self, text: str, messages: list[Message], tools: Any) -> list[int] | None:
        """Where the borders within messages stand in their text; ``None`` where that is not the same without them."""
        try:
            pieces = self._rendering.text(messages, tools).split(_BORDER)
        except EndlessTemplateError:
            raise
        except InputError:
            return None
        places = [0]
        for piece in pieces:
            places.append(places[-1] + len(piece))
        return places[1:-1] if "".join(pieces) == text else None

    # -- what no turn has ----------------------------------------------------------------------------------------

    def between_turns(self, text: str, turns: list[Span], messages: list[Message], tools: Any) -> list[Span]:
        """What stands before, between and after all assistant turns, learnt or not.

        Raises:
            InputError: where a turn that is not learnt stands cannot be told.
        """
        if any(message["role"] == "assistant" and message.get("weight") == 0 for message in messages):
            turns = self._all_turns(text, messages, tools)
        borders = [0, *(place for turn in turns for place in (turn.start, turn.end)), len(text)]
        return [Span(start, end) for start, end in zip(borders[::2], borders[1::2], strict=True) if end > start]

    def _all_turns(self, text: str, messages: list[Message], tools: Any) -> list[Span]:
        try:
            learnt = [{key: item for key, item in message.items() if key != "weight"} for message in messages]
            return self._masked(learnt, tools)[1]
        except EndlessTemplateError:
            raise
        except InputError:  # the template writes the earlier ones anew
            return self._by_header(text, messages, tools)

    def _by_header(self, text: str, messages: list[Message], tools: Any) -> list[Span]:
        """From what the generation prompt adds, through the content, to what ends a turn."""
        asked = self._rendering.text([_USER], tools)
        header = self._rendering.text([_USER], tools, prompt=True).removeprefix(asked)
        spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        probe = [
            {**message, "content": _bordered(message["content"], [len(message["content"].rstrip())])}
            if i in spoken
            else message
            for i, message in enumerate(messages)
        ]
        places = self._borders(text, probe, tools)
        spans: list[Span] = []
        for place in places or []:
            begin = text.rfind(header, spans[-1].end if spans else 0, place)
            end = text.find(self._turn_end or "", place)
            if begin < 0 or end < 0 or not header:
                break
            spans.append(Span(begin + len(header), end + len(self._turn_end or "")))
        if len(spans) != len(spoken):
            raise InputError(
                "data.text.prompt_weight: where the turns stand that are not learnt cannot be told, as the chat "
                "template writes them anew: leave it out, or set data.text.chat_template to one with {% generation %}"
            )
        return spans


def _parts(message: Message, mark: str | None) -> list[Part]:
    """Those that are given, with their places after marks were put in."""
    places = unmarked_places(message["content"], mark)
    given = [(start, end, weight) for start, end, weight in message["content_weights"] if end > start and weight != 1]
    return [(places[start], places[end - 1] + 1, weight) for start, end, weight in given]


def _bordered(content: str, places: list[int]) -> str:
    pieces = zip([0, *places], [*places, len(content)], strict=True)
    return _BORDER.join(content[start:end] for start, end in pieces)
