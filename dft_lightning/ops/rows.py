"""What is gathered from the rows of one chunk, by kernels and beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from dft_lightning.losses.statistics import entropy_of_largest, raised_dtype
from dft_lightning.ops.kernels import kernels_for
from dft_lightning.ops.products import HeadProducts
from dft_lightning.ops.reference import ReferenceHead, ReferenceRows
from dft_lightning.ops.row_math import Moments, kernel_moments_of
from dft_lightning.ops.settings import HeadSettings
from dft_lightning.ops.transform import LogitTransform


def chunk_moments(
    logits: Tensor,
    targets: Tensor,
    settings: HeadSettings,
    reference: tuple[Tensor, LogitTransform] | None,
) -> Moments:
    """All moments that the wanted statistics are made of.

    Args:
        logits: ``[c, V]`` of a chunk, not changed.
        targets: ``[c]``.
        settings: of the head.
        reference: logits ``[c, V]`` of a reference model and what they go through.
    """
    kernels = kernels_for(logits.device, logits.dtype)
    moments: Moments = kernels.row_moments(logits, targets, settings.transform, kernel_moments_of(settings.statistics))
    if (statistic := settings.statistics.get("top_k_entropy")) is not None:
        moments.top_k_entropy = _top_k_entropy(logits, settings.transform, **statistic.params)
    if reference is not None:
        moments.reference_kl, moments.reference_log_normalizer = kernels.row_divergence(
            logits, settings.transform, moments.log_normalizer, *reference
        )
    return moments


def _top_k_entropy(logits: Tensor, transform: LogitTransform, k: int) -> Tensor:
    """The transform keeps the order of logits (or reverses it), so that it is needed for ``k`` of them alone."""
    if 1 <= k < logits.shape[-1]:
        logits = _largest(logits, k) if transform.scale > 0 else -_largest(-logits, k)
    return entropy_of_largest(transform.apply_(logits.to(raised_dtype(logits.dtype), copy=True)), k)


_BLOCK = 128


def _largest(values: Tensor, k: int) -> Tensor:
    """The ``k`` largest of each row ``[n, V]``, in any order.

    They lie in the ``k`` blocks with the largest maxima, which cost a pass over the row; a selection among all of a
    vocabulary's logits takes several times as long.
    """
    whole = values.shape[-1] // _BLOCK * _BLOCK
    if whole // _BLOCK > k:
        blocks = values[:, :whole].view(len(values), -1, _BLOCK)
        best = blocks.amax(-1).topk(k, dim=-1, sorted=False).indices
        found = blocks.gather(1, best.unsqueeze(-1).expand(-1, -1, _BLOCK)).flatten(1)
        values = torch.cat([found, values[:, whole:]], dim=-1)
    return values.topk(k, dim=-1, sorted=False).values


def reference_logits(
    products: HeadProducts | None, reference: ReferenceHead | None, rows: slice
) -> tuple[Tensor, LogitTransform] | None:
    """A chunk's logits of the reference model, where they are wanted."""
    if products is None or reference is None:
        return None
    return products.logits(rows), reference.transform


def reference_rows(
    reference: tuple[Tensor, LogitTransform] | None, log_normalizer: Tensor | None
) -> ReferenceRows | None:
    """The same for the gradient, which needs their normaliser."""
    if reference is None:
        return None
    assert log_normalizer is not None
    return ReferenceRows(*reference, log_normalizer)
