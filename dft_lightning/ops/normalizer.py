"""What a summed loss is divided by."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_normalizer(normalizer: Tensor | float | None, num_tokens: int, dtype: torch.dtype) -> Tensor | float:
    """One over the normaliser: a number, or a scalar tensor of ``dtype`` that is not waited for.

    Without tokens it is 1, whatever the normaliser: the sum is 0, and 0 over a count of 0 would be nan.

    Raises:
        ValueError: a normaliser of 0, of more than one element, or with a gradient, which would be lost.
    """
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must be a number or a scalar tensor, got shape {list(normalizer.shape)}")
        if normalizer.requires_grad:
            raise ValueError("no gradient flows into normalizer: pass normalizer.detach()")
    elif normalizer == 0 and num_tokens > 0:
        raise ValueError(f"normalizer is 0, with {num_tokens} target tokens")
    if normalizer is None or num_tokens == 0:
        return 1.0
    return 1.0 / (normalizer.reshape(()).to(dtype) if isinstance(normalizer, Tensor) else float(normalizer))
