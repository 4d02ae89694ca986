"""A run that is asked to stop writes a checkpoint first."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.checkpoints.whole import written
from dft_lightning.distributed.ranks import StopFlag
from dft_lightning.foreign.lightning import exchange_signals
from dft_lightning.modules.training import step_ends
from dft_lightning.progress import training_loaders

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """Raised by ``fit`` when a run has stopped on a signal, whose number and 128 are its code."""


class InterruptionCheckpoint(Callback):
    """On SIGTERM and Ctrl-C writes a checkpoint and leaves; a second Ctrl-C leaves at once.

    The batch that is computed is finished, and on several processes its optimizer step, in whose exchange all of them
    learn of it; a validation or generation is given up, and done anew by the run that goes on, but for those after the
    last step, which are finished. What is written is of the last optimizer step: a run that goes on from it ends as one
    that was never stopped. A signal on one rank stops all of them at the same batch.

    The checkpoint goes beside those of the first ``ModelCheckpoint``, and is that one's own where it has just written
    one; the log says which and how to go on. Before the first batch of a run, signals do what they always do.

    Raises (out of ``fit``):
        Interrupted: a :class:`SystemExit` with the status 130 (SIGINT) or 143 (SIGTERM).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(accelerator="cpu", callbacks=[InterruptionCheckpoint()], logger=False)
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._stopping = False
        self._loader_states: list[dict[str, Any]] | None = None
        self._saved_at = -1
        self._previous: dict[int, Any] = {}
        self._trainer: pl.Trainer | None = None
        self._flag = StopFlag()

    # -- signals -----------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # In place of Lightning's own for SIGTERM, which exchanges tensors with other ranks in the middle of anything.
        self._signal, self._trainer = None, trainer
        self._flag = getattr(pl_module, "stop_flag", None) or StopFlag()
        self._flag.reset()
        self._stopping, self._loader_states = False, None
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set them
            self._previous = {number: signal.signal(number, self._asked) for number in _SIGNALS}
            exchange_signals(trainer, False)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()

    def _release(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous and self._trainer is not None:
            exchange_signals(self._trainer, True)
        self._previous, self._trainer = {}, None

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            self._leave_at_once(number)
        if self._signal is None:
            name = signal.Signals(number).name
            _say(f"{name}: stopping, with a checkpoint; Ctrl-C again leaves at once, without one")
        self._signal, self._flag.asked = number, True

    def _leave_at_once(self, number: int) -> None:
        launcher = None if self._trainer is None else self._trainer.strategy.launcher
        if launcher is not None and hasattr(launcher, "kill"):
            launcher.kill(signal.SIGKILL)
        _say("left at once: what was saved before is whole, and --ckpt_path last goes on from it")
        os._exit(128 + number)  # from whatever it was doing: a collective would not end by an exception

    # -- where a run can stop: not where other callbacks have something to do, too ---------------------------------

    def asked(self, trainer: pl.Trainer) -> bool:
        """Whether any rank was asked to stop. A collective."""
        return self._learnt(bool(trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)))

    def _learnt(self, found: bool) -> bool:
        if found and self._signal is None:
            self._signal = signal.SIGTERM  # the other's may have been another, which only it knows
        return found

    def _asked_within(self, trainer: pl.Trainer) -> bool:
        """As :meth:`asked` after a micro-batch, of which those that end no step exchange nothing."""
        if trainer.world_size > 1 and not step_ends(trainer):
            return False
        told = self._flag.taken()
        return self.asked(trainer) if told is None or trainer.world_size == 1 else self._learnt(told)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._stopping = not is_over(trainer) and self._asked_within(trainer)
        if self._stopping:  # before the next batch is drawn; what this one leaves to be logged is done first
            found = [loader for loader in training_loaders(trainer) if hasattr(loader, "state_dict")]
            self._loader_states = [loader.state_dict() for loader in found]

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._stopping:
            self._stop(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._stopping:
            self._stop(trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        # Ranks exchange a flag here: only where they are known to have as many batches.
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or is_over(trainer):
            return
        even = trainer.world_size == 1 or hasattr(trainer.datamodule, "row_position")  # type: ignore[attr-defined]
        if even and self.asked(trainer):
            self._stop(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._saved_at = trainer.global_step
        state = checkpoint["loops"]["fit_loop"]["state_dict"]
        if self._loader_states is not None and "combined_loader" in state:
            state["combined_loader"] = self._loader_states  # without the batch that was drawn since

    def _stop(self, trainer: pl.Trainer) -> None:
        assert self._signal is not None
        path = self._save(trainer)
        rank_zero_info(
            f"{signal.Signals(self._signal).name}: stopped after step {trainer.global_step}. Saved {path}. To go on, "
            f"repeat the command with --ckpt_path {path} (or --ckpt_path last)"
        )
        raise Interrupted(0 if _was_started_by_another(trainer) else 128 + self._signal)

    def _save(self, trainer: pl.Trainer) -> Path:
        own = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        just_written = _newest(own, trainer.global_step) if self._saved_at == trainer.global_step else None
        just_written = trainer.strategy.broadcast(just_written)  # others may not see the file
        if just_written is not None:
            return Path(just_written)
        folder = own[0].dirpath if own and own[0].dirpath else Path(trainer.log_dir or trainer.default_root_dir)
        path = Path(folder) / f"interrupted-step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        return path


def asked_to_stop(trainer: pl.Trainer) -> bool:
    """Whether a run is to stop, for what takes long between two batches. A collective."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, InterruptionCheckpoint)]  # type: ignore[attr-defined]
    return bool(found) and not is_over(trainer) and found[0].asked(trainer)


def is_over(trainer: pl.Trainer) -> bool:
    """Whether a run has done its last step, so that one that goes on from here would have nothing to do."""
    return trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps


def _newest(callbacks: list[ModelCheckpoint], step: int) -> str | None:
    """The last whole checkpoint that one of these has written, where it is of this step.

    That of this step may be somebody else's, or be written in a thread and not there yet.
    """
    whole = [callback for callback in callbacks if not callback.save_weights_only]
    names = {name for each in whole for name in (each.best_model_path, each.last_model_path, *each.best_k_models)}
    there = [name for name in names if name and Path(name).exists()]
    newest = max(there, key=lambda name: Path(name).stat().st_mtime_ns, default=None)
    return newest if newest is not None and written(Path(newest))[1] == step else None


def _was_started_by_another(trainer: pl.Trainer) -> bool:
    """Whether Lightning started this process from the first one of its machine, which it ends, with no time to tidy up,
    when one of them fails."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return trainer.local_rank > 0 and environment is not None and not environment.creates_processes_externally


def _say(text: str) -> None:
    os.write(2, f"\n{text}\n".encode())  # a handler must not write where it may have interrupted a write
