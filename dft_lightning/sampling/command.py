"""The command ``sample``: a model's answers to a split's prompts, as rows that ``fit`` learns the right ones of."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch.utils.data import Dataset

from dft_lightning.callbacks.interruption import Interrupted
from dft_lightning.cli.commands import Stopped
from dft_lightning.distributed.strategies import check_half_precision, check_precision
from dft_lightning.engine import EngineOptions
from dft_lightning.errors import InputError
from dft_lightning.fit.config import FitConfig, Split, fit_arguments, module_of, read_fit, strategy_of
from dft_lightning.fit.on_devices import ending_on_signals, of_its_devices, predict, status_of
from dft_lightning.fit.processes import ending_together
from dft_lightning.metrics import ExactMatch
from dft_lightning.models.generation import GenerationOptions
from dft_lightning.sampling.completions import Sampler
from dft_lightning.sampling.lines import Lines
from dft_lightning.sampling.prompts import jobs_by_length, read_prompts

# What of the model decides its answers and which of them are right.
_OF_THE_MODEL = (
    "model",
    "peft",
    "loading.revision",
    "loading.dtype",
    "loading.attn_implementation",
    "loading.head",
    "loading.quantization_config",
    "evaluation.answer_extractor",
    "sharding.param_dtype",
)
_ENGINE = "model.evaluation.engine"
_AT_ONCE = 256  # answers of a server


def sample(
    output: Path,
    k: int = 4,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    split: Split = "train",
    limit: int | None = None,
    overwrite: bool = False,
    engine: Literal["module", "openai"] | None = None,
    *,
    fit: FitConfig,
) -> None:
    """Sample answers to a split's prompts from a fit config's model, check them, and write them as rows that fit reads:
    reward 1 where the answer is right, 0 where it is not. A second call goes on where the first was stopped.

    All other options are those of fit, but for its checkpoint: ``export`` it, and give the folder as the model.

    Args:
        output: what to write, FILE.jsonl
        k: samples of each prompt
        temperature: of sampling
        top_p: sample among the likeliest tokens that have this probability together
        max_new_tokens: longest answer; model.evaluation.generation.max_new_tokens by default
        batch_size: answers at once; data.eval_batch_size by default, or data.batch_size where that is not set; 256
            of a server
        seed: of the samples
        split: whose prompts
        limit: the first rows alone
        overwrite: replace the file, or a partial one of other options
        engine: who answers, over model.evaluation.engine.kind: this module, or a server with the OpenAI completions
            interface, whose address or command line is in model.evaluation.engine
        fit: whose model and rows; in Python a config's file, a dict of its keys, or a list of these, later ones over
            earlier ones

    Raises:
        InputError: anything wrong with the input.
        Stopped: on Ctrl-C and SIGTERM; the message says what is kept.
    """
    _check_numbers(k=k, max_new_tokens=max_new_tokens, batch_size=batch_size, limit=limit)
    _check_sampling(temperature, top_p)
    output, fit = Path(output), fit_arguments(fit)
    if engine is not None:
        given = {"kind": engine} if engine == "openai" else asdict(EngineOptions())  # which has nothing of a server's
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
        options = [part for name, text in texts.items() for part in (f"--{_ENGINE}.{name}", text)]
        fit = replace(fit, args=(*fit.args, *options))
    check_output(output, overwrite)
    trainers: list[pl.Trainer] = []
    with ending_together(trainers):
        try:
            with ending_on_signals():
                config = read_fit(fit)
                if config.get("ckpt_path") is not None:
                    raise InputError(
                        "--ckpt_path: sample takes no checkpoint: `export` it, and give the folder as --model.model, "
                        "with --data.text.tokenizer where the config names one"
                    )
                data, prompts = read_prompts(config, split, limit, fit.classes)
                # Sampling needs no loss, and one may read what rows do not have.
                model = {**config["model"], "loss": _NO_LOSS, "reference_model": None}
                module = module_of({**config, "model": model}, fit.classes)
                if module.evaluation.answer_extractor is None:
                    raise InputError(
                        "model.evaluation.answer_extractor: not set, and sample says which answers are right by it: "
                        "LastNumber, ExpressionValue, HashAnswer, BoxedAnswer, MathAnswer, WholeText or your own"
                    )
                scorer = ExactMatch(module.evaluation.answer_extractor)
                scorer.check(prompts.answers(), split)
                longest = max_new_tokens or module.evaluation.generation.max_new_tokens
                generation = GenerationOptions(longest, True, temperature, top_p)
                asks = module.evaluation.engine
                batch_size = batch_size or (data.eval_batch_size if asks.kind == "module" else _AT_ONCE)
                batches = jobs_by_length([len(ids) for ids in prompts.ids], k, batch_size)
                trainers.append(trainer_of(config["trainer"]))
                asked: dict[str, Any] = {"--split": split, "--limit": limit, "--k": k, "--seed": seed}
                asked |= {f"--{name}": asdict(generation)[name] for name in ("temperature", "top_p", "max_new_tokens")}
                asked |= {"--batch_size": batch_size, "trainer.precision": config["trainer"]["precision"]}
                asked |= {f"model.{name}": reduce(getitem, name.split("."), config["model"]) for name in _OF_THE_MODEL}
                asked["model.evaluation.engine.kind"] = asks.kind
                asked["model.class_path"] = config["model"].get("class_path")
                asked["the prompts (rows, tokenizer or template)"] = prompts.digest
                lines = Lines(output, asked, batches, overwrite, prompts, scorer)

                def step(*_: Any) -> str:
                    """With the model on its device; returns what became of it."""
                    pad = data._pad_token_id()
                    sampler = Sampler(module, trainers[0], generation, module.stop_token_ids, pad, seed)
                    return lines.write(sampler)

                torch.manual_seed(0)  # of a model from a config, or a new adapter: the same when a run goes on
                predict(trainers[0], module, data, _Once(), step)
        except (KeyboardInterrupt, Interrupted) as ending:
            raise Stopped("stopped before anything was sampled", status_of(ending)) from None


def _check_numbers(**given: int | None) -> None:
    for name, value in given.items():
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")


def _check_sampling(temperature: float, top_p: float) -> None:
    if not 0 < temperature < math.inf:
        raise InputError(f"--temperature must be finite and more than 0, got {temperature:g}")
    if not 0 < top_p <= 1:
        raise InputError(f"--top_p must lie in (0, 1], got {top_p:g}")


def check_output(path: Path, overwrite: bool) -> None:
    """Whether the file may be written, before anything is loaded.

    Raises:
        InputError: it is there, is a folder, or is no ``.jsonl``.
    """
    if path.suffix != ".jsonl":
        raise InputError(f"--output must end in .jsonl, got {path}")
    if path.is_dir():
        raise InputError(f"--output: {path} is a folder")
    if path.exists() and not overwrite:
        raise InputError(f"--output: {path} is there: give another file, or --overwrite")


_NO_LOSS = {"class_path": "dft_lightning.losses.CrossEntropyLoss"}


def trainer_of(options: dict[str, Any]) -> pl.Trainer:
    """The trainer of a whole config on its devices, without a progress bar and plugins of its own.

    Raises:
        InputError: no such precision, or none of this device.
    """
    strategy = strategy_of(options["strategy"])
    check_precision(strategy, options["precision"])
    own = {"strategy": strategy, "enable_progress_bar": False, "plugins": None}
    trainer = pl.Trainer(**{**of_its_devices(options), **own})
    check_half_precision(trainer, options["precision"])
    return trainer


class _Once(Dataset[None]):
    """One batch, of nothing: the sampler makes its own."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        return None
