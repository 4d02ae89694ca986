"""The command ``init``: a config for one's own rows, with a comment at each key."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from dft_lightning.data.options import RowOptions
from dft_lightning.data.rows.forms import Conversation, Reading, UnknownForm, recognise_form
from dft_lightning.data.rows.reading import Conversations, read_messages
from dft_lightning.data.rows.sources import as_source
from dft_lightning.errors import InputError
from dft_lightning.files import write_text
from dft_lightning.metrics import BoxedAnswer, HashAnswer

# Names of columns that people have for a prompt and its completion; the first pair whose columns are there is taken.
_PAIRS = (
    ("question", "answer"),
    ("input", "output"),
    ("problem", "solution"),
    ("query", "response"),
    ("question", "response"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("source", "target"),
    ("text", "summary"),
    ("article", "summary"),
)
_LOOKED_AT = 1000  # rows, for what their answers are like
_FEW = 40  # rows, of which a twentieth would be one or two


def init(
    *rows: str,
    test: str | None = None,
    model: str | None = None,
    output: Path | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a config that trains on your own rows, after a look at their columns: init ROWS.

    ROWS is a .jsonl, .json, .csv or .parquet file, a folder of them, or a dataset on the hub. Every row is read, as a
    run would: what is wrong with one is said here. On a terminal the rows and the model are asked for where they are
    not given.

    Args:
        rows: a .jsonl, .json, .csv or .parquet file, a folder of them, or a dataset on the hub; one of these
        test: rows to test on
        model: hub name or folder (HuggingFaceTB/SmolLM2-135M-Instruct)
        output: the config (the name of the rows, with .yaml)
        prompt_column: column of the prompts, where its name says nothing
        completion_column: column of the completions
        overwrite: replace a config that is there

    Raises:
        InputError: there are no such rows, or a bad one; their columns say nothing; or the config is there already.
    """
    if len(rows) > 1:
        raise InputError(f"{rows[1]}: init takes one file, folder or dataset: several may lie in a folder")
    path = rows[0] if rows else _asked("rows: a file, a folder, or a dataset on the hub")
    model = model or _asked("model: a hub name or a folder", _MODEL)
    output = Path(f"{Path(path).stem or 'rows'}.yaml") if output is None else output
    if os.path.lexists(output) and not overwrite:
        raise InputError(f"--output: {output} is there already: give another name, or --overwrite")
    found = _look(path, prompt_column, completion_column)
    if test is not None:
        _read(test, "test", found.options)
    write_text(output, _config(found, path, test, model, output))
    said = ", ".join(f"{column} as the {what}" for what, column in found.columns)
    print(f"{output}: {len(found.rows)} rows of the form {found.form}{f' ({said})' if said else ''}. Next:")
    for command in _next(output, test is not None):
        print(f"  {command}")


_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def _asked(what: str, default: str = "") -> str:
    """What is typed for something that was not given, or its default."""
    typed = ""
    if sys.stdin.isatty():
        with contextlib.suppress(EOFError):
            typed = input(f"{what}{f' [{default}]' if default else ''}: ").strip()
    if not typed and not default:
        raise InputError(f"not given: {what}")
    return typed or default


# -- a look at the rows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """What the rows are: their form, the columns that are named for it, and the rows as conversations."""

    form: str
    options: RowOptions
    rows: Conversations
    columns: list[tuple[str, str]]


def _look(rows: str, prompt_column: str | None, completion_column: str | None) -> _Found:
    given = {"prompt_column": prompt_column, "completion_column": completion_column}
    named: dict[str, Any] = {name: column for name, column in given.items() if column is not None}
    first = next((row for _, row in as_source(rows, "train").rows() if isinstance(row, dict)), {})
    for column in named.values():
        if column not in first:
            raise InputError(f"{rows}: no column {column!r}; there are {', '.join(map(str, first)) or 'none'}")
    options = RowOptions(**named)
    try:
        form = recognise_form(first, options)
    except UnknownForm as unknown:
        named = {**_pair(first, unknown, rows), **named}
        options = RowOptions(**named)
        form = "prompt_completion"
    columns = [(name.removesuffix("_column"), column) for name, column in sorted(named.items(), reverse=True)]
    return _Found(form, options, _read(rows, "train", options), columns)


def _pair(row: dict[str, Any], unknown: UnknownForm, rows: str) -> dict[str, str]:
    """The columns of a known pair of names, in any case; of two columns whose names say nothing, an error."""
    columns = {str(column).lower(): str(column) for column in row}
    for prompt, completion in _PAIRS:
        if prompt in columns and completion in columns:
            return {"prompt_column": columns[prompt], "completion_column": columns[completion]}
    reason = str(unknown).partition(":")[0]
    raise InputError(f"{rows}: {reason}: give --prompt_column and --completion_column")


def _read(rows: str, split: str, options: RowOptions) -> Conversations:
    return read_messages(as_source(rows, split), Reading(options, "assistant" if split == "test" else "any"))


def _comparing(rows: Conversations) -> str:
    """The line of the extractor that finds an answer in all rows, of those that look for a mark."""
    answers = [row.answer for row in _first(rows)]
    for extractor in (HashAnswer(), BoxedAnswer()):
        if answers and all(answer is not None and extractor.extract(answer) is not None for answer in answers):
            return f"    answer_extractor: {type(extractor).__name__}  # finds the answer that is compared\n"
    return "    # answer_extractor: LastNumber  # compares that, and not whole texts; docs/evaluation.md has others\n"


def _first(rows: Conversations) -> Iterator[Conversation]:
    return islice(iter(rows), _LOOKED_AT)


def _positions(model: str) -> int | None:
    """How many tokens a local model has positions for, where its config says it in the usual place."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = config.get("max_position_embeddings") if isinstance(config, dict) else None
    return found if isinstance(found, int) else None


# -- the config --------------------------------------------------------------------------------------------------------


def _next(output: Path, tests: bool) -> list[str]:
    """The commands that come next, as they are typed."""
    config = shlex.quote(str(output))
    found = [f"{command} --config {config}" for command in ("inspect", "fit")]
    if tests:
        found.append(f"test --config {config} --ckpt_path last")
    return [f"python -m dft_lightning {command}" for command in found]


def _config(found: _Found, rows: str, test: str | None, model: str, output: Path) -> str:
    number, few = len(found.rows), len(found.rows) < _FEW
    fraction = 0.25 if few else 0.05
    batch_size = min(8, max(1, number // 4))
    global_batch_size = batch_size * min(4, max(1, number // (batch_size * 8)))
    max_length = min(1024, _positions(model) or 1024)
    columns = "".join(f"    {what}_column: {_scalar(column)}\n" for what, column in found.columns)
    tested = (
        f"  test: {_scalar(test)}\n"
        if test is not None
        else "  # test: test.jsonl  # rows that are never trained on; `test` generates answers to them\n"
    )
    return _TEMPLATE.format(
        rows=_scalar(rows),
        about=_comment(f"{rows}: {number} rows of the form {found.form}."),
        commands="".join(f"#   {_comment(command)}\n" for command in _next(output, test is not None)),
        model=_scalar(model),
        columns=f"  rows:\n{columns}" if columns else "",
        tested=tested,
        fraction=fraction,
        max_length=max_length,
        batch_size=batch_size,
        global_batch_size=global_batch_size,
        evaluation="" if found.form == "text" else _GENERATION + _comparing(found.rows),
        root=_scalar(f"runs/{Path(rows).stem or 'rows'}"),
    )


def _scalar(text: str) -> str:
    """A text as YAML has it on one line."""
    return str(yaml.safe_dump(text, width=10**6, allow_unicode=True)).removesuffix("\n...\n").strip()


def _comment(text: str) -> str:
    return " ".join(text.split())


_GENERATION = """  evaluation:
    generation:
      max_new_tokens: 256  # of an answer, in `test` and `predict`
"""
_TEMPLATE = """# {about}
#
{commands}seed_everything: 0
model:
  model: {model}  # a hub name or a folder
  loss: DFTLoss  # or CrossEntropyLoss, FocalLoss: which is best depends on the rows and the model
  optimizer:
    lr: 5.0e-5  # try 1.0e-5 and 2.0e-4, too; an adapter (configs/lora.yaml) takes about ten times as much
  schedule:
    warmup: 0.1  # a share of all steps; then a cosine down to 0
{evaluation}data:
  train: {rows}
  validation_fraction: {fraction}  # of the rows, for `val/nll`; or `validation:` with rows of its own
{tested}{columns}  text:
    max_length: {max_length}  # tokens; longer rows are cut off, and counted
  # batches: {{packing: bfd}}  # several rows in one of max_length tokens: faster, and batch_size then counts those
  batch_size: {batch_size}  # rows of a GPU at a time: what its memory holds
  global_batch_size: {global_batch_size}  # rows of an optimizer step, whatever the number of GPUs
trainer:
  max_epochs: 3
  gradient_clip_val: 1.0
  precision: bf16-mixed  # 32-true where the machine has no bfloat16
  default_root_dir: {root}
"""
