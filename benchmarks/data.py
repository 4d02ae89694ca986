"""Templating, tokenising and packing: rows a second and how full packed rows are, against TRL's SFTTrainer.

    python benchmarks/data.py --tokenizer ../shared/tokenizers/smollm2 --rows ../shared/data/gsm8k_train.jsonl

Needs a tokenizer folder, and rows with ``question`` and ``answer``; TRL's side needs the ``bench`` extra. Ours is what
``fit`` does before its first step: reading the file, checking, templating, masking and tokenising its rows into the
cache, and packing them. TRL's is ``SFTTrainer``'s preparation of the same rows as prompt and completion messages, read
beforehand, with its packing ``bfd``. Every measurement is a process of its own with an empty cache, without imports
and without loading the tokenizer; the sides take turns, and a ratio is the median over turns. ``--processes 1 2``
measures with one and two worker processes (one: this process alone, whose tokenizer may use every core in ours).

    python benchmarks/data.py --synthetic 1000000 --tokenizer asset://arithmetic-base

prepares generated short rows instead, and measures the peak of memory alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from linear_head import RESULTS, machine, missing

TINY = {
    "vocab_size": 64,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}


def ours(options: argparse.Namespace) -> dict:
    """Rows a second of the data module."""
    import datasets  # noqa: F401 (here, as TRL's side has: load would import it within its time)
    import pyarrow.compute  # noqa: F401

    from dft_lightning.data import ArithmeticRows, InstructionDataModule

    source = str(options.rows) if options.synthetic is None else ArithmeticRows(options.synthetic, max_digits=3)
    data = InstructionDataModule(
        source,
        num_proc=options.num_proc,
        text={"tokenizer": str(options.tokenizer), "max_length": options.max_length},
        rows={
            "prompt_column": "question" if options.synthetic is None else "prompt",
            "completion_column": "answer" if options.synthetic is None else "completion",
        },
        batches={"packing": "bfd"},
    )
    data.tokenizer = data.build_tokenizer()
    started = time.perf_counter()
    data.load("fit")
    seconds = time.perf_counter() - started
    return {
        "rows_per_second": data.splits.counts["train"].rows / seconds,
        "efficiency": data.packs.efficiency(options.max_length),
        "packed_rows": len(data.packs),
        "peak_mib": peak_mib(),
    }


def trl(options: argparse.Namespace) -> dict:
    """Rows a second of SFTTrainer's own preparation."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["question"]}],
                "completion": [{"role": "assistant", "content": row["answer"]}],
            }
            for row in rows
        ]
    )
    seconds = []

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args, **kwargs):
            started = time.perf_counter()
            found = super()._prepare_dataset(*args, **kwargs)
            seconds.append(time.perf_counter() - started)
            return found

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        packing=True,
        packing_strategy="bfd",
        max_length=options.max_length,
        dataset_num_proc=options.num_proc if options.num_proc > 1 else None,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, "vocab_size": len(tokenizer)}))
    torch.set_num_threads(1)
    found = Timed(model, config, train_dataset=dataset, processing_class=tokenizer).train_dataset
    tokens = sum(len(ids) for ids in found["input_ids"])
    return {
        "rows_per_second": len(rows) / seconds[0],
        "efficiency": tokens / (len(found) * options.max_length),
        "packed_rows": len(found),
        "peak_mib": peak_mib(),
    }


def peak_mib() -> float:
    """Most memory that this process has had, and the largest of its children, file pages included."""
    import resource

    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024


SIDES = {"dft_lightning": ours, "trl": trl}


def measure(options: argparse.Namespace, side: str, num_proc: int) -> dict:
    """One side in a process of its own, with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--num-proc", str(num_proc)]
        environment = {**os.environ, "HF_DATASETS_CACHE": cache, "HF_HOME": cache}
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(found.stderr)
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--synthetic", type=int, help="generated rows in place of a file, without TRL")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "data.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--num-proc", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        print(json.dumps(SIDES[options.side](options)))
        return
    sides = list(SIDES) if options.synthetic is None else ["dft_lightning"]
    if "trl" in sides and (reason := missing("trl")):
        print(f"trl: skipped, {reason}", flush=True)
        sides.remove("trl")
    results = {"machine": machine("cpu"), "max_length": options.max_length, "processes": {}}
    for processes in options.processes:
        turns = [{side: measure(options, side, processes) for side in sides} for _ in range(options.turns)]
        found = {
            side: {name: statistics.median(turn[side][name] for turn in turns) for name in turns[0][side]}
            for side in sides
        }
        if "trl" in sides:
            rates = [turn["dft_lightning"]["rows_per_second"] / turn["trl"]["rows_per_second"] for turn in turns]
            found["ratio"] = statistics.median(rates)
        results["processes"][str(processes)] = found
        print(processes, json.dumps(found, indent=1), flush=True)
    if options.synthetic is None:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
