"""Answers to problems, greedy and k samples of each: this package's generation against transformers' ``generate``.

    python benchmarks/generation.py --config configs/quickstart.yaml
    python ../shared/get_smollm2.py smollm2
    python benchmarks/generation.py --config configs/gsm8k_smollm2.yaml --name smollm2 --problems 64 \\
        --model.model smollm2 --data.test ../shared/data/gsm8k_test.jsonl

Further arguments are those of ``fit``. Both sides get the same batches of the first problems of ``data.test``, of
``data.eval_batch_size`` prompts, each prompt in as many rows as it has samples, in ``trainer.precision``. They take
turns. A ratio is the median over turns of two times of one turn. Greedy answers are compared token by token: where two
differ, the logits of the two tokens after the same tokens before them show how near to each other they are.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from linear_head import RESULTS, machine

import dft_lightning.__main__  # noqa: F401 (large tensors on huge pages, as the command has them)
from dft_lightning.cli.commands import FitArguments
from dft_lightning.evaluation.completions import at_temperature
from dft_lightning.fit.config import data_of, module_of, read_fit
from dft_lightning.models.decoding import drawing_by
from dft_lightning.models.generation import completion_lengths
from dft_lightning.sampling.command import trainer_of


def of_transformers(module, ids, mask, options):
    from transformers import GenerationConfig

    sampling = {"temperature": options.temperature, "top_p": options.top_p} if options.do_sample else {}
    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        do_sample=options.do_sample,
        top_k=0 if options.do_sample else None,
        eos_token_id=module.stop_token_ids,
        pad_token_id=module.tokenizer.pad_token_id,
        **sampling,
    )
    made = module.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return made[:, ids.shape[1] :]


def of_dft_lightning(module, ids, mask, options):
    with drawing_by([(0, row) for row in range(len(ids))]):
        return module.generate_tokens(ids, mask, options)


SIDES = {"transformers": of_transformers, "dft_lightning": of_dft_lightning}


def answered(module, trainer, batches, side, options, samples):
    """Each row's tokens up to and with its stop token, and the seconds of all."""
    rows, seconds = [], 0.0
    for batch in batches:
        ids, mask = (
            batch[f"prompt_{name}"].repeat_interleave(samples, dim=0) for name in ("input_ids", "attention_mask")
        )
        started = time.perf_counter()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            tokens = SIDES[side](module, ids, mask, options)
        seconds += time.perf_counter() - started
        lengths = completion_lengths(tokens, module.stop_token_ids)
        rows += [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    return rows, seconds


def differences(module, trainer, batches, one, other):
    """Of greedy answers that differ: the logits of the two tokens where they part, on what is before both."""
    prompts = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["prompt_input_ids"], batch["prompt_attention_mask"], strict=True)
    ]
    found = []
    for prompt, first, second in zip(prompts, one, other, strict=True):
        if first == second:
            continue
        place = next(i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            logits = module.model(torch.tensor([prompt + first[:place]]), use_cache=False).logits[0, -1].float()
        found.append({"place": place, "logits": [logits[first[place]].item(), logits[second[place]].item()]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--num_samples", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--name", default="embedded", help="of the entry in the JSON file")
    parser.add_argument("--output", type=Path, default=RESULTS / "generation_cpu.json")
    options, arguments = parser.parse_known_args()
    pl.seed_everything(0, verbose=False)
    config = read_fit(FitArguments(tuple(arguments)))
    module, data, trainer = module_of(config), data_of(config), trainer_of(config["trainer"])
    data.model_hparams = module.hparams
    data.prepare_data()
    data.setup("test")
    module.configure_model()
    module.eval()
    batches = list(data.generation_dataloader(options.problems, "test"))
    asked = {
        "greedy": (at_temperature(module.evaluation.generation, 0.0), 1),
        f"avg@{options.num_samples}": (
            at_temperature(module.evaluation.generation, options.temperature),
            options.num_samples,
        ),
    }
    few = [{name: value[:2] for name, value in batches[0].items() if isinstance(value, torch.Tensor)}]
    for side in SIDES:
        answered(module, trainer, few, side, asked["greedy"][0], 1)
    result = {"problems": options.problems, "batch_size": data.eval_batch_size, "precision": trainer.precision}
    for name, (generation, samples) in asked.items():
        turns, greedy = [], {}
        for _ in range(options.turns):
            turn = {}
            for side in SIDES:
                rows, seconds = answered(module, trainer, batches, side, generation, samples)
                turn[side] = {"seconds": seconds, "tokens": sum(map(len, rows))}
                greedy[side] = rows
            turns.append(turn)
            print(name, {side: f"{each['seconds']:.1f} s, {each['tokens']} tokens" for side, each in turn.items()})
        ratios = sorted(turn["transformers"]["seconds"] / turn["dft_lightning"]["seconds"] for turn in turns)
        result[name] = {"ratio": ratios[len(ratios) // 2], "turns": turns}
        if samples == 1:
            result[name]["differ"] = differences(module, trainer, batches, *greedy.values())
        print(f"{name}: {result[name]['ratio']:.2f} times as fast")
    written = json.loads(options.output.read_text()) if options.output.exists() else {}
    written |= {**machine("cpu"), options.name: result}
    options.output.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
