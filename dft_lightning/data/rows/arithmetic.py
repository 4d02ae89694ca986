"""Generated addition problems with a carry scratchpad: real enough to compare losses, small enough for any machine.

``47+85=`` is worked digit by digit from the right, ``a+b+carry=digit c carry``, and the answer stands behind the bar:
``7+5+0=2c1,4+8+1=3c1|132``.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from dft_lightning.data.rows.sources import RowSource
from dft_lightning.data.rows.values import BrokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CHARACTERS = "0123456789+=,|c"
_HELD_OUT_SHARE = 10  # one problem in ten


def solve(a: int, b: int, wrong: dict[int, int] | None = None) -> str:
    """The worked addition of two non-negative numbers.

    Args:
        a: first summand.
        b: second summand.
        wrong: digits written in place of the right ones, by step (0 is the rightmost). The answer is made of the
            digits as written, so a wrong step makes a wrong answer; carries stay right.

    Example:
        >>> solve(47, 85)
        '7+5+0=2c1,4+8+1=3c1|132'
        >>> solve(47, 85, wrong={0: 9})
        '7+5+0=9c1,4+8+1=3c1|139'
    """
    wrong = wrong or {}
    width = max(len(str(a)), len(str(b)))
    steps, digits, carry = [], [], 0
    for i in range(width):
        x, y = a // 10**i % 10, b // 10**i % 10
        total = x + y + carry
        digit = wrong.get(i, total % 10)
        steps.append(f"{x}+{y}+{carry}={digit}c{total // 10}")
        digits.append(str(digit))
        carry = total // 10
    answer = ("1" if carry else "") + "".join(reversed(digits))
    return f"{','.join(steps)}|{answer}"


def is_held_out(a: int, b: int) -> bool:
    """Whether a problem belongs to the held-out tenth, which is never generated for training."""
    return zlib.crc32(f"{a}+{b}".encode()) % _HELD_OUT_SHARE == 0


class ArithmeticRows(RowSource):
    """Addition problems as ``prompt`` and ``completion`` rows, the same for the same arguments on any machine.

    Args:
        num_rows: how many.
        min_digits: fewest digits of a summand.
        max_digits: most digits of a summand.
        noise: probability that a step is written with a wrong digit.
        seed: of the problems and of the noise.
        part: ``"train"`` or ``"held_out"``: disjoint sets of problems.
        digit_weights: how often a summand has each number of digits, from ``min_digits`` up; ``None`` for equally.

    Example:
        >>> number, row = next(ArithmeticRows(num_rows=1, min_digits=2, max_digits=2, seed=0).rows())
        >>> row
        {'prompt': '63+75=', 'completion': '3+5+0=8c0,6+7+0=3c1|138'}
    """

    def __init__(
        self,
        num_rows: int,
        min_digits: int = 3,
        max_digits: int = 5,
        noise: float = 0.0,
        seed: int = 0,
        part: Literal["train", "held_out"] = "train",
        digit_weights: list[float] | None = None,
    ) -> None:
        if num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {num_rows}")
        if not 1 <= min_digits <= max_digits:
            raise ValueError(f"need 1 <= min_digits <= max_digits, got {min_digits} and {max_digits}")
        if not 0 <= noise <= 1:
            raise ValueError(f"noise must lie in [0, 1], got {noise}")
        if part not in ("train", "held_out"):
            raise ValueError(f"part must be 'train' or 'held_out', got {part!r}")
        if digit_weights is not None and len(digit_weights) != max_digits - min_digits + 1:
            raise ValueError(
                f"digit_weights needs one weight for each of {min_digits} to {max_digits} digits, got {digit_weights}"
            )
        self.num_rows = num_rows
        self.min_digits = min_digits
        self.max_digits = max_digits
        self.noise = noise
        self.seed = seed
        self.part = part
        self.digit_weights = digit_weights

    def rows(self) -> Iterator[tuple[int, dict[str, Any] | BrokenRow]]:
        generator = random.Random(self.seed)
        number = 0
        while number < self.num_rows:
            a, b = self._summand(generator), self._summand(generator)
            if is_held_out(a, b) != (self.part == "held_out"):
                continue
            number += 1
            wrong = self._wrong_digits(generator, a, b)
            yield number, {"prompt": f"{a}+{b}=", "completion": solve(a, b, wrong)}

    def _summand(self, generator: random.Random) -> int:
        (digits,) = generator.choices(range(self.min_digits, self.max_digits + 1), self.digit_weights)
        return generator.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)

    def _wrong_digits(self, generator: random.Random, a: int, b: int) -> dict[int, int]:
        wrong = {}
        total = a + b
        for step in range(max(len(str(a)), len(str(b)))):
            if generator.random() < self.noise:
                right = total // 10**step % 10
                wrong[step] = (right + generator.randint(1, 9)) % 10
        return wrong


def arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one token per character, with ``^`` before the problem and ``$`` after the answer.

    Example:
        >>> tokenizer = arithmetic_tokenizer()
        >>> problem = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "1+1+0=2c0|2"}]
        >>> tokenizer.apply_chat_template(problem, tokenize=False)
        '^1+1=1+1+0=2c0|2$'
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "_", "bos_token": "^", "eos_token": "$", "unk_token": "?"}
    vocabulary = {token: i for i, token in enumerate([*special.values(), *_CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] + '$' }}"
        "{% else %}{{ '^' + message['content'] }}{% endif %}{% endfor %}"
    )
    return tokenizer
