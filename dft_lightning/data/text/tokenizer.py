"""The tokenizer and its chat template."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.assets import resolve
from dft_lightning.checkpoints.trust import code_refused
from dft_lightning.data.text.time_limit import EndlessTemplateError, limited
from dft_lightning.errors import InputError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_CHAT_TEMPLATE = (
    "{{ BOS }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
)
"""For tokenizers without a chat template: each system or user message and a line break; each assistant message and
the end-of-text token, then a line break if more follows. It begins with the begin-of-text token where the tokenizer
itself would put one (``BOS`` stands for it)."""


def load_tokenizer(
    name: str | os.PathLike[str],
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    key: str = "data.text.tokenizer",
) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer with a chat template.

    Args:
        name: hub name, local folder or ``asset://NAME``.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the tokenizer.
        chat_template: Jinja text, or the path of a ``.jinja`` file, in place of the tokenizer's own. Without either
            :data:`PLAIN_CHAT_TEMPLATE` is used, which is said.
        key: what an error message calls the name.

    Raises:
        InputError: no such tokenizer, not a fast one, or neither a template nor an end-of-text token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    path = resolve(name, key)
    options = {} if revision is None else {"revision": revision}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, **options
        )
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"its tokenizer_class is {type(tokenizer).__name__}, which is none")
    except Exception as error:  # whatever its files make transformers stumble on
        refused = code_refused(path, key, error)
        raise refused or InputError(f"{key}: cannot load the tokenizer of {path!r}: {one_line(error)}") from error
    if not tokenizer.is_fast:
        raise InputError(
            f"{key}: the tokenizer of {path!r} is not a fast tokenizer, whose character offsets the loss mask needs; "
            "convert it to tokenizer.json"
        )
    for name in tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else ():
        if not re.fullmatch(r"\w[\w.-]*", str(name)):  # it is the name of a file where the tokenizer is saved
            raise InputError(f"{key}: the tokenizer of {path!r} has a chat template named {name!r}: take it out")
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = _plain_template(tokenizer, path, key)
    return tokenizer


def _read_template(text_or_path: str) -> str:
    if not text_or_path.endswith(".jinja"):
        return text_or_path
    if not Path(text_or_path).is_file():
        raise InputError(f"data.text.chat_template: no such file: {text_or_path}")
    try:
        return Path(text_or_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.text.chat_template: {text_or_path} cannot be read: {one_line(error)}") from error


def _plain_template(tokenizer: PreTrainedTokenizerBase, path: str, key: str) -> str:
    if tokenizer.eos_token is None:
        raise InputError(
            f"{key}: the tokenizer of {path!r} has neither a chat template nor an end-of-text token: "
            "set data.text.chat_template"
        )
    rank_zero_info(
        f"{path} has no chat template and gets the plain one: each message and a line break, answers and "
        f"{tokenizer.eos_token}; data.text.chat_template takes another"
    )
    return PLAIN_CHAT_TEMPLATE.replace("{{ BOS }}", "{{ bos_token }}" if adds_bos(tokenizer) else "")


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts its begin-of-text token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def as_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose contents are lists of one part, a text."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def takes_parts(tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any] | None = None) -> bool:
    """Whether the template reads contents as lists of parts only, as those of models that see images do."""

    def answers(messages: list[dict[str, Any]]) -> bool:
        try:
            return _ANSWER in _render(tokenizer, messages, template_kwargs)
        except EndlessTemplateError:
            raise
        except InputError:
            return False

    return not answers(_TURN) and answers(as_parts(_TURN))


def end_of_turn(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any] | None = None
) -> tuple[str, int] | None:
    """The special token with which the template ends an assistant turn, as text and id; ``None`` if there is none.

    Where others stand directly before it they are part of the text.

    Args:
        tokenizer: with a chat template.
        template_kwargs: further variables of the template.

    Raises:
        InputError: the template is broken, or leaves out what the assistant said.
    """
    parts = takes_parts(tokenizer, template_kwargs)

    def after_answer(messages: list[dict[str, Any]]) -> str:
        text = _render(tokenizer, as_parts(messages) if parts else messages, template_kwargs)
        _, found, suffix = text.rpartition(_ANSWER)
        if not found:
            raise InputError("the chat template leaves out what the assistant says; set data.text.chat_template")
        return suffix

    suffix = after_answer(_TURN)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    encoded = tokenizer(suffix, add_special_tokens=False, return_offsets_mapping=True)
    tokens = [(i, *place) for i, place in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]
    ends = [(token, start, end) for token, start, end in tokens if token in special and end > start]
    if not ends:
        return None
    last, first, until = ends[0]
    try:
        between = after_answer([*_TURN, {"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}])
    except InputError:
        between = ""
    for token, start, end in ends[1:]:
        # What stands at the end of the text only, such as an end-of-text token, ends no turn.
        if start != until or not between.startswith(suffix[:end]):
            break
        last, until = token, end
    return suffix[first:until], int(last)


_ANSWER = "42 is the answer."
_TURN: list[dict[str, Any]] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER}]


def _render(tokenizer: PreTrainedTokenizerBase, messages: Any, template_kwargs: dict[str, Any] | None) -> str:
    try:
        with limited():
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **(template_kwargs or {})))
    except EndlessTemplateError:
        raise
    except Exception as error:  # whatever its expressions run into
        raise InputError(f"the chat template is broken: {one_line(error)}; set data.text.chat_template") from error
