"""What the backward passes of the linear head share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dft_lightning.ops.kernels import kernels_for
from dft_lightning.ops.products import HeadProducts
from dft_lightning.ops.reference import ReferenceRows
from dft_lightning.ops.row_math import Coefficients
from dft_lightning.ops.scratch import scratch
from dft_lightning.ops.settings import HeadSettings

_PIECE_BYTES = 2**20


def refuse_double_backward() -> None:
    """Raise where a second derivative is asked for: gradients that are computed in place have none."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused linear head has no second derivative (create_graph=True): use logits, with logits_token_loss "
            "or head: full"
        )


def add_chunk_gradients(
    products: HeadProducts,
    settings: HeadSettings,
    rows: slice,
    logits: Tensor,
    targets: Tensor,
    log_prob: Tensor,
    log_normalizer: Tensor,
    coefficients: Coefficients,
    reference: ReferenceRows | None,
) -> None:
    """Turn a chunk's logits into their gradient, and add what it contributes to the others.

    Args:
        products: of the head.
        settings: of the head.
        rows: the chunk.
        logits: ``[c, V]`` of the chunk, overwritten.
        targets: ``[c]``.
        log_prob: ``[c]`` of the targets.
        log_normalizer: ``[c]``.
        coefficients: of the chunk's rows.
        reference: the reference model's rows, where the coefficients have a part for them.
    """
    kernels_for(products.device, settings.dtype).row_gradient_(
        logits,
        targets,
        settings.transform,
        log_prob,
        log_normalizer,
        coefficients.scaled(settings.float16_factor),
        products.bias_gradient,
        reference,
    )
    products.add_gradients(rows, logits)


def returned_gradients(
    gradients: Iterable[Tensor | None],
    dtypes: Iterable[torch.dtype | None],
    upstream: Tensor | float,
    settings: HeadSettings,
) -> tuple[Tensor | None, ...]:
    """Accumulated gradients times the upstream gradient, each in the dtype of its leaf."""
    factor = upstream / settings.float16_factor
    return tuple(
        None if gradient is None or dtype is None else scaled(gradient, factor, dtype)
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    )


def scaled(gradient: Tensor, factor: Tensor | float, dtype: torch.dtype) -> Tensor:
    """``gradient * factor`` in ``dtype``, rounded once; the tensor itself where there is nothing to do.

    Handing out the tensor itself is safe: autograd copies what somebody else holds before it adds to it.
    """
    if gradient.device.type != "cpu":
        out = torch.empty_like(gradient, dtype=dtype)
        return torch.mul(gradient, factor, out=out)
    factor = float(factor)
    if factor == 1.0 and dtype == gradient.dtype:
        return gradient
    out = torch.empty_like(gradient, dtype=dtype)
    if dtype == gradient.dtype:
        return torch.mul(gradient, factor, out=out)
    if factor == 1.0:
        return out.copy_(gradient)
    # In pieces: torch would make a float32 copy of the whole first.
    flat, flat_out = gradient.view(-1), out.view(-1)
    size = max(1, min(flat.numel(), _PIECE_BYTES // gradient.dtype.itemsize))
    with scratch("addend", (size,), gradient.dtype, gradient.device) as piece:
        for start in range(0, flat.numel(), size):
            part = flat[start : start + size]
            flat_out[start : start + size].copy_(torch.mul(part, factor, out=piece[: len(part)]))
    return out
