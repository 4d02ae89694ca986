"""Mathematical answers compared by value, through the library math-verify."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from dft_lightning.errors import InputError
from dft_lightning.metrics.answers import AnswerExtractor


class MathAnswer(AnswerExtractor):
    r"""The final answer as a mathematical object, in LaTeX (``\boxed{...}`` first, then ``$...$``) or as a number.

    Answers are equal where math-verify shows them to be: ``\frac{1}{2}`` and ``0.5``, ``x + y`` and ``y + x``. Needs
    the extra: ``pip install 'dft-lightning[math]'``.

    Args:
        timeout: seconds that reading or comparing one answer may take, on the main thread; ``None`` for no limit, which
            other threads need. An answer that takes longer is wrong.

    Raises:
        InputError: math-verify is not installed.

    Example:
        >>> answer = MathAnswer()  # doctest: +SKIP
        >>> answer.matches(r"so it is $\boxed{0.5}$", r"\boxed{\frac{1}{2}}")  # doctest: +SKIP
        True
    """

    def __init__(self, timeout: int | None = 5) -> None:
        if find_spec("math_verify") is None:
            raise InputError("MathAnswer needs math-verify: pip install 'dft-lightning[math]'")
        self.timeout = timeout

    def extract(self, text: str) -> str | None:
        """The answer as math-verify reads it; to compare two, use :meth:`matches`."""
        found = self._parse(text)
        return str(found[0]) if found else None

    def matches(self, completion: str, reference: str) -> bool:
        from math_verify import verify

        expected, found = self._parse(reference), self._parse(completion)
        return bool(expected and found and verify(expected, found, timeout_seconds=self.timeout))

    def _parse(self, text: str) -> list[Any]:
        from math_verify import parse

        found: list[Any] = parse(text, parsing_timeout=self.timeout)
        return found
