"""The trained model as a Hugging Face folder, at the end of ``fit``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.distributed.strategies import on_first_rank
from dft_lightning.distributed.whole import whole_state
from dft_lightning.errors import InputError, check_one_of
from dft_lightning.export.checkpoint import TrainedCheckpoint, language_model_tensors
from dft_lightning.export.folder import OF_A_MODEL, DType, check_shard_size, export_folder
from dft_lightning.export.model import model_class_of
from dft_lightning.files import check_replaceable
from dft_lightning.modules.causal_lm import CausalLMModule


def export_live(trainer: pl.Trainer, module: CausalLMModule, output: Path, key: str, **options: Any) -> None:
    """Write a module's weights as they are. A collective: rank 0 gathers them, from shards into files beside the
    folder, and writes.

    Args:
        trainer: of the module.
        module: whose model.
        output: the folder.
        key: what a message begins with.
        options: of :func:`.export_folder`.

    Raises:
        InputError: it cannot be written.
    """
    beside: list[tempfile.TemporaryDirectory[str]] = []

    def make() -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        beside.append(tempfile.TemporaryDirectory(prefix=".gathered-", dir=output.parent))

    on_first_rank(trainer, make, key)
    try:
        folder = Path(beside[0].name if beside else "")
        state, record = whole_state(trainer, folder), module.record()  # on every rank: each may be a collective

        def write() -> None:
            tensors, step = language_model_tensors(state), trainer.global_step
            trained = TrainedCheckpoint(_LIVE, tensors, record, dict(module.hparams), step, trainer.current_epoch)
            export_folder(trained, output, trust_remote_code=module.loading.trust_remote_code, **options)

        on_first_rank(trainer, write, key, long=True)
    finally:
        for each in beside:
            each.cleanup()


class HuggingFaceExport(Callback):
    """Writes what ``python -m dft_lightning export`` would make of the last weights, when ``fit`` ends.

    Under every strategy. Rank 0 gathers the weights and writes them: under FSDP2 one tensor at a time, through files
    beside the folder, which take as much room again meanwhile; under FSDP1 in its host memory.

    Args:
        output: the folder; ``None`` for ``huggingface`` in the run's log folder.
        overwrite: replace a model that is in it.
        dtype: to convert to; ``None`` leaves tensors as trained.
        max_shard_size: of a safetensors file.
        merge: of a LoRA run, write base and adapter as one model; rank 0 loads the base again for that. ``False``
            writes the adapter.

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
        merge: bool = False,
    ) -> None:
        check_shard_size(max_shard_size)
        if dtype is not None:
            check_one_of("dtype", dtype, get_args(DType))
        self.output = output
        self.overwrite = overwrite
        self.dtype = dtype
        self.max_shard_size = max_shard_size
        self.merge = merge

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before hours of training, not after."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not isinstance(pl_module, CausalLMModule):
            raise InputError(f"HuggingFaceExport: {type(pl_module).__name__} is no CausalLMModule")
        output, record = self._output(trainer), pl_module.record()

        def check() -> None:
            check_replaceable(output, self.overwrite, OF_A_MODEL, "output")
            model_class_of(record, _LIVE)
            if self.merge and record["adapter"] is None:
                raise InputError("merge: this run trains the whole model and no adapter: leave it out")
            if not os.access(next(parent for parent in output.absolute().parents if parent.is_dir()), os.W_OK):
                raise InputError(f"output: {output.parent} cannot be written")

        on_first_rank(trainer, check, "HuggingFaceExport: ")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What was trained for one batch to try the code (``fast_dev_run``) is not written."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, CausalLMModule)
        output = self._output(trainer)
        options = {"dtype": self.dtype, "overwrite": self.overwrite, "max_shard_size": self.max_shard_size}
        export_live(trainer, pl_module, output, "HuggingFaceExport: ", merge=self.merge, **options)
        rank_zero_info(f"the trained model is in {output}")

    def _output(self, trainer: pl.Trainer) -> Path:
        log_dir = trainer.log_dir  # a broadcast: every rank asks
        return Path(self.output) if self.output is not None else Path(log_dir or ".") / "huggingface"


_LIVE = Path("the trained model")
