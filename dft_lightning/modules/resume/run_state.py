"""What a run has in flight beside weights and optimizer: counts, random states and metrics of every rank."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from dft_lightning.distributed.ranks import gather_lists
from dft_lightning.foreign.lightning import count_logged_steps, logs_now
from dft_lightning.metrics.exact_sums import ExactSums
from dft_lightning.modules.schedules import num_training_batches
from dft_lightning.modules.telemetry import TrainTelemetry
from dft_lightning.modules.training import OptimizerSteps, step_ends
from dft_lightning.progress import (
    Progress,
    RowsOfBatches,
    accumulation_of,
    batches_done,
    go_on_from,
    last_step,
    training_loaders,
)

RUN_STATE = "dft_lightning_run"
"""Its key in a checkpoint."""


class RunState:
    """Writes a run's state into checkpoints and goes on from it.

    A checkpoint is of the last optimizer step, also where it is written in the middle of the next one's micro-batches
    or of a validation. So each step is noted, as what comes after it changes random states and metrics.
    ``telemetry`` has metrics that are updated at each step and logged later: checkpoints hold every rank's. ``name`` is
    that of the module's class.
    """

    def __init__(self, steps: OptimizerSteps, telemetry: TrainTelemetry, name: str) -> None:
        self._steps, self._telemetry, self._name = steps, telemetry, name
        self._noted: dict[str, Any] | None = None
        self._step_number = -1
        self._loaded: dict[str, Any] | None = None
        self._validated_at: int | None = None

    def begin(self, trainer: pl.Trainer) -> None:
        """Before the first batch of a fit, which may go on from a checkpoint."""
        self._noted, self._step_number, self._validated_at = None, -1, None
        self._restore(trainer)
        self.note_step(trainer)

    def note_step(self, trainer: pl.Trainer) -> None:
        """An optimizer step is done, and what was due after it."""
        self._noted, self._step_number = self._now(), trainer.global_step

    def note_validation(self, trainer: pl.Trainer) -> None:
        """Validation has run."""
        self._validated_at = batches_done(trainer)

    def after_validation(self, trainer: pl.Trainer) -> None:
        """Within a fit: what was noted of a step gets the random numbers that validation took."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and step_ends(trainer):
            self.note_step(trainer)

    def _now(self) -> dict[str, Any]:
        metrics = {name: metric.snapshot() for name, metric in self._telemetry.metrics().items()}
        return {"random": random_state(), "metrics": metrics, "values": self._steps.in_flight()}

    def save(self, checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
        """Add the state to a checkpoint that is written along a fit. A collective."""
        progress = last_step(trainer, self._validated_at)
        own = self._now()
        done_again = progress.micro_batches > 0 or (trainer.validating and not progress.validated)
        if done_again and self._noted is not None:
            if self._step_number != trainer.global_step:
                rank_zero_warn(
                    f"{self._name} overrides on_train_batch_end without calling super(): checkpoints "
                    "within a step have random numbers and metrics of an earlier one"
                )
            own = self._noted
        elif self._step_number != trainer.global_step and logs_now(trainer):
            own["metrics"] = {}  # logged as soon as this is written
        rows = rows_of_batches(trainer) if positions(trainer) else None
        checkpoint[RUN_STATE] = {
            "progress": progress.to_dict(),
            "callback_metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "rows_of_batches": None if rows is None else [rows.rows, rows.batches],
            "ranks": gather_lists([on_host(own)], trainer.world_size),
        }
        if rows is not None:  # the loader's own state is where it has read to, and of this rank
            checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)

    def load(self, checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
        """Have the loops of a fit, and :meth:`begin`, go on from a checkpoint."""
        saved = checkpoint.get(RUN_STATE)
        self._loaded = saved
        if saved is None:
            rank_zero_warn(
                "--ckpt_path: the checkpoint does not say where its run was in its rows, as those of earlier versions: "
                "an epoch that was not over begins them again, and dropout draws other numbers"
            )
        if saved is None or "loops" not in checkpoint:
            return
        progress, rows = Progress(**saved["progress"]), rows_of_batches(trainer)
        if rows is None or saved["rows_of_batches"] is None:
            return  # batches of a loader that does not say what they are: Lightning's own count
        of_epoch, before = None, RowsOfBatches(*saved["rows_of_batches"])
        if rows != before and progress.epoch_full:
            of_epoch = num_training_batches(trainer)
        found = progress.in_batches_of(rows, before, of_epoch)
        checkpoint["loops"] = go_on_from(found, checkpoint["loops"])
        self._loaded = {**saved, "validated_at": found.total_batches if found.validated else None}

    def _restore(self, trainer: pl.Trainer) -> None:
        """After :meth:`load`: random states and metrics of this rank."""
        saved, self._loaded = self._loaded, None
        if saved is None:
            return
        ranks = saved["ranks"]
        self._validated_at = saved.get("validated_at")
        if len(ranks) != trainer.world_size:
            rank_zero_info(
                f"the checkpoint is of {len(ranks)} processes and there are {trainer.world_size}: dropout goes on with "
                "other random numbers"
            )
        else:
            restore_random_state(ranks[trainer.global_rank]["random"])
        for name, metric in self._telemetry.metrics().items():
            load_metric(metric, [rank["metrics"].get(name) for rank in ranks], trainer)
        self._steps.load_in_flight(ranks[min(trainer.global_rank, len(ranks) - 1)]["values"])
        for name, value in saved["callback_metrics"].items():  # what callbacks look for at the end of the epoch
            trainer.callback_metrics[name] = torch.tensor(value, dtype=torch.float64)
        # A GradientAccumulationScheduler is asked where an epoch begins alone.
        trainer.accumulate_grad_batches = accumulation_of(trainer, trainer.current_epoch)
        if positions(trainer):
            count_logged_steps(trainer)


def positions(trainer: pl.Trainer) -> bool:
    """Whether the loader in use is the data module's own, which goes on within an epoch; an override may make one."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    return hasattr(datamodule, "goes_on") and all(map(datamodule.goes_on, training_loaders(trainer)))


def rows_of_batches(trainer: pl.Trainer) -> RowsOfBatches | None:
    """Rows of training micro-batches over all ranks, where the data module says so."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    found: RowsOfBatches | None = datamodule.rows_of_batches() if hasattr(datamodule, "rows_of_batches") else None
    return found


def on_host(state: Any) -> Any:
    """Nested dicts with their tensors in host memory."""
    if isinstance(state, dict):
        return {name: on_host(value) for name, value in state.items()}
    return state.cpu() if isinstance(state, Tensor) else state


def load_metric(metric: ExactSums, saved: list[dict[str, Any] | None], trainer: pl.Trainer) -> None:
    """A metric's states from the snapshots of all ranks; of another number of ranks, rank 0 goes on with their sums."""
    snapshots = [snapshot for snapshot in saved if snapshot is not None]
    metric.reset()
    if not snapshots:
        return
    found = dict(snapshots[min(trainer.global_rank, len(snapshots) - 1)])
    if len(saved) != trainer.world_size and metric.sync_on_compute:  # else each rank's are of all of them
        shared = trainer.global_rank == 0
        found = {name: sum(each[name] for each in snapshots) * shared for name in found}
        found["updates"] = snapshots[0]["updates"]  # whether there is something to log is asked on every rank
    metric.restore(
        {name: value.to(metric.device) if isinstance(value, Tensor) else value for name, value in found.items()}
    )


def random_state() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's global generators, of this process's accelerator too.

    In plain values and tensors, which ``weights_only`` loading can read.
    """
    kind, keys, *place = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.array(keys, np.int64)), *place],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()  # of the current device, which is the rank's
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Go on from what :func:`random_state` returned; a state of a device that is not there is left out."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, *place = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *place))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
