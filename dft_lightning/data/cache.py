"""Conversations tokenised once, kept by ``datasets`` under a fingerprint of all that the result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dft_lightning import __version__
from dft_lightning.data.messages import Conversations, report_rows
from dft_lightning.data.tokens import IGNORE_INDEX, ConversationEncoder, Span
from dft_lightning.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset


def tokenize(
    conversations: Conversations,
    encoder: ConversationEncoder,
    *,
    with_prompts: bool,
    keep_all: bool,
    num_proc: int | None,
    desc: str,
) -> Dataset:
    """Rows of ``input_ids``, ``labels`` and ``truncated``, from the cache where they are already there.

    Args:
        conversations: what to tokenise.
        encoder: how.
        with_prompts: add ``prompt``, ``prompt_ids`` and ``reference``, for generation.
        keep_all: keep rows without a target.
        num_proc: processes; ``None`` for this one.
        desc: of the progress bar.

    Raises:
        InputError: rows that the chat template cannot render or that cannot be masked exactly.
    """
    from datasets import Dataset, Features, List, Value, config

    features = {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "truncated": Value("bool")}
    if with_prompts:
        features |= {"prompt_ids": List(Value("int32")), "prompt": Value("string"), "reference": Value("string")}
    key = fingerprint(conversations, encoder, with_prompts, keep_all)
    folder = Path(config.HF_DATASETS_CACHE) / "dft_lightning"
    folder.mkdir(parents=True, exist_ok=True)
    return Dataset.from_dict({"messages": conversations.messages, "number": conversations.numbers}).map(
        _encode_rows,
        batched=True,
        remove_columns=["messages", "number"],
        features=Features(features),
        fn_kwargs={
            "encoder": encoder,
            "with_prompts": with_prompts,
            "keep_all": keep_all,
            "name": conversations.name,
        },
        new_fingerprint=key,
        cache_file_name=str(folder / f"{key}.arrow"),
        num_proc=num_proc,
        desc=desc,
    )


def fingerprint(conversations: Conversations, encoder: ConversationEncoder, with_prompts: bool, keep_all: bool) -> str:
    """Of the rows, the tokenizer, its template and special tokens, the options and this code's version."""
    tokenizer = encoder.tokenizer
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    options = [encoder.max_length, encoder.train_on_prompts, with_prompts, keep_all, __version__]
    backend = tokenizer.backend_tokenizer.to_str()
    content = json.dumps([conversations.messages, backend, tokenizer.chat_template, special, options])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _encode_rows(
    batch: dict[str, Sequence[Any]], encoder: ConversationEncoder, with_prompts: bool, keep_all: bool, name: str
) -> dict[str, list[Any]]:
    """One batch of conversations to columns. Rows without a target are left out, unless ``keep_all``."""
    rendered = _render_all(batch, encoder, name)
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "truncated": []}
    if with_prompts:
        columns |= {"prompt_ids": [], "prompt": [], "reference": []}
    for messages, row in zip(batch["messages"], encoder.encode_rendered(rendered), strict=True):
        if not keep_all and all(label == IGNORE_INDEX for label in row["labels"]):
            continue
        if with_prompts:
            row["prompt"], row["prompt_ids"] = encoder.prompt(messages)
            last = messages[-1]
            row["reference"] = last["content"] if last["role"] == "assistant" else None
        for name, values in columns.items():
            values.append(row[name])
    return columns


def _render_all(
    batch: dict[str, Sequence[Any]], encoder: ConversationEncoder, name: str
) -> list[tuple[str, list[Span]]]:
    rendered, problems = [], []
    for number, messages in zip(batch["number"], batch["messages"], strict=True):
        try:
            rendered.append(encoder.render(messages))
        except InputError as problem:
            problems.append(f"row {number}: {problem}")
    if problems:
        raise InputError(report_rows(name, problems, len(batch["number"])))
    return rendered
