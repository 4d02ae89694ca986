"""Exact match of generated answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from dft_lightning.errors import InputError
from dft_lightning.metrics.answers import AnswerExtractor
from dft_lightning.metrics.exact_sums import ExactSums


class ExactMatch(ExactSums):
    """Share of completions whose extracted answer equals the reference's, over all ranks.

    A completion without an answer is wrong. With nothing scored yet the result is nan.

    Args:
        extractor: finds the answer in both texts.
    """

    higher_is_better = True

    correct: Tensor
    total: Tensor

    def __init__(self, extractor: AnswerExtractor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extractor = extractor
        self._add_counts("correct", "total")

    def score(self, completion: str, reference: str) -> bool:
        """Whether one completion's answer equals the reference's. Raises as :meth:`expected`."""
        self.expected(reference)
        return self.extractor.matches(completion, reference)

    def expected(self, reference: str) -> str:
        """The reference's answer.

        Raises:
            InputError: it has none, so nothing could ever match it.
        """
        expected = self.extractor.extract(reference)
        if expected is None:
            raise InputError(
                f"{self.extractor!r} finds no answer in the reference {reference[-80:]!r}: choose another "
                "answer_extractor (HashAnswer, BoxedAnswer, LastNumber, WholeText, MathAnswer or your own)"
            )
        return expected

    def check(self, references: Iterable[str | None], name: str) -> None:
        """Raise for the first reference that nothing could match, before anything is generated.

        Args:
            references: of the rows in order; ``None`` where a row has none.
            name: what an error message calls the rows.

        Raises:
            InputError: names the row, counted from 1.
        """
        for number, reference in enumerate(references, start=1):
            if reference is None:
                raise InputError(f"{name} row {number} has no final assistant turn to score against")
            try:
                self.expected(reference)
            except InputError as problem:
                raise InputError(f"{name} row {number}: {problem}") from None

    def update(self, completions: Sequence[str], references: Sequence[str]) -> None:
        """Score one reference per completion."""
        for completion, reference in zip(completions, references, strict=True):
            self.correct += self.score(completion, reference)
            self.total += 1

    def compute(self) -> Tensor:
        return self.correct.double() / self.total
