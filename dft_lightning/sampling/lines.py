"""What is sampled, as lines of a file: made by all ranks, written by the first."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dft_lightning.callbacks.engine import served
from dft_lightning.callbacks.interruption import Interrupted
from dft_lightning.cli.commands import Stopped
from dft_lightning.distributed import gather_lists
from dft_lightning.distributed.strategies import on_first_rank
from dft_lightning.engine import Answer
from dft_lightning.errors import InputError
from dft_lightning.evaluation.completions import sampled_shares
from dft_lightning.fit.on_devices import status_of
from dft_lightning.metrics import ExactMatch
from dft_lightning.models.fingerprints import hash_weights
from dft_lightning.sampling.completions import Sampler
from dft_lightning.sampling.partial_file import Job, PartialFile
from dft_lightning.sampling.prompts import Prompts


class Lines:
    """The lines of a run of ``sample``. Ranks take its batches in turn, which are the same on any number of them.

    Args:
        output: the file to make.
        asked: what decides the lines beside the weights, by the name that a message calls it.
        batches: the (prompt, sample) of each batch's lines.
        overwrite: begin anew where the partial file is of other options.
        prompts: what is asked.
        scorer: says which answers are right.
    """

    def __init__(
        self,
        output: Path,
        asked: dict[str, Any],
        batches: Sequence[Sequence[Job]],
        overwrite: bool,
        prompts: Prompts,
        scorer: ExactMatch,
    ) -> None:
        self._output = output
        self._asked = asked
        self._batches = batches
        self._overwrite = overwrite
        self._prompts = prompts
        self._scorer = scorer
        self._file: PartialFile | None = None  # of rank 0

    def write(self, sampler: Sampler) -> str:
        """Sample what is not there yet, and write the whole; returns what became of it. A collective.

        Raises:
            InputError: anything wrong with the file, or with the model's probabilities, on every rank.
            Stopped: on Ctrl-C and SIGTERM.
        """
        weights = hash_weights(sampler.module)  # of shards a collective

        def begin() -> None:
            self._file = PartialFile(
                self._output, {**self._asked, "the weights": weights}, self._batches, self._overwrite
            )

        on_first_rank(sampler.trainer, begin)
        try:
            done = sampler.trainer.strategy.broadcast(0 if self._file is None else self._file.batches_done)
            with served(sampler.trainer, sampler.module):
                speed = self._sample(sampler, done)
            return self._finish(speed, sampler.options.max_new_tokens)
        except (KeyboardInterrupt, Interrupted) as ending:
            raise Stopped(f"stopped: {self._kept()}" if self._file else "stopped", status_of(ending)) from None
        except InputError as error:
            if self._file is None or not self._file.lines_done:
                raise
            raise InputError(f"{error}; {self._kept()}") from error
        finally:
            if self._file is not None:
                self._file.close()

    def _kept(self) -> str:
        assert self._file is not None
        total = sum(map(len, self._batches))
        kept = f"{self._file.lines_done} of {total} answers are in {self._file.path}"
        return f"{kept}; the same command goes on with the others"

    def _sample(self, sampler: Sampler, done: int) -> float:
        """The batches that are not there yet; returns tokens per second, 0 where none were left."""
        rank, ranks = sampler.trainer.global_rank, sampler.trainer.world_size
        tokens, begun, total = 0, time.perf_counter(), sum(map(len, self._batches))
        there = sum(map(len, self._batches[:done]))
        shown = None if rank == 0 else True
        with tqdm(total=total, initial=there, desc="Sampling", unit=" answers", disable=shown) as bar:
            for first in range(done, len(self._batches), ranks):
                # Where fewer batches than ranks are left, the others go along with the last.
                own = self._batches[min(first + rank, len(self._batches) - 1)]
                made = gather_lists([self._lines_of(sampler, own)], ranks)
                for lines in made[: len(self._batches) - first]:
                    if isinstance(lines, str):
                        raise InputError(lines)
                    tokens += sum(line["num_tokens"] for line in lines)
                    if self._file is not None:
                        self._file.append(lines)
                    bar.update(len(lines))
        return tokens / (time.perf_counter() - begun) if tokens else 0.0

    def _lines_of(self, sampler: Sampler, jobs: Sequence[Job]) -> list[dict[str, Any]] | str:
        """A batch's lines; or what is wrong, which all ranks are to learn."""
        try:
            found = sampler.batch(jobs, [self._prompts.ids[index] for index, _ in jobs])
            return [line_of(*pair, self._prompts, self._scorer) for pair in zip(jobs, found, strict=True)]
        except InputError as problem:
            return str(problem)

    def _finish(self, speed: float, max_new_tokens: int) -> str:
        if self._file is None:
            return ""
        k = len({sample for batch in self._batches for _, sample in batch})
        summary = summarise(self._file, k, speed, max_new_tokens)
        self._file.finish()
        print(f"{self._output}: {summary}")
        return summary


def line_of(job: Job, completion: Answer, prompts: Prompts, scorer: ExactMatch) -> dict[str, Any]:
    """What is written of a completion. One that was cut off is not right, whatever it says."""
    index, number = job
    answer = prompts.answer(index)
    assert answer is not None, "checked before"
    correct = completion.finished and scorer.score(completion.text, answer)
    return {
        **prompts.question(index),
        prompts.options.completion_column: completion.text,
        "gold_answer": answer,
        "correct": correct,
        "reward": float(correct),
        "log_prob": completion.log_prob,
        "num_tokens": completion.num_tokens,
        "finished": completion.finished,
        "index": index,
        "sample": number,
    }


def summarise(file: PartialFile, k: int, speed: float, max_new_tokens: int) -> str:
    """What became of all the answers."""
    right: dict[int, int] = {}
    cut = 0
    for line in file.lines():
        right[line["index"]] = right.get(line["index"], 0) + line["correct"]
        cut += not line["finished"]
    counts = list(right.values())
    values = sampled_shares(counts, k)
    names = {"sampled": f"avg@{k}", **{name: name.replace("_at_", "@") for name in values if name != "sampled"}}
    shares = ", ".join(f"{shown} {values[name]:.3f}" for name, shown in names.items())
    text = f"{k * len(counts)} answers to {len(counts)} prompts, {sum(counts)} right: {shares}; "
    text += f"{sum(count > 0 for count in counts)} prompts have a right one"
    text += f"; {cut} cut off at {max_new_tokens} tokens" if cut else ""
    return text + (f"; {speed:.0f} tokens/s" if speed else "")
