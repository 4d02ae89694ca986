"""The LightningModule: any causal language model, any token loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dft_lightning.component import plain_values
from dft_lightning.distributed.ranks import StopFlag
from dft_lightning.distributed.sharding import ShardingOptions, discard_gradients, is_sharded, synchronise
from dft_lightning.distributed.strategies import leave_constant_buffers
from dft_lightning.foreign.lightning import PlainHyperparameters, believe_reduced, logs_now, trainer_of
from dft_lightning.foreign.torch import Moving
from dft_lightning.losses import CrossEntropyLoss, TokenLoss
from dft_lightning.models.decoding import Known
from dft_lightning.models.documents import model_inputs
from dft_lightning.models.flops import ModelFlops
from dft_lightning.models.generation import Completions, GenerationOptions
from dft_lightning.models.given import options_of_itself
from dft_lightning.models.layout import KEY
from dft_lightning.models.lora.options import lora_values
from dft_lightning.models.reference import EarlierModel, ReferenceModel
from dft_lightning.modules.answers import Engine, Kept, kept_or_new
from dft_lightning.modules.batch_loss import BatchObjective, checked
from dft_lightning.modules.building import RUN_THE_MODEL, ModelBuilder, check_uncompiled, objective_of
from dft_lightning.modules.monitors import check_monitors, check_monitors_by_validation
from dft_lightning.modules.optimizer_building import OptimizerBuilder
from dft_lightning.modules.optimizers import DEFAULT_OPTIMIZER, OptimizerCallable
from dft_lightning.modules.options import EvaluationOptions, LoadingOptions, StepOptions, saved_options, whole_options
from dft_lightning.modules.resume.from_checkpoint import FromCheckpoint
from dft_lightning.modules.resume.run_state import RunState
from dft_lightning.modules.resume.saved import Checkpoints, base_of
from dft_lightning.modules.schedules import ScheduleCallable, WarmupSchedule
from dft_lightning.modules.size import announce
from dft_lightning.modules.telemetry import Evaluation, TrainTelemetry, check_prompts, peak_flops, records_of
from dft_lightning.modules.training import OptimizerSteps, step_ends
from dft_lightning.ops import TokenOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Any]


class CausalLMModule(FromCheckpoint, PlainHyperparameters, Moving, pl.LightningModule):
    """Fine-tunes a causal language model with a pluggable token loss.

    The gradient of an optimizer step is that of the token mean of the loss over the whole step (or, with
    ``step.renormalize``, of its mean by weight), however it is split into micro-batches and over ranks. Batches are
    dicts with ``input_ids``, ``labels`` and, where there is padding, ``attention_mask``, all ``[B, T]``; labels are
    aligned with the inputs (the module shifts them) and -100 where there is no target. Packed and padding-free batches
    have rows of whole documents: ``input_ids``, ``labels`` and ``position_ids``, all ``[B, T]``, whose positions start
    anew and whose first label is -100 at each document; where such rows end in padding, ``num_tokens`` is what is none.
    Batches of the data module have a ``layout``, which says where their targets and documents are, so that a step does
    not wait for the device; leave it out where you change a batch.
    ``token_weight`` ``[B, T]``, aligned with the labels, multiplies the tokens' losses and leaves the divisor their
    number; ``reference_log_prob`` ``[B, T]``, aligned with the labels, is for the losses that need it; ``source``
    ``[B, T]`` is the index of each token's source in the data module's ``source_names``.

    Override one at a time: :meth:`build_model`, :meth:`build_parameter_groups`, :meth:`build_optimizer`,
    :meth:`build_scheduler`, :meth:`generate`; or :meth:`training_step`, to add terms to what it returns.

    Args:
        model: hub name, local folder or ``asset://NAME`` to load, or a transformers config, or a dict of its values
            with ``model_type``, to start from random weights; or a causal language model of transformers itself, which
            is trained as it is. Checkpoints then hold its config, and of an adapter not the base: give it again.
        loss: the token loss, or a dict with ``class_path`` and ``init_args``.
        optimizer: an optimizer's class with its options: AdamW if it is not given, whose options can be given alone
            (``{"lr": 1e-4}``); a dict with ``class_path`` and ``init_args`` for any of torch, for ``Muon`` or for
            ``AdamW8bit``; or a ``functools.partial`` of the class.
        schedule: a learning-rate schedule's class with its options, given like the optimizer's.
        loading: how the model is loaded and run.
        peft: train an adapter (LoRA) and nothing else: a ``LoraConfig`` of peft, or a dict of its options. Checkpoints
            hold the adapter alone. ``None`` trains the whole model.
        reference_model: hub name, local folder or ``asset://NAME`` of the model whose distribution a loss reads (a
            teacher, an anchor), over the same vocabulary. ``None`` takes the model that the run starts from: the base
            below an adapter, or else a frozen copy, as large again, which FSDP1 refuses.
        sharding: how ``ModelParallelStrategy`` (FSDP2) shards the model; other strategies take no such options.
        step: what an optimizer step is.
        evaluation: how ``predict`` and ``test`` generate and score.

    The groups ``loading``, ``sharding``, ``step`` and ``evaluation`` may be dicts of their fields.

    Raises:
        ValueError: options that contradict each other or are out of range.

    Example:
        >>> from dft_lightning import CausalLMModule, DFTLoss
        >>> tiny = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        ...         "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32}
        >>> module = CausalLMModule(tiny, loss=DFTLoss(), optimizer={"lr": 1e-3})
        >>> module.configure_model()
        >>> type(module.model).__name__
        'LlamaForCausalLM'
    """

    def __init__(
        self,
        model: dict[str, Any] | str,  # in this order: jsonargparse would make a string of a dict
        loss: TokenLoss = CrossEntropyLoss(),  # noqa: B008 (copied before use)
        optimizer: OptimizerCallable = DEFAULT_OPTIMIZER,
        schedule: ScheduleCallable = WarmupSchedule,
        loading: LoadingOptions = LoadingOptions(),  # noqa: B008 (frozen)
        peft: dict[str, Any] | None = None,
        reference_model: str | None = None,
        sharding: ShardingOptions = ShardingOptions(),  # noqa: B008 (frozen)
        step: StepOptions = StepOptions(),  # noqa: B008 (frozen)
        evaluation: EvaluationOptions = EvaluationOptions(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        whole = whole_options({"loading": loading, "sharding": sharding, "step": step, "evaluation": evaluation})
        loading = options_of_itself(model, whole["loading"])
        peft = lora_values(peft)
        name, own_forward = type(self).__name__, type(self).forward is not CausalLMModule.forward
        self.loss = objective_of(loss, name)
        self.save_hyperparameters()
        self.loading: LoadingOptions = loading
        self.sharding: ShardingOptions = whole["sharding"]
        self.step: StepOptions = whole["step"]
        self.evaluation: EvaluationOptions = whole["evaluation"]
        self.strict_loading = peft is None  # an adapter's checkpoints hold that alone, and its names are looked at
        self.model: nn.Module | None = None
        self.train_telemetry = TrainTelemetry()
        self.eval_metrics = Evaluation(self.evaluation)
        self._builder = ModelBuilder(model, self.loss, self.loading, self.sharding, self.step, peft, reference_model)
        self.model_name = self._builder.base_name  # where the data module's tokenizer is, if it names none
        earlier = EarlierModel.of(self.loss)
        self._objective = BatchObjective(self.loading.head, self.step, own_forward, name, earlier)
        self._completions = Completions(self._builder.load_tokenizer, self.sharding)
        self._optimization = OptimizerBuilder(optimizer, schedule)
        self._steps = OptimizerSteps(self.step, self.train_telemetry, name)
        self._run_state = RunState(self._steps, self.train_telemetry, name)
        schedule_values = self._optimization.schedule_values
        self._checkpoints = Checkpoints(self._builder, peft, schedule_values, self._run_state, earlier)
        self.register_load_state_dict_post_hook(self._checkpoints.leave_out_the_base)  # type: ignore[no-untyped-call]
        self._reference: ReferenceModel | None = None
        self.engine: Engine | None = None  # what answers in this module's place, while it is open
        self.kept_answers: Kept | None = None  # of a command that may be given again

    def plain_hparams(self, values: dict[str, Any]) -> dict[str, Any]:
        """Class paths and options, which ``weights_only`` loading can read."""
        return plain_values(saved_options(values), "pass it to load_from_checkpoint by hand")

    def moving(self, fn: Callable[[Tensor], Tensor]) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """Moves and casts leave the model's non-persistent buffers in their own dtype."""
        return self._builder.moving(self, self.model, fn)

    def configure_model(self) -> None:
        """Build the model, once, and shard it. Lightning calls this when device, precision and strategy are known."""
        check_uncompiled(self)
        builder, trainer = self._builder, trainer_of(self)
        mesh = builder.mesh(trainer)
        if is_sharded(self):
            return
        builder.check_strategy(self.loss, trainer, mesh)
        if trainer is not None and trainer.state.fn in (TrainerFn.FITTING, TrainerFn.TESTING):
            self.eval_metrics.check_answers(self._datamodule)
        files: list[Path] = []
        if self.model is None:  # otherwise built before there was a trainer, or for one that did not shard
            own = type(self).build_model is CausalLMModule.build_model
            self.model, files = builder.empty() if own and builder.reads_shards(mesh) else (self.build_model(), [])
            tokenizer = getattr(self._datamodule, "tokenizer", None)
            self._reference = builder.prepare(self.model, files, self.loss, tokenizer, trainer)
        builder.check_lengths(self.model, self._datamodule)
        self._optimization.see(self, trainer)
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            # What a subclass freezes or trains there counts when the model is wrapped: DDP and FSDP look but once.
            self.build_parameter_groups()
            self.train_telemetry.model_flops = ModelFlops.of(self.model)
        builder.wrap(self, self.model, files, mesh, trainer, RUN_THE_MODEL, self._reference)
        self._checkpoints.remember_base(self.model)

    def build_model(self) -> nn.Module:
        """The language model: takes ``input_ids``, ``attention_mask``, ``use_cache`` and returns ``.logits``.

        For padding-free batches it takes ``position_ids`` as well.

        The fused head finds the output layer by ``get_output_embeddings()`` or as ``lm_head``, an ``nn.Linear``; a
        model without needs ``loading.head: full``.
        """
        return self._builder.load()

    @property
    def _datamodule(self) -> pl.LightningDataModule | None:
        """The trainer's data module, where there is a trainer and it has one."""
        return getattr(trainer_of(self), "datamodule", None)

    @property
    def stop_flag(self) -> StopFlag:
        """What tells all ranks that one of them was asked to stop, with the exchange of an optimizer step."""
        return self._steps.stop_flag

    @property
    def _source_names(self) -> Sequence[str]:
        return getattr(self._datamodule, "source_names", ())

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The data module's tokenizer, or the one beside the model where there is none."""
        return self._completions.tokenizer(self._datamodule)

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
        assert self.model is not None, "call configure_model() first"
        trainer, max_length = trainer_of(self), getattr(getattr(self._datamodule, "text", None), "max_length", None)
        options = {"normalizer": normalizer, "statistics": statistics, "step": self._steps.done(trainer)}
        return self._objective.output(
            self.model, self, batch, self.loss, self._reference, max_length, trainer is None, **options
        )

    def token_output_beside(self, reference: ReferenceModel, batch: Batch) -> TokenOutput:
        """Statistics of a batch's targets, and ``reference_kl`` against another model, whatever the loss. Constants.

        Args:
            reference: of the same vocabulary.
            batch: as the class takes it.
        """
        assert self.model is not None, "call configure_model() first"
        options = {"normalizer": None, "statistics": ("reference_kl",), "step": 0}
        alone = trainer_of(self) is None
        with torch.no_grad():
            return self._objective.output(
                self.model, self, batch, CrossEntropyLoss(), reference, None, alone, **options
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean objective over a micro-batch's targets (with ``renormalize`` over their weights); 0 without any.

        What is added to it counts at its own strength, each micro-batch weighted as its targets are: ``backward`` puts
        the share of the step on.
        """
        batch = checked(batch)
        synchronise(self, self.sharding, steps=step_ends(self.trainer))
        divisor = self._steps.divisor_of(batch[KEY].num_targets, batch_idx, self.trainer)
        statistics = ("entropy",) if self.step.log_train_entropy else ()
        output = self.token_output(batch, normalizer=divisor, statistics=statistics)
        return self._steps.mean_of(output, divisor, batch, batch_idx, self.loss, self._objective.differs())

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backpropagate a micro-batch's loss by its share of the step's targets."""
        super().backward(self._steps.weighted(loss, self.trainer), *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradient of the whole step by its targets."""
        clip = getattr(self.configure_gradient_clipping, "__func__", None)  # a subclass's, or this object's own
        clips = self.automatic_optimization and clip is CausalLMModule.configure_gradient_clipping
        self._objective.check_pending()
        self._steps.normalise(self.parameters(), optimizer, self.trainer, clips)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip as the trainer says; the norm is taken once and logged."""
        by_value = partial(self.clip_gradients, optimizer, gradient_clip_val, gradient_clip_algorithm)
        self._steps.clip(optimizer, gradient_clip_val, gradient_clip_algorithm, self.trainer, by_value)

    def on_fit_start(self) -> None:
        check_monitors(self.trainer, type(self), self.loss, self.step, self.eval_metrics.names)
        self._checkpoints.before_fit(self.trainer)

    def on_train_start(self) -> None:
        assert self.model is not None
        self._steps.begin(self.trainer)
        discard_gradients(self)
        leave_constant_buffers(self.trainer, self.model)
        self._checkpoints.begin(self.model, self.trainer)
        if self._reference is not None:
            self._reference.check_trained(self.model)
        peak = peak_flops(self.device, self.trainer.precision, self.step.peak_flops)
        self.train_telemetry.peak_flops = None if peak is None else peak * self.trainer.world_size
        announce(self, self.model, self.trainer)
        self.train_telemetry.start_clock()

    def on_train_epoch_start(self) -> None:
        self._optimization.check_epoch(self.trainer)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if not step_ends(self.trainer):
            return
        if self._steps.are_whole and logs_now(self.trainer):
            self._log("train", self._steps.collect(self._source_names), prog_bar=("loss", "nll", "token_accuracy"))
        self._run_state.note_step(self.trainer)

    def on_train_end(self) -> None:
        self._steps.done(self.trainer)  # before a trainer that tests counts anew
        self._optimization.check_end(self.trainer, self._steps.learning_rate)

    def _log(self, stage: str, values: Mapping[str, Any], prog_bar: Sequence[str] = ()) -> None:
        # Already reduced over ranks and batches: Lightning must neither average nor exchange them again.
        by_step = stage == "train"
        for name, value in values.items():
            believe_reduced(f"{stage}/{name}")
            shown = name in prog_bar
            self.log(f"{stage}/{name}", value, prog_bar=shown, batch_size=1, on_step=by_step, on_epoch=not by_step)

    def on_validation_start(self) -> None:
        self.train_telemetry.stop_clock()
        self.eval_metrics.begin("val", "forgetting")

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Token metrics of the validation rows, and of ``data.forgetting``, the second loader, where there is one."""
        batch = checked(batch)
        output = self.token_output(batch, statistics=self.eval_metrics.statistics)
        self.eval_metrics.update("forgetting" if dataloader_idx else "val", output, batch, self.loss)

    def on_validation_epoch_end(self) -> None:
        self._run_state.note_validation(self.trainer)
        self._log("val", self.eval_metrics.collect("val", self._source_names), prog_bar=("nll",))
        self._log("forgetting", self.eval_metrics.collect("forgetting", self._source_names))

    def on_validation_end(self) -> None:
        check_monitors_by_validation(self.trainer, type(self))
        self.train_telemetry.start_clock()
        self._run_state.after_validation(self.trainer)

    def on_test_start(self) -> None:
        self.eval_metrics.begin("test")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Token metrics, and scores of generated answers, of each of which ``predictions`` has a record."""
        batch = checked(batch)
        output = self.token_output(batch, statistics=self.eval_metrics.statistics)
        self.eval_metrics.update("test", output, batch, self.loss)
        records = self.predict_step(batch, batch_idx) if self.eval_metrics.scores(batch) else []
        self.eval_metrics.score(records)
        return {"predictions": records}

    def on_test_epoch_end(self) -> None:
        self._log("test", self.eval_metrics.collect("test", self._source_names))
        self._log("test", self.eval_metrics.collect_texts(self.trainer.world_size))

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Generate completions. Returns ``index``, ``prompt``, ``completion`` and ``answer`` of each row."""
        check_prompts(batch)
        return records_of(batch, kept_or_new(self, batch))

    def generate(self, input_ids: Tensor, attention_mask: Tensor, options: GenerationOptions) -> list[str]:
        """Complete prompts ``[B, T]`` (padded on the left); the texts end before the end-of-turn token."""
        tokens = self.generate_tokens(input_ids, attention_mask, options)
        return self._completions.texts(tokens, self.model, self._datamodule)

    def generate_tokens(self, input_ids: Tensor, attention_mask: Tensor, options: GenerationOptions) -> Tensor:
        """As :meth:`generate`, as tokens ``[B, S]``, the end-of-turn token included and padding after it."""
        assert self.model is not None, "call configure_model() first"
        return self._completions.tokens(self.model, input_ids, attention_mask, options, trainer_of(self))

    def known_tokens(self, input_ids: Tensor, max_new_tokens: int) -> Known:
        """The likeliest tokens after a prompt ``[1, T]``, and how clear they are, to tell this model by."""
        return self._completions.known(self.model, input_ids, max_new_tokens, trainer_of(self))

    @property
    def stop_token_ids(self) -> list[int]:
        """What ends a generated text."""
        return self._completions.stop_token_ids(self.model, self._datamodule)

    def configure_optimizers(self) -> Any:
        optimizer = self.build_optimizer(self.build_parameter_groups())
        scheduler = self.build_scheduler(optimizer)
        stepped = {"scheduler": scheduler, "interval": "step"}
        return optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": stepped}

    def build_parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer: matrices with weight decay, norms and biases without."""
        assert self.model is not None, "call configure_model() first"
        return self._optimization.groups(self, self.model)

    def build_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimizer that ``model.optimizer`` names; AdamW is fused where the device allows."""
        return self._optimization.optimizer(groups, self.device, self.trainer)

    def build_scheduler(self, optimizer: Optimizer) -> LRScheduler | None:
        """The schedule that ``model.schedule`` names, stepped once per optimizer step; ``None`` for none."""
        return self._optimization.schedule(optimizer, self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what ``export`` needs beside the weights, and what a run has in flight."""
        self._checkpoints.save(checkpoint, self.record, self._reference, trainer_of(self))

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of the model and its run; see :meth:`.Checkpoints.record`."""
        assert self.model is not None, "call configure_model() first"
        return self._checkpoints.record(self.model, self._completions, trainer_of(self))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._steps.begin_at(int(checkpoint.get("global_step", 0)))
        self.model_name = self.model_name or base_of(checkpoint)  # of a model that was given as an object
        self._checkpoints.load(checkpoint, self.model, self._reference, trainer_of(self))

    def state_dict(self, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As every module's; of a model with an adapter that alone, which is what is saved."""
        state: dict[str, Any] = super().state_dict(**kwargs)
        self._checkpoints.keep_adapter(state, self.model, kwargs.get("prefix", "") + "model.")
        return state
