"""Where the final answer stands in a generated text."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

from dft_lightning.component import Component
from dft_lightning.errors import InputError

# A minus sign belongs to the number unless it subtracts: "12-5" ends in 5.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?:(?<![\w)])-)?\.\d+")


class AnswerExtractor(Component):
    """Finds the final answer in a text, in a form that is equal for equal answers. Subclass and write ``extract``.

    Where no such form is to be had, override :meth:`matches` as well.
    """

    _to_write = ("extract",)

    def extract(self, text: str) -> str | None:
        """The text's final answer, normalised, or ``None`` where it gives none."""
        raise NotImplementedError  # a class without it is not made

    def matches(self, text: str, answer: str) -> bool:
        """Whether a text and a row's answer both give something, and the same."""
        expected = self.extract(answer)
        return expected is not None and self.extract(text) == expected


def _normalise(answer: str) -> str:
    """Numbers to a canonical decimal (``1,200.50`` and ``$1200.5`` agree), anything else without outer spaces."""
    text = answer.strip().rstrip(".")
    digits = text.replace(",", "").replace("$", "").replace("%", "").strip()
    if not _NUMBER.fullmatch(digits):
        return text
    whole, _, fraction = digits.lstrip("-").partition(".")
    # By hand: Decimal.normalize would round to 28 digits.
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return f"-{number}" if "-" in digits and number != "0" else number


class WholeText(AnswerExtractor):
    """The whole text without outer white space.

    Example:
        >>> WholeText().extract(" yes\\n")
        'yes'
    """

    def extract(self, text: str) -> str | None:
        return text.strip()


class LastNumber(AnswerExtractor):
    """The last number of the text.

    Example:
        >>> LastNumber().extract("7+5+0=2c1,4+8+1=3c1|132")
        '132'
        >>> LastNumber().extract("none") is None
        True
    """

    def extract(self, text: str) -> str | None:
        numbers = _NUMBER.findall(text)
        return _normalise(numbers[-1]) if numbers else None


class HashAnswer(AnswerExtractor):
    """What follows the last ``####``, as in GSM8K.

    Example:
        >>> HashAnswer().extract("48 + 24 = 72\\n#### 1,072")
        '1072'
    """

    def extract(self, text: str) -> str | None:
        _, marker, answer = text.rpartition("####")
        lines = answer.strip().splitlines()
        return _normalise(lines[0]) if marker and lines else None


class BoxedAnswer(AnswerExtractor):
    r"""What stands in the last ``\boxed{...}``, braces matched, spaces removed.

    Example:
        >>> BoxedAnswer().extract(r"so $x = \boxed{\frac{1}{2}}$.")
        '\\frac{1}{2}'
    """

    def extract(self, text: str) -> str | None:
        start = text.rfind(r"\boxed{")
        if start < 0:
            return None
        begin = start + len(r"\boxed{")
        depth = 1
        for position in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return _normalise(re.sub(r"\s+", "", text[begin:position]))
        return None


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

    def matches(self, text: str, answer: str) -> bool:
        from math_verify import verify

        expected, found = self._parse(answer), self._parse(text)
        return bool(expected and found and verify(expected, found, timeout_seconds=self.timeout))

    def _parse(self, text: str) -> list[Any]:
        from math_verify import parse

        found: list[Any] = parse(text, parsing_timeout=self.timeout)
        return found
