"""Conversations tokenised once, kept on disk under a fingerprint of all that the result depends on."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dft_lightning.data.forms import Conversation
from dft_lightning.data.messages import MAX_SHOWN, Conversations, OnBadRows, Problems, load_conversation
from dft_lightning.data.tokens import ConversationEncoder, attempt
from dft_lightning.errors import InputError, one_line
from dft_lightning.files import write_text
from dft_lightning.version import __version__

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

_ROWS_AT_ONCE = 250  # few enough that processes end at about the same time


@dataclass(frozen=True)
class RowCounts:
    """What became of the rows of a split.

    Attributes:
        rows: read, bad ones included.
        truncated: cut to ``max_length``, with a target left.
        dropped: for lack of a target.
        bad: skipped by ``on_bad_rows: skip``.
    """

    rows: int
    truncated: int
    dropped: int
    bad: int = 0


@dataclass(frozen=True)
class TokenizedSplit:
    """Rows of ``input_ids``, ``labels``, ``weights`` (null where all are 1), ``number`` and ``part``.

    Also ``truncated``, and ``reference_log_prob`` (null where a row has none).

    Attributes:
        rows: those, and with prompts ``prompt``, ``prompt_ids`` and ``answer``.
        counts: of them.
        problems: the bad rows that were skipped.
        parts: names of the sources, by ``part``; empty where there is one.
    """

    rows: Dataset
    counts: RowCounts
    problems: Problems
    parts: list[str]


def tokenize(
    conversations: Conversations,
    encoder: ConversationEncoder,
    *,
    with_prompts: bool,
    keep_all: bool,
    num_proc: int | None = None,
    on_bad_rows: OnBadRows = "raise",
    desc: str = "Tokenising rows",
) -> TokenizedSplit:
    """Tokenised rows, from the cache where they are already there. Memory does not grow with them.

    Args:
        conversations: what to tokenise.
        encoder: how.
        with_prompts: add ``prompt``, ``prompt_ids`` and ``answer``, for generation.
        keep_all: keep rows without a target.
        num_proc: processes; ``None`` for this one, whose tokenizer uses every core by itself.
        on_bad_rows: ``"raise"``, or ``"skip"`` to leave out what the template refuses.
        desc: of the progress bar.

    Raises:
        InputError: rows that the chat template cannot render or that cannot be masked exactly; a process that died.
    """
    from datasets import Dataset, config

    folder = Path(config.HF_DATASETS_CACHE) / "dft_lightning"
    folder.mkdir(parents=True, exist_ok=True)
    key = fingerprint(conversations, encoder, with_prompts, keep_all)
    path, account = folder / f"{key}.arrow", folder / f"{key}.json"
    if not (path.is_file() and account.is_file()):
        task = _Task(conversations.table, encoder, with_prompts, keep_all)
        _write(path, account, task, num_proc, desc)
    found = json.loads(account.read_text())
    problems = Problems(conversations.name, [*conversations.problems.shown], conversations.problems.count)
    problems.extend(found["shown"], found["bad"])
    total = len(conversations) + conversations.problems.count
    if found["bad"] and (on_bad_rows == "raise" or problems.count == total):
        raise InputError(problems.report(total))
    try:
        rows = Dataset.from_file(str(path))
    except Exception as error:  # cut short by something else: what is written here is whole
        raise InputError(f"{path}: cannot be read ({one_line(error)}): delete it") from error
    kept = len(conversations) - found["dropped"] - found["bad"]
    if len(rows) != kept:  # a stream of Arrow that is cut between two stretches reads as if it ended there
        raise InputError(f"{path}: has {len(rows)} rows of {kept}: delete it")
    counts = RowCounts(total, found["truncated"], found["dropped"], problems.count)
    return TokenizedSplit(rows, counts, problems, conversations.parts)


def fingerprint(conversations: Conversations, encoder: ConversationEncoder, with_prompts: bool, keep_all: bool) -> str:
    """Of the rows, the tokenizer, its template and special tokens, the options and this code's version."""
    tokenizer = encoder.tokenizer
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    options = [*encoder.options, with_prompts, keep_all, __version__, _FORMAT]
    backend = tokenizer.backend_tokenizer.to_str()
    content = json.dumps([conversations.digest, backend, tokenizer.chat_template, special, options])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


_FORMAT = 6  # of the columns below, and of what makes their tokens


@dataclass
class _Encoded:
    """A stretch of rows."""

    batch: pyarrow.RecordBatch
    truncated: int
    dropped: int
    bad: int
    shown: list[str]


@dataclass
class _Task:
    """What turns a stretch of conversations into columns."""

    table: Dataset
    encoder: ConversationEncoder
    with_prompts: bool
    keep_all: bool

    def __call__(self, start: int) -> _Encoded:
        stretch = self.table[start : start + _ROWS_AT_ONCE]
        conversations = [load_conversation(text) for text in stretch["conversation"]]
        problems = Problems("")
        truncated = dropped = 0
        columns: dict[str, list[Any]] = {name: [] for name in schema(self.with_prompts).names}
        found = zip(conversations, self.encoder.encode(conversations), stretch["number"], stretch["part"], strict=True)
        for conversation, row, number, part in found:
            prompt = attempt(self.encoder.prompt, conversation) if self.with_prompts else None
            if isinstance(row, InputError) or isinstance(prompt, InputError):
                problems.add(json.loads(number), row if isinstance(row, InputError) else prompt)
                continue
            if not (self.keep_all or row.has_target):
                dropped += 1
                continue
            truncated += row.truncated
            values = {**vars(row), "number": number, "part": part, **_prompt_columns(conversation, prompt)}
            for name, column in columns.items():
                column.append(values[name])
        return _Encoded(_record_batch(columns, self.with_prompts), truncated, dropped, problems.count, problems.shown)


def _prompt_columns(conversation: Conversation, prompt: tuple[str, list[int]] | None) -> dict[str, Any]:
    if prompt is None:
        return {}
    last = conversation.messages[-1] if conversation.messages else {"role": ""}
    answer = last["content"] if last["role"] == "assistant" else None
    return {"prompt": prompt[0], "prompt_ids": prompt[1], "answer": answer}


def schema(with_prompts: bool) -> pyarrow.Schema:
    """Columns of tokenised rows."""
    import pyarrow as pa

    fields = {"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "weights": pa.list_(pa.float32())}
    fields |= {"reference_log_prob": pa.list_(pa.float32())}
    fields |= {"number": pa.string(), "part": pa.int32(), "truncated": pa.bool_()}
    if with_prompts:
        fields |= {"prompt_ids": pa.list_(pa.int32()), "prompt": pa.string(), "answer": pa.string()}
    return pa.schema(fields)


def _record_batch(columns: dict[str, list[Any]], with_prompts: bool) -> pyarrow.RecordBatch:
    import pyarrow as pa

    types = schema(with_prompts)
    return pa.record_batch([pa.array(columns[field.name], field.type) for field in types], schema=types)


def _write(path: Path, account: Path, task: _Task, num_proc: int | None, desc: str) -> None:
    """Both files, whole or not at all."""
    import pyarrow as pa

    counts = {"truncated": 0, "dropped": 0, "bad": 0}
    shown: list[str] = []
    # Several machines may share the folder, and their process ids.
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with pa.ipc.new_stream(str(unfinished), schema(task.with_prompts)) as stream:
            for encoded in _progress(_encode(task, num_proc), len(task.table), desc):
                stream.write_batch(encoded.batch)
                for name in counts:
                    counts[name] += getattr(encoded, name)
                shown += encoded.shown[: MAX_SHOWN - len(shown)]
        write_text(account, json.dumps({**counts, "shown": shown}))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _progress(encoded: Iterator[_Encoded], total: int, desc: str) -> Iterator[_Encoded]:
    from datasets.utils import tqdm

    with tqdm(total=total, desc=desc, unit=" rows", delay=2) as bar:  # what takes no time needs no bar
        for part in encoded:
            yield part
            bar.update(min(_ROWS_AT_ONCE, total - bar.n))


def _encode(task: _Task, num_proc: int | None) -> Iterator[_Encoded]:
    """Every stretch, in order."""
    starts = range(0, len(task.table), _ROWS_AT_ONCE)
    num_proc = min(num_proc or 1, len(starts))
    if num_proc == 1:
        yield from map(task, starts)
        return
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context(method), _begin_process, (task,))
    try:
        yield from pool.map(_encode_in_process, starts)
    except BrokenProcessPool as error:
        raise InputError(
            f"data.num_proc: one of {num_proc} processes died while tokenising, for want of memory perhaps: take fewer"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_task_of_process: _Task | None = None


def _begin_process(task: _Task) -> None:
    global _task_of_process
    _task_of_process = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each


def _encode_in_process(start: int) -> _Encoded:
    assert _task_of_process is not None
    return _task_of_process(start)
