"""The LightningModule: any causal language model, any token loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dft_lightning.component import from_plain, plain_values
from dft_lightning.distributed import TokenNormalizer
from dft_lightning.distributed.gradients import clip_by_norm, clips_at
from dft_lightning.distributed.shard_loading import allocate_shards, read_shards
from dft_lightning.distributed.sharding import (
    ShardingOptions,
    discard_gradients,
    is_sharded,
    kept_on_cpu,
    shard,
    synchronise_gradients,
)
from dft_lightning.distributed.strategies import (
    check_adapter_strategy,
    data_parallel_mesh,
    gathered_root,
    prepare_fsdp1,
    shards_parameters,
)
from dft_lightning.errors import InputError
from dft_lightning.losses import CrossEntropyLoss, TokenLoss, require_default_forward_options
from dft_lightning.metrics import AnswerExtractor, ExactMatch, LastNumber, SourceMetrics, TokenMetrics
from dft_lightning.metrics.exact_sums import ExactSums
from dft_lightning.modules.adapter import attach, base_name, lora_config, lora_values
from dft_lightning.modules.auxiliary import auxiliary_line, set_auxiliary_loss
from dft_lightning.modules.batch_loss import check_top_k, full_batch_loss, fused_batch_loss
from dft_lightning.modules.documents import check_documents, model_inputs
from dft_lightning.modules.generation import GenerationOptions, decode_completions, generate, stop_token_ids
from dft_lightning.modules.head import WAY_OUT, check_head, ends_of, find_head, text_config
from dft_lightning.modules.loading import DType, checkpoint_activations, config_values, empty_causal_lm, load_causal_lm
from dft_lightning.modules.monitors import check_monitors, check_monitors_by_validation
from dft_lightning.modules.non_finite import NonFiniteSteps, OnNonFinite, check_on_non_finite
from dft_lightning.modules.optimization import (
    Schedule,
    check_adamw_options,
    check_schedule_options,
    decay_groups,
    learning_rate_factor,
    matrix_names,
    steps_of_epochs,
    total_optimizer_steps,
)
from dft_lightning.modules.quantization import OptimizerName, adamw_8bit, check_optimizer_name, is_quantized
from dft_lightning.modules.reference import ReferenceModel, needs_reference_model, reference_of
from dft_lightning.modules.row_checks import check_rows, rotary_length
from dft_lightning.modules.saved import SavedModule
from dft_lightning.modules.size import training_size
from dft_lightning.modules.telemetry import TrainTelemetry
from dft_lightning.ops import TokenOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Any]
_STAGES = ("train", "val", "forgetting", "test")
_RUN_THE_MODEL = ("training_step", "validation_step", "test_step", "predict_step", "token_output", "generate")


class CausalLMModule(NonFiniteSteps, SavedModule):
    """Fine-tunes a causal language model with a pluggable token loss.

    The gradient of an optimizer step is that of the token mean of the loss over the whole step (or, with
    ``renormalize``, of its mean by weight), however it is split into micro-batches and over ranks. Batches are dicts
    with ``input_ids``, ``labels`` and, where there is padding, ``attention_mask``, all ``[B, T]``; labels are aligned
    with the inputs (the module shifts them) and -100 where there is no target. Packed and padding-free batches have
    rows of whole documents: ``input_ids``, ``labels`` and ``position_ids``, all ``[B, T]``, whose positions start anew
    and whose first label is -100 at each document; where such rows end in padding, ``num_tokens`` is what is none.
    ``token_weight`` ``[B, T]``, aligned with the labels, multiplies the tokens' losses and leaves the divisor their
    number; ``reference_log_prob`` ``[B, T]``, likewise, is for the losses that need it; ``source`` ``[B, T]`` is the
    index of each token's source in the data module's ``source_names``.

    Override one at a time: :meth:`build_model`, :meth:`build_parameter_groups`, :meth:`build_optimizer`,
    :meth:`build_scheduler`, :meth:`generate`.

    Args:
        model: hub name, local folder or ``asset://NAME`` to load, or a transformers config, or a dict of its values
            with ``model_type``, to start from random weights.
        loss: the token loss, or a dict with ``class_path`` and ``init_args``.
        learning_rate: peak learning rate of AdamW.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of AdamW, on matrices only (not on norms and biases).
        lr_schedule: decay after warm-up: ``"cosine"``, ``"linear"`` or ``"constant"``.
        warmup_steps: optimizer steps of linear warm-up.
        warmup_ratio: the same as a share of all steps; not together with ``warmup_steps``.
        min_lr_ratio: learning rate at the end, as a share of the peak.
        dtype: of the parameters as loaded; ``"auto"`` takes the checkpoint's own.
        attn_implementation: ``"sdpa"``, ``"eager"``, ``"flash_attention_2"`` ...; ``"documents"`` calls ``sdpa`` for
            each document of a padding-free batch.
        gradient_checkpointing: recompute activations in backward to save memory.
        head: ``"fused"`` computes loss and gradients from the last hidden states, without holding logits;
            ``"full"`` takes the model's own logits, for models whose head the fused one does not know.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the checkpoint.
        peft: train an adapter (LoRA) and nothing else: a ``LoraConfig`` of peft, or a dict of its options. Checkpoints
            hold the adapter alone. ``None`` trains the whole model.
        quantization_config: options of transformers' ``BitsAndBytesConfig``: keeps the base below an adapter in 4 or
            8 bits.
        reference_model: hub name, local folder or ``asset://NAME`` of the model that losses with ``reference_kl``
            compare with, over the same vocabulary. ``None`` takes the model that the run starts from: the base below
            an adapter, or else a frozen copy, as large again, which strategies that shard the model refuse.
        optimizer: ``"adamw"``, or ``"adamw_8bit"``, bitsandbytes' with states of a byte each.
        sharding: how ``ModelParallelStrategy`` (FSDP2) shards the model; other strategies take no such options.
        renormalize: divide a step's gradient by the sum of its tokens' weights ``-dL/dl`` over all micro-batches and
            ranks, in place of their number. Weights then have mean one, so that clipping acts alike on every loss.
            What is logged stays the mean per target token.
        router_aux_loss_coef: coefficient of the auxiliary loss of a mixture of experts, which is added to each token's
            loss; 0 leaves it out. ``None`` goes by the model's config, in which most leave it out
            (``output_router_logits: false``); the run says which it is. It is a mean over the tokens of a micro-batch,
            so that it depends on how a step is split.
        on_non_finite: what becomes of an optimizer step in which the loss of a micro-batch on any rank, or the norm of
            the gradient, is NaN or infinite: ``"raise"`` ends the run before the optimizer steps; ``"skip"`` leaves
            parameters and optimizer as they are, goes on and logs ``skipped_steps``, until 100 are skipped in a row.
            fp16's gradient scaler goes on skipping gradients that overflow: there the loss alone counts.
        log_train_entropy: compute the entropy in training as well; it is always there in validation.
        generation: how ``predict`` and ``test`` generate.
        answer_extractor: finds the answer that ``test`` compares, or a dict with ``class_path`` and ``init_args``.

    Raises:
        ValueError: options that contradict each other or are out of range.

    Example:
        >>> from dft_lightning import CausalLMModule, DFTLoss
        >>> tiny = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        ...         "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32}
        >>> module = CausalLMModule(tiny, loss=DFTLoss(), learning_rate=1e-3)
        >>> module.configure_model()
        >>> type(module.model).__name__
        'LlamaForCausalLM'
    """

    def __init__(
        self,
        model: dict[str, Any] | str,  # in this order: jsonargparse would make a string of a dict
        loss: TokenLoss = CrossEntropyLoss(),  # noqa: B008 (copied before use)
        learning_rate: float = 5e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        lr_schedule: Schedule = "cosine",
        warmup_steps: int = 0,
        warmup_ratio: float | None = None,
        min_lr_ratio: float = 0.0,
        dtype: DType = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        head: Literal["fused", "full"] = "fused",
        revision: str | None = None,
        trust_remote_code: bool = False,
        peft: dict[str, Any] | None = None,
        quantization_config: dict[str, Any] | None = None,
        reference_model: str | None = None,
        optimizer: OptimizerName = "adamw",
        sharding: ShardingOptions = ShardingOptions(),  # noqa: B008 (frozen)
        renormalize: bool = False,
        router_aux_loss_coef: float | None = None,
        on_non_finite: OnNonFinite = "raise",
        log_train_entropy: bool = False,
        generation: GenerationOptions = GenerationOptions(),  # noqa: B008 (frozen)
        answer_extractor: AnswerExtractor = LastNumber(),  # noqa: B008 (stateless)
    ) -> None:
        super().__init__()
        model = config_values(model) if hasattr(model, "to_diff_dict") else model  # a transformers config
        peft = lora_values(peft)
        self.save_hyperparameters()
        check_optimizer_name(optimizer)
        check_on_non_finite(on_non_finite)
        if router_aux_loss_coef is not None and not 0 <= router_aux_loss_coef < math.inf:
            raise ValueError(f"router_aux_loss_coef must be a number from 0 on, got {router_aux_loss_coef}")
        self._check_adapter_options()
        check_schedule_options(warmup_steps, warmup_ratio, min_lr_ratio)
        check_adamw_options(learning_rate, betas, eps, weight_decay)
        self.loss = copy.deepcopy(from_plain(loss, TokenLoss))
        require_default_forward_options(self.loss, type(self).__name__)
        if any(parameter.requires_grad for parameter in self.loss.parameters()):
            raise ValueError(f"{type(self.loss).__name__} has trainable parameters; a token loss must have none")
        self.generation = GenerationOptions(**generation) if isinstance(generation, dict) else generation
        self.sharding = ShardingOptions(**sharding) if isinstance(sharding, dict) else sharding
        self.answer_extractor = from_plain(answer_extractor, AnswerExtractor)
        self.model = None
        if reference_model is not None and not needs_reference_model(self.loss):
            raise ValueError(f"{type(self.loss).__name__} compares with no model: leave reference_model out")
        self._check_head_option(head)
        self._rows_checked = self._head_checked = self._documents_checked = False
        self._counted_steps: tuple[int, list[int] | None] | None = None
        self._rotary: tuple[str, int] | None = None
        self.train_telemetry = TrainTelemetry()
        self.val_metrics = TokenMetrics()
        self.forgetting_metrics = TokenMetrics()
        self.test_metrics = TokenMetrics()
        self.source_metrics = nn.ModuleDict({f"{stage}_": SourceMetrics() for stage in _STAGES})
        self.test_exact_match = ExactMatch(self.answer_extractor)
        self._normalizer: TokenNormalizer | None = None
        self._normalized_step = 0
        self._loss_step = 0
        self._step_learning_rate = 0.0
        self._matrices: frozenset[str] = frozenset()
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def _set_hparams(self, hp: Any) -> None:
        """Where Lightning stores what ``save_hyperparameters`` collects, a subclass's arguments included.

        Kept in a plain form (class paths and options), which ``weights_only`` loading can read.
        """
        values = dict(self._to_hparams_dict(hp))
        super()._set_hparams(plain_values(values, "pass it to load_from_checkpoint by hand"))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves and casts the module, but leaves the model's non-persistent buffers in their own dtype.

        ``precision: bf16-true`` would round rotary frequencies to three digits; transformers keeps them in float32
        under every dtype.
        """
        kept = [
            (module, name, module._buffers[name])
            for module in (self.model.modules() if self.model is not None else ())
            for name in module._non_persistent_buffers_set
        ]
        if is_sharded(self) and self.sharding.cpu_offload:
            fn = kept_on_cpu(fn)
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, buffer in kept:
            if buffer is not None and buffer.is_floating_point() and not buffer.is_meta:
                module._buffers[name] = buffer.to(module._buffers[name].device)  # type: ignore[union-attr]
        return result

    def _check_head_option(self, head: str) -> None:
        if head not in ("fused", "full"):
            raise ValueError(f"head must be 'fused' or 'full', got {head!r}")
        if head == "fused" and type(self).forward is not CausalLMModule.forward:
            raise ValueError(f"{type(self).__name__} overrides forward, which the fused head does not call: {WAY_OUT}")

    # -- the model ---------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the model, once, and shard it. Lightning calls this when device, precision and strategy are known."""
        self._guard_loading()
        mesh = data_parallel_mesh(self._trainer, self.sharding)
        if is_sharded(self):
            return
        self._check_reference_strategy()
        files: list[Path] | None = None
        if self.model is None:  # otherwise built before there was a trainer, or for one that did not shard
            files = self._build(empty=mesh is not None and self.sharding.load == "shards" and self._loads_checkpoint())
        assert self.model is not None
        if self.hparams["peft"] is not None:
            check_adapter_strategy(self._trainer, is_quantized(self.model))
        if self.hparams["optimizer"] != "adamw" and shards_parameters(self._trainer):
            raise InputError("model.optimizer: adamw_8bit does not train shards: set adamw, or use DDP")
        self._matrices = matrix_names(self)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            # What a subclass freezes or trains there counts when the model is wrapped: DDP and FSDP look but once.
            self.build_parameter_groups()
        self._raise_to_float32()
        prepare_fsdp1(self._trainer, self.model)
        if mesh is not None:
            shard(self, self.model, mesh, self.sharding, self.trainer.precision, _RUN_THE_MODEL)
        if files is not None:
            allocate_shards(self, self.trainer.strategy.root_device)
            read_shards(self.model, files, base_name if self.hparams["peft"] is not None else str)
        self._remember_base()

    def _build(self, empty: bool) -> list[Path] | None:
        """Make the model, if ``empty`` without its weights; then the files that have them are returned."""
        files: list[Path] | None = None
        if empty:
            self.model, files = empty_causal_lm(self.hparams["model"], **self._loading_options())
        else:
            self.model = self.build_model()
        set_auxiliary_loss(self.model, self.hparams["router_aux_loss_coef"])
        self._check_vocabulary()
        self._check_top_k()
        if needs_reference_model(self.loss) and not self._only_predicts:
            self._reference = self._make_reference()
        if self.hparams["peft"] is not None:
            attach(self.model, lora_config(self.hparams["peft"]))
            if self.hparams["head"] == "fused":
                find_head(self.model)  # an adapter on it is refused before the data is prepared
        if self.hparams["gradient_checkpointing"]:
            checkpoint_activations(self.model)
        return files

    @property
    def _only_predicts(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING

    def _check_reference_strategy(self) -> None:
        """A second model is not sharded."""
        own = self.hparams["peft"] is not None and self.hparams["reference_model"] is None
        if needs_reference_model(self.loss) and shards_parameters(self._trainer) and not (own or self._only_predicts):
            raise InputError(
                f"{type(self.loss).__name__} needs a second model, and {type(self.trainer.strategy).__name__} shards "
                "one alone: train an adapter (model.peft), whose base it compares with, or use DDP"
            )

    def _make_reference(self) -> ReferenceModel:
        """What the loss compares with, of the model as it is built: before an adapter and a checkpoint's weights."""
        assert self.model is not None
        loading = {**self._loading_options(), "revision": None}
        return reference_of(
            self.model,
            dict(self.hparams),
            self.loss,
            isinstance(self.hparams["model"], str),
            lambda name: load_causal_lm(name, **loading),
        )

    def _loads_checkpoint(self) -> bool:
        """Whether :meth:`build_model` is the class's own and would load a checkpoint."""
        return type(self).build_model is CausalLMModule.build_model and isinstance(self.hparams["model"], str)

    def _loading_options(self) -> dict[str, Any]:
        return {name: self.hparams[name] for name in ("dtype", "attn_implementation", "revision", "trust_remote_code")}

    def build_model(self) -> nn.Module:
        """The language model: takes ``input_ids``, ``attention_mask``, ``use_cache`` and returns ``.logits``.

        For padding-free batches it takes ``position_ids`` as well.

        The fused head finds the output layer by ``get_output_embeddings()`` or as ``lm_head``, an ``nn.Linear``; a
        model without needs ``head: full``.
        """
        options = {**self._loading_options(), "quantization_config": self.hparams["quantization_config"]}
        return load_causal_lm(self.hparams["model"], **options)

    def _check_vocabulary(self) -> None:
        """A token id beyond the embedding would end in an index error far from its cause."""
        tokenizer = getattr(self._datamodule, "tokenizer", None)
        embedding = getattr(self.model, "get_input_embeddings", lambda: None)()
        if tokenizer is None or embedding is None:
            return
        rows, highest = embedding.weight.shape[0], max(tokenizer.get_vocab().values())
        if highest >= rows:
            raise InputError(
                f"data.tokenizer has token ids up to {highest}, but the model's embedding has {rows} rows: "
                "use the model's own tokenizer"
            )

    def _check_top_k(self) -> None:
        """What a loss takes of the likeliest tokens, before anything is computed."""
        assert self.model is not None
        head = ends_of(self.model)[1]
        if head is not None:
            check_top_k(self.loss, head.weight.shape[0])

    @property
    def _datamodule(self) -> pl.LightningDataModule | None:
        """The trainer's data module, where there is a trainer and it has one."""
        return getattr(self._trainer, "datamodule", None)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The data module's tokenizer, or the one beside the model where there is none."""
        of_data = getattr(self._datamodule, "tokenizer", None)
        if of_data is not None:
            return cast("PreTrainedTokenizerBase", of_data)
        if self._tokenizer is None:
            from dft_lightning.data.tokenizer import load_tokenizer

            if not isinstance(self.hparams["model"], str):
                raise InputError("no tokenizer: a model made from a config has none, set data.tokenizer")
            self._tokenizer = load_tokenizer(
                self.hparams["model"],
                self.hparams["revision"],
                trust_remote_code=self.hparams["trust_remote_code"],
            )
        return self._tokenizer

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Logits ``[B, T, V]`` of a batch."""
        assert self.model is not None, "call configure_model() first"
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return cast(Tensor, self.model(**model_inputs(self.model, batch)).logits)

    def token_output(
        self, batch: Batch, *, normalizer: float | None = None, statistics: Sequence[str] = ()
    ) -> TokenOutput:
        """Summed loss and per-token statistics of a batch; the place where model and loss meet.

        A mixture-of-experts model's auxiliary loss is added once per target token, so that the token mean of the
        objective is the model's own sum of the two.

        Args:
            batch: as the class takes it.
            normalizer: what the summed loss is divided by.
            statistics: per-token statistics beyond those that the loss needs, such as ``"entropy"``.
        """
        options: dict[str, Any] = {
            "normalizer": normalizer,
            "statistics": statistics,
            "step": self._step_of_loss(),
            "auxiliary_by_weight": self.hparams["renormalize"],
            "auxiliary_required": bool(self.hparams["router_aux_loss_coef"]),
        }
        assert self.model is not None, "call configure_model() first"
        if "position_ids" in batch and not self._documents_checked:
            longest = getattr(getattr(self._datamodule, "hparams", None), "max_length", None)
            check_documents(self.model, len(batch["position_ids"]), longest)
            self._documents_checked = True
        if not self._rows_checked:  # here and not at start-up, where a sharded model cannot be run
            check_rows(self.model)
            self._rows_checked, self._rotary = True, rotary_length(text_config(self.model))
        if self._rotary is not None and batch["input_ids"].shape[1] > self._rotary[1]:
            kind, length = self._rotary
            rank_zero_warn(
                f"model: {type(self.model).__name__}'s rotary frequencies ({kind}) are others for the whole batch as "
                f"soon as one of its rows is longer than {length} tokens, so that losses and metrics depend on what "
                f"comes together: set data.max_length to {length} or less, or a batch size of 1"
            )
            self._rotary = None  # said once
        if self.hparams["head"] == "full":
            return full_batch_loss(self.model, self, batch, self.loss, options, self._reference)
        head = find_head(self.model)
        if not self._head_checked:
            check_head(self.model, head)
            self._head_checked = True
        return fused_batch_loss(self.model, head, batch, self.loss, options, self._reference)

    def _step_of_loss(self) -> int:
        """Optimizer steps behind the weights: those of this ``fit``, of the last one, or of the checkpoint.

        A trainer that only tests counts from 0 again, which would take a scheduled loss back to its beginning.
        """
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._loss_step = self.global_step
        return self._loss_step

    # -- training ----------------------------------------------------------------------------------------------

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return cast(Tensor, self.trainer.strategy.reduce(tensor, reduce_op="sum"))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self._normalizer is None:  # here and not in a hook: a learning-rate finder trains before every hook
            self._normalizer = TokenNormalizer(self._sum_over_ranks, self.trainer.world_size)
        if self._normalizer.pending and self._normalized_step != self.global_step:
            raise RuntimeError(
                f"{type(self).__name__} overrides on_before_optimizer_step without calling super(): the step's "
                "gradient was never divided by its number of target tokens"
            )
        if not self._normalizer.pending:
            self._begin_step([self.train_telemetry.tokens, self._sources_of("train")])
        self._normalized_step = self.global_step
        if is_sharded(self):
            steps = not self.trainer.fit_loop._should_accumulate()
            synchronise_gradients(self, steps or self.sharding.sync_micro_batches)
        divisor = self._normalizer.count((batch["labels"][:, 1:] != -100).sum())
        statistics = ("entropy",) if self.hparams["log_train_entropy"] else ()
        output = self.token_output(batch, normalizer=divisor, statistics=statistics)
        if self.hparams["renormalize"]:
            self._normalizer.weigh(output.weight)
        self.train_telemetry.update(output, count_tokens(batch))
        self._count_sources("train", batch, output)
        self._normalizer.watch(output.loss)
        self._watch_rows(output.loss, batch)
        return output.loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self._step_learning_rate = float(optimizer.param_groups[0]["lr"])
        # Runs after unscaling and before clipping: the one place where the whole step's gradient is at hand.
        self._step_skipped = False
        if self._normalizer is not None and self._normalizer.rescale(
            self.parameters(), self.trainer.accumulate_grad_batches
        ):
            self._refuse_step("loss")

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | int | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says; the norm is taken once and logged."""
        if self._step_skipped:
            return
        clip_val = clips_at(gradient_clip_val)
        by_norm = clip_val if gradient_clip_algorithm in (None, "norm") else None
        if by_norm is not None:
            self._check_clipping(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = clip_by_norm(parameters, by_norm, root=self.trainer.model)
        if norm is None:
            return
        # On a GPU this waits a second time in a step, after the normaliser: the optimizer must not step before it is
        # known. The norm is the same on all ranks.
        if not self._scales_gradients and not norm.isfinite():
            self._refuse_step("gradient")
            return
        if clip_val is not None and by_norm is None:
            self.clip_gradients(optimizer, clip_val, gradient_clip_algorithm)
        self.train_telemetry.update_gradient(norm, by_norm, skips_non_finite=self._scales_gradients)

    @property
    def _scales_gradients(self) -> bool:
        """Whether a gradient scaler keeps fp16 in range."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def _check_clipping(self, optimizer: Optimizer) -> None:
        """What the trainer's own clipping refuses: an optimizer that unscales fp16 gradients only while stepping."""
        if self._scales_gradients and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise InputError("a fused optimizer cannot be clipped under 16-mixed precision: build it with fused=False")

    def on_fit_start(self) -> None:
        check_monitors(self)
        self._optimizer_options.remember(self.trainer)

    def on_train_start(self) -> None:
        self._optimizer_options.put_back(self.trainer)
        self._tokenizer_files = None  # this run's data may have another
        # This trainer's ranks, and nothing left over from an interrupted step.
        self._normalizer = TokenNormalizer(self._sum_over_ranks, self.trainer.world_size)
        discard_gradients(self)
        self.train_telemetry.reset()
        self._sources_of("train").reset()
        self.load_skipped_counts([0, 0, -1])
        self._run_state.reset()
        self._run_state.restore()
        self._run_state.note_step()
        self._check_trained()
        if self._reference is not None and self.model is not None:
            self._reference.check_trained(self.model)
        # FSDP1 has cut the parameters themselves.
        counted = "parameters" if not isinstance(self.trainer.model, FullyShardedDataParallel) else "values on rank 0"
        rank_zero_info(training_size(self, self.trainer.optimizers, counted))
        if self.model is not None and (line := auxiliary_line(self.model)) is not None:
            rank_zero_info(line)
        self._warn_of_float16()
        self.train_telemetry.start_clock()

    def _warn_of_float16(self) -> None:
        in_float16 = any(p.dtype == torch.float16 and p.requires_grad for p in self.parameters())
        if in_float16 and not self._scales_gradients:
            rank_zero_warn(
                f"trainer.precision: {self.trainer.precision} trains parameters in float16 without a gradient scaler: "
                "gradients below 6e-8 are lost and updates are rounded to three digits, so that it may learn little or "
                "diverge. Use bf16-mixed, or 16-mixed on a GPU, with model.dtype: float32"
            )

    def on_train_epoch_start(self) -> None:
        """Data that is loaded anew and callbacks may change an epoch's length after the schedule was made."""
        epoch, counted = self.trainer.current_epoch, self._counted_steps
        if counted is None or counted[1] is None or epoch >= len(counted[1]):
            return
        steps = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        if math.isfinite(steps) and math.ceil(steps) != counted[1][epoch]:
            rank_zero_warn(
                f"model.lr_schedule: epoch {epoch} takes {math.ceil(steps)} optimizer steps, and {counted[1][epoch]} "
                f"were counted when the schedule was made: it comes to its end after {counted[0]} steps, and the run "
                "perhaps not. Set trainer.max_steps"
            )

    def _say_where_the_schedule_is(self) -> None:
        counted = self._counted_steps
        if counted is not None and self.global_step != counted[0]:
            rank_zero_warn(
                f"model.lr_schedule: the run ended after {self.global_step} optimizer steps, and {counted[0]} were "
                f"counted when the schedule was made: the last learning rate, {self._step_learning_rate:.3g}, is not "
                "the one at its end"
            )

    def on_train_end(self) -> None:
        self._say_where_the_schedule_is()
        self._loss_step = self.global_step

    def on_validation_start(self) -> None:
        self.train_telemetry.stop_clock()

    def on_validation_end(self) -> None:
        if self.trainer.sanity_checking:
            check_monitors_by_validation(self)
        self.train_telemetry.start_clock()
        fitting = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        if fitting and not self.trainer.fit_loop._should_accumulate():
            self._run_state.note_step()  # with the random numbers that validation took

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.trainer.fit_loop._should_accumulate():
            return
        if self._stepped and self.window_ends():
            values: dict[str, Any] = {"skipped_steps": float(self._skipped_steps)} if self._skipped_steps else {}
            if self.train_telemetry.tokens.update_called:  # not where all steps since the last were skipped
                values |= self.train_telemetry.collect()
                values["lr"] = self._step_learning_rate
                values |= self._collect_sources("train")
            self._log("train", values, prog_bar=("loss", "nll", "token_accuracy"), on_step=True, on_epoch=False)
        self._run_state.note_step()

    @property
    def _stepped(self) -> bool:
        """Whether no micro-batch was counted since the last optimizer step."""
        return self._normalizer is not None and not self._normalizer.pending

    # -- what a run has in flight: see RunState ------------------------------------------------------------------

    def window_ends(self) -> bool:
        """Whether what was gathered is logged after this step."""
        # Lightning's own criterion: another would collect at steps that the loggers never see.
        return bool(self.trainer._logger_connector.should_update_logs)

    def in_flight_metrics(self) -> dict[str, ExactSums]:
        """Metrics that are updated at each step and logged later: checkpoints hold every rank's."""
        telemetry = self.train_telemetry
        return {"tokens": telemetry.tokens, "gradients": telemetry.gradients, "sources": self._sources_of("train")}

    def in_flight_values(self) -> dict[str, Any]:
        """Numbers of this rank that go into checkpoints with them."""
        divisor = None if self._normalizer is None else self._normalizer.divisor
        return {"seconds": self.train_telemetry.seconds, "divisor": divisor, "skipped": self.skipped_counts()}

    def load_in_flight_values(self, values: dict[str, Any]) -> None:
        """Go on from what :meth:`in_flight_values` returned."""
        assert self._normalizer is not None
        self.train_telemetry.seconds, self._normalizer.divisor = values["seconds"], values["divisor"]
        self.load_skipped_counts(values["skipped"])

    def _log(self, stage: str, values: dict[str, Any], *, prog_bar: Sequence[str], **kwargs: Any) -> None:
        # Already reduced over ranks and batches: Lightning must neither average nor exchange them again.
        for name, value in values.items():
            self.log(f"{stage}/{name}", value, prog_bar=name in prog_bar, batch_size=1, **kwargs)

    # -- sources of a mixture ----------------------------------------------------------------------------------

    def _sources_of(self, stage: str) -> SourceMetrics:
        return cast(SourceMetrics, self.source_metrics[f"{stage}_"])

    def _count_sources(self, stage: str, batch: Batch, output: TokenOutput) -> None:
        """Each target's objective and nll by the source of its row."""
        if "source" not in batch:
            return
        kept = batch["labels"][:, 1:] != -100
        with torch.no_grad():
            losses = self.loss.token_loss(output)
        if "token_weight" in batch:
            losses = losses * batch["token_weight"][:, 1:][kept]
        self._sources_of(stage).update(batch["source"][:, 1:][kept], losses, -output.log_prob)

    def _collect_sources(self, stage: str) -> dict[str, Tensor]:
        """``loss/NAME`` and ``nll/NAME`` of each source that had targets; the metric begins anew. A collective."""
        names, metrics = getattr(self._datamodule, "source_names", []), self._sources_of(stage)
        if not names or not metrics.update_called:
            return {}
        values = metrics.compute()
        metrics.reset()
        return {
            f"{kind}/{name}": values[kind][i]
            for i, name in enumerate(names)
            for kind in ("loss", "nll")
            if values["targets"][i] > 0
        }

    # -- validation, test, predict -----------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Token metrics of the validation rows, and of ``data.forgetting``, the second loader, where there is one."""
        output = self.token_output(batch, statistics=("entropy",))
        (self.forgetting_metrics if dataloader_idx else self.val_metrics).update(output, count_tokens(batch))
        self._count_sources("forgetting" if dataloader_idx else "val", batch, output)

    def on_validation_epoch_end(self) -> None:
        self._run_state.note_validation()
        self._log_evaluation("val", self.val_metrics, prog_bar=("nll",))
        self._log_evaluation("forgetting", self.forgetting_metrics, prog_bar=())

    def on_test_start(self) -> None:
        # On every rank and before anything is generated: one rank that stops alone leaves the others waiting.
        references = getattr(self._datamodule, "references", None)
        if references is not None:
            self.test_exact_match.check(references("test"), "test")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Token metrics and exact match of the generated answers. Returns a record of each row as ``predictions``."""
        output = self.token_output(batch, statistics=("entropy",))
        self.test_metrics.update(output, count_tokens(batch))
        self._count_sources("test", batch, output)
        records = self.predict_step(batch, batch_idx)
        for record in records:
            record["correct"] = self.test_exact_match.score(record["completion"], record["reference"])
        self.test_exact_match.update([r["completion"] for r in records], [r["reference"] for r in records])
        return {"predictions": records}

    def on_test_epoch_end(self) -> None:
        if self.test_exact_match.update_called:
            self.log("test/exact_match", self.test_exact_match.compute(), batch_size=1)
            self.test_exact_match.reset()
        self._log_evaluation("test", self.test_metrics, prog_bar=())

    def _log_evaluation(self, stage: str, metrics: TokenMetrics, prog_bar: Sequence[str]) -> None:
        if metrics.update_called:
            values = metrics.compute()
            del values["tokens"]
            values |= self._collect_sources(stage)
            self._log(stage, values, prog_bar=prog_bar, on_step=False, on_epoch=True)
            metrics.reset()

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Generate completions. Returns ``index``, ``prompt``, ``completion`` and ``reference`` of each row."""
        if "prompt_input_ids" not in batch:
            raise InputError(
                "test and predict generate from prompt_input_ids and prompt_attention_mask, with index, prompt and "
                "reference beside them, which these batches lack: use InstructionDataModule, or override the step"
            )
        completions = self.generate(batch["prompt_input_ids"], batch["prompt_attention_mask"], self.generation)
        rows = zip(batch["index"].tolist(), batch["prompt"], completions, batch["reference"], strict=True)
        return [
            {"index": index, "prompt": prompt, "completion": completion, "reference": reference}
            for index, prompt, completion, reference in rows
            if index >= 0  # rows of index -1 only make the ranks even
        ]

    def generate(self, input_ids: Tensor, attention_mask: Tensor, options: GenerationOptions) -> list[str]:
        """Complete prompts ``[B, T]`` (padded on the left); the texts end before the end-of-turn token."""
        tokens = self.generate_tokens(input_ids, attention_mask, options)
        return decode_completions(self.tokenizer, tokens, self._stop_token_ids())

    def generate_tokens(self, input_ids: Tensor, attention_mask: Tensor, options: GenerationOptions) -> Tensor:
        """As :meth:`generate`, as tokens ``[B, S]``, the end-of-turn token included and padding after it."""
        assert self.model is not None, "call configure_model() first"
        tokenizer = self.tokenizer
        stops = self._stop_token_ids()
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops[0] if stops else 0)
        with gathered_root(self._trainer):
            return generate(
                self.model,
                input_ids,
                attention_mask,
                options,
                stop_token_ids=stops,
                pad_token_id=int(cast(int, pad)),
                ranks_together=shards_parameters(self._trainer),
            )

    def _stop_token_ids(self) -> list[int]:
        return stop_token_ids(self.model, self.tokenizer, getattr(self._datamodule, "end_of_turn_ids", []))

    # -- the optimizer -----------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        optimizer = self.build_optimizer(self.build_parameter_groups())
        scheduler = self.build_scheduler(optimizer)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def build_parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer: matrices with weight decay, norms and biases without."""
        return decay_groups(self, self.hparams["weight_decay"], self._matrices)

    def build_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """AdamW, fused where the device allows, or bitsandbytes' of 8 bits."""
        options: dict[str, Any] = {
            "lr": self.hparams["learning_rate"],
            "betas": tuple(self.hparams["betas"]),
            "eps": self.hparams["eps"],
        }
        if self.hparams["optimizer"] == "adamw_8bit":
            return adamw_8bit(groups, self.device, **options)
        # Under 16-mixed a fused optimizer unscales inside step(), out of reach of the rescale's log and of clipping.
        return AdamW(
            groups,
            fused=not self._scales_gradients and self.device.type in ("cpu", "cuda", "xpu"),
            **options,
        )

    def build_scheduler(self, optimizer: Optimizer) -> LRScheduler | None:
        """The learning-rate schedule, stepped once per optimizer step; ``None`` for none."""
        schedule, warmup_ratio = self.hparams["lr_schedule"], self.hparams["warmup_ratio"]
        needs_total = schedule != "constant" or warmup_ratio is not None
        total = total_optimizer_steps(self.trainer) if needs_total else None
        self._counted_steps = (total, steps_of_epochs(self.trainer)) if total is not None else None
        warmup_steps = self.hparams["warmup_steps"]
        if warmup_ratio is not None and total is not None:
            warmup_steps = math.ceil(warmup_ratio * total)
        factor = partial(
            learning_rate_factor,
            schedule=schedule,
            warmup_steps=warmup_steps,
            total_steps=total,
            min_ratio=self.hparams["min_lr_ratio"],
        )
        return LambdaLR(optimizer, factor)


def count_tokens(batch: Batch) -> Tensor | int:
    """Tokens of a batch that are no padding."""
    if "num_tokens" in batch:
        return cast(Tensor, batch["num_tokens"])
    mask = batch.get("attention_mask")
    return cast(int, batch["input_ids"].numel()) if mask is None else cast(Tensor, mask.sum())
