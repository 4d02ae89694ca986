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

from dft_lightning.distributed.ranks import gather_lists, largest_of_ranks
from dft_lightning.distributed.strategies import on_first_rank
from dft_lightning.errors import InputError
from dft_lightning.files import add_lines, open_alone
from dft_lightning.models.fingerprints import hash_weights
from dft_lightning.modules.answers import prompts_of

if TYPE_CHECKING:
    from dft_lightning.modules.causal_lm import CausalLMModule


class KeptAnswers:
    """A file of answers whose name says what they depend on: weights, options of generation, precision, seed.

    It is opened at the first batch, and every answer is looked up by its row and its prompt's tokens.

    Args:
        trainer: of the run, whose first rank has the file.
        module: whose answers.
        path: what the file's name begins with.

    Attributes:
        path: of the file; ``None`` before the first batch and on other ranks than the first.
        count: how many answers are in it.
    """

    def __init__(self, trainer: pl.Trainer, module: CausalLMModule, path: Path) -> None:
        self._trainer = trainer
        self._module = module
        self._beginning = path
        self._file: BinaryIO | None = None
        self._found: dict[int, tuple[list[int], str]] | None = None
        self.path: Path | None = None
        self.count = 0

    def completions(self, batch: dict[str, Any], answer: Callable[[], list[str]]) -> list[str]:
        """Texts of a batch's completions: from the file, where it has those of every rank's rows. A collective.

        Args:
            batch: with ``index``, -1 for a row that only makes the ranks even, and prompts.
            answer: gives the texts anew, which are added to the file.

        Raises:
            InputError: the file cannot be written, or another process has it.
        """
        found = self._open()
        rows = [(int(index), ids) for index, ids in zip(batch["index"].tolist(), prompts_of(batch), strict=True)]
        kept = [("" if index < 0 else _text_of(found.get(index), ids)) for index, ids in rows]
        texts = [text for text in kept if text is not None]
        missing = len(texts) < len(kept)
        if self._trainer.world_size > 1:
            missing = bool(largest_of_ranks(missing, self._module.device))
        if not missing:
            return texts
        texts = answer()
        own = [_line(*row, text) for row, text in zip(rows, texts, strict=True) if row[0] >= 0]
        lines = gather_lists(own, self._trainer.world_size)
        on_first_rank(self._trainer, lambda: self._add(lines))
        return texts

    def close(self, *, done: bool) -> None:
        """Let another process have the file; it is taken away where all that it is for is ``done``."""
        if self._file is not None:
            self._file.close()
        if done and self.path is not None:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
        self._file = None

    def _open(self) -> dict[int, tuple[list[int], str]]:
        if self._found is None:
            path = self._beginning.with_name(f"{self._beginning.name}.{self._key()}.partial")
            found: dict[int, tuple[list[int], str]] = {}

            def begin() -> None:
                try:
                    self._file, self.path = open_alone(path), path
                    found.update(_read(self._file))
                except BlockingIOError:
                    raise InputError(
                        f"{path}: another process is answering the same prompts: wait for it, or give "
                        "PredictionWriter.path another file"
                    ) from None
                except OSError as error:
                    raise _not_written(path, error) from error

            on_first_rank(self._trainer, begin)
            self._found = self._trainer.strategy.broadcast(found)
            self.count = len(self._found)
        return self._found

    def _key(self) -> str:
        """Of all that decides the answers but the prompts. Of shards a collective."""
        module = self._module
        generation = module.evaluation.generation
        decides = {
            "class": f"{type(module).__module__}.{type(module).__qualname__}",
            "weights": hash_weights(module),
            "generation": asdict(generation),
            "seed": torch.initial_seed() if generation.do_sample else None,
            "engine": module.evaluation.engine.kind,
            "stop_token_ids": module.stop_token_ids,
            "precision": str(self._trainer.precision),
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]

    def _add(self, lines: Iterable[dict[str, Any]]) -> None:
        assert self._file is not None
        assert self.path is not None
        lines = list(lines)
        try:
            add_lines(self._file, lines)
        except OSError as error:
            raise _not_written(self.path, error) from error
        self.count += len(lines)


def _not_written(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be written: {error.strerror}: give PredictionWriter.path another file")


def _line(index: int, prompt: list[int], text: str) -> dict[str, Any]:
    return {"index": index, "prompt": prompt, "completion": text}


def _read(file: BinaryIO) -> dict[int, tuple[list[int], str]]:
    """The answers of the whole lines; a last one that was cut is taken away."""
    found, end = {}, 0
    file.seek(0)
    for text in file:
        try:
            line = json.loads(text) if text.endswith(b"\n") else None
        except ValueError:
            line = None
        if line is None:
            break
        found[line["index"]] = (line["prompt"], line["completion"])
        end += len(text)
    file.truncate(end)
    return found


def _text_of(kept: tuple[list[int], str] | None, prompt: list[int]) -> str | None:
    """The text of an answer to this prompt."""
    return kept[1] if kept is not None and kept[0] == prompt else None
