"""What a checkpoint holds: beside the weights a record of model and run; of a model with an adapter that alone."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from dft_lightning.component import brief_values, class_path
from dft_lightning.distributed.strategies import check_wrapped, on_first_rank
from dft_lightning.errors import InputError, one_line, shortened
from dft_lightning.files import is_local
from dft_lightning.models.fingerprints import base_fingerprint
from dft_lightning.models.generation import Completions
from dft_lightning.models.head import ends_of
from dft_lightning.models.lora.adapter import trained_names
from dft_lightning.models.lora.saved import adapter_record, check_adapter, check_tensors
from dft_lightning.models.reference import EarlierModel, ReferenceModel
from dft_lightning.modules.building import ModelBuilder
from dft_lightning.modules.factories import Values
from dft_lightning.modules.resume.restored import OptimizerOptions
from dft_lightning.modules.resume.run_state import RunState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "dft_lightning"
"""The key in a checkpoint of what :meth:`Checkpoints.record` says."""


def base_of(checkpoint: dict[str, Any]) -> str | None:
    """The name or folder that a checkpoint's model began from, where it says one."""
    return (checkpoint.get(RECORD) or {}).get("base")


class Checkpoints:
    """What the checkpoints of a run hold that starts from a base, and how it goes on from one."""

    def __init__(
        self,
        builder: ModelBuilder,
        peft: dict[str, Any] | None,
        schedule: Values,
        run_state: RunState,
        earlier: EarlierModel | None,
    ) -> None:
        self._given, self._peft, self._run_state = builder.given is not None, peft, run_state
        self._earlier = earlier
        # What an adapter's base is, in memory, its name does not say.
        self._base = None if self._given and peft is not None else builder.base_name
        self._optimizer_options = OptimizerOptions(schedule)
        self._tokenizer_files: dict[str, bytes] | None = None
        self._base_fingerprint: dict[str, str] | None = None
        self._trained: set[str] = set()

    # -- a run -------------------------------------------------------------------------------------------------

    def remember_base(self, model: nn.Module) -> None:
        """What is trained and what is not, when the model is built and before training touches it."""
        self._trained = trained_names(model)
        if self._peft is not None and self._base_fingerprint is None:
            self._base_fingerprint = base_fingerprint(model)

    def before_fit(self, trainer: pl.Trainer) -> None:
        """When the optimizers are made and nothing is restored."""
        self._optimizer_options.remember(trainer)

    def begin(self, model: nn.Module, trainer: pl.Trainer) -> None:
        """Before a run's first step: go on from the checkpoint, if there is one.

        Raises:
            InputError: what is trained is not what the strategy saw when it wrapped the model.
        """
        self._optimizer_options.put_back(trainer)
        self._tokenizer_files = None  # this run's data may have another
        self._run_state.begin(trainer)
        if self._earlier is not None:
            self._earlier.begin(model)
        if changed := sorted(self._trained ^ trained_names(model)):
            check_wrapped(trainer, changed)
            self._trained |= set(changed)

    # -- writing -----------------------------------------------------------------------------------------------

    def save(
        self,
        checkpoint: dict[str, Any],
        record: Callable[[], dict[str, Any]],
        reference: ReferenceModel | None,
        trainer: pl.Trainer | None,
    ) -> None:
        """Add what ``export`` needs beside the weights, of :meth:`record`, and what a run has in flight."""
        self._optimizer_options.save(checkpoint)
        try:
            checkpoint[RECORD] = record()
        except Exception as error:  # a model's own config may fail to be written: no reason to lose its weights
            rank_zero_warn(f"this checkpoint cannot be exported: {one_line(error)}")
        if reference is not None:
            reference.remember(checkpoint)
        if self._earlier is not None:
            self._earlier.save(checkpoint, int(checkpoint["global_step"]))
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            self._run_state.save(checkpoint, trainer)

    def record(self, model: nn.Module, completions: Completions, trainer: pl.Trainer | None) -> dict[str, Any]:
        """What a checkpoint says of the model and its run, so that it is exported without what the run began from.

        In plain values that ``weights_only`` loading can read. ``base`` is the name or folder that the model was loaded
        from, ``given`` whether it was given as an object, ``adapter`` of :func:`.adapter_record` and ``None`` where all
        of the model is trained, ``tokenizer`` the files of :func:`files_of`, ``stop_token_ids`` what ends a generated
        text.
        """
        datamodule = getattr(trainer, "datamodule", None)
        if self._tokenizer_files is None:
            self._tokenizer_files = _files_of(completions, datamodule)
        base, values, of_base = self._base, self._peft, self._base_fingerprint
        config, generation = getattr(model, "config", None), getattr(model, "generation_config", None)
        metrics = {} if trainer is None else trainer.callback_metrics
        return {
            "base": base,
            "base_is_local": base is not None and Path(base).exists(),
            "given": self._given,
            "adapter": None if values is None or of_base is None else adapter_record(values, of_base),
            "model_class": class_path(type(model)),
            "config_class": class_path(type(config)),
            "config": None if config is None else _config_text(model, config),
            "generation_config": None if generation is None else generation.to_json_string(),
            "stop_token_ids": completions.stop_token_ids(model, datamodule) if self._tokenizer_files else [],
            "tokenizer": self._tokenizer_files,
            "data": {} if trainer is None else brief_values(getattr(datamodule, "hparams", {})),
            "trainer": {} if trainer is None else _settings(trainer),
            "metrics": {name: float(value) for name, value in metrics.items()},
        }

    def keep_adapter(self, state: dict[str, Any], model: nn.Module | None, prefix: str) -> None:
        """Leave of a module's state, where the names of a model with an adapter have a prefix, that adapter alone."""
        if self._peft is None or model is None:
            return
        self._trained |= trained_names(model)  # whatever ever was: it is no longer the base's
        kept = {prefix + name for name in self._trained}
        for name in [name for name in state if name.startswith(prefix) and name not in kept]:
            del state[name]

    # -- reading -----------------------------------------------------------------------------------------------

    def load(
        self,
        checkpoint: dict[str, Any],
        model: nn.Module | None,
        reference: ReferenceModel | None,
        trainer: pl.Trainer | None,
    ) -> None:
        """Hold a checkpoint against this run before it is loaded, and go on from what it has in flight.

        Raises:
            InputError: it is of another adapter, base, reference or optimizer.
        """
        self._check_adapter(checkpoint, model, trainer)
        if self._earlier is not None:
            self._earlier.load(checkpoint, int(checkpoint["global_step"]))
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        self._optimizer_options.load(checkpoint)
        if reference is not None:
            reference.check_remembered(checkpoint)
        check_paths(trainer, checkpoint)
        self._run_state.load(checkpoint, trainer)

    def _check_adapter(self, checkpoint: dict[str, Any], model: nn.Module | None, trainer: pl.Trainer | None) -> None:
        saved, values = checkpoint.get(RECORD, {}).get("adapter"), self._peft
        state = checkpoint.get("state_dict", {})
        names = [name.removeprefix("model.") for name in state if name.startswith("model.")]
        if saved is None and values is not None and any("lora_" in name for name in names):
            rank_zero_warn("the checkpoint does not say how its adapter was made: neither alpha nor base are compared")
        else:
            # On rank 0: others may hold other rows of the base.
            on_first_rank(trainer, lambda: check_adapter(saved, values, self._base_fingerprint))
        if values is not None and names and model is not None:
            check_tensors(names, model)

    def leave_out_the_base(self, module: nn.Module, keys: Any) -> None:
        """Of what a checkpoint lacks for a module with an adapter: the base is where it belongs already.

        A hook of ``load_state_dict``.
        """
        model = module.model
        if self._peft is None or not isinstance(model, nn.Module):
            return
        frozen = {f"model.{name}" for name in model.state_dict()} - {f"model.{name}" for name in self._trained}
        keys.missing_keys[:] = [
            name for name in keys.missing_keys if not any(f".{name}".endswith(f".{each}") for each in frozen)
        ]


def _config_text(model: nn.Module, config: Any) -> str:
    """A checkpoint that has two values where its config ties them is loaded untied, and its config still ties."""
    values = json.loads(config.to_json_string(use_diff=False))
    ends = ends_of(model)
    weights = [getattr(end, "weight", None) for end in ends]
    if None not in ends and weights[0] is not weights[1]:
        values["tie_word_embeddings"] = False
    return json.dumps(values)


def _settings(trainer: pl.Trainer) -> dict[str, Any]:
    names = ("world_size", "accumulate_grad_batches", "gradient_clip_val", "max_steps", "max_epochs")
    classes = {"precision": str(trainer.precision), "strategy": type(trainer.strategy).__name__}
    return classes | {name: getattr(trainer, name) for name in names}


def files_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files that ``save_pretrained`` writes for a tokenizer, by path; its chat templates are in them."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _files_of(completions: Completions, datamodule: pl.LightningDataModule | None) -> dict[str, bytes]:
    try:
        tokenizer = completions.find_tokenizer(datamodule)
        return {} if tokenizer is None else files_of(tokenizer)
    except Exception as error:  # whatever it is, the weights are to be saved
        rank_zero_warn(f"checkpoints will not hold the tokenizer: {one_line(error)}")
        return {}


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
    if not is_local(path):
        return path.startswith(folder.rstrip("/") + "/") and ".." not in path.split("/")
    seems = Path(folder).absolute() in Path(path).absolute().parents
    return not seems or Path(os.path.abspath(folder)) in Path(os.path.abspath(path)).parents
