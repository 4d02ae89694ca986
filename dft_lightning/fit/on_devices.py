"""A model on its devices, put there by Lightning's predict loop: what ``score`` and ``sample`` do with a fit config."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader, Dataset

from dft_lightning.callbacks.interruption import Interrupted
from dft_lightning.cli.commands import handling
from dft_lightning.data import InstructionDataModule
from dft_lightning.fit.processes import started_by_another
from dft_lightning.modules import CausalLMModule

_DEVICES = ("accelerator", "devices", "num_nodes", "strategy", "precision", "plugins")
_KEPT = (*_DEVICES, "enable_progress_bar", "default_root_dir", "deterministic")


def of_its_devices(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """A trainer's options without what a run has beside its devices and precision: no callbacks, no logger.

    Args:
        trainer: all options of the run's own.
    """
    names = ("logger", "enable_checkpointing", "enable_model_summary", "inference_mode", "use_distributed_sampler")
    return {**{name: trainer[name] for name in _KEPT}, **dict.fromkeys(names, False)}


class _Data(pl.LightningDataModule):
    """What the trainer takes the batches from, and the module its tokenizer."""

    def __init__(self, data: InstructionDataModule, batches: Dataset[Any]) -> None:
        super().__init__()
        self.tokenizer = data.tokenizer
        self.end_of_turn_ids = data.end_of_turn_ids
        self.batches = batches

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None)


def predict(
    trainer: pl.Trainer,
    module: CausalLMModule,
    data: InstructionDataModule,
    batches: Dataset[Any],
    step: Callable[[Any, int], Any],
    ckpt_path: str | None = None,
) -> None:
    """Load a module's model onto the trainer's device, and take a step with each batch: in evaluation mode, without
    gradients, in the run's precision.

    Args:
        trainer: of the options of :func:`of_its_devices`.
        module: whose model.
        data: the config's, with its tokenizer.
        batches: each as the step takes it.
        step: takes a batch and its number; callbacks are given what it returns.
        ckpt_path: a checkpoint whose weights the model gets.
    """
    module.predict_step = step  # type: ignore[method-assign, assignment]
    trainer.predict(
        module, datamodule=_Data(data, batches), ckpt_path=ckpt_path, return_predictions=False, weights_only=True
    )


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def ending_on_signals() -> AbstractContextManager[None]:
    """Ctrl-C and SIGTERM end the command as an error would, so that what was begun is deleted.

    A process that another one started leaves them to that, and ends with it.
    """
    return handling(_SIGNALS, _ignore if started_by_another() else _end)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


def _end(number: int, frame: FrameType | None) -> None:
    for each in _SIGNALS:  # a second one would leave the deleting half done
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(128 + number)


def status_of(ending: KeyboardInterrupt | Interrupted) -> int:
    """The exit status of a command that a signal has ended."""
    return int(getattr(ending, "code", None) or 130)
