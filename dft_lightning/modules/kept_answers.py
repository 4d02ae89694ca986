"""Answers of ``test`` and ``predict``, kept as they come: after a stop the same command goes on with the others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from dft_lightning.distributed.ranks import gather_lists, largest_of_ranks
from dft_lightning.distributed.strategies import on_first_rank
from dft_lightning.errors import InputError, one_line
from dft_lightning.files import add_lines, open_alone
from dft_lightning.models.fingerprints import hash_weights
from dft_lightning.modules.answers import prompts_of

if TYPE_CHECKING:
    from dft_lightning.modules.causal_lm import CausalLMModule


class KeptAnswers:
    """A file of answers whose name says what they depend on: weights, options of generation, precision, seed.

    It is opened at the first batch, and every answer is looked up by its row and its prompt's tokens. Where it cannot
    be had, a warning says so, and nothing is kept.

    Args:
        trainer: of the run, whose first rank has the file.
        module: whose answers.
        path: what the file's name begins with.

    Attributes:
        path: of the file; ``None`` before the first batch, on other ranks than the first, and where nothing is kept.
        count: how many answers are in it.
    """

    def __init__(self, trainer: pl.Trainer, module: CausalLMModule, path: Path) -> None:
        self._trainer = trainer
        self._module = module
        self._beginning = path
        self._file: BinaryIO | None = None
        self._found: dict[Row, str] | None = None
        self._used: set[Row] = set()
        self.path: Path | None = None
        self.count = 0

    def completions(self, batch: dict[str, Any], answer: Callable[[], list[str]]) -> list[str]:
        """Texts of a batch's completions: from the file, where it has those of every rank's rows. A collective.

        Args:
            batch: with ``index``, -1 for a row that only makes the ranks even, and prompts.
            answer: gives the texts anew, which are added to the file.

        Raises:
            InputError: the file cannot be written any more.
        """
        found = self._open()
        rows = [(int(index), tuple(ids)) for index, ids in zip(batch["index"].tolist(), prompts_of(batch), strict=True)]
        self._used.update(row for row in rows if row in found)
        texts = [text for text in ("" if row[0] < 0 else found.get(row) for row in rows) if text is not None]
        missing = len(texts) < len(rows)
        if self._trainer.world_size > 1:
            missing = bool(largest_of_ranks(missing, self._module.device))
        if not missing:
            return texts
        texts = answer()
        own = [
            {"index": index, "prompt": prompt, "completion": text}
            for (index, prompt), text in zip(rows, texts, strict=True)
            if index >= 0
        ]
        lines = gather_lists(own, self._trainer.world_size)
        on_first_rank(self._trainer, lambda: self._add(lines))
        return texts

    def finish(self) -> None:
        """Take the file away, unless it has answers to others than were asked for. A collective."""
        if self._found is None:
            return
        used = set(gather_lists(list(self._used), self._trainer.world_size))
        if self.path is not None and self._found.keys() <= used:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)  # while it is locked
        self.close()

    def close(self) -> None:
        """Let another process have the file."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # of what a full disk has left in it
                file.close()

    def _open(self) -> dict[Row, str]:
        if self._found is None:
            path = self._beginning.with_name(f"{self._beginning.name}.{self._key()}.partial")
            found: dict[Row, str] = {}
            if self._trainer.is_global_zero:
                try:
                    self._file = open_alone(path)
                    self.path = path
                    found = _read(self._file)
                except BlockingIOError:
                    self._keep_nothing(path, "another process answers such prompts, and has it")
                except OSError as error:
                    self._keep_nothing(path, error.strerror or one_line(error))
                except InputError as error:
                    self._keep_nothing(path, str(error))
            self._found = self._trainer.strategy.broadcast(found)
            self.count = len(self._found)
        return self._found

    def _keep_nothing(self, path: Path, reason: str) -> None:
        self.close()
        self.path = None
        rank_zero_warn(
            f"answers are not kept as they come ({path}: {reason}): a run that is stopped begins anew; "
            "PredictionWriter.path says where they are kept"
        )

    def _key(self) -> str:
        """Of all that decides the answers but the prompts. Of shards a collective."""
        module = self._module
        generation, engine = module.evaluation.generation, module.evaluation.engine
        record = module.record()
        decides = {
            "class": f"{type(module).__module__}.{type(module).__qualname__}",
            "weights": hash_weights(module),
            "model": [record["model_class"], record["config"], str(record["adapter"])],
            "generation": asdict(generation),
            "seed": torch.initial_seed() if generation.do_sample else None,
            "engine": [engine.kind, engine.url, engine.model, engine.command],
            "stop_token_ids": module.stop_token_ids,
            "vocabulary": len(module.tokenizer),
            "precision": str(self._trainer.precision),
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:12]

    def _add(self, lines: Iterable[dict[str, Any]]) -> None:
        if self._file is None or self.path is None:
            return
        lines = list(lines)
        try:
            add_lines(self._file, lines)
        except OSError as error:
            raise _not_written(self.path, error) from error
        self.count += len(lines)


Row = tuple[int, tuple[int, ...]]


def _not_written(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be written: {error.strerror}: give PredictionWriter.path another file")


def _read(file: BinaryIO) -> dict[Row, str]:
    """The answers of the whole lines; a last one that was cut is taken away."""
    found: dict[Row, str] = {}
    end = 0
    file.seek(0)
    for text in file:
        try:
            line = json.loads(text) if text.endswith(b"\n") else None
        except ValueError:
            line = None
        if line is None:
            break
        found[line["index"], tuple(line["prompt"])] = line["completion"]
        end += len(text)
    file.truncate(end)
    return found
