"""Several sources as one."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any, Literal

from dft_lightning.data.rows.identity import known_by
from dft_lightning.data.rows.sources import Row, RowSource, as_source
from dft_lightning.errors import InputError
from dft_lightning.metrics.exact_sums import MAX_SOURCES


class MixedRows(RowSource):
    """Rows of several named sources, whose ``nll`` and ``loss`` are logged by name.

    Without ``weights`` it has every row of every source once. With them each row is drawn from a source with that
    probability, in the source's own order.

    Args:
        sources: by name: a path, hub name or source.
        weights: by name, how often a source is drawn from; they need not add up to one. 0 leaves a source out.
        stopping_strategy: ``"first_exhausted"`` ends where the source that is drawn has no row left;
            ``"all_exhausted"`` begins such a source again, and ends when each has been through.
        seed: of the draws.
        split: of hub datasets and saved ones that are given by name.

    Raises:
        ValueError: no source, weights of others than the sources, negative ones, or none above zero.

    Example:
        >>> from dft_lightning.data import ArithmeticRows
        >>> parts = {"easy": ArithmeticRows(6, max_digits=3), "hard": ArithmeticRows(6, min_digits=5)}
        >>> [number for number, _ in MixedRows(parts, weights={"easy": 3, "hard": 1}).rows()][:4]
        ['hard:1', 'hard:2', 'easy:1', 'easy:2']
    """

    def __init__(
        self,
        sources: dict[str, RowSource | str],
        weights: dict[str, float] | None = None,
        stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted",
        seed: int = 0,
        split: str = "train",
    ) -> None:
        if not sources:
            raise ValueError("sources: none given")
        if len(sources) > MAX_SOURCES:
            raise ValueError(f"sources: {len(sources)} given, and losses are logged of {MAX_SOURCES} at most")
        for name in sources:
            if not name or set(name) & set("/ \t\n"):
                raise ValueError(f"sources: {name!r} becomes part of a logged name, which has no spaces and slashes")
        if weights is not None:
            if set(weights) != set(sources):
                raise ValueError(f"weights are of {sorted(weights)}, and the sources are {sorted(sources)}")
            if not all(weight >= 0 and math.isfinite(weight) for weight in weights.values()):
                raise ValueError(f"weights must be finite and not negative, got {weights}")
            if not any(weights.values()):
                raise ValueError("weights: none is above 0")
        if stopping_strategy not in ("first_exhausted", "all_exhausted"):
            raise ValueError(f"stopping_strategy must be first_exhausted or all_exhausted, got {stopping_strategy!r}")
        self.sources = {name: as_source(source, split) for name, source in sources.items()}
        self.weights = weights
        self.stopping_strategy = stopping_strategy
        self.seed = seed

    @property
    def name(self) -> str:
        return " + ".join(self.sources)

    @property
    def parts(self) -> list[str]:
        return list(self.sources)

    def stream(self) -> None:
        if self.weights is not None and self.stopping_strategy == "first_exhausted" and len(self.sources) > 1:
            raise InputError(
                "data.streaming: each pass over a mixture begins with the same rows and would end before the "
                "others: set its stopping_strategy: all_exhausted"
            )
        for source in self.sources.values():
            source.stream()

    def identity(self) -> Any:
        sources = [[name, source.identity()] for name, source in self.sources.items()]
        if any(inner is None for _, inner in sources):
            return None
        drawn = [self.weights, self.stopping_strategy, self.seed]
        return known_by(self, sources=sources, drawn=drawn)

    def rows(self) -> Iterator[tuple[int | str, Row]]:
        return ((number, row) for _, number, row in self.rows_of_parts())

    def rows_of_parts(self) -> Iterator[tuple[int, int | str, Row]]:
        names = list(self.sources)
        if self.weights is None:
            for part, name in enumerate(names):
                yield from ((part, *numbered) for numbered in self._rows_of(name))
            return
        drawn = [part for part, name in enumerate(names) if self.weights[name]]
        probabilities = [self.weights[names[part]] for part in drawn]
        generator = random.Random(self.seed)
        running = {part: self._rows_of(names[part]) for part in drawn}
        exhausted: set[int] = set()
        while True:
            (part,) = generator.choices(drawn, probabilities)
            found = next(running[part], None)
            if found is None:
                exhausted.add(part)
                if self.stopping_strategy == "first_exhausted" or len(exhausted) == len(drawn):
                    return
                running[part] = self._rows_of(names[part])
                found = next(running[part])
            yield part, *found

    def _rows_of(self, name: str) -> Iterator[tuple[str, Row]]:
        """Rows with places such as ``name:3``."""
        empty = True
        for number, row in self.sources[name].rows():
            empty = False
            yield f"{name}:{number}", row
        if empty:
            raise InputError(f"{name} ({self.sources[name].name}): no rows")
