"""What a checkpoint holds: beside the weights a record of model and run; of a model with an adapter that alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from dft_lightning.checkpoints.shards import guard_loading
from dft_lightning.distributed.strategies import check_wrapped, on_first_rank
from dft_lightning.errors import InputError, one_line, shortened
from dft_lightning.metrics.exact_sums import ExactSums
from dft_lightning.modules.adapter import (
    adapter_record,
    check_adapter,
    check_tensors,
    fingerprint,
    raise_to_float32,
    trained_names,
)
from dft_lightning.modules.record import RECORD, describe, files_of
from dft_lightning.modules.reference import ReferenceModel
from dft_lightning.modules.restored import OptimizerOptions
from dft_lightning.modules.run_state import RunState
from dft_lightning.trust import loading_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Self


class SavedModule(pl.LightningModule):
    """The part of :class:`~dft_lightning.modules.CausalLMModule` that is about its checkpoints."""

    model: nn.Module | None
    _loss_step: int

    if TYPE_CHECKING:

        def in_flight_metrics(self) -> dict[str, ExactSums]: ...

        def in_flight_values(self) -> dict[str, Any]: ...

        def load_in_flight_values(self, values: dict[str, Any]) -> None: ...

        def window_ends(self) -> bool: ...

        @property
        def tokenizer(self) -> PreTrainedTokenizerBase: ...

        @property
        def _datamodule(self) -> pl.LightningDataModule | None: ...

        def _stop_token_ids(self) -> list[int]: ...

    def __init__(self) -> None:
        super().__init__()
        self._tokenizer_files: dict[str, bytes] | None = None
        self._base_fingerprint: dict[str, str] | None = None
        self._trained: set[str] = set()
        self._reference: ReferenceModel | None = None
        self._run_state = RunState(self)
        self._optimizer_options = OptimizerOptions()
        self.register_load_state_dict_post_hook(leave_out_the_base)  # type: ignore[no-untyped-call]

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> Self:
        """A module from a checkpoint's weights and options; no code is run because the checkpoint says so.

        Args:
            checkpoint_path: a file, an address or an open file.
            map_location: as Lightning's.
            hparams_file: options in place of the checkpoint's own.
            strict: as Lightning's.
            weights_only: ``False`` lets the file run any code.
            kwargs: options over those of the checkpoint. ``trust_remote_code`` is ``False`` unless it is here: ``True``
                runs code that comes with the model that the checkpoint names. So is ``attn_implementation`` to be here
                where it is a kernel on the hub.

        Raises:
            InputError: the checkpoint names a class that is neither this package's nor imported already, or a model
                that wants its own code to be run.
        """
        with loading_options(cls, checkpoint_path, hparams_file, weights_only, kwargs):
            return super().load_from_checkpoint(
                checkpoint_path,
                map_location,
                hparams_file,
                strict,
                weights_only,
                **{"trust_remote_code": False, **kwargs},
            )

    def _guard_loading(self) -> None:
        """Before the strategy is asked to load a checkpoint: what it unpickles itself is looked at first."""
        if self._trainer is not None:
            guard_loading(self.trainer.strategy)

    def _check_adapter_options(self) -> None:
        hparams = self.hparams
        if hparams["peft"] is None:
            if hparams["quantization_config"] is not None:
                raise ValueError("quantization_config is for a base that is frozen: set peft as well")
            return
        self.strict_loading = False  # checkpoints hold the adapter alone: on_load_checkpoint checks its names
        if isinstance(hparams["model"], dict):
            raise ValueError("peft: an adapter needs a pretrained model, for its checkpoints do not hold the base")

    def _raise_to_float32(self) -> None:
        """What is trained beside LoRA's matrices, which peft has seen to."""
        if self.hparams["peft"] is None or self.model is None:
            return
        raised = raise_to_float32(self.model)
        if raised and self._trainer is not None and self.trainer.precision == "32-true":
            raise InputError(
                f"model.peft: {raised[0]} of a base in half precision is trained beside the adapter, and its updates "
                "would be rounded away there: set trainer.precision: bf16-mixed, or model.dtype: float32"
            )

    def _remember_base(self) -> None:
        """What is trained and what is not, when the model is built and before training touches it."""
        assert self.model is not None
        self._trained = trained_names(self.model)
        if self.hparams["peft"] is not None and self._base_fingerprint is None:
            self._base_fingerprint = fingerprint(self.model)

    def _check_trained(self) -> None:
        """Whether what is trained is what the strategy saw."""
        assert self.model is not None
        if changed := sorted(self._trained ^ trained_names(self.model)):
            check_wrapped(self.trainer, changed)
            self._trained |= set(changed)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what ``export`` needs beside the weights (config, tokenizer, the run's settings and metrics), and what a
        run has in flight."""
        self._optimizer_options.save(checkpoint)
        try:
            checkpoint[RECORD] = self.record()
        except Exception as error:  # a model's own config may fail to be written: no reason to lose its weights
            rank_zero_warn(f"this checkpoint cannot be exported: {one_line(error)}")
        if self._reference is not None:
            self._reference.remember(checkpoint)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._run_state.save(checkpoint)

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of the model and its run; see :mod:`dft_lightning.modules.record`."""
        assert self.model is not None, "call configure_model() first"
        if self._tokenizer_files is None:
            self._tokenizer_files = self._files_of_tokenizer()
        stops = self._stop_token_ids() if self._tokenizer_files else []
        values, of_base = self.hparams["peft"], self._base_fingerprint
        adapter = None if values is None or of_base is None else adapter_record(values, of_base)
        return describe(self.model, self.hparams["model"], adapter, self._tokenizer_files, stops, self._trainer)

    def _files_of_tokenizer(self) -> dict[str, bytes]:
        if getattr(self._datamodule, "tokenizer", None) is None and not isinstance(self.hparams["model"], str):
            return {}
        try:
            return files_of(self.tokenizer)
        except Exception as error:  # whatever it is, the weights are to be saved
            rank_zero_warn(f"checkpoints will not hold the tokenizer: {one_line(error)}")
            return {}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._loss_step = int(checkpoint.get("global_step", 0))
        self._optimizer_options.load(checkpoint)
        saved, values = checkpoint.get(RECORD, {}).get("adapter"), self.hparams["peft"]
        state = checkpoint.get("state_dict", {})
        names = [name.removeprefix("model.") for name in state if name.startswith("model.")]
        if saved is None and values is not None and any("lora_" in name for name in names):
            rank_zero_warn("the checkpoint does not say how its adapter was made: neither alpha nor base are compared")
        else:
            # On rank 0: others may hold other rows of the base.
            on_first_rank(self._trainer, lambda: check_adapter(saved, values, self._base_fingerprint))
        if values is not None and names and self.model is not None:
            check_tensors(names, self.model)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            if self._reference is not None:
                self._reference.check_remembered(checkpoint)
            self._check_optimizer(checkpoint)
            check_paths(self.trainer, checkpoint)
            self._run_state.load(checkpoint)

    def _check_optimizer(self, checkpoint: dict[str, Any]) -> None:
        own = self.hparams["optimizer"]
        saved = checkpoint.get("hyper_parameters", {}).get("optimizer", own)
        if saved != own and checkpoint.get("optimizer_states"):
            raise InputError(f"--ckpt_path: the checkpoint has the states of {saved}, and model.optimizer is {own}")

    def state_dict(self, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As every module's; of a model with an adapter that alone, which is what is saved."""
        state: dict[str, Any] = super().state_dict(**kwargs)
        if self.hparams["peft"] is not None and self.model is not None:
            prefix = kwargs.get("prefix", "") + "model."
            self._trained |= trained_names(self.model)  # whatever ever was: it is no longer the base's
            kept = {prefix + name for name in self._trained}
            for name in [name for name in state if name.startswith(prefix) and name not in kept]:
                del state[name]
        return state


def check_paths(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Refuse paths of older checkpoints, which ``ModelCheckpoint`` deletes in time, that are not in its folder.

    Lightning deletes those below the folder alone, but takes ``FOLDER/../..`` for one, and addresses wherever they are.
    """
    states = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict)]
    named = {state.get(name) for state in states for name in _DELETED}
    named |= {path for state in states for path in state.get("best_k_models") or {}}
    for callback in trainer.checkpoint_callbacks:
        folder = str(getattr(callback, "dirpath", None) or trainer.default_root_dir)
        for path in sorted(filter(None, named), key=str):
            if not _may_be_deleted(str(path), folder):
                raise InputError(
                    f"--ckpt_path: the checkpoint has {shortened(str(path), 300)} for an older one: refused"
                )


_DELETED = ("best_model_path", "kth_best_model_path", "last_model_path")  # with best_k_models, of a callback's state


def _may_be_deleted(path: str, folder: str) -> bool:
    """Whether what Lightning would delete is in the folder; of what it would not, too."""
    if not _is_local_file_protocol(path):
        return path.startswith(folder.rstrip("/") + "/") and ".." not in path.split("/")
    seems = Path(folder).absolute() in Path(path).absolute().parents
    return not seems or Path(os.path.abspath(folder)) in Path(os.path.abspath(path)).parents


def leave_out_the_base(module: nn.Module, keys: Any) -> None:
    """Of what a checkpoint lacks for a module with an adapter: the base is where it belongs already."""
    if isinstance(module, SavedModule) and module.hparams["peft"] is not None and module.model is not None:
        frozen = {f"model.{name}" for name in module.model.state_dict()} - {f"model.{name}" for name in module._trained}
        keys.missing_keys[:] = [
            name for name in keys.missing_keys if not any(f".{name}".endswith(f".{each}") for each in frozen)
        ]
