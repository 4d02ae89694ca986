"""A batch of sampled completions, each with the log-probability that the model gives it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, groupby
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dft_lightning.engine import Answer, Question
from dft_lightning.errors import InputError
from dft_lightning.evaluation.completions import measuring
from dft_lightning.losses.base import IGNORE_INDEX
from dft_lightning.models.decoding import drawing_by
from dft_lightning.models.generation import BROKEN, GenerationOptions, completion_lengths, decode_completions
from dft_lightning.modules import CausalLMModule
from dft_lightning.modules.answers import Engine
from dft_lightning.sampling.partial_file import Job
from dft_lightning.sampling.prompts import IntArray


class Sampler:
    """Samples completions from a module's model.

    Args:
        module: with its model, on its device.
        trainer: tells device and precision.
        options: how to generate.
        stop_token_ids: a completion ends with the first of these.
        pad_token_id: fills up batches, masked everywhere.
        seed: with a prompt's index and a sample's number it decides what is drawn.

    Raises:
        InputError: nothing would ever end a completion.
    """

    def __init__(
        self,
        module: CausalLMModule,
        trainer: pl.Trainer,
        options: GenerationOptions,
        stop_token_ids: Sequence[int],
        pad_token_id: int,
        seed: int,
    ) -> None:
        if not stop_token_ids:
            raise InputError("no token ends a turn or a text, so that no answer would ever be finished")
        self.module = module
        self.trainer = trainer
        self.options = options
        self.stop_token_ids = stop_token_ids
        self.pad_token_id = pad_token_id
        self.seed = seed

    def batch(self, jobs: Sequence[Job], prompts: Sequence[IntArray]) -> list[Answer]:
        """A completion of each prompt, the same whenever this (prompt, sample) of ``jobs`` is sampled; or what the
        module's engine answers.

        Raises:
            InputError: probabilities that are NaN or infinite.
        """
        if self.module.engine is not None:
            return self._asked(self.module.engine, jobs, prompts)
        seeds = [(self.seed, *job) for job in jobs]
        with measuring(self.trainer, self.module), drawing_by(seeds):
            try:
                tokens, texts = self._generate(prompts)
                problem = None
            except InputError as error:  # of one rank: the others go on to a forward, which may be a collective
                tokens, texts, problem = torch.full((len(prompts), 1), self.pad_token_id), [""] * len(prompts), error
            lengths = completion_lengths(tokens, self.stop_token_ids)
            sampled = [row[:length] for row, length in zip(tokens.cpu(), lengths, strict=True)]
            log_probs = self._log_probs(prompts, sampled)
        if problem is not None:
            raise problem
        if not torch.tensor(log_probs).isfinite().all():
            raise InputError(BROKEN)
        return [
            # A NUL is no text that a row may have.
            Answer(text.replace("\0", "\ufffd"), log_prob, len(row), int(row[-1]) in self.stop_token_ids)
            for text, log_prob, row in zip(texts, log_probs, sampled, strict=True)
        ]

    def _asked(self, engine: Engine, jobs: Sequence[Job], prompts: Sequence[IntArray]) -> list[Answer]:
        questions = []
        for _, group in groupby(zip(jobs, prompts, strict=True), key=lambda pair: pair[0][0]):
            (first, ids), *others = group
            questions.append(Question(first, ids.tolist(), 1 + len(others), self.seed))
        found = engine.ask(questions, self.options, [ids.tolist() for ids in prompts])
        answers = [answer for question in questions for answer in found[question.key]]
        # A NUL is no text that a row may have.
        return [replace(each, text=each.text.replace("\0", "\ufffd")) for each in answers]

    def _generate(self, prompts: Sequence[IntArray]) -> tuple[Tensor, list[str]]:
        rows = [torch.from_numpy(prompt).long() for prompt in prompts]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        device = self.module.device
        with _generated_tokens(self.module) as calls:
            texts = self.module.generate(ids.to(device), mask.to(device), self.options)
        said = [decode_completions(self.module.tokenizer, tokens, self.stop_token_ids) for tokens in calls]
        if said != [texts]:  # one of the module's own
            raise InputError(
                f"{type(self.module).__name__}.generate returns other texts than one call of generate_tokens makes: "
                "sample needs the tokens, for their log-probs: override generate_tokens in its place"
            )
        return calls[0], texts

    def _log_probs(self, prompts: Sequence[IntArray], completions: Sequence[Tensor]) -> list[float]:
        """By a forward over prompt and completion, as training makes it: at temperature 1, of all tokens."""
        asked = [torch.from_numpy(prompt).long() for prompt in prompts]
        pairs = list(zip(asked, completions, strict=True))
        rows = [torch.cat(pair) for pair in pairs]
        learnt = [torch.cat([torch.full_like(prompt, IGNORE_INDEX), said]) for prompt, said in pairs]
        batch = {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(learnt, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        }
        device = self.module.device
        found = self.module.token_output({name: tensor.to(device) for name, tensor in batch.items()}).log_prob
        found, ends = found.double().cpu(), accumulate(len(said) for said in completions)
        return [float(found[end - len(said) : end].sum()) for end, said in zip(ends, completions, strict=True)]


@contextlib.contextmanager
def _generated_tokens(module: CausalLMModule) -> Iterator[list[Tensor]]:
    """What each call of a module's ``generate_tokens`` returns meanwhile."""
    calls: list[Tensor] = []
    own = module.generate_tokens

    def generate_tokens(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(own(*args, **kwargs))
        return calls[-1]

    module.generate_tokens = generate_tokens  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        del module.generate_tokens
