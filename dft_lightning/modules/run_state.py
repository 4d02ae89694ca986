"""What a run has in flight beside weights and optimizer: counts, random states and metrics of every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import Metric

from dft_lightning.distributed.gather import gather_lists
from dft_lightning.errors import InputError
from dft_lightning.modules.optimization import num_training_batches
from dft_lightning.modules.random_state import random_state, restore_random_state
from dft_lightning.progress import Progress, batches_done, count_logged_steps, go_on_from, last_step

if TYPE_CHECKING:
    from dft_lightning.modules.saved import SavedModule

RUN_STATE = "dft_lightning_run"
"""Its key in a checkpoint."""


class RunState:
    """Writes a run's state into checkpoints and goes on from it.

    A checkpoint is of the last optimizer step, also where it is written in the middle of the next one's micro-batches
    or of a validation. So each step is noted, as what comes after it changes random states and metrics.

    Args:
        module: of the run; what it has in flight is what its ``in_flight_metrics`` and ``in_flight_values`` say.
    """

    def __init__(self, module: SavedModule) -> None:
        self._module = module
        self._step: dict[str, Any] | None = None
        self._step_number = -1
        self._loaded: dict[str, Any] | None = None
        self._validated_at: int | None = None

    def reset(self) -> None:
        """Before a fit."""
        self._step, self._step_number = None, -1
        self._validated_at = None

    def note_step(self) -> None:
        """An optimizer step is done, and what was due after it."""
        self._step, self._step_number = self._now(), self._module.global_step

    def note_validation(self) -> None:
        """Validation has run."""
        self._validated_at = batches_done(self._module.trainer)

    def _now(self) -> dict[str, Any]:
        metrics = {name: metric_state(metric) for name, metric in self._module.in_flight_metrics().items()}
        return {"random": random_state(), "metrics": metrics, "values": self._module.in_flight_values()}

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Add the state to a checkpoint that is written along a fit. A collective."""
        trainer = self._module.trainer
        progress = last_step(trainer, self._validated_at)
        own = self._now()
        done_again = progress.micro_batches > 0 or (trainer.validating and not progress.validated)
        if done_again and self._step is not None:
            own = self._step
        elif self._step_number != self._module.global_step and self._module.window_ends():
            own["metrics"] = {}  # logged as soon as this is written
        rows = rows_of_batch(trainer)
        checkpoint[RUN_STATE] = {
            "progress": progress.to_dict(),
            "rows_of_batch": rows,
            "ranks": gather_lists([on_host(own)], trainer.world_size),
        }
        if rows is not None:  # the loader's own state is where it has read to, and of this rank
            checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Have the loops of a fit, and :meth:`restore`, go on from a checkpoint.

        Raises:
            InputError: it is within an epoch, and not at a whole number of this run's batches.
        """
        saved = checkpoint.get(RUN_STATE)
        self._loaded = saved
        if saved is None or "loops" not in checkpoint:
            return
        progress, rows = Progress(**saved["progress"]), rows_of_batch(self._module.trainer)
        if rows is None or saved["rows_of_batch"] is None:
            return  # batches of a loader that does not say what they are: Lightning's own count
        of_epoch = None
        if rows != saved["rows_of_batch"] and progress.epoch_full:
            of_epoch = num_training_batches(self._module.trainer)
        found = progress.in_batches_of(rows, saved["rows_of_batch"], of_epoch)
        if found is None:
            raise InputError(
                f"--ckpt_path: the checkpoint is {progress.batches * saved['rows_of_batch']} rows into its epoch, "
                f"which is no whole number of batches of {rows} rows (data.batch_size x ranks): set data.batch_size so "
                "that it is"
            )
        checkpoint["loops"] = go_on_from(found, checkpoint["loops"])
        if found.validated:
            self._validated_at = found.total_batches

    def restore(self) -> None:
        """Before the first batch after :meth:`load`: random states and metrics of this rank."""
        saved, self._loaded = self._loaded, None
        if saved is None:
            return
        ranks, trainer = saved["ranks"], self._module.trainer
        if len(ranks) != trainer.world_size:
            rank_zero_info(
                f"the checkpoint is of {len(ranks)} processes and there are {trainer.world_size}: dropout goes on with "
                "other random numbers"
            )
        elif trainer.global_rank < len(ranks):
            restore_random_state(ranks[trainer.global_rank]["random"])
        for name, metric in self._module.in_flight_metrics().items():
            load_metric_state(metric, [rank["metrics"].get(name) for rank in ranks], trainer)
        self._module.load_in_flight_values(ranks[min(trainer.global_rank, len(ranks) - 1)]["values"])
        if rows_of_batch(trainer) is not None:
            count_logged_steps(trainer)


def rows_of_batch(trainer: pl.Trainer) -> int | None:
    """Rows of a training micro-batch over all ranks, where the data module can go on within an epoch."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    if not hasattr(datamodule, "row_position"):
        return None
    return int(datamodule.batch_size) * trainer.world_size


def metric_state(metric: Metric) -> dict[str, Any]:
    """Copies of a metric's states, and how often it was updated."""
    states = {name: cast(Tensor, value).detach().clone() for name, value in metric.metric_state.items()}
    return {"states": states, "updates": metric._update_count}


def on_host(state: Any) -> Any:
    """Nested dicts with their tensors in host memory."""
    if isinstance(state, dict):
        return {name: on_host(value) for name, value in state.items()}
    return state.cpu() if isinstance(state, Tensor) else state


def load_metric_state(metric: Metric, saved: list[dict[str, Any] | None], trainer: pl.Trainer) -> None:
    """A metric's states from those of all ranks; of another number of ranks, rank 0 goes on with all their sums."""
    metric.reset()
    states = [state for state in saved if state is not None]
    if not states:
        return
    if len(saved) == trainer.world_size or not metric.sync_on_compute:  # else they are of all ranks already
        found = states[min(trainer.global_rank, len(states) - 1)]["states"]
    elif trainer.is_global_zero:
        found = {name: sum(state["states"][name] for state in states) for name in states[0]["states"]}
    else:
        found = {}
    for name, value in found.items():
        current: Tensor = getattr(metric, name)
        current.copy_(value)
    metric._update_count = states[0]["updates"]  # on every rank: whether there is something to log is asked of it
