"""Answers to a batch's prompts: by the module, or by the engine that it was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dft_lightning.engine import Answer, Question
from dft_lightning.errors import InputError
from dft_lightning.models.decoding import drawing_by
from dft_lightning.models.generation import GenerationOptions
from dft_lightning.modules.options import EvaluationOptions


class Engine(Protocol):
    """What answers in a module's place."""

    def ask(
        self, questions: Sequence[Question], options: GenerationOptions, prompts: Sequence[Sequence[int]]
    ) -> dict[Any, list[Answer]]:
        """The answers to each question by its key. ``prompts``, of token ids, tell the model; there is at least one."""


class Kept(Protocol):
    """Answers that are kept for the same command once more."""

    def completions(self, batch: dict[str, Any], answer: Callable[[], list[str]]) -> list[str]:
        """Texts of a batch's completions, from what is kept or as ``answer`` gives them."""


class Answering(Protocol):
    """What a module has to do with answers."""

    evaluation: EvaluationOptions
    engine: Engine | None
    kept_answers: Kept | None

    @property
    def device(self) -> torch.device:
        """The model's."""

    def generate(self, input_ids: Tensor, attention_mask: Tensor, options: GenerationOptions) -> list[str]:
        """Texts of completions to prompts ``[B, T]``, padded on the left."""


def answers_of(
    module: Answering,
    batch: dict[str, Any],
    options: GenerationOptions,
    num_samples: int = 1,
    seed: int | None = None,
) -> list[str]:
    """Texts of ``num_samples`` completions to each prompt of a batch, those of one prompt one after the other.

    What a sample draws depends on ``seed``, that of the run by default, its row's index and its number alone.

    Raises:
        InputError: an engine is to answer, and none was given.
    """
    indices, seed = batch["index"].tolist(), torch.initial_seed() if seed is None else seed
    if module.evaluation.engine.kind == "module":
        ids, mask = batch["prompt_input_ids"].to(module.device), batch["prompt_attention_mask"].to(module.device)
        with drawing_by([(seed, index, sample) for index in indices for sample in range(num_samples)]):
            return module.generate(_repeat(ids, num_samples), _repeat(mask, num_samples), options)
    if module.engine is None:
        raise InputError(
            "model.evaluation.engine: a server is to answer, which the callback EngineAnswers asks (the command adds "
            "it): give it to the trainer"
        )
    prompts = prompts_of(batch)
    pairs = [(index, prompt) for index, prompt in zip(indices, prompts, strict=True) if index >= 0]
    found = module.engine.ask([Question(index, prompt, num_samples, seed) for index, prompt in pairs], options, prompts)
    # Rows of index -1 only make the ranks even.
    return [text for index in indices for text in _texts(found.get(index), num_samples)]


def kept_or_new(module: Answering, batch: dict[str, Any]) -> list[str]:
    """Texts of the completions that ``predict`` and ``test`` want: kept ones, if any are, or :func:`answers_of`."""

    def answer() -> list[str]:
        return answers_of(module, batch, module.evaluation.generation)

    return answer() if module.kept_answers is None else module.kept_answers.completions(batch, answer)


def prompts_of(batch: dict[str, Any]) -> list[list[int]]:
    """Token ids of a batch's prompts, without the padding."""
    rows = zip(batch["prompt_input_ids"], batch["prompt_attention_mask"], strict=True)
    return [row[kept.bool()].tolist() for row, kept in rows]


def _texts(answers: Sequence[Answer] | None, num_samples: int) -> list[str]:
    return [""] * num_samples if answers is None else [answer.text for answer in answers]


def _repeat(tensor: Tensor, times: int) -> Tensor:
    return tensor.repeat_interleave(times, dim=0)
