"""What a callback measures of a module on some rows: generated answers, token metrics, probabilities of targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch

from dft_lightning.distributed import gather_lists
from dft_lightning.errors import InputError
from dft_lightning.metrics import ExactMatch, TokenMetrics, pass_at_k, reported_k
from dft_lightning.models.generation import GenerationOptions
from dft_lightning.models.layout import KEY, with_layout
from dft_lightning.models.reference import ReferenceModel
from dft_lightning.models.row_checks import evaluating
from dft_lightning.modules.answers import answers_of
from dft_lightning.modules.causal_lm import CausalLMModule


def check_prompts(trainer: pl.Trainer, module: CausalLMModule, split: str, limit: int | None) -> None:
    """Raise before any training, and on every rank: a run that cannot be evaluated at its end should not begin.

    Raises:
        InputError: no rows of the split, or a row that no answer could match.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    data.generation_dataloader(limit, split)
    ExactMatch(module.evaluation.extractor).check(data.answers(split, limit), split)


@contextmanager
def measuring(trainer: pl.Trainer, module: CausalLMModule) -> Iterator[None]:
    """Evaluation mode, the run's precision, and a random state of its own: training goes on as if nothing happened."""
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices), evaluating(module), trainer.precision_plugin.forward_context():
        torch.manual_seed(0)  # of a model whose forward draws
        yield


def count_correct(
    trainer: pl.Trainer,
    module: CausalLMModule,
    options: GenerationOptions,
    *,
    split: str = "validation",
    limit: int | None = None,
    num_samples: int = 1,
    seed: int = 0,
    after_batch: Callable[[], None] = lambda: None,
) -> list[int]:
    """How many of ``num_samples`` completions are right, for each of the first ``limit`` problems of a split.

    A collective: call it on every rank. Every rank gets the counts of all rows, in the rows' order. ``after_batch`` may
    raise, on every rank alike. What a sample draws depends on ``seed``, its row and its number alone, whatever the
    batches and the ranks.
    """
    metric = ExactMatch(module.evaluation.extractor)
    counts: list[tuple[int, int]] = []
    with measuring(trainer, module):
        for batch in trainer.datamodule.generation_dataloader(limit, split):  # type: ignore[attr-defined]
            completions = answers_of(module, batch, options, num_samples, seed)
            for i, index in enumerate(batch["index"].tolist()):
                if index >= 0:  # rows of index -1 only make the ranks even
                    samples = completions[i * num_samples : (i + 1) * num_samples]
                    counts.append((index, sum(metric.score(text, batch["answer"][i]) for text in samples)))
            after_batch()
    return [count for _, count in sorted(gather_lists(counts, trainer.world_size))]


def at_temperature(options: GenerationOptions, temperature: float) -> GenerationOptions:
    """Sampling from the model's whole distribution at a temperature; greedy at 0."""
    if temperature == 0:
        return replace(options, do_sample=False)
    return replace(options, do_sample=True, temperature=temperature, top_p=1.0, top_k=0)


def shares(greedy: list[int], sampled: list[int] | None, num_samples: int) -> dict[str, float]:
    """Exact match ``greedy``, ``sampled`` (avg@n) and ``pass_at_K`` from the right completions of each problem."""
    values = {"greedy": sum(greedy) / len(greedy)}
    return values if sampled is None else {**values, **sampled_shares(sampled, num_samples)}


def sampled_shares(sampled: list[int], num_samples: int) -> dict[str, float]:
    """``sampled`` (avg@n) and ``pass_at_K`` from the right completions of each problem."""
    values = {"sampled": sum(sampled) / (num_samples * len(sampled))}
    for k in reported_k(num_samples):
        values[f"pass_at_{k}"] = sum(pass_at_k(num_samples, count, k) for count in sampled) / len(sampled)
    return values


def token_values(trainer: pl.Trainer, module: CausalLMModule, split: str, limit: int | None = None) -> dict[str, float]:
    """Token metrics of the first ``limit`` rows of a split, over all ranks. A collective."""
    metrics = TokenMetrics().to(module.device)
    with measuring(trainer, module):
        for batch in _batches(trainer, module, split, limit):
            batch = with_layout(batch)
            metrics.update(module.token_output(batch, statistics=("entropy",)), batch[KEY].num_tokens)
    values = {name: float(value) for name, value in metrics.compute().items()}
    del values["tokens"]
    return values


def held_values(
    trainer: pl.Trainer, module: CausalLMModule, split: str, start: ReferenceModel, limit: int | None = None
) -> dict[str, float]:
    """What is left of the model that a run began with, on the first ``limit`` rows of a split. A collective.

    Returns:
        ``kl``, the mean over targets of ``KL(start || model)`` in nats; of a mixture also ``nll/NAME``,
        ``token_accuracy/NAME`` and ``kl/NAME`` of each source that has targets.
    """
    found: list[tuple[int, float, float, float]] = []
    with measuring(trainer, module):
        for batch in _batches(trainer, module, split, limit):
            batch = with_layout(batch)
            output = module.token_output_beside(start, batch)
            sources = torch.full_like(output.log_prob, -1)  # of a split that is no mixture
            if "source" in batch:
                sources = batch["source"].flatten()[batch[KEY].target_index + 1]
            columns = (sources, -output.log_prob, output.correct, cast(torch.Tensor, output.reference_kl))
            found += zip(*(column.tolist() for column in columns), strict=True)
    values = np.array(gather_lists(found, trainer.world_size), dtype=np.float64).reshape(-1, 4)
    held = {"kl": values[:, 3].mean()}
    for source, name in enumerate(trainer.datamodule.source_names):  # type: ignore[attr-defined]
        own = values[values[:, 0] == source, 1:]
        if len(own):
            means = zip(("nll", "token_accuracy", "kl"), own.mean(axis=0), strict=True)
            held |= {f"{measure}/{name}": mean for measure, mean in means}
    return {name: float(value) for name, value in held.items()}


def target_log_probs(trainer: pl.Trainer, module: CausalLMModule, split: str, limit: int | None = None) -> list[float]:
    """Log-probability of each target of the first ``limit`` rows of a split, in nats. A collective.

    In the order of rank, row and token, which is the same at every call in a run.
    """
    found: list[float] = []
    with measuring(trainer, module):
        for batch in _batches(trainer, module, split, limit):
            found += module.token_output(batch).log_prob.tolist()
    return gather_lists(found, trainer.world_size)


def _batches(trainer: pl.Trainer, module: CausalLMModule, split: str, limit: int | None) -> Iterator[dict[str, Any]]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    for batch in data.evaluation_dataloader(split, limit):
        yield cast(dict[str, Any], trainer.strategy.batch_to_device(batch, module.device))


def require_instruction_data(trainer: pl.Trainer, name: str) -> None:
    """Raise ``InputError`` unless the trainer has a data module with prompts."""
    if not hasattr(getattr(trainer, "datamodule", None), "generation_dataloader"):
        raise InputError(f"{name} takes its prompts from InstructionDataModule: fit with datamodule=")
