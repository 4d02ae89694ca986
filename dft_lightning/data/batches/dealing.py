"""The rows of an optimizer step dealt to ranks and micro-batches by their tokens, so that ranks hardly wait.

Within a step any row may go anywhere: the gradient is that of the mean over all its tokens. Ranks wait for each other
at the end of a step, and where parameters are sharded in every micro-batch. So micro-batches of the same number are
made alike over ranks first, and what is left is evened out over the step.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Integers = np.ndarray[Any, np.dtype[np.int64]]
Dealt = list[list[Integers]]
"""Of each rank the rows of each of its micro-batches, as positions in what was dealt."""


def deal_rows(lengths: Integers, ranks: int, sizes: Sequence[int], padded: bool, lockstep: bool = False) -> Dealt:
    """Deal rows to micro-batches of given numbers of rows.

    Args:
        lengths: tokens of each row, ``ranks * sum(sizes)`` of them.
        ranks: how many there are.
        sizes: rows of each micro-batch of a rank.
        padded: whether a micro-batch is padded to its longest row: rows of about the same length then come together.
            Otherwise they are joined, and micro-batches are to have about the same number of tokens.
        lockstep: whether ranks wait for each other after every micro-batch, as where parameters are sharded: then
            those of the same number are made alike, and not what ranks have in all.

    Example:
        >>> lengths = np.array([9, 1, 5, 5, 2, 8, 6, 4])
        >>> [[lengths[rows].tolist() for rows in rank] for rank in deal_rows(lengths, 2, [2, 2], padded=False)]
        [[[9, 1], [6, 4]], [[8, 2], [5, 5]]]
        >>> [[lengths[rows].tolist() for rows in rank] for rank in deal_rows(lengths, 2, [2, 2], padded=True)]
        [[[9, 8], [2, 1]], [[6, 5], [5, 4]]]
    """
    layers = np.argsort(-lengths, kind="stable").reshape(-1, ranks)  # each of rows of about the same length
    if padded:
        stops = np.cumsum(sizes)
        columns = [
            list(layers[stop - size : stop].reshape(ranks, size)) for size, stop in zip(sizes, stops, strict=True)
        ]
    else:
        columns = [_alike(layers[chosen], lengths) for chosen in _spread(lengths[layers].sum(1), sizes)]
    return _to_ranks(columns, lengths, padded, lockstep)


def deal_tokens(
    lengths: Integers, ranks: int, micro_batches: int, max_tokens: int, padded: bool, lockstep: bool = False
) -> Dealt | None:
    """Deal rows to micro-batches of any number of rows, and of at most ``max_tokens`` tokens, padding included.

    Returns:
        As :func:`deal_rows`; a micro-batch may have no row. ``None`` where rows do not fit.
    """
    bins = (_fill_padded if padded else _fill_joined)(lengths, ranks * micro_batches, max_tokens)
    if bins is None:
        return None
    bins.sort(key=lambda rows: -micro_batch_tokens(rows, lengths, padded))
    columns = [bins[start : start + ranks] for start in range(0, len(bins), ranks)]
    return _to_ranks(columns, lengths, padded, lockstep, max_tokens)


def fits(lengths: Integers, micro_batches: int, max_tokens: int, padded: bool) -> bool:
    """Whether :func:`deal_tokens` finds room for rows in so many micro-batches of all ranks."""
    if padded:
        descending = -np.sort(-lengths)
        return _stretches(descending, max_tokens, micro_batches) is not None
    return _heaped(lengths, micro_batches, max_tokens) is not None


def waiting(dealt: Dealt, lengths: Integers, padded: bool) -> tuple[float, float]:
    """How much longer a step takes than its mean rank needs, by tokens: 0.25 is a quarter.

    Returns:
        Where ranks wait at its end alone, and where they wait after every micro-batch.
    """
    costs = np.array([[micro_batch_tokens(rows, lengths, padded) for rows in rank] for rank in dealt], np.float64)
    of_rank = costs.sum(1)
    return float(of_rank.max() / of_rank.mean() - 1), float(costs.max(0).sum() / costs.mean(0).sum() - 1)


def micro_batch_tokens(rows: Integers, lengths: Integers, padded: bool) -> int:
    """Tokens of a micro-batch, padding included."""
    if not len(rows):
        return 0
    return int(lengths[rows].max()) * len(rows) if padded else int(lengths[rows].sum())


def _spread(weights: Integers, sizes: Sequence[int]) -> list[list[int]]:
    """Layers, longest first, to micro-batches: each to the one that is furthest below its share of all tokens."""
    shares = np.array(sizes) * (weights.sum() / sum(sizes))
    left, found = list(sizes), [list[int]() for _ in sizes]
    for layer, weight in enumerate(weights.tolist()):
        chosen = max((i for i, room in enumerate(left) if room), key=lambda i: shares[i])
        found[chosen].append(layer)
        shares[chosen] -= weight
        left[chosen] -= 1
    return found


def _alike(layers: Integers, lengths: Integers) -> list[Integers]:
    """Rows ``[b, ranks]`` to micro-batches of ``b`` rows, one of each layer, with sums that are alike."""
    totals = np.zeros(layers.shape[1], np.int64)
    found = np.empty_like(layers.T)
    for number, layer in enumerate(layers):
        order = np.argsort(totals, kind="stable")  # the longest row to the shortest sum
        found[order, number] = layer
        totals[order] += lengths[layer]
    bins = list(found)
    _even_out(bins, lengths)
    return bins


def _lower_columns(dealt: Dealt, lengths: Integers, limit: float) -> None:
    """Lower the largest of the micro-batches of each number, in place: a row of it for a shorter one of another number,
    where the largest there does not grow by as much, and none beyond ``limit``."""
    ranks, numbers = len(dealt), len(dealt[0])
    bins = [rows for rank in dealt for rows in rank]
    flat = np.concatenate(bins)
    place = np.repeat(np.arange(len(bins)), [len(rows) for rows in bins])
    costs = np.array([int(lengths[rows].sum()) for rows in bins])
    column, done = np.arange(len(bins)) % numbers, np.zeros(numbers, bool)
    for _ in range(4 * len(bins)):
        highest = costs.reshape(ranks, numbers).max(0)
        waits = np.where(done, -1, highest * ranks - costs.reshape(ranks, numbers).sum(0))
        if (number := int(waits.argmax())) < 0 or waits[number] < 0:
            break
        of_column = costs.reshape(ranks, numbers)[:, number]
        high = int(of_column.argmax()) * numbers + number
        room = costs[high] - np.partition(of_column, -2)[-2] if ranks > 1 else 0
        own, others = np.flatnonzero(place == high), np.flatnonzero(column[place] != number)
        differences = lengths[flat[own]][:, None] - lengths[flat[others]][None]
        raised = np.maximum(costs[place[others]] + differences - highest[column[place[others]]], 0)
        may = (differences > 0) & (costs[place[others]] + differences <= limit)
        gains = np.where(may, np.minimum(differences, room) - raised, 0)
        if not gains.size or gains.max() <= 0:
            done[number] = True
            continue
        one, other = np.unravel_index(int(gains.argmax()), gains.shape)
        moved, at, to = int(differences[one, other]), own[one], others[other]
        flat[at], flat[to] = flat[to], flat[at]
        costs[high] -= moved
        costs[place[to]] += moved
    parts = np.split(flat, np.cumsum([len(rows) for rows in bins])[:-1])
    for rank in range(ranks):
        dealt[rank] = parts[rank * numbers : (rank + 1) * numbers]


def _even_out(bins: list[Integers], lengths: Integers, numbers: list[Integers] | None = None) -> None:
    """Swap rows between the largest and the smallest of some sums, in place, until that brings nothing.

    Args:
        bins: rows of each.
        lengths: tokens of rows.
        numbers: of each bin the micro-batch of each of its places, where rows may go to one of the same number alone.
    """
    totals = np.array([int(lengths[rows].sum()) for rows in bins])
    for _ in range(4 * len(bins)):
        high, low = int(totals.argmax()), int(totals.argmin())
        may = True if numbers is None else numbers[high][:, None] == numbers[low][None]
        if not (moved := _swap(bins[high], bins[low], lengths, int(totals[high] - totals[low]), may)):
            break
        totals[high] -= moved
        totals[low] += moved


def _swap(high: Integers, low: Integers, lengths: Integers, gap: int, may: Any) -> int:
    """Swap the pair of rows that brings two sums ``gap`` apart nearest to each other.

    Returns:
        By how much less the higher one is; 0 where no swap helps.
    """
    if not len(high) or not len(low):
        return 0
    differences = lengths[high][:, None] - lengths[low][None]
    distance = np.where(may & (differences > 0) & (differences < gap), np.abs(2 * differences - gap), gap)
    place = np.unravel_index(int(distance.argmin()), distance.shape)
    if distance[place] >= gap:
        return 0
    one, other = int(place[0]), int(place[1])
    high[one], low[other] = low[other], high[one]
    return int(differences[place])


def _to_ranks(
    columns: list[list[Integers]], lengths: Integers, padded: bool, lockstep: bool, limit: float = math.inf
) -> Dealt:
    """Micro-batches of the same number to ranks: the largest to the rank that has least so far, then pairs swapped.
    Of joined ones, then rows, as long as none gets more tokens than ``limit``."""
    ranks = len(columns[0])
    totals = np.zeros(ranks, np.int64)
    costs = np.zeros((len(columns), ranks), np.int64)
    dealt: Dealt = [[] for _ in range(ranks)]
    for number, column in enumerate(columns):
        by_cost = sorted(column, key=lambda rows: -micro_batch_tokens(rows, lengths, padded))
        for rank, rows in zip(np.argsort(totals, kind="stable").tolist(), by_cost, strict=True):
            dealt[rank].append(rows)
            costs[number, rank] = micro_batch_tokens(rows, lengths, padded)
        totals = costs.sum(0)
    for _ in range(4 * ranks):
        totals = costs.sum(0)
        high, low = int(totals.argmax()), int(totals.argmin())
        gap, gains = int(totals[high] - totals[low]), costs[:, high] - costs[:, low]
        distance = np.where((gains > 0) & (gains < gap), np.abs(2 * gains - gap), gap)
        number = int(distance.argmin())
        if distance[number] >= gap:
            break
        costs[number, [high, low]] = costs[number, [low, high]]
        dealt[high][number], dealt[low][number] = dealt[low][number], dealt[high][number]
    if not padded:
        (_lower_columns if lockstep else _swap_rows)(dealt, lengths, limit)
    return dealt


def _swap_rows(dealt: Dealt, lengths: Integers, limit: float) -> None:
    """Even out what ranks have in all, by swapping rows of micro-batches of the same number, in place; not where one
    would have more tokens than ``limit``."""
    sizes = [[len(rows) for rows in rank] for rank in dealt]
    flat = [np.concatenate(rank) for rank in dealt]
    _even_out(flat, lengths, [np.repeat(np.arange(len(each)), each) for each in sizes])
    found = [np.split(rows, np.cumsum(each)[:-1]) for rows, each in zip(flat, sizes, strict=True)]
    if all(int(lengths[rows].sum()) <= limit for rank in found for rows in rank):
        dealt[:] = found


def _heaped(lengths: Integers, number: int, max_tokens: int) -> list[list[int]] | None:
    """Rows to ``number`` sums: the longest row left to the smallest; ``None`` where one is too large."""
    heap = [(0, place) for place in range(number)]
    found: list[list[int]] = [[] for _ in range(number)]
    for row in np.argsort(-lengths, kind="stable").tolist():
        total, place = heapq.heappop(heap)
        total += int(lengths[row])
        if total > max_tokens:
            return None
        found[place].append(row)
        heapq.heappush(heap, (total, place))
    return found


def _fill_joined(lengths: Integers, number: int, max_tokens: int) -> list[Integers] | None:
    """Rows to ``number`` sums that are alike."""
    found = _heaped(lengths, number, max_tokens)
    if found is None:
        return None
    bins = [np.array(rows, np.int64) for rows in found]
    _even_out(bins, lengths)  # none is larger afterwards
    return bins


def _stretches(descending: Integers, limit: int, number: int) -> list[int] | None:
    """Where stretches of rows begin whose number times longest is at most ``limit``; ``None`` for more than ``number``
    of them."""
    starts, start = list[int](), 0
    while start < len(descending):
        if len(starts) == number or descending[start] > limit:
            return None
        starts.append(start)
        start += limit // int(descending[start])
    return starts


def _fill_padded(lengths: Integers, number: int, max_tokens: int) -> list[Integers] | None:
    """Rows by their length, cut into at most ``number`` stretches, the costliest as cheap as can be."""
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    if _stretches(descending, max_tokens, number) is None:
        return None
    low, high = int(descending[0]), max_tokens
    while low < high:
        middle = (low + high) // 2
        if _stretches(descending, middle, number) is None:
            low = middle + 1
        else:
            high = middle
    starts = _stretches(descending, high, number)
    assert starts is not None
    return [*np.split(order, starts[1:]), *(order[:0] for _ in range(number - len(starts)))]
