"""The groups of options of the module; their docstrings are their documentation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

from torchmetrics import Metric

from dft_lightning.component import from_plain, group_of
from dft_lightning.distributed.sharding import ShardingOptions
from dft_lightning.engine import EngineOptions
from dft_lightning.errors import check_one_of
from dft_lightning.metrics import AnswerExtractor, WholeText
from dft_lightning.metrics.own import metrics_by_name
from dft_lightning.models.blocks import Checkpointing
from dft_lightning.models.generation import GenerationOptions
from dft_lightning.models.given import kept_model
from dft_lightning.models.loading import DType
from dft_lightning.modules.optimizers import optimizer_values
from dft_lightning.modules.schedules import schedule_values

Head = Literal["fused", "full"]
OnNonFinite = Literal["raise", "skip"]

GROUPS = ("loading", "sharding", "step", "evaluation", "generation", "engine")
"""Names of the arguments that are groups of options, and of those within them."""


@dataclass(frozen=True)
class LoadingOptions:
    """How the model is loaded and run.

    Attributes:
        dtype: of the parameters as loaded; ``"auto"`` takes the checkpoint's own.
        attn_implementation: ``"sdpa"``, ``"eager"``, ``"flash_attention_2"`` ...; ``"documents"`` calls ``sdpa`` for
            each document of a padding-free batch.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the checkpoint.
        quantization_config: options of transformers' ``BitsAndBytesConfig``: keeps the base below an adapter in 4 or
            8 bits.
        gradient_checkpointing: what to keep for backward, to save memory: ``"full"``, or true, keeps the inputs of the
            model's blocks and computes the rest again; ``"every_2"`` and so on do so with every second block;
            ``"selective"`` keeps matrix products and attention as well, and computes again what is cheap;
            ``"offload"`` computes nothing again and keeps all in host memory. Gradients stay the same.
        compile: have ``torch.compile`` make one graph of the model's repeated blocks, for every length of rows. The
            first step then takes a minute or more.
        head: ``"fused"`` computes loss and gradients from the last hidden states, without holding logits; ``"full"``
            takes the model's own logits, for models whose head the fused one does not know.
    """

    dtype: DType = "float32"
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    quantization_config: dict[str, Any] | None = None
    gradient_checkpointing: bool | Checkpointing = False
    compile: bool = False
    head: Head = "fused"

    def __post_init__(self) -> None:
        check_one_of("head", self.head, get_args(Head))
        if self.gradient_checkpointing is True:
            object.__setattr__(self, "gradient_checkpointing", "full")
        elif self.gradient_checkpointing is not False:
            check_one_of("gradient_checkpointing", self.gradient_checkpointing, get_args(Checkpointing))

    @property
    def of_a_model(self) -> dict[str, Any]:
        """What decides how a checkpoint is read, whatever is quantized."""
        names = ("dtype", "attn_implementation", "revision", "trust_remote_code")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class StepOptions:
    """What an optimizer step is.

    Attributes:
        renormalize: divide a step's gradient by the sum of its tokens' weights ``-dL/dl`` over all micro-batches and
            ranks, in place of their number. Weights then have mean one, so that clipping acts alike on every loss.
            What is logged stays the mean per target token.
        on_non_finite: what becomes of an optimizer step in which the loss of a micro-batch on any rank, or the norm of
            the gradient, is NaN or infinite: ``"raise"`` ends the run before the optimizer steps; ``"skip"`` leaves
            parameters and optimizer as they are, goes on and logs ``skipped_steps``, until 100 are skipped in a row.
            fp16's gradient scaler goes on skipping gradients that overflow: there the loss alone counts.
        log_train_entropy: compute the entropy in training as well; it is always there in validation.
        router_aux_loss_coef: coefficient of the auxiliary loss of a mixture of experts, which is added to the mean of
            each micro-batch; 0 leaves it out. ``None`` goes by the model's config, in which most leave it out
            (``output_router_logits: false``); the run says which it is. It is a mean over the tokens of a micro-batch,
            so that it depends on how a step is split.
        gradient_threshold: classes whose gradient ``|dL/dz|``, with respect to the head's product, is below this at
            every token of a chunk are left out of the fused head's gradient products, which then take a fraction of the
            time; ``head/dropped`` is logged, the mean over tokens of what their gradients lose, which bounds the error.
            What bfloat16 rounds is more than 2**-12 (2.4e-4) leaves out with cross-entropy or 2**-14 (6.1e-5) with DFT,
            for SmolLM2's head, and about as much as 2**-16 does for Gemma 3's. 0 is exact.
        peak_flops: floating-point operations a second of each device at its best, such as 989e12 of an H100 in
            bfloat16, which ``mfu`` is measured by. ``None`` knows many GPUs by their name; of others and of the CPU no
            ``mfu`` is logged.
    """

    renormalize: bool = False
    on_non_finite: OnNonFinite = "raise"
    log_train_entropy: bool = False
    router_aux_loss_coef: float | None = None
    gradient_threshold: float = 0.0
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        check_one_of("on_non_finite", self.on_non_finite, get_args(OnNonFinite))
        coefficient = self.router_aux_loss_coef
        if coefficient is not None and not 0 <= coefficient < math.inf:
            raise ValueError(f"router_aux_loss_coef must be a number from 0 on, got {coefficient}")
        if self.peak_flops is not None and not 0 < self.peak_flops < math.inf:
            raise ValueError(f"peak_flops must be a number above 0, got {self.peak_flops}")


@dataclass(frozen=True)
class EvaluationOptions:
    """How ``predict`` and ``test`` generate and score.

    Attributes:
        generation: how completions are generated.
        engine: who generates them: this module, or a server.
        answer_extractor: finds the answer that is compared. ``None`` compares whole texts, and leaves rows without an
            answer, such as plain text, to the token metrics.
        metrics: further metrics by name, which is what they are logged under. A class of torchmetrics that takes texts
            scores what ``test`` generates; a :class:`~dft_lightning.metrics.TargetMetric` scores the target tokens in
            validation and test. Each is a class path, ``class_path`` and ``init_args``, or in Python the metric itself;
            classes of ``torchmetrics.text`` need no path. ``None`` is ``{chrf: CHRFScore}`` where there is no
            ``answer_extractor``, and none where there is one. Checkpoints do not hold them.
    """

    generation: GenerationOptions = GenerationOptions()  # noqa: RUF009 (frozen)
    engine: EngineOptions = EngineOptions()  # noqa: RUF009 (frozen)
    answer_extractor: AnswerExtractor | None = None
    metrics: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Take in Python what a config says, too: dicts of options."""
        generation = group_of(GenerationOptions, self.generation, "generation")
        object.__setattr__(self, "generation", generation)
        object.__setattr__(self, "engine", group_of(EngineOptions, self.engine, "engine"))
        if self.answer_extractor is not None:
            object.__setattr__(self, "answer_extractor", from_plain(self.answer_extractor, AnswerExtractor))

    @property
    def extractor(self) -> AnswerExtractor:
        """What finds the answer that is compared."""
        return WholeText() if self.answer_extractor is None else self.answer_extractor

    def further_metrics(self) -> dict[str, Metric]:
        """Metrics beside those that are always there, by name. Raises as :func:`.metrics_by_name`."""
        default = {"chrf": "CHRFScore"} if self.answer_extractor is None else {}
        return metrics_by_name(default if self.metrics is None else self.metrics)


def whole_options(values: dict[str, Any]) -> dict[str, Any]:
    """A module's arguments as they are kept, with all that was left out of a group, an optimizer or a schedule."""
    whole: dict[str, Callable[[Any], Any]] = {
        "model": kept_model,
        "optimizer": optimizer_values,
        "schedule": schedule_values,
        "loading": partial(group_of, LoadingOptions, key="loading"),
        "sharding": partial(group_of, ShardingOptions, key="sharding"),
        "step": partial(group_of, StepOptions, key="step"),
        "evaluation": partial(group_of, EvaluationOptions, key="evaluation"),
    }
    return {name: whole[name](value) if name in whole else value for name, value in values.items()}


def saved_options(values: dict[str, Any]) -> dict[str, Any]:
    """As :func:`whole_options`, without metrics of a run's own: what is measured is no part of what was trained, and a
    checkpoint that names a class is read with more care."""
    values = whole_options(values)
    if isinstance(evaluation := values.get("evaluation"), EvaluationOptions):  # a class of one's own may take none
        values["evaluation"] = replace(evaluation, metrics=None)
    return values
