"""How long ranks wait for the longest, by tokens: rows dealt in turn, and dealt by their tokens.

    python benchmarks/dealing.py --rows ../shared/data/gsm8k_train.jsonl --tokenizer ../shared/tokenizers/smollm2

No process trains: the sampler's own arithmetic is looked at. A wait is what a step takes longer than its mean rank
needs: ``step`` where ranks wait for each other at its end alone (DDP), ``each`` where they wait after every micro-batch
(sharded parameters). ``rows`` keeps the number of rows of a micro-batch, ``tokens`` takes any number
(``data.batches.max_tokens``) in as many micro-batches. ``time`` is what a step takes, of what it takes with rows in
turn. Rows have ``question`` and ``answer``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
from linear_head import RESULTS, machine

from dft_lightning.data import ArithmeticRows, InstructionDataModule, LocalRows
from dft_lightning.data.batches.dealing import Dealt, deal_rows, deal_tokens, waiting
from dft_lightning.data.batches.sampling import epoch_order

SHAPES = [(8, 1, 4), (8, 4, 2), (8, 2, 4), (8, 1, 8), (32, 4, 2), (32, 2, 4), (32, 1, 8), (32, 4, 8), (64, 4, 8)]


def lengths_of(options: argparse.Namespace) -> np.ndarray:
    """Tokens of each training row, as a run has them."""
    if options.synthetic is not None:
        source, columns = ArithmeticRows(options.synthetic, min_digits=1, max_digits=9), {}
    else:
        source = LocalRows(str(options.rows))
        columns = {"form": "prompt_completion", "prompt_column": "question", "completion_column": "answer"}
    data = InstructionDataModule(source, rows=columns, text={"tokenizer": str(options.tokenizer)})
    data.load("fit")
    return data.splits.lengths("train").numpy()


def taken(dealt: Dealt, lengths: np.ndarray, padded: bool) -> tuple[float, float]:
    """Tokens that a step takes the time of: of the slowest rank, and of the slowest one of every micro-batch."""
    costs = np.array(
        [
            [
                0 if not len(rows) else lengths[rows].max() * len(rows) if padded else lengths[rows].sum()
                for rows in rank
            ]
            for rank in dealt
        ]
    )
    return float(costs.sum(1).max()), float(costs.max(0).sum())


def one_shape(lengths: np.ndarray, ranks: int, micro_batches: int, batch_size: int, padded: bool) -> dict:
    """Means over the whole steps of an epoch."""
    size, found = ranks * micro_batches * batch_size, []
    order = np.array(epoch_order(len(lengths), True, 0, 0))
    for first in range(0, len(order) - size + 1, size):
        own = lengths[order[first : first + size]]
        in_turn = list(np.arange(size).reshape(micro_batches, batch_size, ranks).transpose(2, 0, 1))
        sizes = [batch_size] * micro_batches
        started = time.perf_counter()
        rows = deal_rows(own, ranks, sizes, padded)
        seconds = time.perf_counter() - started
        alike = deal_rows(own, ranks, sizes, padded, lockstep=True)
        limit = int(own.max()) * size  # none: as few micro-batches as those of rows
        tokens = deal_tokens(own, ranks, micro_batches, limit, padded)
        tokens_alike = deal_tokens(own, ranks, micro_batches, limit, padded, lockstep=True)
        before, plain = waiting(in_turn, own, padded), taken(in_turn, own, padded)
        sides = {"step": (rows, tokens), "each": (alike, tokens_alike)}
        found.append(
            {"in turn": {"step": before[0], "each": before[1]}, "seconds": seconds}
            | {
                kind: {when: waiting(both[which], own, padded)[when == "each"] for when, both in sides.items()}
                for which, kind in enumerate(("rows", "tokens"))
            }
            | {
                f"time of {kind}": {
                    when: taken(both[which], own, padded)[when == "each"] / plain[when == "each"]
                    for when, both in sides.items()
                }
                for which, kind in enumerate(("rows", "tokens"))
            }
        )
    mean = {"steps": len(found), "milliseconds": 1000 * statistics.median(each["seconds"] for each in found)}
    for name in found[0].keys() - {"seconds"}:
        mean[name] = {when: statistics.fmean(each[name][when] for each in found) for when in ("step", "each")}
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="asset://arithmetic-base")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--synthetic", type=int, help="generated rows in place of a file")
    parser.add_argument("--output", type=Path, default=RESULTS / "dealing.json")
    options = parser.parse_args()
    lengths = lengths_of(options)
    results = []
    print(f"{len(lengths)} rows of {lengths.mean():.0f} tokens, {lengths.max()} at most")
    print("ranks x micro-batches x rows: waits at the end of a step (after every micro-batch), time of in turn")
    for padded in (False, True):
        for ranks, micro_batches, batch_size in SHAPES:
            if ranks * micro_batches * batch_size > len(lengths):
                continue
            found = one_shape(lengths, ranks, micro_batches, batch_size, padded)
            results.append(
                {"ranks": ranks, "micro_batches": micro_batches, "rows": batch_size, "padded": padded, **found}
            )
            parts = [
                f"{name} {found[name]['step']:6.1%} ({found[name]['each']:6.1%})"
                for name in ("in turn", "rows", "tokens")
            ]
            times = [f"{found[f'time of {name}']['step']:.2f}" for name in ("rows", "tokens")]
            kind = "padded" if padded else "joined"
            print(f"{kind} {ranks:2} x {micro_batches} x {batch_size}: {', '.join(parts)}; time {', '.join(times)}")
    table = {"machine": machine("cpu"), "rows": len(lengths), "mean_length": float(lengths.mean()), "results": results}
    options.output.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
