"""Whole training steps with DFT: dft_lightning's command against TRL's SFTTrainer(loss_type="dft").

    python ../shared/get_smollm2.py smollm2
    python benchmarks/training_step.py --model smollm2 --rows ../shared/data/gsm8k_train.jsonl

Needs a model folder with tokenizer, and rows with ``question`` and ``answer``; TRL's side needs the ``bench`` extra.
All sides train on the same rows in the same order, bf16-mixed, AdamW, float32 weights. ``dft_lightning`` takes
padding-free batches, ``padded`` is the same command with padding, ``packed`` packs the rows to 1024 tokens, one packed
row a step, and so has other tokens in a step; ``_compiled`` is with ``model.loading.compile``. ``products`` is the
limit: it computes nothing but the step's matrix products and attention, in bfloat16, without padding and recomputation.
Every measurement is a process of its own; the sides take turns, and a ratio is the median over turns. Time runs from
the end of the second step to the end of the last, data and logging included. Tokens are those that are not padding.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from linear_head import RESULTS, machine, missing, resident

WARM_UP = 2


def rows_of(options: argparse.Namespace) -> list[dict]:
    """The rows that all steps take."""
    lines = options.rows.read_text().splitlines()[: options.steps * options.batch_size]
    return [json.loads(line) for line in lines]


def rows_file(options: argparse.Namespace, folder: str) -> str:
    """The same in a file."""
    path = Path(folder) / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(options)))
    return str(path)


class Clock:
    """Tokens and seconds of the steps after the warm-up."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.started = self.seconds = 0.0

    def seen(self, batch) -> None:
        padded = "attention_mask" in batch
        self.tokens.append(int(batch["attention_mask"].sum()) if padded else batch["input_ids"].numel())

    def step_done(self, steps: int) -> None:
        if steps == WARM_UP:
            self.started = time.perf_counter()
        self.seconds = time.perf_counter() - self.started

    def result(self) -> dict:
        tokens = sum(self.tokens[WARM_UP:])
        return {
            "tokens_per_second": tokens / self.seconds,
            "tokens": tokens,
            "peak_memory": resident("VmHWM"),
            "steps": len(self.tokens),
        }


def run_ours(
    options: argparse.Namespace, folder: str, padding_free: bool = False, packed: bool = False, compiled: bool = False
) -> dict:
    import dft_lightning.__main__  # noqa: F401 (large tensors on huge pages, as the command has them)
    from dft_lightning import CausalLMModule
    from dft_lightning.fit import main

    clock = Clock()

    class Watched(CausalLMModule):
        def training_step(self, batch, batch_idx):
            clock.seen(batch)
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            clock.step_done(self.global_step)

    arguments = ["fit", "--model.model", str(options.model), "--model.loss", "DFTLoss"]
    arguments += ["--data.train", rows_file(options, folder)]
    arguments += ["--data.rows.prompt_column", "question", "--data.rows.completion_column", "answer"]
    arguments += ["--data.batch_size", str(options.batch_size), "--data.batches.shuffle", "false"]
    arguments += ["--model.loading.gradient_checkpointing", str(options.gradient_checkpointing).lower()]
    arguments += ["--model.loading.compile", str(compiled).lower()]
    arguments += ["--trainer.max_steps", str(options.steps), "--trainer.precision", "bf16-mixed"]
    arguments += ["--trainer.accelerator", options.device, "--trainer.devices", "1"]
    arguments += ["--trainer.gradient_clip_val", "1.0", "--trainer.enable_checkpointing", "false"]
    arguments += ["--trainer.default_root_dir", folder]
    if packed:
        arguments += ["--data.batches.packing", "bfd", "--data.text.max_length", "1024", "--data.batch_size", "1"]
    if padding_free:
        arguments += ["--data.batches.padding_free", "true", "--model.loading.attn_implementation", "documents"]
    main(arguments, module_class=Watched)
    return clock.result()


def train_in_trl(
    options: argparse.Namespace, folder: str, config: dict, bases: tuple[type, ...] = (), **given: object
) -> tuple[Clock, object]:
    """Time TRL's trainer.

    Args:
        options: of the script.
        folder: for what it writes.
        config: of its ``SFTConfig``, beside what all measurements have.
        bases: classes before the trainer's own.
        given: to the trainer.

    Returns:
        The clock, and the trainer.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    clock = Clock()

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.step_done(state.global_step)

    class Watched(SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            clock.seen(inputs)
            return super().training_step(model, inputs, *args, **kwargs)

    class Trainer(*bases, Watched):
        pass

    rows = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows_of(options)
    ]
    arguments = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        use_cpu=options.device == "cpu",
        train_sampling_strategy="sequential",
        shuffle_dataset=False,
        learning_rate=5e-5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **config,
    )
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(options.model, dtype="float32"),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        callbacks=[Watch()],
        **given,
    )
    trainer.train()
    return clock, trainer


def run_trl(options: argparse.Namespace, folder: str) -> dict:
    config = {"loss_type": "dft", "bf16": True, "gradient_checkpointing": options.gradient_checkpointing}
    clock, _ = train_in_trl(options, folder, config)
    return clock.result()


def run_products(options: argparse.Namespace, folder: str) -> dict:
    """What no side can do without: three products for each linear layer, attention in each document, and the head."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from dft_lightning import CausalLMModule, InstructionDataModule

    rows = rows_file(options, folder)
    columns = {"prompt_column": "question", "completion_column": "answer"}
    data = InstructionDataModule(
        rows,
        batch_size=options.batch_size,
        rows=columns,
        text={"tokenizer": str(options.model)},
        batches={"shuffle": False},
    )
    data.prepare_data()
    data.setup("fit")
    module = CausalLMModule(str(options.model))
    module.configure_model()
    config, head = module.model.config, module.model.get_output_embeddings()
    layers = [m.weight for m in module.model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    layers = [weight.detach().to(options.device, torch.bfloat16) for weight in layers]
    head = head.weight.detach().to(options.device, torch.bfloat16)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=options.device, dtype=torch.bfloat16)

    def products(weight: torch.Tensor, hidden: torch.Tensor, gradient: torch.Tensor) -> None:
        torch.mm(hidden, weight.t())
        torch.mm(gradient, weight)
        torch.mm(gradient.t(), hidden)

    def attention(*inputs: torch.Tensor) -> None:
        output = scaled_dot_product_attention(*inputs, is_causal=True)
        torch.autograd.grad(output, inputs, inputs[0])

    clock = Clock()
    for step, batch in enumerate(data.train_dataloader()):
        clock.seen(batch)
        lengths = batch["attention_mask"].sum(1).tolist()
        kept = int((batch["labels"] != -100).sum())
        by_layer = [(w, tensor(sum(lengths), w.shape[1]), tensor(sum(lengths), w.shape[0])) for w in layers]
        heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        documents = [[tensor(1, heads, length, size).requires_grad_() for _ in range(3)] for length in lengths]
        of_head = (head, tensor(kept, head.shape[1]), tensor(kept, head.shape[0]))
        if options.device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for arguments in [*by_layer, of_head]:
            products(*arguments)
        for document in documents * config.num_hidden_layers:
            attention(*document)
        if options.device == "cuda":
            torch.cuda.synchronize()
        clock.seconds += time.perf_counter() - started if step >= WARM_UP else 0.0
    return clock.result()


SIDES = {
    "dft_lightning": partial(run_ours, padding_free=True),
    "dft_lightning_compiled": partial(run_ours, padding_free=True, compiled=True),
    "padded": run_ours,
    "padded_compiled": partial(run_ours, compiled=True),
    "packed": partial(run_ours, padding_free=True, packed=True),
    "packed_compiled": partial(run_ours, padding_free=True, packed=True, compiled=True),
    "trl": run_trl,
    "products": run_products,
}


def in_own_process(script: str, options: argparse.Namespace, side: str, *more: str) -> dict:
    """What a side of a script writes to ``--result``."""
    arguments = [sys.executable, script, "--side", side, "--model", str(options.model), "--rows", str(options.rows)]
    arguments += ["--steps", str(options.steps), "--batch_size", str(options.batch_size), *more]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        log = Path(folder) / "log"
        with log.open("w") as stream:
            done = subprocess.run(
                [*arguments, "--result", str(result)], stdout=stream, stderr=stream, check=False, cwd=folder
            )
        if done.returncode != 0:
            raise SystemExit(f"{side} failed:\n{log.read_text()[-3000:]}")
        return json.loads(result.read_text())


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def compare(options: argparse.Namespace, checkpointing: bool, sides: list[str]) -> dict:
    turns = []
    for _ in range(options.turns):
        more = ["--device", options.device, *(["--gradient_checkpointing"] if checkpointing else [])]
        turn = {side: in_own_process(__file__, options, side, *more) for side in sides}
        turns.append(turn)
        print({side: round(result["tokens_per_second"]) for side, result in turn.items()}, flush=True)
    counts = {result["tokens"] for turn in turns for side, result in turn.items() if not side.startswith("packed")}
    if len(counts) != 1:
        raise SystemExit(f"the sides did not train on the same tokens: {counts}")
    speed = {side: median([turn[side]["tokens_per_second"] for turn in turns]) for side in sides}
    memory = {side: median([turn[side]["peak_memory"] for turn in turns]) for side in sides}
    ratios = {}
    if "trl" in sides:
        ratios = {
            side: median([turn[side]["tokens_per_second"] / turn["trl"]["tokens_per_second"] for turn in turns])
            for side in sides
        }
    print(f"gradient checkpointing {'on' if checkpointing else 'off'}")
    for side in sides:
        line = f"  {side:22} {speed[side]:7.0f} tokens/s, peak memory of the process {memory[side] / 2**20:6.0f} MiB"
        print(line + (f", {ratios[side]:.2f} times TRL's speed" if ratios else ""), flush=True)
    return {"gradient_checkpointing": checkpointing, "ratios": ratios, "turns": turns}


def parser_of_steps(description: str | None, steps: int) -> argparse.ArgumentParser:
    """The arguments of a script that measures whole steps, each side in a process of its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with weights and tokenizer")
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines with question and answer")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    if options.steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}, which warm up")
    options.model, options.rows = options.model.resolve(), options.rows.resolve()
    return options


def main() -> None:
    parser = parser_of_steps(__doc__, steps=8)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE")
    parser.add_argument("--output", type=Path, help="JSON; benchmarks/results/training_step_DEVICE.json by default")
    parser.add_argument("--gradient_checkpointing", action="store_true", help=argparse.SUPPRESS)
    options = parsed(parser)
    if options.side:
        with tempfile.TemporaryDirectory() as folder:
            options.result.write_text(json.dumps(SIDES[options.side](options, folder)))
        return
    sides = list(options.sides)
    if "trl" in sides and (reason := missing("trl")):
        print(f"trl: skipped, {reason}", flush=True)
        sides.remove("trl")
    uncompiled = [side for side in sides if not side.endswith("compiled")]  # what is computed again is not the point
    results = [compare(options, False, sides), compare(options, True, uncompiled)]
    output = options.output or RESULTS / f"training_step_{options.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**machine(options.device), "results": results}, indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
