"""Buffers that one call leaves to the next, and copies in another dtype that go through them a piece at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_PIECE_BYTES = 2**20
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


def slices(length: int, size: int) -> Iterator[slice]:
    """Of ``size`` each, the last of what is left."""
    for start in range(0, length, size):
        yield slice(start, min(length, start + size))


def add_(total: Tensor, addend: Tensor) -> None:
    """``total += addend``, both ``[n, m]``, the addend of a narrower dtype: torch would copy the whole of it first."""
    step = max(1, _PIECE_BYTES // (total.shape[1] * total.dtype.itemsize))
    with scratch("addend", (step, total.shape[1]), total.dtype, total.device) as piece:
        for rows in slices(len(total), step):
            part = addend[rows]
            total[rows].add_(piece[: len(part)].copy_(part))


def scaled(gradient: Tensor, factor: Tensor | float, dtype: torch.dtype) -> Tensor:
    """``gradient * factor`` in ``dtype``, rounded once; the tensor itself where there is nothing to do.

    Handing out the tensor itself is safe: autograd copies what somebody else holds before it adds to it.
    """
    on_host = gradient.device.type == "cpu"
    factor = float(factor) if on_host else factor
    if on_host and factor == 1.0 and dtype == gradient.dtype:
        return gradient
    out = torch.empty_like(gradient, dtype=dtype)
    if not on_host or dtype == gradient.dtype:
        return torch.mul(gradient, factor, out=out)
    if factor == 1.0:
        return out.copy_(gradient)
    # In pieces: torch would make a copy of the whole in the gradient's dtype first.
    size = max(1, min(out.numel(), _PIECE_BYTES // gradient.dtype.itemsize))
    with scratch("addend", (size,), gradient.dtype, gradient.device) as piece:
        for part, part_out in zip(torch.split(gradient.view(-1), size), torch.split(out.view(-1), size), strict=True):
            part_out.copy_(torch.mul(part, factor, out=piece[: len(part)]))
    return out
