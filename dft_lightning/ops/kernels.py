"""Which kernels take the rows of a head."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

from dft_lightning.ops import torch_kernels


def kernels_for(device: torch.device, dtype: torch.dtype) -> Any:
    """The module with ``row_moments``, ``row_softmax``, ``row_cross_entropy``, ``row_gradient_`` and
    ``column_largest``.

    By the device and the dtype of the products:
    Triton on CUDA (and ROCm); plain torch on the CPU, elsewhere, and for float64.
    """
    if device.type == "cuda" and dtype != torch.float64 and _has_triton():
        from dft_lightning.ops import triton_kernels

        return triton_kernels
    return torch_kernels


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None
