"""Exact match of generated answers, and pass@k of several samples of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import comb
from typing import Any

import torch
from torch import Tensor

from dft_lightning.errors import InputError, one_line
from dft_lightning.metrics.answers import AnswerExtractor
from dft_lightning.metrics.exact_sums import ExactSums


class ExactMatch(ExactSums):
    """Share of completions whose extracted answer is that of the row's own, over all ranks.

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
        self._add_sums("correct", "total", dtype=torch.int64)

    def score(self, text: str, answer: str) -> bool:
        """Whether a text gives the same as a row's answer. Raises as :meth:`expected`."""
        self.expected(answer)
        try:
            return self.extractor.matches(text, answer)
        except Exception as error:  # whatever the user's own code runs into
            raise InputError(f"{self.extractor!r} fails on the text {text[-80:]!r}: {_told(error)}") from error

    def expected(self, answer: str) -> str:
        """What a row's answer gives, in the form that is compared.

        Raises:
            InputError: it gives nothing, so nothing could ever match it.
        """
        try:
            expected = self.extractor.extract(answer)
        except Exception as error:  # whatever the user's own code runs into
            raise InputError(f"{self.extractor!r} fails on the answer {answer[-80:]!r}: {_told(error)}") from error
        if expected is None:
            raise InputError(
                f"{self.extractor!r} finds nothing in the answer {answer[-80:]!r}: choose another answer_extractor "
                "(HashAnswer, BoxedAnswer, LastNumber, ExpressionValue, WholeText, MathAnswer or your own)"
            )
        return expected

    def check(self, answers: Iterable[str | None], name: str) -> None:
        """Raise where nothing could match an answer, before anything is generated.

        Args:
            answers: of the rows in order; ``None`` where a row has none.
            name: what an error message calls the rows.

        Raises:
            InputError: names the first such row, counted from 1, and how many there are.
        """
        listed = list(answers)
        problems = {number: text for number, each in enumerate(listed, start=1) if (text := self._problem(each))}
        if problems:
            number, text = next(iter(problems.items()))
            rest = f" ({len(problems)} of {len(listed)} rows)" if len(problems) > 1 else ""
            raise InputError(f"{name} row {number}{text}{rest}")

    def _problem(self, answer: str | None) -> str | None:
        """Why nothing could match a row's answer, to be read after the row."""
        if answer is None:
            return " has no final assistant turn to score against"
        try:
            self.expected(answer)
        except InputError as problem:
            return f": {problem}"
        return None

    def update(self, texts: Sequence[str], answers: Sequence[str]) -> None:
        """Score one text for each row's answer."""
        for text, answer in zip(texts, answers, strict=True):
            self.correct += self.score(text, answer)
            self.total += 1

    def compute(self) -> Tensor:
        return self.correct.double() / self.total


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that at least one of ``k`` samples is right, estimated without bias from ``num_samples``.

    ``1 - C(n - c, k) / C(n, k)``: the share of the subsets of ``k`` samples that hold a right one.

    Source: Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, equation 1.

    Args:
        num_samples: samples of a problem.
        num_correct: how many of them are right.
        k: at most ``num_samples``.

    Raises:
        ValueError: unless ``1 <= k <= num_samples`` and ``0 <= num_correct <= num_samples``.

    Example:
        >>> [pass_at_k(4, 1, k) for k in (1, 2, 4)]
        [0.25, 0.5, 1.0]
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"need 1 <= k <= num_samples and 0 <= num_correct <= num_samples, got k={k} of {num_samples} "
            f"with {num_correct} right"
        )
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def reported_k(num_samples: int) -> list[int]:
    """The values of k worth reporting beside avg@n (which is pass@1): powers of two from 2, and ``num_samples``."""
    powers = [2**i for i in range(1, num_samples.bit_length())]
    return sorted({k for k in (*powers, num_samples) if 2 <= k <= num_samples})
