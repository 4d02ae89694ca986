"""What of a row nobody reads: which columns and keys these are, and which of them mean something elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import Any

from dft_lightning.data.options import RowOptions
from dft_lightning.data.rows.references import FINGERPRINT, LOG_PROB

LEFT = "left to the template"
WEIGHTS = ("weight", "reward", "advantage")
"""Columns of which a row is weighted by the one that it has, where no other is named."""

OF_TEMPLATES = frozenset(
    ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking", "tool_plan", "tools", "functions")
)
"""Keys of messages that chat templates are known to read."""

_STEERING = frozenset(
    (
        # shown to the model
        *("image", "images", "video", "videos", "audio", "audios", "objects", "documents"),
        # said before the answer
        *("system", "history", "tools", "functions"),
        # whether something is learnt, and how much of it
        *("label", "labels", "kto_tag", "mask", "loss_mask", "completion_mask", "assistant_masks", "segments"),
        *("loss_scale", "loss_weight", "sample_weight", "weights", "train", "training", "train_detail"),
        # what is not to be said
        *("rejected", "rejected_response", "rejected_messages", "rejected_images"),
    )
)
"""Columns and keys by which other trainers decide what is learnt, or what stands before it."""

_OF_EVERY_FORM = frozenset((LOG_PROB, FINGERPRINT))
_OF_CONVERSATIONS = frozenset(("tools", "functions", "chat_template_kwargs", "system"))


def kind_of_key(key: str) -> str:
    """What is said of a message's key that is not read here."""
    return "steering" if key in _STEERING else LEFT


def unread_columns(columns: Iterable[Any], form: str, options: RowOptions) -> list[tuple[str, Any]]:
    """The columns of a row that its form does not read, each with what is said of it."""
    weights = WEIGHTS if options.weight_column is None else (options.weight_column,)
    read = {*_columns_of(form, options), *_OF_EVERY_FORM, *weights}
    return [("steering" if column in _STEERING else "unread", column) for column in columns if column not in read]


def _columns_of(form: str, options: RowOptions) -> AbstractSet[str]:
    if form == "text":
        return {options.text_column}
    return (
        _OF_CONVERSATIONS
        | {
            "messages": {options.messages_column},
            "sharegpt": {"conversations"},
            "preference": {options.prompt_column, "chosen"},
            "prompt_completion": {options.prompt_column, options.completion_column, "history"},
            "alpaca": {"instruction", "input", "output", "history"},
        }[form]
    )
