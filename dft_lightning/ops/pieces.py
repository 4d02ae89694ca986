"""What is done to a tensor a piece at a time, and the memory that is kept for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

PIECE_BYTES = 2**20

# Elements that torch goes through on one thread. Beside other busy processes an operation of a millisecond on two
# threads takes ten, for the first waits until the second has had its turn; from some threads on they gain more.
_ALONE, _FEW_THREADS = 2**14, 4

_PAGE_BYTES = 4096  # or more, of huge pages

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


def row_pieces(num_rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows of ``width`` elements, for operations that are short beside what waiting for a thread may take.

    On the CPU each piece is one thread's, unless there are many threads; elsewhere all rows are one piece.
    """
    few = device.type == "cpu" and torch.get_num_threads() <= _FEW_THREADS
    return slices(num_rows, max(1, _ALONE // width) if few else max(1, num_rows))


def times_rows(matrix: Tensor, factor: Tensor, *, out: Tensor) -> Tensor:
    """``out = matrix * factor`` with a factor ``[n, 1]`` of each row, rounded once."""
    for part in row_pieces(len(matrix), matrix.shape[1], matrix.device):
        torch.mul(matrix[part], factor[part], out=out[part])
    return out


def filled(length: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of one value."""
    out = torch.empty(length, dtype=dtype, device=device)
    for part in row_pieces(length, 1, device):
        out[part].fill_(value)
    return out


def with_pages(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor whose memory the system has given already.

    It gives it at the first touch. Where that is in the middle of a product, on the CPU, the product's threads wait for
    each other's pages, and often end up on one core: every third product took twice as long, beside others and alone.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        one_of_each_page = out.view(-1)[:: _PAGE_BYTES // dtype.itemsize]
        for part in row_pieces(len(one_of_each_page), 1, device):
            one_of_each_page[part].zero_()
    return out


def add_(total: Tensor, addend: Tensor) -> None:
    """``total += addend``, both ``[n, m]``, the addend of a narrower dtype: torch would copy the whole of it first."""
    step = max(1, PIECE_BYTES // (total.shape[1] * total.dtype.itemsize))
    with scratch("addend", (step, total.shape[1]), total.dtype, total.device) as piece:
        for rows in slices(len(total), step):
            part = addend[rows]
            total[rows].add_(piece[: len(part)].copy_(part))


def scaled(gradient: Tensor, factor: Tensor | float, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """``gradient * factor`` in ``dtype``, rounded once; the tensor itself where there is nothing to do.

    Handing out the tensor itself is safe: autograd copies what somebody else holds before it adds to it. Scaling it
    ``in_place`` is where nobody will ask for it again.
    """
    on_host = gradient.device.type == "cpu"
    factor = float(factor) if on_host else factor
    if not isinstance(factor, Tensor) and factor == 1.0 and dtype == gradient.dtype:
        return gradient
    out = gradient if in_place and dtype == gradient.dtype else torch.empty_like(gradient, dtype=dtype)
    if not on_host or dtype == gradient.dtype:
        return multiplied(gradient, factor, out=out)
    if factor == 1.0:
        return out.copy_(gradient)
    # In pieces: torch would make a copy of the whole in the gradient's dtype first.
    size = max(1, min(out.numel(), PIECE_BYTES // gradient.dtype.itemsize))
    with scratch("addend", (size,), gradient.dtype, gradient.device) as piece:
        for part, part_out in zip(torch.split(gradient.view(-1), size), torch.split(out.view(-1), size), strict=True):
            part_out.copy_(torch.mul(part, factor, out=piece[: len(part)]))
    return out


def multiplied(gradient: Tensor, factor: Tensor | float, *, out: Tensor) -> Tensor:
    """``out = gradient * factor``, rounded once, whatever the factor's dtype."""
    if isinstance(factor, Tensor):
        factor = factor.reshape(1)  # torch would round a scalar tensor to the gradient's dtype first
    return torch.mul(gradient, factor, out=out)
