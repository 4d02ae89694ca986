"""Where the final answer stands in a generated text."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
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
        return _last_number(text)


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text)
    return _normalise(numbers[-1]) if numbers else None


class ExpressionValue(AnswerExtractor):
    """The value of the last arithmetic expression of the text, exactly; of the last number where there is none.

    Expressions are of numbers, ``+``, ``-``, ``*``, ``/`` and brackets. So ``( 290.0 / 2.0 )`` and ``290/2`` are equal
    to ``145``, and what divides by 0 or is broken off is no answer.

    Example:
        >>> ExpressionValue().extract("There are ( 290.0 / 2.0 ) of them.")
        '145'
        >>> ExpressionValue().extract("(1 + 2) / 9")
        '1/3'
        >>> ExpressionValue().extract("3 + ") is None
        True
    """

    def extract(self, text: str) -> str | None:
        text = _THOUSANDS.sub("", text)
        found = [each.strip(" \t.") for each in _EXPRESSION.findall(text)]
        with_operator = [each for each in found if _OPERATOR.search(each)]
        return _value(with_operator[-1]) if with_operator else _last_number(text)


_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# What looks like arithmetic, as far as it goes on a line.
_EXPRESSION = re.compile(r"[(+\-\d.][\d \t.()+\-*/]*")
_OPERATOR = re.compile(r"[\d)]\s*[+\-*/]")
_LONGEST = 200  # characters


def _value(expression: str) -> str | None:
    """The exact value of an expression, as a whole number, a decimal or a fraction."""
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", expression)  # Python has no numbers with leading zeros
    if len(text) > _LONGEST:
        return None
    try:
        value: Fraction = _evaluated(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return _normalise(str(value)) if value.denominator == 1 else _decimal(value)


def _decimal(value: Fraction) -> str:
    """A fraction as a decimal where that ends within six places, or as it is."""
    scaled = value * 10**6
    if scaled.denominator != 1:
        return str(value)
    sign, digits = "-" * (value < 0), f"{abs(scaled.numerator):07d}"
    return _normalise(f"{sign}{digits[:-6]}.{digits[-6:]}")


def _evaluated(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_evaluated(node.left, text), _evaluated(node.right, text))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _evaluated(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(ast.get_source_segment(text, node) or "")
    raise ValueError("no arithmetic")


_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


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
