"""Functional forms of the losses, in the manner of :mod:`torch.nn.functional`."""

from __future__ import annotations

from torch import Tensor

from dft_lightning.losses.dft import DFTLoss
from dft_lightning.losses.focal import FocalLoss


def dft_cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """Dynamic Fine-Tuning loss ``-sg(p) log p``; see :class:`~dft_lightning.losses.DFTLoss`.

    Args:
        logits: ``[..., V]``, classes last.
        targets: ``[...]`` class indices or ``[..., V]`` soft targets.
        ignore_index: the class index to leave out.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: shapes that do not match, a class index out of range, an unknown reduction.

    Example:
        >>> import torch
        >>> dft_cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]), reduction="none")
        tensor([0.3466, 0.0000])
    """
    result: Tensor = DFTLoss(ignore_index=ignore_index, reduction=reduction)(logits, targets)
    return result


def focal_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    gamma: float = 2.0,
    alpha: float = 1.0,
    detach_weight: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Focal loss ``-alpha (1 - p)**gamma log p``; see :class:`~dft_lightning.losses.FocalLoss`.

    Args:
        logits: ``[..., V]``, classes last.
        targets: ``[...]`` class indices or ``[..., V]`` soft targets.
        gamma: focusing parameter; 0 is cross-entropy.
        alpha: constant factor.
        detach_weight: take the weight as a constant.
        ignore_index: the class index to leave out.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: as :func:`dft_cross_entropy`, and for ``gamma`` or ``alpha`` out of range.

    Example:
        >>> import torch
        >>> focal_cross_entropy(torch.zeros(1, 4), torch.tensor([1]), gamma=2.0)
        tensor(0.7798)
    """
    loss = FocalLoss(gamma, alpha, detach_weight, ignore_index=ignore_index, reduction=reduction)
    result: Tensor = loss(logits, targets)
    return result
