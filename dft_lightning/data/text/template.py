"""Conversations through a chat template: as rows of text, with the characters that are learnt."""

from __future__ import annotations

import copy
import datetime
import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from dft_lightning.data.notes import Notes
from dft_lightning.data.options import TextOptions
from dft_lightning.data.rows.checks import LARGEST_WEIGHT
from dft_lightning.data.rows.turns import Message
from dft_lightning.data.text.layout import Layouts
from dft_lightning.data.text.part_weights import PartWeights
from dft_lightning.data.text.passages import Passages, RewrittenTurnError
from dft_lightning.data.text.probes import Probes
from dft_lightning.data.text.rendering import Rendering, weight_of
from dft_lightning.data.text.span_weights import Span, multiplied, weighted, without_empty_thoughts
from dft_lightning.data.text.special_tokens import SpecialTokens
from dft_lightning.data.text.template_reads import sought
from dft_lightning.data.text.template_source import copies_contents, has_marks
from dft_lightning.data.text.time_limit import EndlessTemplateError, limited
from dft_lightning.data.text.tokenizer import adds_bos, end_of_turn
from dft_lightning.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dft_lightning.data.rows.forms import Conversation

MaskPath = Literal["generation", "prefixes"]

_DEFAULTS = TextOptions()
_MOST_VARIANTS = 100


@dataclass(frozen=True)
class Rendered:
    """Text of a row and what of it is learnt.

    Attributes:
        text: with the special tokens that rows spell marked, see :class:`SpecialTokens`.
        spans: in order.
        mark: the marking character; ``None`` where nothing is marked.
        messages: how many messages of the conversation it has; ``None`` for all.
        left_out: names of what the template leaves out, see :class:`~dft_lightning.data.text.probes.Probes`.
    """

    text: str
    spans: list[Span]
    mark: str | None = None
    messages: int | None = None
    left_out: tuple[str, ...] = ()


class ChatTemplate:
    """Renders conversations and finds what is learnt: ``path`` says how.

    Args:
        tokenizer: with a chat template.
        options: of the data module.
        one_row: make one row of each conversation, for generation: where there would be one of each turn, that of the
            turn that ends the conversation; if none does, one of all messages, of which nothing is learnt.

    Attributes:
        notes: of the rows that were rendered.

    Raises:
        InputError: the template is broken, or ``options`` have what it makes nothing of.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, options: TextOptions = _DEFAULTS, one_row: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.notes = Notes()
        self._one_row = one_row
        self._rendering = Rendering(tokenizer, options)
        turn_end = end_of_turn(tokenizer, options.chat_template_kwargs)
        self._turn_end = turn_end[0] if turn_end else None
        self.special_tokens = SpecialTokens(tokenizer, self._turn_end, options.allow_special_tokens, self._asked())
        self.path: MaskPath = "generation" if has_marks(self._rendering.source) else "prefixes"
        self._span_weights = [(re.compile(text), weight) for text, weight in (options.span_weights or {}).items()]
        self._weighs = bool(self._span_weights or options.prompt_weight)
        self._copies_contents = copies_contents(self._rendering.source)
        self._words = sought(self._rendering.source) | ({self._turn_end} if self._turn_end else set())
        self._prepare()
        self._variants: dict[str, ChatTemplate] = {}

    def _prepare(self) -> None:
        """What depends on the template's variables."""
        self._passages = Passages(self._rendering, self._turn_end)
        self._layouts = Layouts(self._masked, None if self._copies_contents else self._rendering.text, self._words)
        self._probes = Probes(self._rendering.text)
        self._part_weights = PartWeights(self._rendering, self._masked, self._turn_end)

    @property
    def date(self) -> datetime.date | None:
        """The day that the template writes; ``None`` where it writes none."""
        return self._rendering.date

    def rows(self, conversation: Conversation) -> list[Rendered]:
        """The texts of a conversation's rows, and the spans that are learnt.

        One row, or one of each assistant turn that is learnt: see ``TextOptions.train_turns``. Turns that are not
        learnt make no row, but a conversation in which none is makes one without spans.

        Raises:
            InputError: the template refuses the conversation, or cannot be masked exactly.
        """
        if conversation.template_kwargs:
            return self._variant(conversation).rows(replace(conversation, template_kwargs=None))
        mark, conversation = self._marked(conversation, self.notes)
        if conversation.text is not None:
            return [self._plain(conversation, mark)]
        self._probes.check_tool_calls(conversation.messages, conversation.tools)
        rows = self._rows(conversation, mark)
        if dropped := {name: None for row in rows for name in row.left_out}:
            self.notes.add("dropped", dropped)
        if self._rendering.unread:
            self.notes.add("unread variables", self._rendering.unread)
        return rows

    def prompt(self, conversation: Conversation) -> Rendered:
        """What generation starts from: all but a final assistant turn, and the generation prompt.

        Of a final assistant message with a ``prefix_length`` so many characters belong to it.
        """
        if conversation.text is not None:
            return Rendered("", [])  # plain text answers nothing
        if conversation.template_kwargs:
            return self._variant(conversation).prompt(replace(conversation, template_kwargs=None))
        mark, conversation = self._marked(conversation)
        messages = conversation.messages
        answered = len(messages) - (messages[-1]["role"] == "assistant")
        return Rendered(self._passages.prompt(messages, answered, conversation.tools), [], mark)

    # -- the ways to a mask --------------------------------------------------------------------------------------

    def _rows(self, conversation: Conversation, mark: str | None) -> list[Rendered]:
        messages, turns = conversation.messages, self.options.train_turns
        if turns == "last":
            last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
            messages = _learnt_alone(messages, last)
        if turns != "each":
            try:
                return [self._row(messages, conversation, mark)]
            except RewrittenTurnError:
                if turns == "all" and not self._one_row:
                    self.notes.add("each", ["conversations of several assistant turns"])
        learnt = [] if self._one_row else [i for i, message in enumerate(messages) if weight_of(message)]
        return [
            self._row(_learnt_alone(messages[: i + 1], i), conversation, mark) for i in learnt or [len(messages) - 1]
        ]

    def _row(self, messages: list[Message], conversation: Conversation, mark: str | None) -> Rendered:
        tools, left_out = conversation.tools, list[str]()
        found = None if tools else self._layouts.fill(messages)
        if found is None:
            with limited():  # many renderings
                found = self._masked(messages, tools)
                left_out = self._probes.left_out(messages, tools, found[0])
        text, spans = found
        if mark is not None:
            self.special_tokens.check_marks(text, mark)
        spans = self._weighed(text, spans, messages, conversation, mark)
        size = None if len(messages) == len(conversation.messages) else len(messages)
        return Rendered(text, spans, mark, size, tuple(left_out))

    def _weighed(
        self, text: str, turns: list[Span], messages: list[Message], conversation: Conversation, mark: str | None
    ) -> list[Span]:
        """What is learnt of a text, from the turns that are."""
        spans, tools = turns, conversation.tools
        if not self.options.train_empty_thoughts:
            spans = without_empty_thoughts(text, spans)
        if not self._weighs and not any("content_weights" in message for message in messages):  # most rows
            return spans
        if self._span_weights:
            spans = weighted(text, spans, self._span_weights, mark)
        prompts = self.options.prompt_weight * conversation.weight
        if prompts:
            between = self._part_weights.between_turns(text, turns, messages, tools)
            rest = [replace(span, weight=prompts) for span in between]
            spans = sorted([*spans, *rest], key=lambda span: span.start)
        factors = self._part_weights.of_contents(text, turns, messages, tools, mark, with_prompts=bool(prompts))
        return _checked(multiplied(spans, factors) if factors else spans)

    def _masked(self, messages: list[Message], tools: Any = None) -> tuple[str, list[Span]]:
        marked = has_marks(self._rendering.template(tools))  # that for tools may be another
        return (self._passages.generated if marked else self._passages.grown)(messages, tools)

    def _plain(self, conversation: Conversation, mark: str | None) -> Rendered:
        bos, eos, text = self.tokenizer.bos_token, self.tokenizer.eos_token, str(conversation.text)
        if eos is None:
            raise InputError("plain text ends in the end-of-text token, which the tokenizer has none of")
        is_control = self.special_tokens.is_control
        begun = is_control(bos) and text.lstrip().startswith(bos)
        ended = any(is_control(end) and text.rstrip().endswith(str(end)) for end in (eos, self._turn_end))
        start = bos if self._adds_bos and not begun else ""
        text = f"{start}{text}{'' if ended else eos}"
        spans = [Span(len(start), len(text), conversation.weight)] if conversation.weight else []
        return Rendered(text, _checked(weighted(text, spans, self._span_weights, mark)), mark)

    @cached_property
    def _adds_bos(self) -> bool:
        return adds_bos(self.tokenizer)

    # -- parts -------------------------------------------------------------------------------------------------

    def _marked(self, conversation: Conversation, notes: Notes | None = None) -> tuple[str | None, Conversation]:
        found = self.special_tokens.spelled(conversation)
        if found is None:
            return None, conversation
        as_text, as_control = found
        if notes is not None:
            notes.add("special tokens", sorted(as_text))
            notes.add("allowed special tokens", sorted(as_control))
        if not as_text:
            return None, conversation
        mark, marked = self.special_tokens.mark(conversation)
        return mark, replace(marked, messages=[_measured(message, mark) for message in marked.messages])

    def _asked(self) -> str:
        """A question as the template writes it; nothing where it wants more than that."""
        try:
            return self._rendering.text([{"role": "user", "content": "x"}])
        except EndlessTemplateError:
            raise
        except InputError:
            return ""

    def _variant(self, conversation: Conversation) -> ChatTemplate:
        """The same template with a row's own variables."""
        key = json.dumps(conversation.template_kwargs, sort_keys=True)
        if key not in self._variants:
            if len(self._variants) == _MOST_VARIANTS:
                self._variants.clear()
            variant = self._variants[key] = copy.copy(self)
            variant._rendering = self._rendering.with_own(conversation.template_kwargs or {})
            variant._prepare()
        self._variants[key].notes = self.notes
        return self._variants[key]


def _checked(spans: list[Span]) -> list[Span]:
    if any(abs(span.weight) > LARGEST_WEIGHT for span in spans):
        raise InputError(
            "the weights of the row, its turns and their parts, data.text.span_weights and prompt_weight multiply to "
            "more than float32 holds"
        )
    return spans


def _learnt_alone(messages: list[Message], learnt: int | None) -> list[Message]:
    return [
        {**message, "weight": 0.0} if message["role"] == "assistant" and i != learnt else message
        for i, message in enumerate(messages)
    ]


def _measured(message: Message, mark: str) -> Message:
    """With the length of the beginning that is given as it is after marks were put in."""
    if not message.get("prefix_length"):
        return message
    content, length = message["content"], 0
    for _ in range(message["prefix_length"]):
        length += 1 + (content[length : length + 1] == mark)
    return {**message, "prefix_length": length}
