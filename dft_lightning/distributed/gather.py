"""Python objects from all ranks."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

T = TypeVar("T")


def gather_lists(items: list[T], world_size: int) -> list[T]:
    """The lists of all ranks, one after the other. A collective: call it on every rank."""
    if world_size == 1:
        return items
    parts: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
