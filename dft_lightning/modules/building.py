"""The language model of a run: made, checked, given its adapter, and ready to be sharded."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dft_lightning.checkpoints.shards import guard_loading
from dft_lightning.checkpoints.strategy import check_saves_meanwhile
from dft_lightning.component import from_plain
from dft_lightning.distributed.shard_loading import allocate_shards, read_shards
from dft_lightning.distributed.sharding import ShardingOptions, is_sharded, kept_on_cpu, shard
from dft_lightning.distributed.strategies import (
    check_adapter_strategy,
    data_parallel_mesh,
    prepare_fsdp1,
    wraps_parameters,
)
from dft_lightning.errors import InputError
from dft_lightning.foreign.lightning import came_compiled
from dft_lightning.foreign.torch import non_persistent_buffers
from dft_lightning.foreign.transformers import attention_of
from dft_lightning.losses.base import TokenLoss, require_default_forward_options
from dft_lightning.losses.statistics import check_params, normalise_needs
from dft_lightning.models.attention import ATTENTION, ends_graphs
from dft_lightning.models.blocks import compile_blocks, spare_activations
from dft_lightning.models.given import model_itself, name_of, plain_model
from dft_lightning.models.head import ends_apart, ends_of, find_head
from dft_lightning.models.loading import empty_causal_lm, load_causal_lm
from dft_lightning.models.lora.adapter import attach, base_name, raise_to_float32
from dft_lightning.models.lora.options import lora_config
from dft_lightning.models.quantization import is_quantized
from dft_lightning.models.reference import ReferenceModel, needs_reference_model, reference_of
from dft_lightning.models.row_checks import positions_of, text_config
from dft_lightning.modules.batch_loss import check_top_k, set_auxiliary_loss
from dft_lightning.modules.options import LoadingOptions, StepOptions
from dft_lightning.ops import check_threshold

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
RUN_THE_MODEL = (*_STEPS, "token_output", "generate", "generate_tokens", "known_tokens")
"""Methods of the module."""


class ModelBuilder:
    """Makes the model and what the loss compares it with, of the options of the module.

    Args:
        model: a name, a folder, a config's values, or the model itself.
        loss: of the module, as its other options.
        loading: see there.
        sharding: see there.
        step: see there.
        peft: see there.
        reference_model: see there.

    Attributes:
        base: the model's name or folder, or its config's values.
        base_name: the name or folder that it comes from, where there is one.
        given: the model itself, where it is given.

    Raises:
        ValueError: options that contradict each other.
    """

    def __init__(
        self,
        model: Any,
        loss: TokenLoss,
        loading: LoadingOptions,
        sharding: ShardingOptions,
        step: StepOptions,
        peft: dict[str, Any] | None,
        reference_model: str | None,
    ) -> None:
        self.base, self.base_name, self.given = plain_model(model), name_of(model), model_itself(model)
        self._loading, self._sharding, self._peft = loading, sharding, peft
        self._reference_model, self._router_aux_loss_coef = reference_model, step.router_aux_loss_coef
        check_threshold(step.gradient_threshold, loss)
        if step.gradient_threshold and loading.head == "full":
            raise ValueError("gradient_threshold is the fused head's: set loading.head: fused, or it to 0")
        if peft is None and loading.quantization_config is not None:
            raise ValueError("quantization_config is for a base that is frozen: set peft as well")
        if peft is not None and isinstance(model, Mapping):
            raise ValueError(
                "peft: an adapter needs a pretrained model, for its checkpoints do not hold the base: give a name as "
                "model, or the model itself, where the run had that"
            )
        if reference_model is not None and not needs_reference_model(loss):
            raise ValueError(f"{type(loss).__name__} compares with no model: leave reference_model out")

    def load(self) -> nn.Module:
        """The model with its weights."""
        if self.given is not None:
            self.given.train()  # from_pretrained leaves dropout off
            return self.given
        quantized = self._loading.quantization_config
        return load_causal_lm(self.base, **self._loading.of_a_model, quantization_config=quantized)

    def empty(self) -> tuple[nn.Module, list[Path]]:
        """The model without its weights, and the files that have them."""
        assert isinstance(self.base, str)
        return empty_causal_lm(self.base, **self._loading.of_a_model)

    def load_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer beside the model; ``None`` where it comes from no name or folder."""
        from dft_lightning.data.text.tokenizer import load_tokenizer

        name, loading = self.base_name, self._loading
        if name is None:
            return None
        return load_tokenizer(name, loading.revision, trust_remote_code=loading.trust_remote_code)

    def mesh(self, trainer: pl.Trainer | None) -> DeviceMesh | None:
        """What the model is sharded over, if it is. From here on what a strategy unpickles is looked at first."""
        if trainer is not None:
            guard_loading(trainer.strategy)
        mesh = data_parallel_mesh(trainer, self._sharding)
        if trainer is not None and self._sharding.async_save:
            check_saves_meanwhile(trainer.strategy)
        return mesh

    def reads_shards(self, mesh: DeviceMesh | None) -> bool:
        """Whether each rank reads its own part of a checkpoint, once the model is sharded."""
        return mesh is not None and self._sharding.load == "shards" and isinstance(self.base, str)

    def check_strategy(self, loss: TokenLoss, trainer: pl.Trainer | None, mesh: DeviceMesh | None) -> None:
        """Raise ``InputError`` for a loss whose second model a strategy cannot shard."""
        if loss.refresh_every is not None and (mesh is not None or wraps_parameters(trainer)):
            raise InputError(
                f"{type(loss).__name__}: refresh_every keeps a copy of what is trained, which is not sharded: use DDP, "
                "or refresh_every: null, with rows that `python -m dft_lightning score` has given reference log-probs"
            )
        own = self._peft is not None and self._reference_model is None
        if _compares(loss, trainer) and wraps_parameters(trainer) and not own:
            raise InputError(
                f"{type(loss).__name__} needs a second model, and FSDPStrategy (FSDP1) shards one alone: use "
                "ModelParallelStrategy (FSDP2) or DDP, or train an adapter (model.peft), whose base it compares with"
            )

    def prepare(
        self, model: nn.Module, files: list[Path], loss: TokenLoss, tokenizer: Any, trainer: pl.Trainer | None
    ) -> ReferenceModel | None:
        """Check a model that was just made, and give it what the options say; returns the reference, if there is one.

        ``files`` have the model's weights, if it was made without.

        Raises:
            InputError: the model is none for the tokenizer or the options.
        """
        if not isinstance(model, nn.Module):
            raise InputError(f"build_model must return the language model, got {type(model).__name__}")
        set_auxiliary_loss(model, self._router_aux_loss_coef)
        check_vocabulary(model, tokenizer)
        if (head := ends_of(model)[1]) is not None:
            check_top_k(loss, head.weight.shape[0])
        reference = self._reference_of(model, files, loss) if _compares(loss, trainer) else None
        if self._peft is not None:
            attach(model, lora_config(self._peft))
            if self._loading.head == "fused":
                find_head(model)  # an adapter on it is refused before the data is prepared
        if not isinstance(choice := self._loading.gradient_checkpointing, bool):  # true is a name by now
            spare_activations(model, choice)
        if self._loading.compile:
            self._check_compiled(model, trainer)
            compile_blocks(model)
        return reference

    def _check_compiled(self, model: nn.Module, trainer: pl.Trainer | None) -> None:
        """Raise ``InputError`` where an attention would cut the graphs of blocks into pieces."""
        if trainer is None or attention_of(model) != ATTENTION:
            return
        if ends_graphs(model, trainer.strategy.root_device, str(trainer.precision)):
            raise InputError(
                "model.loading.compile: with dropout, and in float32 on a GPU, the documents attention is one call a "
                "document, which would cut a block's graph into pieces: set attn_implementation: sdpa, or leave "
                "compile out"
            )

    def check_lengths(self, model: nn.Module, data: Any) -> None:
        """Name rows that are longer than the model has positions for, where the data module is the package's own."""
        from dft_lightning.data.splits import Splits

        if isinstance(splits := getattr(data, "splits", None), Splits):
            splits.check_lengths(positions_of(model, text_config(model)))

    def wrap(
        self,
        root: nn.Module,
        model: nn.Module,
        files: list[Path],
        mesh: DeviceMesh | None,
        trainer: pl.Trainer | None,
        methods: tuple[str, ...],
        reference: ReferenceModel | None,
    ) -> None:
        """Make a model ready for the trainer's strategy; shard it where that does not do so itself.

        Args:
            root: what is trained, with the model in it.
            model: the language model.
            files: of the weights, for a model that was made without.
            mesh: of :meth:`mesh`.
            trainer: of the run, if there is one.
            methods: of ``root`` that run the model.
            reference: that is beside it.

        Raises:
            InputError: the strategy or the precision cannot train the model.
        """
        if self._peft is not None:
            check_adapter_strategy(trainer, is_quantized(model))
            self._raise_to_float32(model, trainer)
        prepare_fsdp1(trainer, model)
        if mesh is None:
            return
        assert trainer is not None
        shard(root, model, mesh, self._sharding, trainer.precision, methods, ends_apart(model))
        if files:  # each rank reads its own
            allocate_shards(root, trainer.strategy.root_device)
            read_shards(model, files, str if self._peft is None else base_name)
        if reference is not None:
            reference.shard(mesh, self._sharding, trainer.precision, trainer.strategy.root_device)

    @contextmanager
    def moving(self, root: nn.Module, model: nn.Module | None, fn: Any) -> Iterator[Any]:
        """Around ``_apply`` of what is trained, which moves and casts it: offloaded parameters stay on the CPU.

        The model's non-persistent buffers keep their dtype: ``precision: bf16-true`` would round rotary frequencies to
        three digits, and transformers keeps them in float32 under every dtype.
        """
        kept = [
            (module, name, buffer)
            for module in (model.modules() if model is not None else ())
            for name, buffer in non_persistent_buffers(module)
        ]
        yield kept_on_cpu(fn) if is_sharded(root) and self._sharding.cpu_offload else fn
        for module, name, buffer in kept:
            if buffer.is_floating_point() and not buffer.is_meta:
                setattr(module, name, buffer.to(getattr(module, name).device))

    def _raise_to_float32(self, model: nn.Module, trainer: pl.Trainer | None) -> None:
        """What is trained beside LoRA's matrices, which peft has seen to."""
        raised = raise_to_float32(model)
        if raised and trainer is not None and trainer.precision == "32-true":
            raise InputError(
                f"model.peft: {raised[0]} of a base in half precision is trained beside the adapter, and its updates "
                "would be rounded away there: set trainer.precision: bf16-mixed, or model.loading.dtype: float32"
            )

    def _reference_of(self, model: nn.Module, files: list[Path], loss: TokenLoss) -> ReferenceModel:
        """What the loss compares with, of the model as it is built: before an adapter and a checkpoint's weights."""
        loading = {**self._loading.of_a_model, "revision": None}

        def load(name: str) -> tuple[nn.Module, list[Path]]:
            return empty_causal_lm(name, **loading) if files else (load_causal_lm(name, **loading), [])

        there_again = isinstance(self.base, str) or self.given is not None
        return reference_of(model, self._reference_model, self._peft, loss, there_again, load, files)


def _compares(loss: TokenLoss, trainer: pl.Trainer | None) -> bool:
    predicts = trainer is not None and trainer.state.fn == TrainerFn.PREDICTING
    return needs_reference_model(loss) and not predicts


def check_uncompiled(module: pl.LightningModule) -> None:
    """Raise ``InputError`` for what was given as ``torch.compile(module)``: a step is no one graph."""
    if came_compiled(module):
        raise InputError(
            f"torch.compile({type(module).__name__}): a whole step is no graph, for it counts, logs and checks: give "
            "the trainer a module that is not compiled, with model.loading.compile: true (loading={'compile': True}), "
            "which compiles the model's blocks"
        )


def check_vocabulary(model: nn.Module, tokenizer: Any) -> None:
    """Raise ``InputError`` for a token id beyond the embedding: it would end in an index error far from its cause."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if tokenizer is None or embedding is None:
        return
    rows, highest = embedding.weight.shape[0], max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise InputError(
            f"data.text.tokenizer has token ids up to {highest}, but the model's embedding has {rows} rows: use the "
            "model's own tokenizer"
        )


def objective_of(given: TokenLoss | dict[str, Any], name: str) -> TokenLoss:
    """A module's objective: a copy, which may keep state.

    Raises:
        ValueError: it has options that a module has itself, trainable parameters, or needs what there is not.
    """
    loss = copy.deepcopy(from_plain(given, TokenLoss))
    try:
        for need in normalise_needs(loss.needs):
            check_params(need)
    except ValueError as error:
        raise InputError(f"model.loss: {type(loss).__name__}: {error}") from error
    require_default_forward_options(loss, name)
    if any(parameter.requires_grad for parameter in loss.parameters()):
        raise ValueError(f"{type(loss).__name__} has trainable parameters; a token loss must have none")
    return loss
