"""The contract of a token loss: per-token statistics in, one loss per token out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dft_lightning.component import Component
from dft_lightning.errors import InputError, check_one_of
from dft_lightning.losses.from_logits import statistics_from_logits
from dft_lightning.losses.statistics import Statistic, TokenStats, given_to, names_of, normalise_needs

#: The target that marks a token without one.
IGNORE_INDEX = -100
"""The class index of what is no target."""

REDUCTIONS = ("none", "mean", "sum")

#: Options of :class:`TokenLoss` for direct calls, which a module owns itself.
FORWARD_OPTIONS = ("ignore_index", "reduction")


class TokenLoss(Component, nn.Module):
    """Base class of token losses: a drop-in criterion on logits and the strategy inside ``CausalLMModule``.

    A loss of one's own writes :meth:`token_loss` and nothing else. It knows nothing of batches, ranks,
    accumulation, vocabularies or precision, and has no trainable parameters.

    Every loss takes both arguments by name.

    Args:
        ignore_index: the target that :meth:`forward` leaves out. Class-index targets only.
        reduction: ``"none"``, ``"mean"`` (over non-ignored targets; 0 where all are ignored) or ``"sum"``,
            of :meth:`forward` alone.

    Attributes:
        needs: the statistics beyond ``log_prob`` that :meth:`token_loss` reads, as names or :class:`Statistic`.
        pointwise: whether token ``i``'s loss depends on token ``i``'s statistics alone. A loss that sets it to
            ``False`` may also depend on the other tokens of the same sequence, never on the rest of the batch.
        uses_step: whether :meth:`token_loss` reads ``stats.step``. Whoever calls such a loss has to give the step.
        takes_negative_weights: whether the loss of a token times a negative number unlearns the token.
        refresh_every: where it is a number, ``reference_log_prob`` is the model's own as it was at the last optimizer
            step that is a multiple of it, and not the data's; see :class:`ProximalLoss`.

    Raises:
        ValueError: the reduction is unknown.

    Example:
        >>> class SquaredSurprise(TokenLoss):
        ...     def token_loss(self, stats):
        ...         return stats.log_prob.square()
        >>> logits = torch.tensor([[0.0, 0.0], [5.0, 5.0]])
        >>> SquaredSurprise()(logits, torch.tensor([1, -100]))  # log(1/2) ** 2
        tensor(0.4805)
    """

    _to_write = ("token_loss",)
    pointwise: bool = True
    uses_step: bool = False
    takes_negative_weights: bool = True
    refresh_every: int | None = None

    def __init__(self, *, ignore_index: int = IGNORE_INDEX, reduction: str = "mean") -> None:
        super().__init__()
        check_one_of("reduction", reduction, REDUCTIONS)
        self.ignore_index = ignore_index
        self.reduction = reduction

    @property
    def needs(self) -> Iterable[Statistic | str]:
        """Statistics beyond ``log_prob`` that this instance reads. What nobody needs is not computed."""
        return ()

    @property
    def reads_rows(self) -> bool:
        """Whether the data have to come with reference log-probs."""
        return self.refresh_every is None and "reference_log_prob" in names_of(self.needs)

    def token_loss(self, stats: TokenStats) -> Tensor:
        """Loss of each target token.

        Args:
            stats: statistics of ``n`` tokens, in float32 or float64.

        Returns:
            ``[n]``, unreduced, differentiable with respect to the statistics it uses.
        """
        raise NotImplementedError  # a class without it is not made

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        step: int | None = None,
        reference_log_prob: Tensor | None = None,
        reference_logits: Tensor | None = None,
    ) -> Tensor:
        """The loss as a criterion on logits.

        Targets are checked on the host, which waits for the device once per call (not under ``torch.compile``).

        Args:
            logits: ``[..., V]``, classes last, any floating dtype. Half precision is raised to float32.
            targets: ``[...]`` class indices, where ``ignore_index`` marks targets to leave out (their logits
                get a gradient of exactly zero), or ``[..., V]`` one-hot or soft targets, none ignored.
            step: the optimizer step, which losses with a schedule (``uses_step``) need.
            reference_log_prob: ``[...]`` log-probabilities of the targets under another model, a constant, for the
                losses that need them. What stands at ignored targets does not matter.
            reference_logits: ``[..., V]`` of another model, a constant, for the losses that compare with its
                distribution.

        Returns:
            A scalar, or ``[...]`` for ``reduction="none"`` (0 at ignored targets); float32, or float64 for
            float64 logits.

        Raises:
            ValueError: shapes that do not match, a class index out of range, negative soft targets, no step for a loss
                with a schedule, no reference for a loss that needs one.
            TypeError: logits or class indices of the wrong dtype.
        """
        step = required_step(self, step)
        soft = _check_logits_and_targets(logits, targets, self.ignore_index)
        shape = logits.shape[:-1]
        rows = logits.reshape(-1, logits.shape[-1])
        given = {
            "sequence_index": sequence_index_of(shape, logits.device),
            "reference_log_prob": _flattened("reference_log_prob", reference_log_prob, shape),
            "reference_logits": _flattened("reference_logits", reference_logits, logits.shape),
        }
        if soft:
            kept = None
            targets = targets.reshape(rows.shape)
        else:
            targets = targets.reshape(-1).long()  # before comparing: 156 is -100 in uint8
            # Ignored rows are dropped, not multiplied by zero: an inf or nan there stays out of the gradient.
            kept = targets != self.ignore_index
            rows, targets = rows[kept], targets[kept]
            given = {name: None if value is None else value[kept] for name, value in given.items()}
        stats = statistics_from_logits(rows, targets, normalise_needs(self.needs), step=step, **given)
        losses = unreduced(self, stats)
        if self.reduction == "none":
            full = losses if kept is None else losses.new_zeros(kept.shape).masked_scatter(kept, losses)
            return full.reshape(shape)
        total = losses.sum()
        return total if self.reduction == "sum" else total / max(losses.numel(), 1)


def required_step(loss: TokenLoss, step: int | None) -> int:
    """The optimizer step, which may only be left out where the loss does not read it."""
    if step is None and loss.uses_step:
        raise ValueError(f"{type(loss).__name__} follows a schedule: give the optimizer step, step=...")
    return step or 0


def sequence_index_of(shape: torch.Size, device: torch.device) -> Tensor:
    """The sequence of each target, flattened: ``[B, T]`` targets are B sequences of T tokens, ``[T]`` are one."""
    length = shape[-1] if len(shape) else 1
    return torch.arange(shape.numel(), device=device) // max(length, 1)


def stats_for(loss: TokenLoss, stats: TokenStats) -> TokenStats:
    """The statistics that a loss names; reading another raises ``InputError``."""
    return given_to(type(loss).__name__, loss.needs, loss.uses_step, stats)


def unreduced(loss: TokenLoss, stats: TokenStats) -> Tensor:
    """``loss.token_loss(stats)``, checked: one loss per token.

    Raises:
        ValueError: the loss returned another shape (its mean, often), which would be divided by the count twice, or
            reads what it does not name.
    """
    losses = loss.token_loss(stats_for(loss, stats))
    if not isinstance(losses, Tensor):
        raise InputError(f"{type(loss).__name__}.token_loss must return a tensor [n], got {type(losses).__name__}")
    if losses.shape != stats.log_prob.shape:
        raise ValueError(
            f"{type(loss).__name__}.token_loss must return one loss per token, of shape {list(stats.log_prob.shape)}, "
            f"got shape {list(losses.shape)}: leave sums and means to the module"
        )
    return losses


def loss_and_slopes(
    loss: TokenLoss, stats: TokenStats, token_weight: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Unreduced losses and the derivative of their sum by ``log_prob`` and each other statistic that it depends on.

    All are ``[n]`` and detached. The derivatives come from autograd on the statistics, so a stop-gradient inside the
    loss is honoured. They exist also where gradients are off (validation, ``torch.no_grad``, ``torch.inference_mode``).

    Args:
        loss: any token loss.
        stats: of ``n`` tokens.
        token_weight: ``[n]`` factors of the losses.
    """
    with torch.inference_mode(False), torch.enable_grad():
        values: dict[str, Any] = {
            name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in vars(stats).items()
        }
        values["own"] = {name: value.detach().clone() for name, value in stats.own.items()}
        if stats.log_expected_prob is stats.log_prob:
            values["log_expected_prob"] = None
        leaves = {name: values[name].requires_grad_() for name in _DIFFERENTIABLE if values[name] is not None}
        losses = unreduced(loss, TokenStats(**values))
        if token_weight is not None:
            losses = losses * token_weight.clone()
        slopes: tuple[Tensor | None, ...]
        if losses.requires_grad:
            slopes = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
        else:
            slopes = (None,) * len(leaves)
    found = {name: slope for name, slope in zip(leaves, slopes, strict=True) if slope is not None}
    return losses.detach(), {"log_prob": torch.zeros_like(leaves["log_prob"]), **found}


# What depends on the model's logits; the other statistics are constants.
_DIFFERENTIABLE = (
    "log_prob",
    "mean_log_prob",
    "entropy",
    "sum_squared_prob",
    "tempered_log_prob",
    "reference_kl",
    "reference_reverse_kl",
)


def token_loss_and_weight(
    loss: TokenLoss, stats: TokenStats, token_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Unreduced losses, and each token's weight ``-dL/dl`` (1 for cross-entropy, ``p`` for DFT), both ``[n]``.

    The losses keep their graph, where there is one; the weights are detached. Arguments as :func:`loss_and_slopes`.
    """
    losses = unreduced(loss, stats)
    if token_weight is not None:
        losses = losses * token_weight
    return losses, -loss_and_slopes(loss, stats, token_weight)[1]["log_prob"]


def require_default_forward_options(loss: TokenLoss, where: str) -> None:
    """``ignore_index`` and ``reduction`` belong to ``forward`` alone: refuse them where another owns them."""
    if loss.ignore_index != IGNORE_INDEX or loss.reduction != "mean":
        raise ValueError(
            f"{where} ignores labels of {IGNORE_INDEX} and reduces by itself: leave ignore_index and reduction of "
            f"{type(loss).__name__} at {IGNORE_INDEX} and 'mean', got {loss.ignore_index} and {loss.reduction!r}"
        )


def _check_logits_and_targets(logits: Tensor, targets: Tensor, ignore_index: int) -> bool:
    """Check shapes, dtypes and values.

    Returns:
        Whether the targets are soft (``[..., V]``) rather than class indices (``[...]``).
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V at least 1, got shape {_shape(logits)}")
    if targets.shape == logits.shape:
        _check_soft_targets(targets)
        return True
    if targets.shape != logits.shape[:-1]:
        raise ValueError(_shape_message(logits, targets))
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(
            f"class-index targets must be integers, got {targets.dtype} of shape {_shape(targets)} for logits of "
            f"shape {_shape(logits)}; soft targets have the logits' shape"
        )
    check_class_indices(targets.long(), logits.shape[-1], ignore_index)
    return False


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _shape_message(logits: Tensor, targets: Tensor) -> str:
    message = (
        f"logits of shape {_shape(logits)} do not match targets of shape {_shape(targets)}: logits [..., V] take "
        "class indices [...] or soft targets [..., V]"
    )
    channels_first = logits.ndim == targets.ndim + 1 and logits.ndim > 2
    if channels_first and logits.shape[:1] + logits.shape[2:] == targets.shape:
        message += "; the classes seem to be on axis 1: pass logits.movedim(1, -1)"
    return message


def check_class_indices(targets: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise ``ValueError`` for the first target that is neither in ``[0, num_classes)`` nor ``ignore_index``."""
    if torch.compiler.is_compiling():  # a data-dependent check would break the graph
        return
    wrong = ((targets < 0) | (targets >= num_classes)) & (targets != ignore_index)
    if not bool(wrong.any()):
        return
    position = wrong.nonzero()[0].tolist()
    value = int(targets[tuple(position)]) if position else int(targets)
    raise ValueError(
        f"target {value} at position {position} is not a class index: it must lie in [0, {num_classes}) or be "
        f"ignore_index ({ignore_index}); {int(wrong.sum())} of {targets.numel()} targets are out of range"
    )


def _check_soft_targets(targets: Tensor) -> None:
    if torch.compiler.is_compiling() or not (targets.is_floating_point() or targets.dtype == torch.int64):
        return
    wrong = ~(targets >= 0)  # also true for nan
    if bool(wrong.any()):
        position = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"soft targets of shape {_shape(targets)} must not be negative or nan: "
            f"{targets[tuple(position)].item()} at position {position}"
        )


def _flattened(name: str, values: Tensor | None, shape: torch.Size) -> Tensor | None:
    """What goes with logits or targets, its leading axes made one, where it is given.

    Raises:
        ValueError: it has another shape than ``shape``.
    """
    if values is None:
        return None
    if values.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, like what it goes with; got {_shape(values)}")
    return values.reshape(-1) if name == "reference_log_prob" else values.reshape(-1, shape[-1])
