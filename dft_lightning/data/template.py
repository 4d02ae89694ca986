"""Conversations through a chat template, and which characters of the text are learnt.

Where the template marks what the assistant says by ``{% generation %}``, that is taken. Otherwise a turn is what its
rendering has beyond the generation prompt before it; growing prefixes of the conversation are rendered for it, and each
must be a prefix of the whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from dft_lightning.data.special_tokens import SpecialTokens
from dft_lightning.data.template_source import copies_contents
from dft_lightning.data.time_limit import EndlessTemplateError, limited
from dft_lightning.data.tokenizer import adds_bos, as_parts, end_of_turn, takes_parts
from dft_lightning.data.turns import Message
from dft_lightning.errors import InputError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dft_lightning.data.forms import Conversation

TrainTurns = Literal["all", "last"]
MaskPath = Literal["generation", "prefixes"]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Span:
    """Characters ``start`` to ``end`` of a text, learnt with a weight."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class Rendered:
    """Text of a conversation and what of it is learnt.

    Attributes:
        text: with the special tokens that rows spell marked, see :class:`SpecialTokens`.
        spans: in order.
        mark: the marking character; ``None`` where nothing is marked.
    """

    text: str
    spans: list[Span]
    mark: str | None = None


class ChatTemplate:
    """Renders conversations and finds what is learnt: ``path`` says how.

    Args:
        tokenizer: with a chat template.
        train_turns: ``"all"`` assistant turns, or the ``"last"`` alone.
        template_kwargs: further variables of the template, such as ``enable_thinking``.
        allow_special_tokens: let rows spell special tokens as control, not as text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train_turns: TrainTurns = "all",
        template_kwargs: dict[str, Any] | None = None,
        allow_special_tokens: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.train_turns = train_turns
        self.template_kwargs = template_kwargs or {}
        self.allow_special_tokens = allow_special_tokens
        self._parts = takes_parts(tokenizer, self.template_kwargs)
        turn_end = end_of_turn(tokenizer, self.template_kwargs)
        self._turn_end = turn_end[0] if turn_end else None
        self.special_tokens = SpecialTokens(tokenizer, self._turn_end)
        self._variables = {**tokenizer.special_tokens_map, **self.template_kwargs}
        self._own_template = str(tokenizer.get_chat_template())
        self._copies_contents = copies_contents(self._own_template)
        self.path: MaskPath = "generation" if _GENERATION.search(self._own_template) else "prefixes"
        self._layouts: dict[tuple[str, ...], _Layout | None] = {}
        self._writes_tool_calls: dict[bool, bool] = {}

    def render(self, conversation: Conversation) -> Rendered:
        """The text of a conversation, and the spans that are learnt.

        Raises:
            InputError: the template refuses the conversation, or cannot be masked exactly.
        """
        mark, conversation = self._marked(conversation)
        if conversation.text is not None:
            return self._plain(conversation, mark)
        self._check_tool_calls(conversation)
        messages = self._with_weights(conversation.messages)
        if self.path == "generation":
            text, spans = self._generated(messages, conversation.tools)
        else:
            text, spans = self._laid_out(messages, conversation.tools) or self._grown(messages, conversation.tools)
        if mark is not None:
            self.special_tokens.check_marks(text, mark)
        return Rendered(text, [span for span in spans if span.weight], mark)

    def prompt(self, conversation: Conversation) -> Rendered:
        """What generation starts from: all but a final assistant turn, and the generation prompt."""
        if conversation.text is not None:
            return Rendered("", [])  # plain text answers nothing
        mark, conversation = self._marked(conversation)
        messages = conversation.messages
        before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return Rendered(self._apply(before, conversation.tools, add_generation_prompt=True), [], mark)

    # -- the ways to a mask ------------------------------------------------------------------------------------

    def _plain(self, conversation: Conversation, mark: str | None) -> Rendered:
        tokenizer = self.tokenizer
        if tokenizer.eos_token is None:
            raise InputError("plain text ends in the end-of-text token, which the tokenizer has none of")
        start = str(tokenizer.bos_token) if self._adds_bos else ""
        text = f"{start}{conversation.text}{tokenizer.eos_token}"
        return Rendered(text, [Span(len(start), len(text), conversation.weight)] if conversation.weight else [], mark)

    def _generated(self, messages: list[Message], tools: Any) -> tuple[str, list[Span]]:
        """By ``{% generation %}``."""
        text, found = self._render(messages, tools, return_assistant_tokens_mask=True)
        weights = [_weight(message) for message in messages if message["role"] == "assistant"]
        if len(found) != len(weights):
            found = _joined(found)  # a turn may be marked by pieces
        if len(found) != len(weights):
            if len(set(weights)) > 1:
                raise InputError(
                    f"the chat template marks {len(found)} passages by {{% generation %}} for {len(weights)} "
                    "assistant messages, so their weights cannot be told apart: give them one weight"
                )
            weights = weights[:1] * len(found)
        spans = []
        for (start, end), weight in zip(found, weights, strict=True):
            # A block may stop short of the end-of-turn token, or go on to the line break after it.
            size = len(self._turn_end or "")
            around = text.find(self._turn_end, max(start, end - size), end + size) if self._turn_end else -1
            spans.append(Span(start, self._end(text, start, end) if around < 0 else around + size, weight))
        return text, spans

    def _grown(self, messages: list[Message], tools: Any) -> tuple[str, list[Span]]:
        """By growing prefixes."""
        full = self._apply(messages, tools)
        spans = []
        for i, message in enumerate(messages):
            weight = _weight(message)
            if message["role"] != "assistant" or not weight:
                continue
            prefix = self._apply(messages[:i], tools, add_generation_prompt=True)
            through = self._apply(messages[: i + 1], tools)
            _check_prefix(prefix, through, f"turn {i + 1} does not begin with the generation prompt", _OTHER_PROMPT)
            # A template may end the whole text in what is not there between turns, so the turn is what must stay.
            end = self._end(through, len(prefix), len(through))
            _check_prefix(
                through[:end], full, f"turn {i + 1} is rendered otherwise once more turns follow", _OTHER_TURNS
            )
            spans.append(Span(len(prefix), end, weight))
        return full, spans

    def _laid_out(self, messages: list[Message], tools: Any) -> tuple[str, list[Span]] | None:
        """As :meth:`_grown` in one rendering: where the text is the layout of its roles with the contents put in.

        In none where the template's source shows that it must be. ``None`` where it is not: the template trims, say,
        or reads more than the contents.
        """
        if tools or any(len(message) > 2 and not message.keys() <= _LAID_OUT for message in messages):
            return None
        roles = tuple(
            message["role"] if message.get("weight") != 0 else f"{message['role']} left out" for message in messages
        )
        if roles not in self._layouts:
            self._layouts[roles] = _Layout.find(messages, lambda probe: self._grown(probe, None))
        layout = self._layouts[roles]
        if layout is None:
            return None
        text, spans = layout.fill(messages)
        return (text, spans) if self._copies_contents or text == self._apply(messages, None) else None

    @cached_property
    def _adds_bos(self) -> bool:
        return adds_bos(self.tokenizer)

    # -- parts -------------------------------------------------------------------------------------------------

    def _marked(self, conversation: Conversation) -> tuple[str | None, Conversation]:
        return (None, conversation) if self.allow_special_tokens else self.special_tokens.mark(conversation)

    def _check_tool_calls(self, conversation: Conversation) -> None:
        """Many templates know nothing of tool calls, and would have the model learn to say nothing there."""
        if not any(message.get("tool_calls") for message in conversation.messages):
            return
        has_tools = conversation.tools is not None
        if has_tools not in self._writes_tool_calls:
            call = {"type": "function", "function": {"name": _TOOL, "arguments": {}}}
            asked: Message = {"role": "user", "content": "x"}
            probe: list[Message] = [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
            try:
                self._writes_tool_calls[has_tools] = _TOOL in self._apply(probe, conversation.tools)
            except InputError:
                self._writes_tool_calls[has_tools] = True  # for the real messages to say
        if not self._writes_tool_calls[has_tools]:
            raise InputError("the chat template leaves out tool calls; set data.chat_template to one that writes them")

    def _with_weights(self, messages: list[Message]) -> list[Message]:
        if self.train_turns == "all":
            return messages
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        return [
            {**message, "weight": 0.0} if message["role"] == "assistant" and i != last else message
            for i, message in enumerate(messages)
        ]

    def _end(self, text: str, start: int, end: int) -> int:
        """What the template puts after the end-of-turn token (a line break, often) is not learnt."""
        if self._turn_end is None:
            return end
        found = text.rfind(self._turn_end, start, end)
        return end if found < 0 else found + len(self._turn_end)

    def _apply(self, messages: list[Message], tools: Any, add_generation_prompt: bool = False) -> str:
        return self._render(messages, tools, add_generation_prompt=add_generation_prompt)[0]

    def _template(self, tools: Any) -> str:
        return str(self.tokenizer.get_chat_template(tools=tools)) if tools else self._own_template

    def _render(self, messages: list[Message], tools: Any, **options: Any) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        plain = [
            {key: value for key, value in message.items() if key != "weight"} if "weight" in message else message
            for message in messages
        ]
        if self._parts:
            plain = as_parts(plain)
        try:
            with limited():
                found: Any = render_jinja_template(
                    [plain],
                    tools=tools,
                    chat_template=self._template(tools),
                    **self._variables,
                    **options,
                )
        except EndlessTemplateError:
            raise
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise InputError(f"the chat template refuses a conversation of roles {roles}: {error}") from error
        except Exception as error:  # whatever its expressions run into
            raise InputError(f"the chat template fails: {type(error).__name__}: {one_line(error)}") from error
        texts, spans = found
        return texts[0], spans[0] if spans else []


@dataclass(frozen=True)
class _Layout:
    """Where a template puts the contents of messages of certain roles.

    Attributes:
        pieces: text and, in between, the messages' positions.
        spans: as position in ``pieces`` and characters into it, start and end of each learnt passage.
        learnt: positions of the messages that are learnt.
    """

    pieces: list[str | int]
    spans: list[tuple[tuple[int, int], tuple[int, int]]]
    learnt: list[int]

    @classmethod
    def find(cls, messages: list[Message], render: Callable[[list[Message]], tuple[str, list[Span]]]) -> _Layout | None:
        """From contents that stand for others; ``None`` where they are not in the text once and in order."""
        probe = [{**message, "content": f"{_PROBE}{i}{_PROBE}"} for i, message in enumerate(messages)]
        try:
            text, spans = render(probe)
        except InputError:
            return None  # for the real contents to say
        parts = re.split(f"{_PROBE}([0-9]+){_PROBE}", text)
        if [int(i) for i in parts[1::2]] != list(range(len(messages))):
            return None
        pieces: list[str | int] = [int(part) if i % 2 else part for i, part in enumerate(parts)]
        starts = [0]
        for i, part in enumerate(parts):
            starts.append(starts[-1] + len(part) + (2 * len(_PROBE) if i % 2 else 0))

        def locate(place: int) -> tuple[int, int]:
            piece = max(i for i, start in enumerate(starts[:-1]) if start <= place)
            return piece, place - starts[piece]

        located = [(locate(span.start), locate(span.end)) for span in spans]
        if any(isinstance(pieces[piece], int) and offset for pair in located for piece, offset in pair):
            return None  # a border within a content
        learnt = [i for i, message in enumerate(messages) if message["role"] == "assistant" and _weight(message)]
        return cls(pieces, located, learnt)

    def fill(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text with the messages' own contents, and its spans."""
        texts = [piece if isinstance(piece, str) else messages[piece]["content"] for piece in self.pieces]
        starts = [0]
        for text in texts:
            starts.append(starts[-1] + len(text))
        spans = [
            Span(starts[first] + a, starts[last] + b, _weight(messages[i]))
            for ((first, a), (last, b)), i in zip(self.spans, self.learnt, strict=True)
        ]
        return "".join(texts), spans


_LAID_OUT = {"role", "content", "weight"}
_PROBE = "\uf8f0"  # of a private area, which templates have no opinion on
_TOOL = "dft_probe_tool"

_OTHER_PROMPT = (
    "data.chat_template_kwargs to what makes the prompt that of the answers (enable_thinking: false, often), or "
    "data.chat_template to one with {% generation %}"
)
_OTHER_TURNS = (
    "data.train_turns: last, or data.chat_template to one with {% generation %} or one that keeps earlier turns as "
    "they are"
)


def _weight(message: Message) -> float:
    return float(message.get("weight", 1.0))


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


def _check_prefix(prefix: str, text: str, problem: str, remedy: str) -> None:
    if text.startswith(prefix):
        return
    same = next((i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), min(len(prefix), len(text)))
    raise InputError(
        f"the chat template cannot be masked exactly: {problem}. At character {same} it has "
        f"{prefix[same : same + 40]!r} there and {text[same : same + 40]!r} in the whole; set {remedy}"
    )
