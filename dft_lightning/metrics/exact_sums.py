"""Token, source and gradient metrics as exact sums: the same for any batch size, accumulation and number of ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dft_lightning.foreign.torchmetrics import ExactMetric
from dft_lightning.ops import TokenOutput

MAX_SOURCES = 64


class ExactSums(ExactMetric):
    """Base of metrics whose states are sums in float64 and counts in int64.

    They move between devices with the module but keep their dtype: ``precision: bf16-true`` would otherwise make
    bfloat16 of them, which cannot count beyond 256.
    """

    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(compute_with_cache=False, **kwargs)  # :meth:`restore` would not reach it

    def _add_sums(self, *names: str, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = ()) -> None:
        for name in names:
            self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def snapshot(self) -> dict[str, Tensor | int]:
        """What :meth:`restore` goes back to; copies on the device."""
        return {"updates": self.update_count, **{name: getattr(self, name).clone() for name in self.metric_state}}

    def restore(self, snapshot: dict[str, Tensor | int]) -> None:
        """Forget every update since :meth:`snapshot`, which is to be taken anew for a second time."""
        for name in self.metric_state:
            setattr(self, name, snapshot[name])
        self.set_update_count(cast(int, snapshot["updates"]))

    def reset(self) -> None:
        """Back to zero, with tensors that later work outside inference mode as well."""
        with torch.inference_mode(False):
            super().reset()


class NamedSums(ExactSums):
    """Exact sums of which several values are made, by name."""

    def values_of(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values of states by name."""
        raise NotImplementedError

    def compute(self) -> dict[str, Tensor]:
        return self.values_of({name: getattr(self, name) for name in self.metric_state})


class TokenMetrics(NamedSums):
    """Objective, NLL, perplexity, accuracy, entropy and mean weight over all target tokens seen.

    States are sums in float64 and counts in int64, added over ranks; each mean is one division at the end.
    Perplexity is ``exp`` of the mean ``-log p``, whatever loss is trained. With no target yet the means are nan.

    :meth:`compute` returns float64 scalars under ``loss``, ``nll`` (nats per token), ``perplexity``,
    ``token_accuracy``, ``mean_weight`` (mean ``-dL/dl``), ``target_tokens``, ``tokens`` (non-padding) and, where it
    was given, ``entropy`` (nats); where a ``gradient_threshold`` left classes out of gradients, ``head/dropped``, the
    mean over targets of :class:`TokenOutput`'s ``dropped``.
    """

    higher_is_better = None

    loss_sum: Tensor
    nll_sum: Tensor
    weight_sum: Tensor
    entropy_sum: Tensor
    correct: Tensor
    targets: Tensor
    entropy_targets: Tensor
    dropped_sum: Tensor
    dropped_targets: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sums("loss_sum", "nll_sum", "weight_sum", "entropy_sum", "dropped_sum")
        self._add_sums("correct", "targets", "entropy_targets", "dropped_targets", "tokens", dtype=torch.int64)

    def update(self, output: TokenOutput, tokens: Tensor | int = 0) -> None:
        """Add the targets of one batch.

        Args:
            output: what the head returned for the batch.
            tokens: number of non-padding tokens in the batch.
        """
        self.loss_sum += output.loss_sum.double()
        self.nll_sum -= output.log_prob.double().sum()
        self.weight_sum += output.weight.double().sum()
        self.correct += output.correct.sum()
        self.targets += output.log_prob.numel()
        self.tokens += tokens
        if output.entropy is not None:
            self.entropy_sum += output.entropy.double().sum()
            self.entropy_targets += output.entropy.numel()
        if output.dropped is not None:
            self.dropped_sum += output.dropped.double().sum()
            self.dropped_targets += output.dropped.numel()

    def values_of(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        targets = sums["targets"]
        nll = sums["nll_sum"] / targets
        values = {
            "loss": sums["loss_sum"] / targets,
            "nll": nll,
            "perplexity": nll.exp(),
            "token_accuracy": sums["correct"].double() / targets,
            "mean_weight": sums["weight_sum"] / targets,
            "target_tokens": targets.double(),
            "tokens": sums["tokens"].double(),
        }
        if sums["entropy_targets"] > 0:
            values["entropy"] = sums["entropy_sum"] / sums["entropy_targets"]
        if sums["dropped_targets"] > 0:
            values["head/dropped"] = sums["dropped_sum"] / sums["dropped_targets"]
        return values


class SourceMetrics(NamedSums):
    """Mean objective and nll over the targets of each source.

    States are sums in float64 and counts in int64 for each of up to 64 sources, added over ranks.

    :meth:`compute` returns float64 ``loss`` and ``nll`` and int64 ``targets``, each ``[64]`` by source; the means of a
    source without targets are nan.
    """

    higher_is_better = None

    loss_sums: Tensor
    nll_sums: Tensor
    targets: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sums("loss_sums", "nll_sums", shape=(MAX_SOURCES,))
        self._add_sums("targets", dtype=torch.int64, shape=(MAX_SOURCES,))

    def update(self, source: Tensor, loss: Tensor, nll: Tensor) -> None:
        """Add targets.

        Args:
            source: ``[n]``, the index of each target's source.
            loss: ``[n]``, the objective.
            nll: ``[n]``, ``-log p``.
        """
        self.loss_sums += torch.zeros_like(self.loss_sums).index_add_(0, source, loss.double())
        self.nll_sums += torch.zeros_like(self.nll_sums).index_add_(0, source, nll.double())
        # Not torch.bincount, which looks for the largest first and waits for the device.
        self.targets += torch.zeros_like(self.targets).index_add_(0, source, torch.ones_like(source))

    def values_of(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        targets = sums["targets"]
        return {"loss": sums["loss_sums"] / targets, "nll": sums["nll_sums"] / targets, "targets": targets}


class GradientMetrics(NamedSums):
    """Mean gradient norm before clipping and share of clipped steps.

    Gradients are equal on all ranks by the time they are measured, so nothing is exchanged.

    :meth:`compute` returns ``grad_norm`` and ``clipped_steps`` (in ``[0, 1]``), float64 scalars.
    """

    higher_is_better = None

    norm_sum: Tensor
    clipped: Tensor
    steps: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(sync_on_compute=False, **kwargs)
        self._add_sums("norm_sum")
        self._add_sums("clipped", "steps", dtype=torch.int64)

    def update(self, norm: float, clip_val: float | int | None, skips_non_finite: bool = False) -> None:
        """Add an optimizer step.

        Args:
            norm: total norm of its gradient before clipping.
            clip_val: the norm it is clipped to, or ``None``.
            skips_non_finite: whether a gradient scaler skips steps whose gradient overflowed; they do not count.
        """
        if skips_non_finite and not math.isfinite(norm):
            return
        self.norm_sum += norm
        self.clipped += bool(clip_val) and norm > cast(float, clip_val)
        self.steps += 1

    def values_of(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        steps = sums["steps"]
        return {"grad_norm": sums["norm_sum"] / steps, "clipped_steps": sums["clipped"].double() / steps}


class WorkMetrics(NamedSums):
    """Floating-point operations of a model, added over ranks; :meth:`compute` returns ``flops``, a float64 scalar."""

    higher_is_better = None

    flops: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sums("flops")

    def update(self, flops: float) -> None:
        """Add those of a micro-batch."""
        self.flops += flops

    def values_of(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"flops": sums["flops"]}


def computed(metrics: Sequence[NamedSums]) -> list[dict[str, Tensor]]:
    """What ``compute`` returns of each, on the host: over all ranks in one exchange, and read at once. A collective.

    torchmetrics exchanges each state by itself, after a barrier. Counts travel as float64, which has them exactly.
    """
    metrics = list(metrics)
    shared = [metric for metric in metrics if metric.sync_on_compute]
    ordered = [*shared, *(metric for metric in metrics if not metric.sync_on_compute)]
    states = [(metric, name, getattr(metric, name)) for metric in ordered for name in metric.metric_state]
    with torch.inference_mode(False), torch.no_grad():
        vector = torch.cat([state.double().flatten() for _, _, state in states])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            size = sum(state.numel() for metric, _, state in states if metric.sync_on_compute)
            torch.distributed.all_reduce(vector[:size])
        parts = torch.split(vector.cpu(), [state.numel() for _, _, state in states])
        sums: dict[int, dict[str, Tensor]] = {id(metric): {} for metric in metrics}
        for (metric, name, state), part in zip(states, parts, strict=True):
            sums[id(metric)][name] = part.view(state.shape).to(state.dtype)
        return [metric.values_of(sums[id(metric)]) for metric in metrics]
