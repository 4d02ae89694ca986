"""The order of rows, which does not depend on the number of ranks, and each rank's share of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from dft_lightning.data.batches.collating import PADDING_ROW


class RowSampler(DistributedSampler[Any]):
    """Shares rows out among ranks so that a global step sees the same rows on any number of ranks.

    Where the rows do not divide evenly, ranks are filled up with rows that have no target. torch's sampler repeats
    rows instead, which counts them twice in an epoch's gradients and metrics. It is a ``DistributedSampler`` so that
    Lightning leaves it alone and sets its epoch.

    Its state is the epoch and how many of its rows all ranks have drawn together, and so good for any number of ranks.

    Args:
        dataset: the rows.
        num_replicas: number of ranks.
        rank: this rank.
        shuffle: a new order in each epoch, by ``seed`` and epoch alone.
        seed: of the order.
        lengths: of the rows: with them, rows of about the same length come together.
        group_size: how many; over all ranks.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = False,
        seed: int = 0,
        lengths: Tensor | None = None,
        group_size: int = 1,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.lengths = lengths
        self.group_size = group_size
        self._start = 0  # rows of this rank that the next iteration leaves out
        self._drawn = 0

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self._start = 0
        super().set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the rows drawn of it over all ranks."""
        return {"epoch": self.epoch, "rows": self._drawn * self.num_replicas}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Have the next iteration go on where :meth:`state_dict` was taken; later ones of other epochs are whole."""
        self.epoch = state_dict["epoch"]
        self._start = self._drawn = state_dict["rows"] // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        start, self._start = self._start, 0
        self._drawn = start
        for index in self._order()[start:]:
            self._drawn += 1
            yield index

    def _order(self) -> list[int]:
        """This rank's rows of the epoch."""
        size = len(self.dataset)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = torch.randperm(size, generator=generator) if self.shuffle else torch.arange(size)
        if self.lengths is not None:
            shuffled = _by_length(shuffled, self.lengths, self.group_size, generator if self.shuffle else None)
        order = shuffled.tolist()
        order += [PADDING_ROW] * (self.total_size - size)
        return order[self.rank :: self.num_replicas]


_POOLED_GROUPS = 50


def _by_length(order: Tensor, lengths: Tensor, group_size: int, generator: torch.Generator | None) -> Tensor:
    """Groups of about the same length, in a random order: sorted within stretches of 50 groups of the given order.

    The group with the longest row comes first, so that a run that will not fit ends at once; the one that is not full
    comes last.
    """
    stretches = torch.split(order, _POOLED_GROUPS * group_size)
    groups = [
        group
        for stretch in stretches
        for group in torch.split(stretch[lengths[stretch].argsort(descending=True, stable=True)], group_size)
    ]
    full = [group for group in groups if len(group) == group_size]
    rest = [group for group in groups if len(group) < group_size]
    if generator is not None and full:
        full = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        longest = max(range(len(full)), key=lambda i: int(lengths[full[i]].max()))
        full.insert(0, full.pop(longest))
    return torch.cat([*full, *rest]) if groups else order
