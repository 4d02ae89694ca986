"""Token, source and gradient metrics as exact sums: the same for any batch size, accumulation and number of ranks."""

from __future__ import annotations

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


class TokenMetrics(ExactSums):
    """Objective, NLL, perplexity, accuracy, entropy and mean weight over all target tokens seen.

    States are sums in float64 and counts in int64, added over ranks; each mean is one division at the end.
    Perplexity is ``exp`` of the mean ``-log p``, whatever loss is trained. With no target yet the means are nan.

    :meth:`compute` returns float64 scalars under ``loss``, ``nll`` (nats per token), ``perplexity``,
    ``token_accuracy``, ``mean_weight`` (mean ``-dL/dl``), ``target_tokens``, ``tokens`` (non-padding) and, where it
    was given, ``entropy`` (nats).
    """

    higher_is_better = None

    loss_sum: Tensor
    nll_sum: Tensor
    weight_sum: Tensor
    entropy_sum: Tensor
    correct: Tensor
    targets: Tensor
    entropy_targets: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sums("loss_sum", "nll_sum", "weight_sum", "entropy_sum")
        self._add_sums("correct", "targets", "entropy_targets", "tokens", dtype=torch.int64)

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

    def compute(self) -> dict[str, Tensor]:
        nll = self.nll_sum / self.targets
        values = {
            "loss": self.loss_sum / self.targets,
            "nll": nll,
            "perplexity": nll.exp(),
            "token_accuracy": self.correct.double() / self.targets,
            "mean_weight": self.weight_sum / self.targets,
            "target_tokens": self.targets.double(),
            "tokens": self.tokens.double(),
        }
        if self.entropy_targets > 0:
            values["entropy"] = self.entropy_sum / self.entropy_targets
        return values


class SourceMetrics(ExactSums):
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
        self.targets += torch.bincount(source, minlength=MAX_SOURCES)

    def compute(self) -> dict[str, Tensor]:
        return {
            "loss": self.loss_sums / self.targets,
            "nll": self.nll_sums / self.targets,
            "targets": self.targets,
        }


class GradientMetrics(ExactSums):
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

    def update(self, norm: Tensor, clip_val: float | int | None, skips_non_finite: bool = False) -> None:
        """Add an optimizer step.

        Args:
            norm: total norm of its gradient before clipping.
            clip_val: the norm it is clipped to, or ``None``.
            skips_non_finite: whether a gradient scaler skips steps whose gradient overflowed; they do not count.
        """
        counted = norm.isfinite() if skips_non_finite else torch.ones_like(norm, dtype=torch.bool)
        self.norm_sum += torch.where(counted, norm.detach().double(), 0.0)
        if clip_val:
            self.clipped += counted & (norm > clip_val)
        self.steps += counted

    def compute(self) -> dict[str, Tensor]:
        return {"grad_norm": self.norm_sum / self.steps, "clipped_steps": self.clipped.double() / self.steps}
