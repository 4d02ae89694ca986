"""What a run asks of rows: reference log-probs, weights without a sign, no more tokens than the model has positions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dft_lightning.data.options import BatchOptions, StreamOptions
from dft_lightning.data.rows.forms import Conversation
from dft_lightning.data.text.cache import column_of
from dft_lightning.errors import InputError
from dft_lightning.losses import TokenLoss
from dft_lightning.models.row_checks import Positions

if TYPE_CHECKING:
    from datasets import Dataset


class UnscoredRowsError(InputError):
    """A loss reads reference log-probs, and the rows have none."""


@dataclass(frozen=True)
class Run:
    """What rows hang on beside the data module's options.

    Attributes:
        loss: that is trained; ``None`` where there is no trainer.
        hparams: the module's.
        validates: whether the run does.
        model_name: where the model comes from, where the module knows better than its options.
    """

    loss: Any = None
    hparams: Mapping[str, Any] = field(default_factory=dict)
    validates: bool = True
    model_name: str | None = None

    def name_of_model(self) -> str:
        """The name or folder of the model, beside which its tokenizer is. Raises ``InputError`` where it has none."""
        name = self.model_name or self.hparams.get("model")
        if isinstance(name, str):
            return name
        why = "the model has no name to take it from" if self.hparams else "there is no module to take it from"
        raise InputError(f"data.text.tokenizer is not set, and {why}: set it (in Python text={{'tokenizer': NAME}})")

    @property
    def reads_reference(self) -> str | None:
        """The name of the loss, where it reads ``reference_log_prob``."""
        return type(self.loss).__name__ if isinstance(self.loss, TokenLoss) and self.loss.reads_rows else None

    @property
    def unsigned(self) -> str:
        """Why training rows may not have negative weights; empty where they may."""
        if (self.hparams.get("step") or {}).get("renormalize"):
            return "model.step.renormalize divides by the sum of the weights: leave that out"
        if not getattr(self.loss, "takes_negative_weights", True):
            name = type(self.loss).__name__
            return f"{name} means nothing with a negative weight: leave such rows out, or take another loss"
        return ""

    def check_first(self, split: str, key: str, first: Conversation) -> None:
        """Whether the loss will have what it reads, by the first row: that all are alike is seen to later."""
        if first.reference_log_prob is None:
            self._refuse_without_reference(split, key)

    def check_references(self, split: str, key: str, rows: Dataset) -> bool:
        """Whether all rows have reference log-probs; otherwise none may have any.

        Args:
            split: whose rows.
            key: what an error message calls them.
            rows: tokenised.

        Raises:
            InputError: some have, or none has and the loss reads them.
        """
        column = column_of(rows, "reference_log_prob")
        if column.null_count == 0:
            return True
        if column.null_count < len(rows):
            place = json.loads(rows[column.is_null().index(True).as_py()]["number"])
            raise InputError(
                f"{key}: row {place} has no reference_log_prob, and others have: score every source, or none"
            )
        if split != "predict":
            self._refuse_without_reference(split, key)
        return False

    def _refuse_without_reference(self, split: str, key: str) -> None:
        unread = split in ("validation", "forgetting") and not self.validates
        if self.reads_reference is not None and not unread:
            raise UnscoredRowsError(
                f"{key}: {self.reads_reference} reads reference_log_prob, which the rows lack: run "
                "`python -m dft_lightning score` with this config, and give the options that it prints"
            )

    def check_signs(self, key: str, rows: Dataset) -> None:
        """Raise ``InputError`` where a training row has a negative weight, and the run cannot take it."""
        import pyarrow.compute as pc

        column = column_of(rows, "weights")
        if not self.unsigned or column.null_count == len(column):
            return
        lowest = pc.min(pc.list_flatten(column)).as_py()
        if lowest is not None and lowest < 0:
            at = next(i for i, weights in enumerate(column) if weights.is_valid and min(weights.as_py()) < 0)
            place, weight = json.loads(rows[at]["number"]), min(rows[at]["weights"])
            raise InputError(f"{key}: row {place}: a weight of {weight:g}, and {self.unsigned}")


def check_lengths(key: str, rows: Dataset, lengths: Tensor, positions: Positions) -> None:
    """Name the rows that a model has no positions for, before it is trained on them.

    Args:
        key: what a message calls them.
        rows: tokenised.
        lengths: ``[rows]``, tokens of each that the model is given at once.
        positions: of the model.

    Raises:
        InputError: there is nothing beyond them: they are parameters.
    """
    longer = int((lengths > positions.number).sum())
    if longer == 0:
        return
    longest = int(lengths.argmax())
    place = json.loads(rows[longest]["number"])
    message = (
        f"{key}: {longer} of {len(lengths)} rows have more tokens than the model has positions ({positions.number}): "
        f"the longest, row {place}, has {int(lengths[longest])}"
    )
    if positions.learned:
        raise InputError(f"{message}: set data.text.max_length: {positions.number}")
    rank_zero_warn(f"{message}. It was not trained on what is beyond: data.text.max_length cuts rows off")


def check_trainer(
    trainer: pl.Trainer, batches: BatchOptions, streaming: StreamOptions | None, *, validates: bool
) -> None:
    """Raise ``InputError`` for what a fit cannot do with these batches.

    Args:
        trainer: of the fit.
        batches: how rows become batches.
        streaming: how they are streamed; ``None`` where they are not.
        validates: whether there are validation rows of their own.
    """
    loss = getattr(trainer.lightning_module, "loss", None)
    if batches.packing == "bfd_split" and not getattr(loss, "pointwise", True):
        raise InputError(
            f"{type(loss).__name__} reads whole sequences (pointwise = False), and data.batches.packing: bfd_split "
            "cuts them: use bfd"
        )
    if batches.max_tokens is not None and trainer.overfit_batches > 0:  # type: ignore[attr-defined]
        raise InputError(
            "trainer.overfit_batches takes rows in their own order, and data.batches.max_tokens deals those of a step: "
            "leave one of the two out"
        )
    cut = trainer.limit_train_batches != 1.0 and not trainer.fast_dev_run  # type: ignore[attr-defined]
    if batches.max_tokens is not None and cut:
        raise InputError(
            "trainer.limit_train_batches would cut a step apart, whose micro-batches data.batches.max_tokens makes: "
            "set trainer.max_steps, or give fewer rows"
        )
    if streaming is None:
        return
    if trainer.max_steps < 0 and not any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise InputError("data.streaming goes round without end: set trainer.max_steps")
    if validates and trainer.val_check_interval == 1.0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise InputError(
            "data.streaming has no end of an epoch to validate at: set trainer.val_check_interval to a number of "
            "batches, with trainer.check_val_every_n_epoch: null"
        )


def check_going_back(batches: BatchOptions, streaming: StreamOptions | None) -> None:
    """Raise ``InputError`` for training rows that are gone after they were trained on."""
    if batches.packing == "bfd_split":
        raise InputError(
            "data.batches.packing: bfd_split has no whole training rows, which compare goes back to: use bfd"
        )
    if streaming is not None:
        raise InputError("data.streaming: the training rows cannot be gone back to, which compare does: turn it off")
