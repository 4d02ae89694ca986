"""The order of rows, which does not depend on the number of ranks, and each rank's share of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from dft_lightning.data.batches.collating import PADDING_ROW
from dft_lightning.data.batches.step_dealing import RowDealing, TokenDealing


class RowSampler(DistributedSampler[Any]):
    """Shares rows out among ranks so that a global step sees the same rows on any number of ranks.

    Where the rows do not divide evenly, ranks are filled up with rows that have no target. torch's sampler repeats
    rows instead, which counts them twice in an epoch's gradients and metrics. It is a ``DistributedSampler`` so that
    Lightning leaves it alone and sets its epoch.

    Its state is the epoch and how many of its rows all ranks have drawn together, of dealt rows those of whole steps,
    and so good for any number of ranks.

    Args:
        dataset: the rows.
        num_replicas: number of ranks.
        rank: this rank.
        shuffle: a new order in each epoch, by ``seed`` and epoch alone.
        seed: of the order.
        lengths: of the rows: with them, rows of about the same length come together.
        group_size: how many; over all ranks.
        dealing: deals the rows of each step; ``None`` deals them in turn.
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
        dealing: RowDealing | TokenDealing | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.lengths = lengths
        self.group_size = group_size
        self.dealing = dealing
        self._start = 0  # rows of all ranks that the next iteration leaves out
        self._drawn = 0  # rows of all ranks

    def __len__(self) -> int:
        """What an iteration yields: rows, or micro-batches of a number of tokens."""
        if isinstance(self.dealing, TokenDealing):
            return self.dealing.micro_batches_of(len(self.dataset))  # type: ignore[arg-type]
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self._start = 0
        super().set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the rows drawn of it over all ranks."""
        return {"epoch": self.epoch, "rows": self._drawn}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Have the next iteration go on where :meth:`state_dict` was taken; later ones of other epochs are whole."""
        self.epoch, rows = state_dict["epoch"], state_dict["rows"]
        if not isinstance(self.dealing, TokenDealing):  # which fills ranks up step by step
            rows -= rows % self.num_replicas
        self._start = self._drawn = rows

    def __iter__(self) -> Iterator[Any]:
        start, self._start = self._start, 0
        self._drawn = start
        if self.dealing is not None:
            yield from self._dealt(start, self.dealing)
            return
        for index in self._filled()[start + self.rank :: self.num_replicas]:
            self._drawn += self.num_replicas
            yield index

    def _dealt(self, start: int, dealing: RowDealing | TokenDealing) -> Iterator[Any]:
        """This rank's part of each step."""
        in_batches = isinstance(dealing, TokenDealing)
        order = self.order() if isinstance(dealing, TokenDealing) else self._filled()[: dealing.limit]
        first, size = start, dealing.rows_of_step(self.num_replicas, self.epoch)
        while first < len(order):  # where a run goes on in steps of another size, its first one is what is left of one
            step = order[first : first + size - first % size]
            own = dealing.deal(step, self.num_replicas)[self.rank]
            *others, last = own if in_batches else [row for rows in own for row in rows]
            yield from others
            first = self._drawn = first + len(step)
            yield last

    def _filled(self) -> list[int]:
        """The rows of the epoch, as many for each rank."""
        order = self.order()
        return order + [PADDING_ROW] * (self.total_size - len(order))

    def order(self) -> list[int]:
        """The rows of the epoch in their order over all ranks."""
        size = len(self.dataset)  # type: ignore[arg-type]
        return epoch_order(size, self.shuffle, self.seed, self.epoch, self.lengths, self.group_size)


class BatchSampler(DistributedSampler[Any]):
    """Whole batches, which ranks take in turn: the same ones in the same order whatever the number of ranks.

    Where batches do not divide evenly, ranks are filled up with one of a row that has no target. It is a
    ``DistributedSampler`` so that Lightning leaves it alone.

    Args:
        dataset: the rows.
        batch_size: rows of a batch.
        num_replicas: number of ranks.
        rank: this rank.
        lengths: of the rows: with them, rows of about the same length come together, the longest first. ``None``
            leaves them in their order.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, num_replicas: int, rank: int, lengths: Tensor | None
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        self.batch_size = batch_size
        self.lengths = lengths
        size = len(dataset)  # type: ignore[arg-type]
        self.num_samples = -(-size // (batch_size * num_replicas))
        self.total_size = self.num_samples * num_replicas

    def __iter__(self) -> Iterator[Any]:
        size = len(self.dataset)  # type: ignore[arg-type]
        order = torch.arange(size) if self.lengths is None else self.lengths.argsort(descending=True, stable=True)
        batches = [batch.tolist() for batch in torch.split(order, self.batch_size) if len(batch)]
        batches += [[PADDING_ROW]] * (self.total_size - len(batches))
        return iter(batches[self.rank :: self.num_replicas])


def epoch_order(
    size: int, shuffle: bool, seed: int, epoch: int, lengths: Tensor | None = None, group_size: int = 1
) -> list[int]:
    """The rows of an epoch in their order over all ranks; see :class:`RowSampler`."""
    generator = torch.Generator().manual_seed(seed + epoch)
    shuffled = torch.randperm(size, generator=generator) if shuffle else torch.arange(size)
    if lengths is not None:
        shuffled = _by_length(shuffled, lengths, group_size, generator if shuffle else None)
    found: list[int] = shuffled.tolist()
    return found


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
