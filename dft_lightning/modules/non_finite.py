"""Optimizer steps whose loss or gradient is not finite: the run ends before them, or leaves them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dft_lightning.checkpoints import newest_saved
from dft_lightning.distributed import gather_lists
from dft_lightning.distributed.normalization import remove_gradients
from dft_lightning.errors import InputError
from dft_lightning.losses import TokenLoss
from dft_lightning.metrics.exact_sums import ExactSums

OnNonFinite = Literal["raise", "skip"]

SKIPPED_IN_A_ROW = 100
"""So many, and the run ends: it learns nothing any more."""

_SHOWN_ROWS = 10


def check_on_non_finite(value: str) -> None:
    """Raise ``ValueError`` for what is no :data:`OnNonFinite`: in Python nothing else does."""
    if value not in get_args(OnNonFinite):
        raise ValueError(f"on_non_finite must be one of {', '.join(get_args(OnNonFinite))}, got {value!r}")


class NonFiniteSteps(pl.LightningModule):
    """The part of :class:`~dft_lightning.modules.CausalLMModule` that is about steps that are not finite.

    Whether a step is one is known before :meth:`_refuse_step`, and on all ranks alike.
    """

    loss: TokenLoss
    _step_learning_rate: float

    def __init__(self) -> None:
        super().__init__()
        self._skipped_steps = 0
        self._skipped_in_a_row = 0
        self._last_skipped_step = -1
        self._step_skipped = False
        self._window: list[tuple[ExactSums, dict[str, Tensor | int]]] = []
        self._rows: list[tuple[Tensor, Tensor]] = []

    def skipped_counts(self) -> list[int]:
        """What checkpoints keep: steps skipped in all and in a row, and the last of them."""
        return [self._skipped_steps, self._skipped_in_a_row, self._last_skipped_step]

    def load_skipped_counts(self, counts: Sequence[int]) -> None:
        """Go on from what :meth:`skipped_counts` returned."""
        self._skipped_steps, self._skipped_in_a_row, self._last_skipped_step = counts

    def _begin_step(self, window: Sequence[ExactSums]) -> None:
        """Before a step's first micro-batch; ``window`` is what is logged of all steps since the last logged one."""
        self._rows = []
        if self.hparams["on_non_finite"] == "skip":
            self._window = [(metric, metric.snapshot()) for metric in window]

    def _watch_rows(self, loss: Tensor, batch: Mapping[str, Any]) -> None:
        """Keep which rows a micro-batch had, where it says so, without waiting for the device."""
        if "index" in batch:
            self._rows.append((loss.detach().isfinite(), batch["index"]))

    def _refuse_step(self, what: Literal["loss", "gradient"]) -> None:
        """Leave out the step at hand, or end the run. A collective.

        Raises:
            InputError: the option is ``"raise"``, or as many steps were skipped in a row as may be.
        """
        follows = self._last_skipped_step == self.global_step - 1
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if follows else 1
        self._last_skipped_step = self.global_step
        remove_gradients(self.parameters())
        if self.hparams["on_non_finite"] == "raise" or self._skipped_in_a_row >= SKIPPED_IN_A_ROW:
            raise InputError(self._why_not(what))
        for metric, before in self._window:
            metric.restore(before)
        self._window = []
        if not self._skipped_steps:
            rank_zero_warn(
                f"model.on_non_finite: skip: {self._described(what)}: nothing is learnt from it. train/skipped_steps "
                "counts such steps from here on"
            )
        self._skipped_steps += 1
        self._step_skipped = True

    def _described(self, what: str) -> str:
        of_loss = type(self.loss).__name__
        subject = f"the loss ({of_loss})" if what == "loss" else f"the gradient's norm (the loss, {of_loss}, is finite)"
        place = f"global step {self.global_step}, learning rate {self._step_learning_rate:.3g}"
        return f"{subject} is NaN or infinite at {place}"

    def _why_not(self, what: str) -> str:
        skips = self.hparams["on_non_finite"] == "skip"
        before = f"{self._skipped_in_a_row} steps in a row were not finite; of the last, " if skips else ""
        rows = self._rows_not_finite() if what == "loss" else []
        shown = ", ".join(map(str, rows[:_SHOWN_ROWS])) + (" ..." if len(rows) > _SHOWN_ROWS else "")
        ways = "lower model.learning_rate, set trainer.gradient_clip_val, look at the data"
        ways += "" if skips else ", or leave such steps out by model.on_non_finite: skip"
        saved = newest_saved(self.trainer)
        return (
            f"{before}{self._described(what)}"
            + (f" (rows of index {shown})" if rows else "")
            + f"; the optimizer has not taken the step. What may help: {ways}"
            + (f". The newest checkpoint is of before it: go on with --ckpt_path {saved}" if saved else "")
        )

    def _rows_not_finite(self) -> list[int]:
        """Of all ranks, as far as batches say which rows they have. A collective."""
        own = [row for finite, index in self._rows if not finite for row in index.tolist() if row >= 0]
        return sorted(gather_lists(own, self.trainer.world_size))
