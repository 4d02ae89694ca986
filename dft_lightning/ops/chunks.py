"""How many tokens go through a head at once, and how their logits lie in memory."""

from __future__ import annotations

import torch

# 2048 tokens of a vocabulary of 150,000 in half precision: what a chunk may always take.
DEFAULT_CHUNK_BYTES = 640 * 2**20

# Every chunk but the first reads and writes the weight's gradient in float32. At this many rows that takes a fifth of
# the time of the product which is added, on a GPU.
CUDA_CHUNK_ROWS = 4096

# Of a GPU's free memory, one part in as many may be what is kept of logits; float32 logits take a quarter of it more.
_SHARE = 4


def row_stride(vocabulary: int) -> int:
    """Elements from one row of logits to the next: whole vectors of 16, so that every row begins on one."""
    return -(-vocabulary // 16) * 16


def chunk_rows(
    num_tokens: int, row_bytes: int, buffers: int, device: torch.device, chunk_bytes: int | None, rows_for_weight: int
) -> int:
    """Rows of a chunk, even ones, so that the last is about as long as the others.

    Args:
        num_tokens: in all.
        row_bytes: of one token's logits in one buffer.
        buffers: side by side, which share the free memory.
        device: of the logits.
        chunk_bytes: at most what a buffer takes, or ``None``: :data:`DEFAULT_CHUNK_BYTES`, and where CUDA wants the
            weight's gradient more, at least 4096 rows, if they take no more than a quarter of the free memory.
        rows_for_weight: how many tokens are better in one chunk than in several for the weight's gradient; 0 where
            it is not wanted.
    """
    largest = (chunk_bytes or DEFAULT_CHUNK_BYTES) // row_bytes
    if chunk_bytes is None and device.type == "cuda":
        largest = _on_cuda(num_tokens, buffers * row_bytes, device, largest, rows_for_weight)
    return _even(num_tokens, max(1, largest))


def _on_cuda(num_tokens: int, row_bytes: int, device: torch.device, largest: int, rows_for_weight: int) -> int:
    """The first that fits: one chunk where it pays, 4096 and what is over, 4096, what every chunk may take."""
    chunks = 1 if num_tokens <= rows_for_weight else max(1, num_tokens // CUDA_CHUNK_ROWS)
    for rows in [_rounded(num_tokens, chunks), CUDA_CHUNK_ROWS] if rows_for_weight else []:
        # Few rows ask nothing: the driver's answer takes a fraction of a millisecond.
        if rows > largest and rows * row_bytes * _SHARE <= free_memory(device):
            return rows
    return largest


def free_memory(device: torch.device) -> int:
    """Bytes that a CUDA device has left, what torch's allocator holds in reserve included."""
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def _even(n: int, largest: int) -> int:
    """Chunks of nearly one size: a last one of a few tokens would cost as much as a full one."""
    return max(1, min(_rounded(n, max(1, -(-n // largest))), largest, n))


def _rounded(n: int, chunks: int) -> int:
    return -(-n // chunks // 64) * 64  # the product's own blocking
