"""The optimizer step: its micro-batches counted, its gradient normalised, checked, clipped and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from dft_lightning.distributed import TokenNormalizer
from dft_lightning.distributed.ranks import StopFlag, clip_by_norm, clips_at, remove_gradients, sum_over_ranks
from dft_lightning.errors import InputError
from dft_lightning.foreign.torch import unscales_itself
from dft_lightning.losses import TokenLoss
from dft_lightning.metrics.exact_sums import ExactSums
from dft_lightning.modules.batch_loss import CHANGED
from dft_lightning.modules.non_finite import NonFiniteSteps
from dft_lightning.modules.options import StepOptions
from dft_lightning.modules.telemetry import TrainTelemetry, exact
from dft_lightning.ops import TokenOutput


@dataclass
class _Mean:
    """What is to be counted of a batch whose mean was handed out, when it comes to ``backward``."""

    batch_idx: int
    targets: int  # their number
    differs: Tensor | None  # whether the batch is not what its layout says
    weight: Tensor | None  # the sum of their weights, where the step is divided by these
    share: Tensor  # targets, or their weight, over the divisor of the step's sums: what the mean is multiplied by
    has_gradient: bool = False  # whether anything was backpropagated through it

    def note_gradient(self, gradient: Tensor) -> None:
        """A hook of the mean."""
        self.has_gradient = True


@dataclass
class OptimizerStep:
    """What is known of one optimizer step."""

    number: int  # of steps done before it
    before: list[tuple[ExactSums, dict[str, Tensor | int]]]  # metrics of the window logged next, with states before it
    means: list[_Mean] = field(default_factory=list)  # handed out and not come to backward yet
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of each micro-batch: was it finite, its indices
    unweighted: int = 0  # micro-batches that came to backward without such a mean
    ended: bool = False  # its gradient is whole
    skipped: bool = False  # it is left out
    learning_rate: float = 0.0  # of the first group of parameters
    loss_name: str = "loss"  # for messages


class OptimizerSteps:
    """Makes the gradient of each optimizer step that of the mean over its target tokens.

    ``training_step`` returns the mean over a micro-batch (:meth:`mean_of`). ``backward`` multiplies what has become of
    it by the micro-batch's share of the targets (:meth:`weighted`), and before the optimizer steps the sum over
    micro-batches and ranks is divided by all of them (:meth:`normalise`). So a term that is added to the mean counts at
    its own strength. Micro-batches without such a mean are left to Lightning, which takes the mean over them.

    ``telemetry`` is where steps are measured, ``non_finite`` counts those that were left out, ``stop_flag`` tells all
    ranks in the same exchange whether one of them was asked to stop.
    """

    def __init__(self, options: StepOptions, telemetry: TrainTelemetry, name: str) -> None:
        self._renormalize = options.renormalize
        self._telemetry, self._name = telemetry, name
        self._normalizer: TokenNormalizer | None = None
        self._done = 0
        self._step: OptimizerStep | None = None
        self.non_finite = NonFiniteSteps(options.on_non_finite)
        self.stop_flag = StopFlag()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_normalizer": None, "_step": None}  # of a trainer, which stays where it is

    def begin(self, trainer: pl.Trainer) -> None:
        """Before a run's first step: this trainer's ranks, and nothing left over from an interrupted step."""
        self._normalizer, self._step = _normalizer_of(trainer), None
        self._telemetry.reset()
        self.non_finite.load_counts([0, 0, -1])

    def done(self, trainer: pl.Trainer | None) -> int:
        """Optimizer steps behind the weights: those of this ``fit``, of the last one, or of the checkpoint.

        A trainer that only tests counts from 0 again, which would take a scheduled loss back to its beginning.
        """
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            self._done = trainer.global_step
        return self._done

    def begin_at(self, steps: int) -> None:
        """The weights are those of a checkpoint after so many steps."""
        self._done = steps

    @property
    def learning_rate(self) -> float:
        """Of the last step."""
        return 0.0 if self._step is None else self._step.learning_rate

    @property
    def are_whole(self) -> bool:
        """Whether no micro-batch was counted since the last step."""
        return self._step is not None and self._step.ended

    def in_flight(self) -> dict[str, Any]:
        """Numbers of this rank that go into checkpoints."""
        divisor = None if self._normalizer is None else self._normalizer.divisor
        return {"seconds": self._telemetry.seconds, "divisor": divisor, "skipped": self.non_finite.counts()}

    def load_in_flight(self, values: dict[str, Any]) -> None:
        """Go on from what :meth:`in_flight` returned."""
        assert self._normalizer is not None
        self._telemetry.seconds, self._normalizer.divisor = values["seconds"], values["divisor"]
        self.non_finite.load_counts(values["skipped"])

    # -- micro-batches -----------------------------------------------------------------------------------------

    def divisor_of(self, num_targets: int, batch_idx: int, trainer: pl.Trainer) -> float:
        """What the summed loss of a batch with so many targets is to be divided by, for the range of half precision.

        Raises:
            RuntimeError: the module overrides one of the methods that this leans on, and does not call ``super()``.
        """
        step = self._at_hand(trainer)
        self._forget_means(step, batch_idx)
        return cast(TokenNormalizer, self._normalizer).divisor_of(num_targets, trainer.strategy.root_device)

    def mean_of(
        self,
        output: TokenOutput,
        divisor: float,
        batch: Mapping[str, Any],
        batch_idx: int,
        loss: TokenLoss,
        differs: Tensor | None = None,
    ) -> Tensor:
        """The mean objective of a batch over its targets; with ``renormalize`` over their weights. 0 without any.

        The loss in ``output`` is over ``divisor``, of :meth:`divisor_of`; ``batch`` has a layout, and ``differs`` says
        whether that is another's.
        """
        step, num_targets = cast(OptimizerStep, self._step), output.log_prob.numel()
        self._telemetry.update(output, batch, loss)
        step.loss_name = type(loss).__name__
        if "index" in batch:
            step.rows.append((output.loss.detach().isfinite(), batch["index"]))
        weight = output.weight.detach().double().sum() if self._renormalize else None
        share = output.loss.detach().new_full((), num_targets / divisor)
        if weight is not None:
            share = (weight / divisor).to(output.loss.dtype)
        counted = _Mean(batch_idx, num_targets, differs, weight, share)
        step.means.append(counted)
        # A quotient by the same tensor that backward multiplies by: the sum's own gradient comes back to the last bit.
        # A weight that is not finite is no fault of the loss, and comes to the gradient there.
        mean = output.loss / torch.where(share.isfinite() & (share != 0), share, torch.ones_like(share))
        if mean.requires_grad:
            mean.register_hook(counted.note_gradient)  # type: ignore[no-untyped-call]
        return mean

    def weighted(self, loss: Tensor, trainer: pl.Trainer) -> Tensor:
        """What to backpropagate for the loss of a micro-batch, which is counted with it."""
        step = self._at_hand(trainer)
        means, step.means = step.means, []
        if not means:
            step.unweighted += 1
            return loss
        normalizer, finite = cast(TokenNormalizer, self._normalizer), loss.detach().isfinite()
        for each in means:  # one, but in a training_step that calls super() more than once
            normalizer.count(each.targets, finite, each.differs, each.weight)
        return loss * sum(each.share for each in means)

    # -- the whole step ----------------------------------------------------------------------------------------

    def normalise(
        self, parameters: Iterable[Tensor], optimizer: Optimizer, trainer: pl.Trainer, clips: bool = True
    ) -> None:
        """Divide the gradient of the whole step. A collective.

        Called after fp16's unscaling and before clipping: the one place where the whole step's gradient is at hand.

        Args:
            parameters: whose gradient.
            optimizer: what steps.
            trainer: of the run.
            clips: whether :meth:`clip` comes next, where the host hears of the step; otherwise it waits for that here.

        Raises:
            RuntimeError: the module overrides one of the methods that this leans on, and does not call ``super()``.
            InputError: as :meth:`clip`.
        """
        step, parameters = self._at_hand(trainer), list(parameters)
        self._forget_means(step, None)
        normalizer = cast(TokenNormalizer, self._normalizer)
        if step.unweighted and normalizer.pending:
            raise RuntimeError(
                f"{self._name}.training_step calls super().training_step for some micro-batches of an optimizer step "
                "and not for others, so that their gradients have no common divisor: call it for all, or for none"
            )
        step.ended, step.learning_rate = True, float(optimizer.param_groups[0]["lr"])
        normalizer.rescale(parameters, trainer.accumulate_grad_batches, self.stop_flag.asked)
        if not clips:
            self._hear(step, parameters, None, trainer)

    def clip(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None,
        algorithm: str | None,
        trainer: pl.Trainer,
        clip_by_value: Callable[[], None],
    ) -> None:
        """Clip as the trainer says, with the gradient's norm taken once; or leave the step out. A collective.

        Raises:
            InputError: a loss or the norm is not finite, and such steps are not to be left out; a batch was changed
                behind its layout; or there is no way to clip.
        """
        step = cast(OptimizerStep, self._step)
        if step.skipped:
            return
        scales = scales_gradients(trainer)
        if scales and unscales_itself(optimizer):
            # Gradients are still scaled here: the norm would be another, in the log as well as for clipping.
            raise InputError(
                "a fused optimizer unscales its gradients only while it steps, too late for clipping and the log under "
                "16-mixed precision: build it with fused=False"
            )
        clip_val = clips_at(gradient_clip_val)
        by_norm = clip_val if algorithm in (None, "norm") else None
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        found = clip_by_norm(parameters, by_norm, root=trainer.model)
        norm = self._hear(step, parameters, found, trainer)
        if norm is None:
            return
        # The norm is the same on all ranks. A gradient scaler looks by itself.
        if not scales and not math.isfinite(norm):
            self._leave_out(step, "gradient", parameters, trainer)
            return
        if clip_val is not None and by_norm is None:
            clip_by_value()
        self._telemetry.update_gradient(norm, by_norm, skips_non_finite=scales)

    def _hear(
        self, step: OptimizerStep, parameters: Iterable[Tensor], norm: Tensor | None, trainer: pl.Trainer
    ) -> float | None:
        """Wait for what is known of the step on the device: the host's one time.

        Returns:
            The gradient's norm, ``None`` where there is no gradient, or where it was removed.
        """
        totals = cast(TokenNormalizer, self._normalizer).totals(norm)
        if totals is None:
            return None if norm is None else float(norm)
        self.stop_flag.answer(totals.asked > 0)
        if totals.differs:
            raise InputError(CHANGED)
        if totals.non_finite:
            self._leave_out(step, "loss", parameters, trainer)
            return None
        if not totals.divisor:
            remove_gradients(parameters)
            return None
        return totals.norm

    def collect(self, source_names: Sequence[str]) -> dict[str, Any]:
        """What is logged of the steps since the last call. A collective."""
        skipped = self.non_finite.skipped
        values: dict[str, Any] = exact({"skipped_steps": skipped} if skipped else {})
        if measured := self._telemetry.collect(source_names):
            values |= {**measured, **exact({"lr": self.learning_rate})}
        return values

    def _at_hand(self, trainer: pl.Trainer) -> OptimizerStep:
        """The step that has not ended, or a new one."""
        if self._normalizer is None:  # a learning-rate finder trains before every hook
            self._normalizer = _normalizer_of(trainer)
        step = self._step
        if step is not None and not step.ended:
            if step.number != trainer.global_step:
                raise RuntimeError(
                    f"{self._name} overrides on_before_optimizer_step without calling super(): the step's gradient was "
                    "never divided by its number of target tokens"
                )
            return step
        window = self._telemetry.metrics().values() if self.non_finite.skips else ()
        self._step = OptimizerStep(trainer.global_step, [(metric, metric.snapshot()) for metric in window])
        return self._step

    def _forget_means(self, step: OptimizerStep, batch_idx: int | None) -> None:
        """Means of other micro-batches, which returned no loss."""
        others = [each for each in step.means if each.batch_idx != batch_idx]
        if any(each.has_gradient for each in others):
            raise RuntimeError(
                f"{self._name} overrides backward without calling super(): the micro-batch's gradient was not weighted "
                "by its number of target tokens"
            )
        step.means = [each for each in step.means if each.batch_idx == batch_idx]

    def _leave_out(
        self,
        step: OptimizerStep,
        what: Literal["loss", "gradient"],
        parameters: Iterable[Tensor],
        trainer: pl.Trainer,
    ) -> None:
        remove_gradients(parameters)
        self.non_finite.refuse(what, trainer, step.loss_name, step.learning_rate, step.rows)
        for metric, before in step.before:
            metric.restore(before)
        step.skipped = True


def scales_gradients(trainer: pl.Trainer) -> bool:
    """Whether a gradient scaler keeps fp16 in range."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _normalizer_of(trainer: pl.Trainer) -> TokenNormalizer:
    return TokenNormalizer(sum_over_ranks if trainer.world_size > 1 else _nothing, trainer.world_size)


def _nothing(tensor: Tensor) -> None:
    """One process has the sum."""


def step_ends(trainer: pl.Trainer) -> bool:
    """Whether the micro-batch that is computed now is the last of its optimizer step."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    last = trainer.is_last_batch or batches == trainer.num_training_batches
    return last or batches % trainer.accumulate_grad_batches == 0
