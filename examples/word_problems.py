"""Word problems of SVAMP for comparisons on a real model: expressions that answer them, and questions to repeat.

``python examples/word_problems.py`` shows the first rows of ``ChilleD/SVAMP``, or of a local file that is given.
"""

import random
import re
import sys
from collections.abc import Iterator
from typing import Any

from dft_lightning.data import HubRows, LocalRows, RowSource

REPEAT = "Repeat this sentence word for word, and write nothing else:\n{question}"
PROMPT = "Write the arithmetic expression that answers the question, and nothing else.\n{body} {question}"


class WordProblems(RowSource):
    """A problem as the prompt and its expression as the completion, the same for the same arguments.

    Args:
        path: hub name or local file, with ``Body``, ``Question`` and ``Equation``.
        split: of the hub's dataset.
        first: the first row that is taken, counted from 0.
        count: how many; ``None`` for all that follow.
        wrong: share of rows whose expression is made wrong, by another operator.
        seed: of which they are, and what is written.
    """

    def __init__(
        self,
        path: str = "ChilleD/SVAMP",
        split: str = "train",
        first: int = 0,
        count: int | None = None,
        wrong: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.path = path
        self.split = split
        self.first = first
        self.count = count
        self.wrong = wrong
        self.seed = seed

    def rows(self) -> Iterator[tuple[int | str, dict[str, Any]]]:
        source = LocalRows(self.path) if is_file(self.path) else HubRows(self.path, split=self.split)
        draw, last = random.Random(self.seed), None if self.count is None else self.first + self.count
        for place, (number, row) in enumerate(source.rows()):
            # Of every row, so that a part is one of the whole.
            is_wrong, other = draw.random() < self.wrong, draw.random()
            if place >= self.first and (last is None or place < last):
                yield number, self.example(row, other if is_wrong else None)

    def example(self, row: dict[str, Any], wrong: float | None) -> dict[str, Any]:
        """A row's prompt and completion, which is made wrong by a number in [0, 1) where there is one."""
        expression = plain(row["Equation"])
        prompt = PROMPT.format(body=row["Body"].strip().rstrip(".") + ".", question=row["Question"].strip())
        return {"prompt": prompt, "completion": expression if wrong is None else changed(expression, wrong)}


class RepeatedQuestions(WordProblems):
    """Questions to be repeated word for word, which small chat models can do: one word of a wrong row is another one of
    its problem.
    """

    def example(self, row: dict[str, Any], wrong: float | None) -> dict[str, Any]:
        question = row["Question"].strip()
        words, others = question.split(), row["Body"].split()
        if wrong is not None:
            place = int(wrong * len(words))
            others = [word for word in others if word != words[place]]
            words[place] = others[int(wrong * 1e6) % len(others)]
        return {
            "prompt": REPEAT.format(question=question),
            "completion": question if wrong is None else " ".join(words),
        }


class Solutions(RowSource):
    """GSM8K's questions as prompts and their solutions in words as completions: text that tuning on expressions may
    spoil.

    Args:
        path: hub name or local file, with ``question`` and ``answer``.
        split: of the hub's dataset.
    """

    def __init__(self, path: str = "openai/gsm8k", split: str = "test") -> None:
        self.path = path
        self.split = split

    def rows(self) -> Iterator[tuple[int | str, dict[str, Any]]]:
        local = is_file(self.path)
        source = LocalRows(self.path) if local else HubRows(self.path, name="main", split=self.split)
        for number, row in source.rows():
            yield number, {"prompt": row["question"], "completion": row["answer"]}


def is_file(path: str) -> bool:
    """Whether a path is a local file's, and no name on the hub."""
    return path.endswith((".jsonl", ".json", ".csv", ".parquet"))


def plain(equation: str) -> str:
    """An equation without its outer brackets and the decimals of whole numbers.

    Example:
        >>> plain("( ( 290.0 + 10.0 ) / 2.0 )")
        '( 290 + 10 ) / 2'
    """
    text = re.sub(r"(\d+)\.0\b", r"\1", equation).strip()
    return text[1:-1].strip() if text.startswith("(") and text.endswith(")") else text


def changed(expression: str, draw: float) -> str:
    """The expression with another operator in the place of its last, by a number in [0, 1).

    Example:
        >>> changed("( 290 + 10 ) / 2", 0.5)
        '( 290 + 10 ) - 2'
    """
    operators = list(re.finditer(r"(?<= )[-+*/](?= )", expression))
    place = operators[-1].start()
    others = [each for each in "+-*/" if each != expression[place]]
    return expression[:place] + others[int(draw * len(others))] + expression[place + 1 :]


if __name__ == "__main__":
    for number, row in WordProblems(*sys.argv[1:2], count=3).rows():
        print(number, row)
