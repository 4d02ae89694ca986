"""What gradient checkpointing and compiled blocks take and save: time and memory of whole steps with DFT.

    python ../shared/get_smollm2.py smollm2
    OMP_NUM_THREADS=1 python benchmarks/activations.py --model smollm2 --rows ../shared/data/gsm8k_train.jsonl

Needs a model folder with tokenizer, and rows with ``question`` and ``answer``. Every side trains on the same padded
rows in the same order: bfloat16 by autocast, float32 weights, the fused head, AdamW. Every measurement is a process of
its own; the sides take turns, and a ratio is the median over turns. Time is the processor's in this process, from the
end of the second step, which other processes do not change; with ``OMP_NUM_THREADS=1`` none of it is spent on waiting.
The first step, which compiles, is given by the clock. Memory is what torch's allocator holds at most, beyond weights,
gradients and optimizer, in the forward and backward pass of one micro-batch more, by its own record; ``to_host`` is
what ``offload`` would move from a GPU, which on the CPU stays where it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from linear_head import RESULTS, machine
from training_step import WARM_UP, in_own_process, parsed, parser_of_steps, rows_of

SIDES: dict[str, dict[str, Any]] = {
    "none": {},
    "every_2": {"gradient_checkpointing": "every_2"},
    "full": {"gradient_checkpointing": "full"},
    "selective": {"gradient_checkpointing": "selective"},
    "offload": {"gradient_checkpointing": "offload"},
    "compiled": {"compile": True},
    "compiled, full": {"gradient_checkpointing": "full", "compile": True},
    "compiled, selective": {"gradient_checkpointing": "selective", "compile": True},
}


@contextlib.contextmanager
def peak_memory(trace: Path) -> Iterator[list[int]]:
    """Appends the most bytes held at once of those allocated within, by the allocator's own record.

    Summed here by address: the allocator's running total also takes off what was allocated before and is freed
    within, and, in a process that was profiled before, by the size that another block had at that address.
    """
    found: list[int] = []
    with torch.profiler.profile(profile_memory=True) as profile:
        yield found
    profile.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held: dict[int, int] = {}
    total = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        total -= held.pop(address, 0)
        if size > 0 and event["args"]["Total Allocated"]:  # none is given for a file that is mapped
            held[address] = size
            total += size
        most = max(most, total)
    found.append(most)


@contextlib.contextmanager
def counted_moves() -> Iterator[list[int]]:
    """Appends the bytes of each tensor that would be moved to the host."""
    from dft_lightning.foreign.torch import is_of_a_parameter
    from dft_lightning.models import blocks

    found: list[int] = []

    def stays(tensor: torch.Tensor) -> bool:
        found.extend([] if is_of_a_parameter(tensor) else [tensor.nbytes])
        return True

    with patch.object(blocks, "_stays", stays):
        yield found


def run(options: argparse.Namespace, folder: Path) -> dict:
    """Steps of one side."""
    import dft_lightning.__main__  # noqa: F401 (large tensors on huge pages, as the command has them)
    from dft_lightning import CausalLMModule, DFTLoss, InstructionDataModule
    from dft_lightning.ops import release_scratch

    data = InstructionDataModule(
        rows_of(options),
        batch_size=options.batch_size,
        rows={"prompt_column": "question", "completion_column": "answer"},
        text={"tokenizer": str(options.model)},
        batches={"shuffle": False},
    )
    data.prepare_data()
    data.setup("fit")
    module = CausalLMModule(str(options.model), loss=DFTLoss(), loading=SIDES[options.side])
    module.configure_model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-5, fused=True)

    def gradients(batch: dict) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            output = module.token_output(batch, normalizer=float(batch["layout"].num_targets))
        output.loss.backward()
        return output.loss.item()

    tokens, first, seconds, losses = 0, 0.0, [], []
    for step, batch in enumerate(data.train_dataloader()):
        started, waited = time.process_time(), time.perf_counter()
        losses.append(gradients(batch))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        seconds.append(time.process_time() - started)
        first = first or time.perf_counter() - waited
        tokens += int(batch["attention_mask"].sum()) if step >= WARM_UP else 0
    release_scratch()  # what is kept between calls would not be allocated again
    with counted_moves() as moved, peak_memory(folder / "trace.json") as most:
        gradients(batch)
    return {
        "tokens_per_cpu_second": tokens / sum(seconds[WARM_UP:]),
        "first_step": first,
        "peak_memory": most[0],
        "to_host": sum(moved),
        "loss": losses[-1],
    }


def compare(options: argparse.Namespace) -> dict:
    """Medians of every side over turns, with its speed as a multiple of that of the first."""
    turns = []
    for _ in range(options.turns):
        turns.append({side: in_own_process(__file__, options, side) for side in options.sides})
    found = {}
    for side in options.sides:
        found[side] = {key: median([turn[side][key] for turn in turns]) for key in turns[0][side]}
        found[side]["first_step"] = turns[0][side]["first_step"]  # later ones find what was compiled
        speeds = [
            turn[side]["tokens_per_cpu_second"] / turn[options.sides[0]]["tokens_per_cpu_second"] for turn in turns
        ]
        found[side]["times_the_speed"] = median(speeds)
        print(
            f"{side:20} {found[side]['times_the_speed']:5.2f} times the speed, first step "
            f"{found[side]['first_step']:5.1f} s, {found[side]['peak_memory'] / 2**20:6.0f} MiB",
            flush=True,
        )
    return {"turns": turns, "sides": found}


def main() -> None:
    parser = parser_of_steps(__doc__, steps=6)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--output", type=Path, default=RESULTS / "activations_cpu.json")
    options = parsed(parser)
    if options.side:
        with tempfile.TemporaryDirectory() as folder:
            options.result.write_text(json.dumps(run(options, Path(folder))))
        return
    sizes = {"steps": options.steps, "batch_size": options.batch_size}
    found = {**machine("cpu"), **sizes, **compare(options)}
    options.output.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
