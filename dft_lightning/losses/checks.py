"""What is wrong with logits and targets, said once and with the offending shape or value."""

from __future__ import annotations

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")


def check_reduction(reduction: str) -> None:
    """Raise ``ValueError`` naming the allowed reductions."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; choose one of {', '.join(map(repr, REDUCTIONS))}")


def check_logits_and_targets(logits: Tensor, targets: Tensor, ignore_index: int) -> bool:
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


def flattened(name: str, values: Tensor | None, shape: torch.Size) -> Tensor | None:
    """What goes with logits or targets, its leading axes made one, where it is given.

    Raises:
        ValueError: it has another shape than ``shape``.
    """
    if values is None:
        return None
    if values.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, like what it goes with; got {_shape(values)}")
    return values.reshape(-1) if name == "reference_log_prob" else values.reshape(-1, shape[-1])
