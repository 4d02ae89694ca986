"""Which characters of a conversation's text an assistant says.

Where the template marks them by ``{% generation %}``, that is taken. Otherwise a turn is what its rendering has beyond
the generation prompt before it; growing prefixes of the conversation are rendered for it, and each must be a prefix of
the whole. Either way the text begins with what generation starts from, and nothing of that is learnt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dft_lightning.data.rows.turns import Message
from dft_lightning.data.text.rendering import Rendering, weight_of
from dft_lightning.data.text.span_weights import Span
from dft_lightning.data.text.time_limit import EndlessTemplateError
from dft_lightning.errors import InputError

_FEW = 3  # turns of which each is held against the whole conversation

_OTHER_PROMPT = (
    "data.text.chat_template_kwargs to what makes the prompt that of the answers (enable_thinking: false, often), or "
    "data.text.chat_template to one whose answers begin with its generation prompt"
)
_OTHER_TURNS = (
    "data.text.train_turns: each or last, or data.text.chat_template to one with {% generation %} or one that keeps "
    "earlier turns as they are"
)
_OTHER_BEGINNING = (
    "data.text.chat_template to one that writes contents as they are, or put the beginning of the last message into "
    "the answer"
)
_MARKING = "data.text.chat_template to one that marks every assistant turn, or none"
_SIGN = re.compile("\uf8f2([0-9]+)\uf8f2")  # of a private area, which templates have no opinion on
_USER: Message = {"role": "user", "content": "x"}
_TOOL = {
    "type": "function",
    "function": {"name": "x", "description": "x", "parameters": {"type": "object", "properties": {}}},
}


class RewrittenTurnError(InputError):
    """A turn that the template renders otherwise once more turns follow."""


class Passages:
    """Finds what is learnt.

    Args:
        rendering: by the template.
        turn_end: what ends a turn; ``None`` where the template has nothing that does.
    """

    def __init__(self, rendering: Rendering, turn_end: str | None) -> None:
        self._rendering = rendering
        self._turn_end = turn_end

    def prompt(self, messages: list[Message], i: int, tools: Any = None) -> str:
        """What generation of message ``i`` starts from: with the beginning of its content that is given."""
        given = messages[i].get("prefix_length") if i < len(messages) else None
        if given:
            return self._rendering.until(messages[: i + 1], given, tools)
        return self._rendering.text(messages[:i], tools, prompt=True)

    # -- by what the template marks ------------------------------------------------------------------------------

    def generated(self, messages: list[Message], tools: Any = None) -> tuple[str, list[Span]]:
        """Text and spans by ``{% generation %}``."""
        text, found = self._rendering.passages(messages, tools)
        spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(found) != len(spoken):
            found = _joined(found)  # a turn may be marked by pieces
        if len(found) == len(spoken) and all(map(partial(_begins, text), found, (messages[i] for i in spoken))):
            weights = [weight_of(messages[i]) for i in spoken]
        else:
            weights = self._told_apart(found, messages, spoken, tools)
        spans = [Span(start, self._marked_end(text, start, end)) for start, end in found]
        spans = [replace(span, weight=weight) for span, weight in zip(spans, weights, strict=True) if weight]
        return text, self._after_prompts(text, spans, messages, tools)

    def _told_apart(
        self, found: list[tuple[int, int]], messages: list[Message], spoken: list[int], tools: Any
    ) -> list[float]:
        """The weights of passages of which it is not seen at once which messages they are of."""
        weights = [weight_of(messages[i]) for i in spoken]
        if weights and weights[-1] and not any(weights[:-1]):  # of the last alone: the prompt before it tells
            begin = len(self.prompt(messages, spoken[-1], tools))
            weights = [weights[-1] if end > begin else 0.0 for _, end in found]
            if not any(weights):
                raise InputError(_nothing_marked(spoken[-1], "", _MARKING))
            return weights
        self._check_owners(messages, spoken, len(found), tools)
        if len(found) == len(weights):
            return weights
        if len(set(weights)) > 1:
            raise InputError(
                f"the chat template marks {len(found)} passages by {{% generation %}} for {len(weights)} "
                "assistant messages, so their weights cannot be told apart: give them one weight"
            )
        return weights[:1] * len(found)

    def _check_owners(self, messages: list[Message], spoken: list[int], number: int, tools: Any) -> None:
        """Whether passages are of the assistant messages, by signs in what messages say.

        Raises:
            InputError: one has another message, too; one to be learnt has none; or they are as many as messages, of
                other weights, and not one of each.
        """
        try:
            text, found = self._rendering.passages([_signed(message, i) for i, message in enumerate(messages)], tools)
        except EndlessTemplateError:
            raise
        except InputError:
            return  # of signs: what was said itself is written
        found = found if len(found) == len(spoken) else _joined(found)
        owners = [{int(i) for i in _SIGN.findall(text[start:end])} for start, end in found]
        if any(len(signs) > 1 for signs in owners) or not set[int]().union(*owners) <= set(spoken):
            raise InputError(
                "the chat template marks more than an assistant's turn as one passage by {% generation %}: set "
                "data.text.chat_template to one that marks what assistants say, turn by turn"
            )
        for i in spoken:
            if weight_of(messages[i]) and not any(i in signs for signs in owners):
                if i == spoken[-1]:
                    raise InputError(_nothing_marked(i, "", _MARKING))
                raise RewrittenTurnError(_nothing_marked(i, " once more turns follow", _OTHER_TURNS))
        several = len({weight_of(messages[i]) for i in spoken}) > 1
        if several and number == len(spoken) and owners != [{i} for i in spoken]:
            raise InputError(
                "the chat template marks pieces of assistant messages by {% generation %} that cannot be told apart, "
                f"and so cannot their weights: give them one weight, or set {_MARKING}"
            )

    def _marked_end(self, text: str, start: int, end: int) -> int:
        """A block may leave out the end-of-turn token and white space before it, or have the line break after it."""
        if self._turn_end is None:
            return end
        size = len(self._turn_end)
        rest = len(text) - len(text[end:].lstrip()) if text[end : end + 1].isspace() else end
        if text.startswith(self._turn_end, rest):
            return rest + size
        around = text.find(self._turn_end, max(start, end - size + 1), end + size)
        return self._end(text, start, end) if around < 0 else around + size

    def _after_prompts(self, text: str, spans: list[Span], messages: list[Message], tools: Any) -> list[Span]:
        """Spans without what a block has of the generation prompt, which the last of them tells."""
        if not spans:
            return spans
        last = max(i for i, message in enumerate(messages) if weight_of(message))
        prompt = self.prompt(messages, last, tools)
        if not text.startswith(prompt):
            through = text if last + 1 == len(messages) else self._rendering.text(messages[: last + 1], tools)
            _check_prompt(prompt, through, messages, last)
            _check_prefix(prompt, text, _rewritten(last), _OTHER_TURNS, RewrittenTurnError)
        begun = next((span for span in spans if span.start < len(prompt) < span.end), None)
        if begun is None:
            return spans
        header = text[begun.start : len(prompt)]
        return [
            replace(span, start=span.start + len(header) * text.startswith(header, span.start, span.end))
            for span in spans
        ]

    # -- by growing prefixes -------------------------------------------------------------------------------------

    def grown(self, messages: list[Message], tools: Any = None) -> tuple[str, list[Span]]:
        """Text and spans by growing prefixes.

        To render each of them takes time that grows with the square of the turns. Where there are many, the first, one
        in the middle and the last are rendered so, with all before them. The others are rendered with the turn before
        them and what stands between, after a user message: whatever a template makes of a turn by itself, its
        neighbours, its being the last, or an answer to a user, it shows there. The turn must again be a prefix of what
        follows, and the whole text must be what these renderings have, one after the other, without a gap. If anything
        differs, each turn is held against the whole conversation after all.
        """
        full = self._rendering.text(messages, tools)
        learnt = [i for i, message in enumerate(messages) if weight_of(message)]
        held = learnt if len(learnt) <= _FEW else [learnt[0], learnt[len(learnt) // 2], learnt[-1]]
        found = {i: self._held(full, messages, i, tools) for i in held}
        if len(held) < len(learnt):
            linked = self._linked(full, messages, learnt[0], learnt[-1], found[learnt[0]], tools) | {
                held[-1]: found[held[-1]]
            }
            if any(i not in linked for i in learnt) or linked[held[1]] != found[held[1]]:
                linked = {i: found.get(i) or self._held(full, messages, i, tools) for i in learnt}
            found = linked
        return full, [replace(found[i], weight=weight_of(messages[i])) for i in learnt]

    def _held(self, full: str, messages: list[Message], i: int, tools: Any) -> Span:
        """A turn, held against the text of the whole conversation."""
        prefix = self.prompt(messages, i, tools)
        through = full if i + 1 == len(messages) else self._rendering.text(messages[: i + 1], tools)
        _check_prompt(prefix, through, messages, i)
        # A template may end the whole text in what is not there between turns, so the turn is what must stay.
        end = self._end(through, len(prefix), len(through))
        _check_prefix(through[:end], full, _rewritten(i), _OTHER_TURNS, RewrittenTurnError)
        return Span(len(prefix), end)

    def _linked(
        self, full: str, messages: list[Message], first: int, last: int, span: Span, tools: Any
    ) -> dict[int, Span]:
        """The turns from the first, whose span is given, until the last, each after the one before it; none from where
        the full text has not what is rendered then."""
        found, before = {first: span}, first
        tools = tools and [_TOOL]
        try:
            begin = self._rendering.text([_USER], tools, prompt=True)
            for i in range(first + 1, last):
                if messages[i]["role"] != "assistant":
                    continue
                window = [_USER, *messages[before:i]]
                prefix = self._rendering.text(window, tools, prompt=True)
                through = self._rendering.text([*window, messages[i]], tools)
                end = self._end(through, len(prefix), len(through))
                known = f"{begin}{full[span.start : span.end]}"
                beyond = through[len(known) : end]
                if not (prefix.startswith(known) and through.startswith(prefix) and full.startswith(beyond, span.end)):
                    break
                stop = span.end + len(beyond)
                span = Span(stop - (end - len(prefix)), stop)
                found[i], before = span, i
        except InputError:
            pass  # of roles that do not follow each other so
        return found

    def _end(self, text: str, start: int, end: int) -> int:
        """What the template puts after the end-of-turn token (a line break, often) is not learnt."""
        if self._turn_end is None:
            return end
        found = text.rfind(self._turn_end, start, end)
        return end if found < 0 else found + len(self._turn_end)


def _nothing_marked(i: int, when: str, remedy: str) -> str:
    return f"the chat template marks nothing of turn {i + 1} by {{% generation %}}{when}: set {remedy}"


def _begins(text: str, passage: tuple[int, int], message: Message) -> bool:
    """Whether a passage is seen to be what a message says: it begins so."""
    said = message["content"].strip()
    return bool(said) and text[slice(*passage)].lstrip().startswith(said)


def _signed(message: Message, i: int) -> Message:
    """With signs behind what it says and the names of what it calls: these may be written alone."""
    sign = f"\uf8f2{i}\uf8f2"
    signed = {**message, "content": message["content"].rstrip() + sign}
    if message.get("tool_calls"):
        calls = [(call, call["function"]) for call in message["tool_calls"]]
        signed["tool_calls"] = [{**call, "function": {**it, "name": it["name"] + sign}} for call, it in calls]
    return signed


def _rewritten(i: int) -> str:
    return f"turn {i + 1} is rendered otherwise once more turns follow"


def _check_prompt(prompt: str, through: str, messages: Sequence[Message], i: int) -> None:
    given = messages[i].get("prefix_length")
    problem = "with its given beginning" if given else "with the generation prompt"
    _check_prefix(
        prompt, through, f"turn {i + 1} does not begin {problem}", _OTHER_BEGINNING if given else _OTHER_PROMPT
    )


def _joined(passages: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Passages that touch are one, and those of nothing are none."""
    joined: list[tuple[int, int]] = []
    for start, end in passages:
        if start == end:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _check_prefix(prefix: str, text: str, problem: str, remedy: str, kind: type[InputError] = InputError) -> None:
    if text.startswith(prefix):
        return
    same, differs = 0, len(prefix)
    while same < differs:  # the first so many characters are the same, and more than so many are not
        middle = (same + differs + 1) // 2
        same, differs = (middle, differs) if text.startswith(prefix[:middle]) else (same, middle - 1)
    raise kind(
        f"the chat template cannot be masked exactly: {problem}. At character {same} it has "
        f"{prefix[same : same + 40]!r} there and {text[same : same + 40]!r} in the whole; set {remedy}"
    )
