"""Where a batch's targets, documents and padding are: what the host has to know of it, so that it need not ask."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from dft_lightning.errors import InputError
from dft_lightning.losses.base import IGNORE_INDEX, sequence_index_of

KEY = "layout"
"""Of a batch, where it has one."""


class BatchLayout:
    """What is known of a batch where it is made, on the host. Its tensors move to the device with the batch.

    A batch that is changed afterwards is another one: leave its ``layout`` out, and it is made anew, which waits for
    the device. :meth:`differs` finds out, without waiting.

    Attributes:
        shape: of the batch, ``(B, T)``.
        target_index: ``[n]``, positions in the flattened batch of the tokens whose successors are targets.
        lengths: ``[documents]``, int32, of joined rows the tokens of each document (a row begins one, and what fills it
            up are documents of one token); of padded rows ``[B]`` those of each that are no padding. ``None`` where
            rows are padded otherwise than on the right.
        num_tokens: tokens that are no padding.
        smallest_target: the smallest class index among the targets, 0 without any.
        largest_target: the largest one, -1 without any.
        joined: whether rows are of whole documents.
        documents: ``lengths`` as the host has them.
    """

    def __init__(
        self,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> None:
        """Of a batch's tensors ``[B, T]`` on the host; ``num_tokens`` where joined rows end in padding."""
        self.shape = (labels.shape[0], labels.shape[1])
        kept = labels[:, 1:] != IGNORE_INDEX
        rows, columns = kept.nonzero(as_tuple=True)
        self.target_index = rows * labels.shape[1] + columns
        targets = labels[:, 1:][kept]
        self.smallest_target = int(targets.min()) if self.num_targets else 0
        self.largest_target = int(targets.max()) if self.num_targets else -1
        self.joined = position_ids is not None
        documents = document_lengths(position_ids) if position_ids is not None else _rows(self.shape, attention_mask)
        self.documents = documents
        self.lengths = None if documents is None else torch.tensor(documents, dtype=torch.int32)
        if num_tokens is None:
            flat = attention_mask is not None and attention_mask.ndim == 2
            num_tokens = int(torch.count_nonzero(cast(Tensor, attention_mask))) if flat else labels.numel()
        self.num_tokens = num_tokens

    def _with_tensors(self, move: Callable[[Tensor], Tensor]) -> BatchLayout:
        moved = object.__new__(type(self))
        values = {name: move(value) if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        moved.__dict__.update(values)
        return moved

    def to(self, device: torch.device | str | int, **kwargs: Any) -> BatchLayout:
        """With its tensors on a device; to one with a memory of its own without waiting, as batches go there."""
        kwargs.setdefault("non_blocking", torch.device(device).type != "cpu")
        return self._with_tensors(lambda tensor: tensor.to(device, **kwargs))

    def pin_memory(self) -> BatchLayout:
        """With its tensors in pinned memory, as loaders ask for."""
        return self._with_tensors(Tensor.pin_memory)

    def clone(self) -> BatchLayout:
        """With copies of its tensors."""
        return self._with_tensors(Tensor.clone)

    def __getitem__(self, part: Any) -> None:
        """Of a part of a batch, which may be taken of all that it holds alike, there is none: it is made anew."""

    def __iter__(self) -> Iterator[None]:
        """Over nothing: Lightning goes through a batch for tensors whose first dimension is its size."""
        return iter(())

    @property
    def num_targets(self) -> int:
        """How many targets there are."""
        return self.target_index.numel()

    @property
    def max_length(self) -> int:
        """Tokens of the longest document or row."""
        return self.shape[1] if self.documents is None else max(self.documents, default=0)

    @property
    def cu_seq_lens(self) -> Tensor:
        """``[documents + 1]``, int32: where each document of joined rows begins and the last ends."""
        assert self.lengths is not None
        return torch.nn.functional.pad(self.lengths.cumsum(0, dtype=torch.int32), (1, 0))

    def sequence_index(self) -> Tensor:
        """``[B * T]``: the number of the document, or of the row, of each token."""
        device = self.target_index.device
        if not self.joined:
            return sequence_index_of(torch.Size(self.shape), device)
        assert self.lengths is not None
        numbers = torch.arange(len(self.lengths), device=device)
        return numbers.repeat_interleave(self.lengths, output_size=self.shape[0] * self.shape[1])

    def differs(self, batch: Mapping[str, Any], num_classes: int) -> Tensor:
        """Whether this is another batch's layout: a scalar bool tensor on the device.

        Args:
            batch: ``labels``, ``attention_mask`` and ``position_ids`` are looked at.
            num_classes: targets must be less.
        """
        labels, positions = batch["labels"], batch.get("position_ids")
        if self.joined != (positions is not None):
            return torch.ones((), dtype=torch.bool, device=labels.device)
        found: Tensor = (labels[:, 1:] != IGNORE_INDEX).sum() != self.num_targets
        if self.num_targets:
            targets = labels.flatten()[self.target_index + 1]
            found = found | (targets.amin() < 0) | (targets.amax() >= num_classes)
        if self.lengths is not None and positions is not None:
            starts = self.cu_seq_lens[:-1].repeat_interleave(self.lengths, output_size=positions.numel())
            own = torch.arange(positions.numel(), device=positions.device) - starts
            found = found | (own != positions.flatten()).any()
        elif self.lengths is not None and (mask := batch.get("attention_mask")) is not None:
            own = torch.arange(self.shape[1], device=mask.device) < self.lengths.unsqueeze(1)
            found = found | ((mask != 0) != own).any()
        return found


def layout_of(batch: Mapping[str, Any]) -> BatchLayout:
    """A batch's own layout; without one it is made, which waits for the device.

    Raises:
        InputError: it is of a batch of another shape.
    """
    labels, found = batch["labels"], batch.get(KEY)
    if isinstance(found, BatchLayout):
        if found.shape != tuple(labels.shape):
            raise InputError(
                f"labels are {list(labels.shape)} and the batch's {KEY!r} is of {list(found.shape)}: leave that out "
                "where you change a batch, and it is made anew"
            )
        return found
    mask, positions, tokens = (batch.get(name) for name in ("attention_mask", "position_ids", "num_tokens"))
    mask, positions = (None if each is None else each.cpu() for each in (mask, positions))
    return BatchLayout(labels.cpu(), mask, positions, None if tokens is None else int(tokens)).to(labels.device)


def with_layout(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch that has one. Raises as :func:`layout_of`."""
    return {**batch, KEY: layout_of(batch)}


def document_lengths(position_ids: Tensor) -> list[int]:
    """Tokens of each document of rows: one begins wherever ``position_ids`` ``[B, T]`` do not go up by one.

    Every row begins one, at position 0.
    """
    positions = position_ids.flatten()
    starts = (positions.diff(prepend=positions[:1] - 2) != 1).nonzero().flatten().tolist()
    return [end - start for start, end in itertools.pairwise([*starts, len(positions)])]


def _rows(shape: tuple[int, int], attention_mask: Tensor | None) -> list[int] | None:
    """Tokens of each row that are no padding, where all padding is on the right."""
    if attention_mask is None:
        return [shape[1]] * shape[0]
    if attention_mask.ndim != 2:  # which says more than where padding is
        return None
    real = attention_mask != 0
    lengths: list[int] = real.sum(1).tolist()
    right = torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)
    return lengths if bool((right == real).all()) else None


def shifted(values: Tensor, last: float = 0) -> Tensor:
    """Each token's successor's value, ``[B, T]``, so that hidden states need not be copied."""
    return torch.cat([values[:, 1:], values.new_full((len(values), 1), last)], dim=1)
