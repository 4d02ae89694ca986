"""Messages through a tokenizer's chat template, as transformers renders it: its variables, and the day it writes."""

from __future__ import annotations

import contextlib
import copy
import datetime
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dft_lightning.data.options import TextOptions
from dft_lightning.data.rows.turns import Message
from dft_lightning.data.text.template_reads import variables
from dft_lightning.data.text.template_source import marks_in_place
from dft_lightning.data.text.time_limit import limited
from dft_lightning.data.text.tokenizer import as_parts, takes_parts
from dft_lightning.errors import InputError, one_line
from dft_lightning.foreign.transformers import template_clock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHTS = frozenset({"weight", "content_weights"})
OF_ROWS = WEIGHTS | {"prefix_length"}
"""Keys of messages that are not for the template."""

Passage = tuple[int, int]

_OPEN, _CLOSE, _BORDER = "\uf8f4", "\uf8f5", "\uf8f6"  # of a private area, which templates have no opinion on
_TAG = re.compile(r"\{%([-+]?)\s*(generation|endgeneration)\s*([-+]?)%\}")
# The tags stay where they are, so that white space around them is trimmed as it was.
_BEGIN = "{%%%s generation %%}{{ '" + _OPEN + "' }}{%% if true %%}{%% endif %s%%}"
_END = "{%%%s if true %%}{%% endif %%}{{ '" + _CLOSE + "' }}{%% endgeneration %s%%}"

_GIVEN = {"conversations", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"}
_GIVEN |= {"return_assistant_tokens_mask"}


class Rendering:
    """A chat template with its variables.

    Args:
        tokenizer: with a chat template.
        options: of the data module.

    Attributes:
        source: of the template for conversations without tools.
        date: the day that the template writes: ``options.date``, or that on which this was made; ``None`` where it
            writes none.
        unread: names of variables that the template is given and does not read.

    Raises:
        InputError: the template is broken, or ``options`` have what it makes nothing of.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: TextOptions) -> None:
        self._tokenizer = tokenizer
        self.source = str(tokenizer.get_chat_template())
        self._in_place = marks_in_place(self.source)
        own = _own(options.chat_template_kwargs or {}, "data.text.chat_template_kwargs")
        self._parts = takes_parts(tokenizer, own)
        self._variables: dict[str, Any] = {**tokenizer.special_tokens_map, **own}
        templates = tokenizer.chat_template
        sources = list(map(str, templates.values())) if isinstance(templates, dict) else [self.source]
        self._reads = set[str]().union(*map(variables, sources))
        self._own = own
        self.unread = sorted(own.keys() - self._reads)
        self.date: datetime.date | None = None
        day = datetime.date.fromisoformat(options.date) if options.date else datetime.date.today()
        if "strftime_now" in self._reads and self._asks_for(day):
            self.date = day
        if options.date and self.date is None:
            raise InputError(
                "data.text.date: the chat template writes no day, or one that a variable of its own has: leave it out"
            )

    def with_own(self, values: dict[str, Any]) -> Rendering:
        """The same with a row's own variables."""
        other = copy.copy(self)
        other._own = {**self._own, **_own(values, "chat_template_kwargs")}
        other._variables = {**self._variables, **other._own}
        other.unread = sorted(other._own.keys() - self._reads)
        return other

    def text(self, messages: list[Message], tools: Any = None, prompt: bool = False) -> str:
        """A conversation, with the generation prompt behind it or without.

        Raises:
            InputError: the template refuses the messages, fails, or does not come to an end.
        """
        return self._render(messages, tools, self.template(tools), add_generation_prompt=prompt)[0]

    def until(self, messages: list[Message], length: int, tools: Any = None) -> str:
        """A conversation, up to the first ``length`` characters of the last message's content.

        Raises:
            InputError: as :meth:`text` does, and where the template writes nothing of the content there.
        """
        last = {key: value for key, value in messages[-1].items() if key != "tool_calls"}
        begun = {**last, "content": f"{last['content'][:length]}{_BORDER}"}
        text, found, _ = self.text([*messages[:-1], begun], tools).rpartition(_BORDER)
        if not found:
            raise InputError(
                "the chat template leaves out how the last message begins, which the row gives as part of the prompt; "
                "have it be part of the answer, or set data.text.chat_template"
            )
        return text

    def passages(self, messages: list[Message], tools: Any = None) -> tuple[str, list[Passage]]:
        """A conversation, and what the template marks of it by ``{% generation %}``.

        transformers takes the place of a block to be the length of what was written before. Where a block is not
        written in its place (but in a macro, say) that is the place of something else. There characters are put around
        what the blocks write, and looked for in the whole.

        Raises:
            InputError: as :meth:`text` does, and where something is done to what the blocks write.
        """
        source = self.template(tools)
        if self._in_place if source is self.source else marks_in_place(source):
            return self._render(messages, tools, source, return_assistant_tokens_mask=True)
        text = self.text(messages, tools)
        found = _between(self._render(messages, tools, _TAG.sub(_bracketed, source))[0])
        if found is None or found[0] != text:
            raise InputError(
                "the chat template changes, repeats or hides what it marks by {% generation %} (in a macro, filter or "
                "{% set %} block), so that its marks cannot be followed: set data.text.chat_template to one with "
                "{% generation %} around what is written in its place"
            )
        return found

    def template(self, tools: Any) -> str:
        """The source for conversations with those tools."""
        return str(self._tokenizer.get_chat_template(tools=tools)) if tools else self.source

    def _render(
        self,
        messages: list[Message],
        tools: Any,
        template: str,
        clock: Callable[[str], str] | None = None,
        **options: Any,
    ) -> tuple[str, list[Passage]]:
        """The text, and the passages that transformers finds, where ``options`` ask for them."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        plain = [
            message
            if OF_ROWS.isdisjoint(message)
            else {key: value for key, value in message.items() if key not in OF_ROWS}
            for message in messages
        ]
        if self._parts:
            plain = as_parts(plain)
        try:
            with limited(), self._clock(template, clock or self._strftime):
                found: Any = render_jinja_template(
                    [plain],
                    tools=tools,
                    chat_template=template,
                    **self._variables,
                    **options,
                )
        except InputError:
            raise
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise InputError(f"the chat template refuses a conversation of roles {roles}: {error}") from error
        except Exception as error:  # whatever its expressions run into
            raise InputError(f"the chat template fails: {type(error).__name__}: {one_line(error)}") from error
        texts, spans = found
        return texts[0], spans[0] if spans else []

    def _clock(self, template: str, strftime: Callable[[str], str]) -> contextlib.AbstractContextManager[None]:
        return template_clock(template, strftime) if "strftime_now" in self._reads else contextlib.nullcontext()

    def _strftime(self, wanted: str) -> str:
        if self.date is None:
            raise InputError(
                "the chat template writes the day into rows of this kind, and into no others, so that what is kept of "
                "them would be wrong tomorrow: set data.text.chat_template to one that does not"
            )
        return self.date.strftime(wanted)

    def _asks_for(self, day: datetime.date) -> bool:
        """Whether any of a few conversations has the template ask for the day."""
        user, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}
        tools = [{"type": "function", "function": {"name": "f", "description": "x", "parameters": {"type": "object"}}}]
        asked: list[str] = []

        def clock(wanted: str) -> str:
            asked.append(wanted)
            return day.strftime(wanted)

        for messages in ([user], [user, answer], [{"role": "system", "content": "x"}, user, answer]):
            for given in (None, tools):
                with contextlib.suppress(InputError):  # for rows of the kind to say
                    self._render(
                        messages, given, self.template(given), clock, add_generation_prompt=messages[-1] is user
                    )
        return bool(asked)


def _own(values: dict[str, Any], where: str) -> dict[str, Any]:
    given = sorted(_GIVEN & values.keys())
    if given:
        raise InputError(f"{where}: {', '.join(given)}: every template is given that as it is; leave it out")
    return values


def weight_of(message: Message) -> float:
    """What a message is learnt with: an assistant's, of which more is there than what the prompt has."""
    if message["role"] != "assistant":
        return 0.0
    given = message.get("prefix_length")
    if given and given >= len(message["content"]) and not message.get("tool_calls"):
        return 0.0
    return float(message.get("weight", 1.0))


def _bracketed(tag: re.Match[str]) -> str:
    return (_BEGIN if tag[2] == "generation" else _END) % (tag[1], tag[3])


def _between(text: str) -> tuple[str, list[Passage]] | None:
    """A text without the characters around its passages, and these; ``None`` where they are not in pairs."""
    pieces = re.split(f"([{_OPEN}{_CLOSE}])", text)
    if "".join(pieces[1::2]) != (_OPEN + _CLOSE) * (len(pieces) // 4):
        return None
    places = [0]
    for piece in pieces[::2]:
        places.append(places[-1] + len(piece))
    return "".join(pieces[::2]), list(zip(places[1:-1:2], places[2:-1:2], strict=True))
