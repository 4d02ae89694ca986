"""The DFT paper's five benchmarks as JSON lines with `problem` and `solution`, for `data.test`.

    python examples/math_benchmarks.py --output math

A solution is the bare answer in \\boxed{}, which MathAnswer compares by value.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Name on the hub and split, of the copies that are most used. The paper does not say which it had.
BENCHMARKS = {
    "math500": ("HuggingFaceH4/MATH-500", "test"),
    "minerva": ("math-ai/minervamath", "test"),
    "olympiadbench": ("math-ai/olympiadbench", "test"),
    "aime24": ("HuggingFaceH4/aime_2024", "train"),
    "amc23": ("math-ai/amc23", "test"),
}
PROBLEM, ANSWER = ("problem", "question"), ("answer", "final_answer")


def convert(rows: Any, name: str) -> Iterator[dict[str, str]]:
    """Rows of any of them in one form."""
    for number, row in enumerate(rows, start=1):
        problem, answer = (
            next((row[c] for c in columns if row.get(c) not in (None, "", [])), None) for columns in (PROBLEM, ANSWER)
        )
        if problem is None or answer is None:
            raise SystemExit(f"{name}, row {number}: expected a problem and an answer, found {sorted(row)}")
        answers = answer if isinstance(answer, list) else [answer]
        text = ", ".join(str(each).strip().strip("$") for each in answers)
        yield {"problem": str(problem), "solution": f"\\boxed{{{text}}}"}


def main(arguments: list[str] | None = None) -> None:
    from datasets import load_dataset

    parser = argparse.ArgumentParser(description="Write the five benchmarks.")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    folder = parser.parse_args(arguments).output
    folder.mkdir(parents=True, exist_ok=True)
    for name, (path, split) in BENCHMARKS.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in convert(load_dataset(path, split=split), name)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(lines)} problems")


if __name__ == "__main__":
    main()
