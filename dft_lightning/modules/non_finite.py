"""Optimizer steps whose loss or gradient is not finite: the run ends before them, or leaves them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dft_lightning.checkpoints import newest_saved
from dft_lightning.distributed import gather_lists
from dft_lightning.errors import InputError
from dft_lightning.modules.options import OnNonFinite

SKIPPED_IN_A_ROW = 100
"""So many, and the run ends: it learns nothing any more."""

_SHOWN_ROWS = 10


class NonFiniteSteps:
    """Counts the steps that are left out, and says why a run ends.

    Whether a step is one is known before :meth:`refuse`, and on all ranks alike.

    Args:
        option: ``"raise"`` or ``"skip"``.

    Attributes:
        skipped: steps left out in all.
        in_a_row: steps left out up to the last of them.
        last: the number of the last of them.
    """

    def __init__(self, option: OnNonFinite) -> None:
        self._option = option
        self.skipped, self.in_a_row, self.last = 0, 0, -1

    @property
    def skips(self) -> bool:
        """Whether steps are left out rather than end the run."""
        return self._option == "skip"

    def counts(self) -> list[int]:
        """What checkpoints keep."""
        return [self.skipped, self.in_a_row, self.last]

    def load_counts(self, counts: Sequence[int]) -> None:
        """Go on from what :meth:`counts` returned."""
        self.skipped, self.in_a_row, self.last = counts

    def refuse(
        self,
        what: Literal["loss", "gradient"],
        trainer: pl.Trainer,
        loss_name: str,
        learning_rate: float,
        rows: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        """Count the step at hand, of which ``what`` is not finite, as left out, or end the run. A collective.

        ``rows`` has of each micro-batch whether its loss was finite, and the indices of its rows.

        Raises:
            InputError: the option is ``"raise"``, or as many steps were skipped in a row as may be.
        """
        self.in_a_row = self.in_a_row + 1 if self.last == trainer.global_step - 1 else 1
        self.last = trainer.global_step
        of_loss = what == "loss"
        subject = f"the loss ({loss_name})" if of_loss else f"the gradient's norm (the loss, {loss_name}, is finite)"
        at = f"global step {trainer.global_step}, learning rate {learning_rate:.3g}"
        described = f"{subject} is NaN or infinite at {at}"
        if not self.skips or self.in_a_row >= SKIPPED_IN_A_ROW:
            raise InputError(self._why_not(described, trainer, _not_finite(rows, trainer) if of_loss else []))
        if not self.skipped:
            rank_zero_warn(
                f"model.step.on_non_finite: skip: {described}: nothing is learnt from it. train/skipped_steps counts "
                "such steps from here on"
            )
        self.skipped += 1

    def _why_not(self, described: str, trainer: pl.Trainer, rows: list[int]) -> str:
        before = f"{self.in_a_row} steps in a row were not finite; of the last, " if self.skips else ""
        shown = ", ".join(map(str, rows[:_SHOWN_ROWS])) + (" ..." if len(rows) > _SHOWN_ROWS else "")
        ways = "lower model.optimizer.lr, set trainer.gradient_clip_val, look at the data"
        ways += "" if self.skips else ", or leave such steps out by model.step.on_non_finite: skip"
        saved = newest_saved(trainer)
        return (
            f"{before}{described}"
            + (f" (rows of index {shown})" if rows else "")
            + f"; the optimizer has not taken the step. What may help: {ways}"
            + (f". The newest checkpoint is of before it: go on with --ckpt_path {saved}" if saved else "")
        )


def _not_finite(rows: Sequence[tuple[Tensor, Tensor]], trainer: pl.Trainer) -> list[int]:
    """Rows of all ranks, as far as batches say which they have. A collective."""
    own = [row for finite, index in rows if not finite for row in index.tolist() if row >= 0]
    return sorted(gather_lists(own, trainer.world_size))
