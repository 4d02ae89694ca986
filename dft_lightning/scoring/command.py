"""The command ``score``: a data set with the log-probs of its targets under a model."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from dft_lightning.callbacks import EngineAnswers, PredictionWriter
from dft_lightning.callbacks.interruption import Interrupted
from dft_lightning.cli import READ_AS
from dft_lightning.cli.commands import FitArguments, Stopped
from dft_lightning.cli.parsers import raising_input_errors
from dft_lightning.data import InstructionDataModule
from dft_lightning.distributed import gather_lists
from dft_lightning.errors import InputError, check_one_of
from dft_lightning.files import check_replaceable, replacing_folder
from dft_lightning.fit.command import DFTLightningCLI, cli_options
from dft_lightning.fit.config import FitConfig, fit_arguments
from dft_lightning.fit.on_devices import ending_on_signals, of_its_devices, predict, status_of
from dft_lightning.fit.own_classes import PACKAGE
from dft_lightning.fit.processes import ending_together
from dft_lightning.foreign.lightning import believe_lengths
from dft_lightning.losses import CrossEntropyLoss
from dft_lightning.modules import CausalLMModule
from dft_lightning.scoring.batches import ScoredWriter, ScoringBatches, target_log_probs
from dft_lightning.scoring.rows import SplitRows
from dft_lightning.version import __version__

Split = Literal["train", "validation", "forgetting", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
RECORD = "score.json"


def score(output: Path, overwrite: bool = False, splits: list[Split] | None = None, *, fit: FitConfig) -> None:
    """Run a model once over the rows of a fit config, and write them with the log-prob of each target
    token, for losses that read ``reference_log_prob``.

    ``--ckpt_path PATH`` scores with a trained checkpoint. All other options are those of fit.

    Args:
        output: a folder, which gets a folder for each split; a new one, or an empty one
        overwrite: replace what score has written there
        splits: which of train, validation, forgetting and test; all that the config has by default
        fit: whose model and rows; in Python a config's file, a dict of its keys, or a list of these, later ones over
            earlier ones

    Raises:
        InputError: anything wrong with the input.
        Stopped: on Ctrl-C and SIGTERM; nothing is written.
    """
    output, fit = Path(output), fit_arguments(fit)
    _check_names(splits)
    trainers: list[pl.Trainer] = []
    with ending_together(trainers):
        try:
            with ending_on_signals(), raising_input_errors():
                check_replaceable(output, overwrite, (RECORD,), "--output", SPLITS)
                scored = ScoringCLI(fit, splits, output, trainers.append).scored
        except Interrupted as ending:
            raise Stopped("stopped: nothing was written", status_of(ending)) from None
    if not trainers[0].is_global_zero:
        return
    flags = " ".join(f"--data.{split} {shlex.quote(str(output / split))}" for split in scored)
    print(f"{output}: add to fit, with the same data options:\n    {flags}")


def _check_names(splits: Sequence[str] | None) -> None:
    for split in splits or []:
        check_one_of("--splits", split, SPLITS)


class _Scored(Exception):
    pass


class ScoringCLI(DFTLightningCLI):
    """Takes a ``fit`` config as ``predict`` does, and scores.

    Args:
        fit: whose model and rows.
        splits: which to score; ``None`` for all that the config has.
        output: the folder to write.
        on_trainer: as of :class:`.DFTLightningCLI`.
    """

    def __init__(
        self,
        fit: FitArguments,
        splits: Sequence[Split] | None,
        output: Path,
        on_trainer: Callable[[pl.Trainer], None],
    ) -> None:
        self.splits = splits
        self.output = output
        self.scored: list[Split] = []
        options = {**cli_options(), "save_config_callback": None, "on_trainer": on_trainer}
        classes = fit.classes or PACKAGE
        with contextlib.suppress(_Scored):
            super().__init__(classes.model, classes.data, **options, args=[READ_AS["score"], *fit.args])

    def before_instantiate_classes(self) -> None:
        """What a run has beside its devices and precision, callbacks among it, stays away."""
        options = self._options(self.config)
        if options.ckpt_path is not None and Path(options.ckpt_path).is_dir():
            raise InputError(
                f"--ckpt_path: {options.ckpt_path} is a folder of shards, which score does not read: export it, and "
                "give model.model what is written"
            )
        defaults = self.options_parser().get_defaults().trainer
        for name, value in {**vars(defaults), **of_its_devices(vars(options.trainer))}.items():
            options.trainer[name] = value

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        unwanted = (PredictionWriter, EngineAnswers)
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, unwanted)]
        return trainer

    def before_predict(self) -> None:
        """In place of Lightning's own, which this ends by :class:`_Scored`."""
        self.model.loss = CrossEntropyLoss()  # of a reference nothing is asked but log-probs
        data = self.datamodule
        data.model_hparams = self.model.hparams
        self.scored = _chosen(data, self.splits)
        data.load_tokenizer()
        splits = [SplitRows(data, split) for split in self.scored]
        for split in splits:
            split.check()
            _say(split)
        self._score(splits)
        raise _Scored

    def _score(self, splits: list[SplitRows]) -> None:
        data = self.datamodule
        batches = ScoringBatches(splits, data.collator(), data.eval_batch_size, self.trainer.world_size)
        first = self.trainer.is_global_zero
        with replacing_folder(self.output) if first else contextlib.nullcontext() as folder:
            writer = ScoredWriter(batches, folder)
            self.trainer.callbacks.append(writer)  # type: ignore[attr-defined]
            believe_lengths()
            predict(self.trainer, self.model, data, batches, partial(_of_a_turn, self.model), self._checkpoint)
            if folder is None:
                return
            record = self._record(splits, writer)
            (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def _record(self, splits: list[SplitRows], writer: ScoredWriter) -> dict[str, Any]:
        """What the log-probs come from."""
        import torch
        import transformers

        model, data = self.model.hparams, self.datamodule
        versions = {"dft_lightning": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        return {
            "model": model["model"],
            "revision": model["loading"]["revision"],
            "peft": model["peft"] is not None,
            "checkpoint": self._checkpoint,
            "dtype": model["loading"]["dtype"],
            "precision": self.trainer.precision,
            "tokenizer": data.text.tokenizer or model["model"],
            "max_length": data.text.max_length,
            "packing": data.batches.packing,
            "versions": versions,
            "splits": {
                split.split: {
                    "source": split.source.name,
                    "rows": writer.rows[place],
                    "targets": writer.targets[place],
                    "bad_rows": split.problems.count,
                    "columns_left_out": sorted(split.left_out),
                }
                for place, split in enumerate(splits)
            },
        }


def _of_a_turn(module: CausalLMModule, turn: list[dict[str, Any]], batch_idx: int) -> list[list[Any]]:
    """What a module predicts here: the log-probs of each batch of a turn, on every rank. A collective.

    Each rank takes one of the batches; where fewer than ranks are left, the others go along with the last.
    """
    rank, ranks = module.trainer.global_rank, module.trainer.world_size
    own = target_log_probs(module, turn[min(rank, len(turn) - 1)], batch_idx)
    return gather_lists([own], ranks)[: len(turn)]


def _chosen(data: InstructionDataModule, splits: Sequence[Split] | None) -> list[Split]:
    """The splits to score.

    Raises:
        InputError: the config has none, or not one of those that are asked for.
    """
    there = [split for split in SPLITS if data.sources[split] is not None]
    for split in splits or []:
        if split == "validation" and data.validation_fraction:
            raise InputError("--splits validation: it is a part of data.train (data.validation_fraction): score train")
        if split not in there:
            raise InputError(f"--splits {split}: data.{split} is not set")
    if not there:
        raise InputError("data.train is not set, nor any other rows")
    return [split for split in there if splits is None or split in splits]


def _say(split: SplitRows) -> None:
    if split.problems.count:
        rank_zero_warn(
            f"data.rows.on_bad_rows: skip\n{split.problems.report(split.total)}\nThey are left out of what is written"
        )
    if split.left_out:
        names = ", ".join(sorted(split.left_out))
        rank_zero_warn(f"data.{split.split}: columns that JSON has no form for are left out: {names}")
