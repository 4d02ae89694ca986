"""Generated completions to a JSONL file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.distributed import gather_lists
from dft_lightning.errors import InputError
from dft_lightning.files import is_local, replacing
from dft_lightning.modules.causal_lm import CausalLMModule
from dft_lightning.modules.kept_answers import KeptAnswers


class PredictionWriter(Callback):
    """Writes what ``predict`` and ``test`` generate, one JSON object a line in the order of the rows.

    Each has ``index`` (from 0), ``prompt``, ``completion`` and ``answer``; in ``test`` also ``correct``. The file
    is written whole when all rows are done, by rank 0, and replaces an older one of the same name only then. Until then
    answers are kept as they come, in ``*.partial`` beside it (beside the run's folders, for the file in one of these):
    where the run is stopped or fails, the same command goes on with the others. That is of ``InstructionDataModule``'s
    rows and of modules whose ``generate`` is this package's: of others nothing is known that says which answers differ.

    Args:
        path: the file; ``None`` for ``predictions.jsonl`` (``test_predictions.jsonl``) in the run's log folder.
    """

    NAMES: ClassVar[dict[str, str]] = {"test": "test_predictions.jsonl", "predict": "predictions.jsonl"}

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self._records: list[dict[str, Any]] = []
        self._kept: KeptAnswers | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Before hours of generation, not after.
        if self.path is not None and (Path(self.path).is_dir() or not os.access(_nearest_folder(self.path), os.W_OK)):
            raise InputError(f"PredictionWriter.path: {self.path} is a folder or cannot be written")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, pl_module, self.NAMES["test"])

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, pl_module, self.NAMES["predict"])

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule, default_name: str) -> None:
        self._records = []  # of one that was left in the middle
        path = self.path or os.path.join(trainer.default_root_dir, default_name)
        if isinstance(module, CausalLMModule) and is_local(path) and _may_be_kept(trainer, module):
            module.kept_answers = self._kept = KeptAnswers(trainer, module, Path(path))

    def _end(self, module: pl.LightningModule, *, done: bool) -> None:
        kept, self._kept = self._kept, None
        if kept is None or not isinstance(module, CausalLMModule):
            return
        module.kept_answers = None
        if done:
            kept.finish()
        else:
            kept.close()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(pl_module, done=True)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(pl_module, done=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._kept is not None and self._kept.path is not None and self._kept.count:
            kept = f"{self._kept.count} answers are kept in {self._kept.path}"
            rank_zero_info(f"{kept}: the same command goes on with the others")
        self._end(pl_module, done=False)

    def _collect(self, outputs: Any) -> None:
        self._records += outputs["predictions"] if isinstance(outputs, dict) else outputs

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(outputs)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(outputs)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, self.NAMES["predict"])

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, self.NAMES["test"])

    def _write(self, trainer: pl.Trainer, default_name: str) -> None:
        records, self._records = self._records, []
        log_dir = trainer.log_dir  # a broadcast: every rank asks
        records = gather_lists(records, trainer.world_size)
        if not trainer.is_global_zero or not records:
            return
        path = Path(self.path) if self.path else Path(log_dir or ".") / default_name
        with replacing(path) as file:
            for record in sorted(records, key=lambda record: int(record["index"])):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        rank_zero_info(f"{len(records)} completions in {path}")


def _may_be_kept(trainer: pl.Trainer, module: CausalLMModule) -> bool:
    """Whether it is known what answers depend on, and that ranks have as many batches as each other."""
    own = any(getattr(type(module), name) is not getattr(CausalLMModule, name) for name in _DECIDE)
    return not own and hasattr(getattr(trainer, "datamodule", None), "generation_dataloader")


_DECIDE = ("generate", "generate_tokens", "predict_step")


def _nearest_folder(path: str) -> Path:
    """The closest folder above a file that exists already."""
    return next(parent for parent in Path(path).absolute().parents if parent.is_dir())
