"""Buffers that one call leaves to the next."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_local = threading.local()


@contextmanager
def scratch(role: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """An uninitialised tensor for as long as the context lasts.

    On the CPU the memory of a role is kept for the thread's next call: a fresh page costs more than the arithmetic on
    it. Elsewhere torch's caching allocator does this already. Whoever keeps a tensor beyond the context must copy it.

    Args:
        role: what the buffer is for; one buffer is kept per role.
        shape: of the tensor.
        dtype: of the tensor.
        device: of the tensor.
    """
    if device.type != "cpu":
        yield torch.empty(shape, dtype=dtype, device=device)
        return
    kept: dict[str, Tensor] = _local.__dict__.setdefault("buffers", {})
    size = torch.Size(shape).numel() * dtype.itemsize
    # Taken out while it is in use, so that a nested call gets another.
    buffer = kept.pop(role, None)
    if buffer is None or buffer.numel() < size:
        buffer = None  # freed before the larger one is made
        with torch.inference_mode(False):  # an inference tensor could not be written to in training
            buffer = torch.empty(size, dtype=torch.uint8)
    try:
        yield buffer[:size].view(dtype).view(shape)
    finally:
        kept[role] = buffer


def release_scratch() -> None:
    """Free the buffers that this thread keeps between calls of the linear head."""
    _local.__dict__.pop("buffers", None)
