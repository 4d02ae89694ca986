"""The trained model as a Hugging Face folder, at the end of ``fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.distributed.strategies import whole_state
from dft_lightning.errors import InputError, one_line
from dft_lightning.export.checkpoint import TrainedCheckpoint, language_model_tensors
from dft_lightning.export.folder import OF_A_MODEL, export_folder
from dft_lightning.files import check_replaceable
from dft_lightning.modules.causal_lm import CausalLMModule


class HuggingFaceExport(Callback):
    """Writes what ``python -m dft_lightning export`` would make of the last weights, when ``fit`` ends.

    Under every strategy: rank 0 gathers the weights in its host memory and writes them.

    Args:
        output: the folder; ``None`` for ``huggingface`` in the run's log folder.
        overwrite: replace a model that is in it.
        dtype: to convert to; ``None`` leaves tensors as trained.
        max_shard_size: of a safetensors file.

    Raises:
        InputError: before training: the folder is not empty, or no folder. After it: it cannot be written.

    Example:
        >>> from dft_lightning.callbacks import HuggingFaceExport
        >>> HuggingFaceExport("exported", dtype="bfloat16").output
        'exported'
    """

    def __init__(
        self,
        output: str | None = None,
        overwrite: bool = False,
        dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None,
        max_shard_size: str = "5GB",
    ) -> None:
        self.output = output
        self.overwrite = overwrite
        self.dtype = dtype
        self.max_shard_size = max_shard_size

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, CausalLMModule):
            raise InputError(f"HuggingFaceExport: {type(pl_module).__name__} is no CausalLMModule")
        if self.output is not None:  # before hours of training, not after
            check_replaceable(Path(self.output), self.overwrite, OF_A_MODEL, "HuggingFaceExport.output")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, CausalLMModule)
        log_dir = trainer.log_dir  # a broadcast: every rank asks
        state = whole_state(trainer)
        problem = None
        if trainer.is_global_zero:
            problem = self._write(trainer, pl_module, state, Path(self.output or Path(log_dir or ".") / "huggingface"))
        problem = trainer.strategy.broadcast(problem)  # a rank that ends alone leaves the others waiting
        if problem is not None:
            raise InputError(f"HuggingFaceExport: {problem}")

    def _write(self, trainer: pl.Trainer, module: CausalLMModule, state: dict[str, Any], output: Path) -> str | None:
        """Returns what went wrong."""
        trained = TrainedCheckpoint(
            Path("the trained model"),
            language_model_tensors(state),
            module.record(),
            dict(module.hparams),
            trainer.global_step,
            trainer.current_epoch,
        )
        try:
            export_folder(
                trained, output, dtype=self.dtype, overwrite=self.overwrite, max_shard_size=self.max_shard_size
            )
        except Exception as error:
            return f"{output}: {one_line(error)}"
        rank_zero_info(f"the trained model is in {output}")
        return None
