"""Per-token results of chunks, put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dft_lightning.losses.statistics import raised_dtype


def concatenated(
    chunks: Sequence[Mapping[str, Any]], names: Iterable[str], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """``[n]`` tensors of the named results in the order of the names; empty ones where there is no chunk.

    Args:
        chunks: results of each chunk by name.
        names: which; ``correct`` is bool.
        dtype: of the logits.
        device: of the results.
    """
    if chunks:
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in names}
    kinds = {name: torch.bool if name == "correct" else raised_dtype(dtype) for name in names}
    return {name: torch.empty(0, dtype=kind, device=device) for name, kind in kinds.items()}
