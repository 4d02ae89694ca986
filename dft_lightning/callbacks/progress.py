"""How far a run is: a bar on a terminal, a line a logged step in a file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.errors import InputError
from dft_lightning.foreign.lightning import logs_now
from dft_lightning.modules.schedules import total_optimizer_steps
from dft_lightning.modules.training import step_ends

_OF_A_STEP = ("loss", "nll", "lr", "tokens_per_second")
_OF_VALIDATION = ("loss", "nll", "token_accuracy")


class StepProgress(TQDMProgressBar):
    """The optimizer steps of a ``fit``: how many are done, of how many, and what is logged of them.

    On a terminal it is a bar of all steps of the run, epochs together. Elsewhere, in a file or a CI's log, it is a line
    at each logged step: the step, of how many, ``loss``, ``nll``, ``lr``, ``tokens_per_second`` and the time that the
    steps to come will take at the pace since the run began or went on; and a line a validation. Numbers have four
    digits that count, however small they are.

    Args:
        lines: lines, or with ``False`` the bar; ``None`` for lines where standard output is no terminal.
        refresh_rate: micro-batches between two updates of the bar.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(accelerator="cpu", callbacks=[StepProgress(lines=True)], logger=False)
    """

    def __init__(self, lines: bool | None = None, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.lines = not sys.stdout.isatty() if lines is None else lines
        if self.lines:
            super().disable()
        self._total: int | None = None
        self._begun: tuple[int, float] = (0, 0.0)  # the step and the time at which this process began
        self._line_due = False
        self._has_bar = self._validated = False

    def enable(self) -> None:
        """Show the bar, as Lightning asks on the first rank; lines stay lines."""
        if not self.lines:
            super().enable()

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What stands behind the bar: values that were logged with ``prog_bar``, as text."""
        return {name: shown(value) for name, value in trainer.progress_bar_metrics.items()}

    # -- training ------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        self._begun, self._total, self._line_due = (step, time.monotonic()), _total(trainer), False
        self._has_bar = self._validated = False
        rank_zero_info(f"{self.place(step)}: {self._to_come(step)}")

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if not self._has_bar:  # after all that is said before the first batch
            self.train_progress_bar, self._has_bar = self.init_train_tqdm(), True
            self.train_progress_bar.unit, self.train_progress_bar.initial = "step", trainer.global_step
            self.train_progress_bar.reset(self._total)
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch}")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        ends = step_ends(trainer)
        self._line_due = self.lines and ends and logs_now(trainer)  # the module logs after this
        if ends and self.is_enabled:
            bar = self.train_progress_bar
            bar.n = trainer.global_step
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._write_line(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write_line(trainer)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._write_line(trainer)
        if self._has_bar:
            super().on_train_end()
        if not self._validated and any(trainer.num_val_batches) and not trainer.interrupted:
            rank_zero_info(
                "no validation was due before the end: it comes after each epoch, or as trainer.val_check_interval says"
            )

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        self._write_line(trainer)

    # -- validation ----------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write_line(trainer)
        super().on_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._validated = not trainer.sanity_checking
        values = _named(trainer, "val", _OF_VALIDATION)
        if self.lines and values and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            rank_zero_info(f"{self.place(trainer.global_step)}: validation {values}")

    # -- what generates ------------------------------------------------------------------------------------------------

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_test_batch_end(trainer, pl_module, *args)
        self._write_share("test", args[2] + 1, trainer.num_test_batches)

    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_predict_batch_end(trainer, pl_module, *args)
        self._write_share("predict", args[2] + 1, trainer.num_predict_batches)

    def _write_share(self, what: str, done: int, batches: Sequence[float]) -> None:
        """A line at each tenth of the batches."""
        total = sum(batches)
        if self.lines and (math.isinf(total) or done * 10 // total > (done - 1) * 10 // total):
            rank_zero_info(f"{what}: {done} of {total} batches" if math.isfinite(total) else f"{what}: {done} batches")

    # -- texts ---------------------------------------------------------------------------------------------------------

    def place(self, step: int) -> str:
        """The step, and of how many where that is known."""
        return f"step {step}" if self._total is None else f"step {step} of {self._total}"

    def _to_come(self, step: int) -> str:
        if self._total is None:
            return "the number of steps to come is not known"
        share = (self._total - step) / max(self._total, 1)
        return f"{max(self._total - step, 0)} to come ({max(share, 0):.0%})"

    def _write_line(self, trainer: pl.Trainer) -> None:
        if not self._line_due:
            return
        self._line_due = False
        values = _named(trainer, "train", _OF_A_STEP)
        rank_zero_info(f"{self.place(trainer.global_step)}: {values}{self._time_left(trainer.global_step)}")

    def _time_left(self, step: int) -> str:
        first, since = self._begun
        if self._total is None or step <= first:
            return ""
        seconds = (time.monotonic() - since) / (step - first) * max(self._total - step, 0)
        return f", {timedelta(seconds=round(seconds))} left"


def _total(trainer: pl.Trainer) -> int | None:
    try:
        return total_optimizer_steps(trainer)
    except InputError:  # rows without a number, and no max_steps
        return None


def _named(trainer: pl.Trainer, stage: str, names: tuple[str, ...]) -> str:
    logged = trainer.callback_metrics
    found = {name: logged[f"{stage}/{name}"] for name in names if f"{stage}/{name}" in logged}
    return ", ".join(f"{_TITLES.get(name, name)} {shown(value)}" for name, value in found.items())


_TITLES = {"tokens_per_second": "tokens/s"}


def shown(value: Any) -> str:
    """A number with four digits that count, ``0.0001234`` and ``1234`` alike."""
    number = float(value)
    return f"{number:.0f}" if 1000 <= abs(number) < 1e7 else f"{number:.4g}"
