"""The callback that measures and records a run, for the report to read."""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from dft_lightning.callbacks.engine import check_along_fit, served
from dft_lightning.compare.files import CHECKPOINT, FIT, PART, PROBABILITIES, TEST, write_json
from dft_lightning.compare.hashes import RowHasher, combined, hash_texts
from dft_lightning.compare.starts import measured_once
from dft_lightning.distributed import gather_lists
from dft_lightning.distributed.strategies import shards_parameters
from dft_lightning.errors import InputError
from dft_lightning.evaluation.completions import (
    at_temperature,
    check_prompts,
    count_correct,
    held_values,
    require_instruction_data,
    shares,
    target_log_probs,
    token_values,
)
from dft_lightning.files import replacing_file
from dft_lightning.models.fingerprints import hash_weights
from dft_lightning.models.reference import StartingModel
from dft_lightning.modules.causal_lm import CausalLMModule


@dataclass(frozen=True)
class RunIdentity:
    """Which place of the grid a run has.

    Attributes:
        name: of the run and of its folder.
        loss: the name that the comparison gives the loss; ``None`` for the base model, which is only tested.
        learning_rate: peak learning rate.
        seed: of the run.
    """

    name: str
    loss: str | None = None
    learning_rate: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Evaluation:
    """What is measured of every run, and when.

    Attributes:
        every_n_steps: optimizer steps between evaluations on validation rows; there is always one before the first
            step and one after the last.
        num_samples: samples per problem for avg@k and pass@k.
        temperature: of those samples, more than 0.
        temperatures: of the curve of exact match on test rows; 0 is greedy.
        curve_samples: samples per problem at each of them (``num_samples`` at ``temperature``, one at 0).
        limit: validation and forgetting rows that are evaluated, from the start of each set; ``None`` for all. The
            test is on all test rows.
        forgetting_answers: score answers on ``data.forgetting`` rows too; without, token metrics alone, for rows in
            which the answer extractor finds none.
        forgetting_kl: on those rows also the divergence from the model that the run began with, of which a copy of
            what is trained is kept beside it.
        probability_rows: training rows, from the start, whose targets' probabilities are kept before and after.
        seed: of the sampling.
    """

    every_n_steps: int = 100
    num_samples: int = 4
    temperature: float = 1.0
    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
    curve_samples: int = 1
    limit: int | None = 200
    forgetting_answers: bool = True
    forgetting_kl: bool = True
    probability_rows: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("every_n_steps", "num_samples", "curve_samples", "limit", "probability_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"evaluation.{name} must be at least 1, got {value}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"evaluation.temperature must be more than 0, got {self.temperature}; greedy is always scored"
            )
        if any(not 0 <= temperature < math.inf for temperature in self.temperatures):
            raise ValueError(f"evaluation.temperatures must be finite and not negative, got {list(self.temperatures)}")


@contextlib.contextmanager
def naming_the_way_out(split: str) -> Iterator[None]:
    """Forgetting rows, whose answers cannot be scored, need not be."""
    try:
        yield
    except InputError as problem:
        if split == "forgetting":
            raise InputError(f"{problem}; or set evaluation.forgetting_answers: false") from None
        raise


class RunRecorder(Callback):
    """Measures a run before, along and after ``fit`` and in ``test``, and writes what it finds into the run's folder.

    In ``fit``: exact match (greedy, avg@k, pass@k) and token metrics on validation rows and, where there are some, on
    ``data.forgetting`` rows; what the run logs; probabilities of the training targets before and after; hashes of the
    initial weights, the rows and the targets of every step. In ``test``: exact match on test rows at every
    temperature, for each problem. A run trains the same with or without it.

    Files: ``fit.json``, ``probabilities.npz`` (``before`` and ``after``, log-probabilities in nats), ``last.ckpt`` (the
    weights after the last step, which are those to test), ``test.json``; until ``fit`` has ended ``part.ckpt``, of its
    last evaluation, from which a run that was interrupted goes on to the same records.

    Args:
        folder: the run's folder.
        run: which run this is.
        evaluation: what is measured, and when.
    """

    def __init__(self, folder: str, run: RunIdentity, evaluation: Evaluation = Evaluation()) -> None:
        self.folder = Path(folder)
        self.run = run
        self.evaluation = evaluation
        self._rank, self._world_size = 0, 1
        self._started = 0.0
        self._forget()

    def _forget(self) -> None:
        """What an earlier fit has left."""
        self._history: list[dict[str, Any]] = []
        self._logged = _LoggedValues(str(self.folder))
        self._hasher = RowHasher()
        self._initial_weights = ""
        self._seconds = 0.0  # before an interruption
        self._log_probs: dict[str, list[float]] = {}
        self._start: StartingModel | None = None
        self._start_values: dict[str, Tensor] | None = None  # of it, where they were loaded
        self._trains = self._to_save = self._saving = False

    # -- fit ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage not in ("fit", "test"):
            return
        require_instruction_data(trainer, "RunRecorder")
        assert isinstance(pl_module, CausalLMModule)
        if shards_parameters(trainer):  # weights are hashed and saved whole
            raise InputError(
                f"trainer.strategy: a run of compare holds whole weights, and {type(trainer.strategy).__name__} shards "
                "them: use one GPU a run, or ddp"
            )
        self._rank, self._world_size = trainer.global_rank, trainer.world_size
        if stage == "fit":
            self._forget()
            trainer.loggers = [*trainer.loggers, self._logged]
            check_along_fit(pl_module)
        for split in self._splits(trainer) if stage == "fit" else ("test",):
            if self._has_answers(split):
                with naming_the_way_out(split):
                    check_prompts(trainer, pl_module, split, self._limit(split))

    def _has_answers(self, split: str) -> bool:
        return split != "forgetting" or self.evaluation.forgetting_answers

    def _limit(self, split: str) -> int | None:
        return None if split == "test" else self.evaluation.limit

    def _splits(self, trainer: pl.Trainer) -> list[str]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        return ["validation", *(["forgetting"] if "forgetting" in data.splits else [])]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, CausalLMModule)
        assert pl_module.model is not None
        self._started, self._trains = time.time() - self._seconds, True
        if self.evaluation.forgetting_kl and "forgetting" in self._splits(trainer):
            self._start = StartingModel(pl_module.model, self._start_values)
        self._start_values = None
        if self._history:  # of the part before an interruption
            rank_zero_info(f"goes on after step {trainer.global_step}, from {trainer.ckpt_path}")
            return
        if trainer.global_step:
            raise InputError(f"--ckpt_path: a recorded run goes on from its own {PART} alone: give no other")
        self._initial_weights = hash_weights(pl_module)
        self._evaluate(trainer, pl_module)
        self._keep_log_probs(trainer, pl_module, "before")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._to_save:  # here, where all is logged that the step before has left
            assert isinstance(pl_module, CausalLMModule)
            self._save(trainer, pl_module)
        self._hasher.add(batch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step and step % self.evaluation.every_n_steps == 0 and self._history[-1]["step"] != step:
            assert isinstance(pl_module, CausalLMModule)
            self._evaluate(trainer, pl_module)
            self._to_save = True

    def _save(self, trainer: pl.Trainer, module: CausalLMModule) -> None:
        module.train_telemetry.stop_clock()
        self._to_save, self._saving = False, True
        try:
            trainer.save_checkpoint(self.folder / PART)
        finally:
            self._saving = False
        module.train_telemetry.start_clock()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # A run that met an error begins anew: what it had before may be by what was wrong.
        if self._trains and isinstance(exception, Exception) and trainer.is_global_zero:
            (self.folder / PART).unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, for ``part.ckpt``; nothing for other checkpoints, whose moments are others.
        A collective."""
        if not self._saving:
            return {}
        hashers = gather_lists([vars(self._hasher)], self._world_size)
        return {
            "run": vars(self.run),
            "history": self._history,
            "logged": self._logged.records,
            "hashers": hashers,
            "initial_weights": self._initial_weights,
            "seconds": time.time() - self._started,
            "log_probs": self._log_probs,
            "start": None if self._start is None else self._start.values,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what was measured before an interruption.

        Raises:
            InputError: of another run, or on another number of ranks.
        """
        if state_dict["run"] != vars(self.run):
            raise InputError(
                f"--ckpt_path: this {PART} is of {state_dict['run']['name']}, and the run is {self.run.name}"
            )
        if len(state_dict["hashers"]) != self._world_size:
            raise InputError(
                f"{self.folder / PART} is of {len(state_dict['hashers'])} processes, and this run has "
                f"{self._world_size}: set trainer.devices to as many, or move the file away to begin anew"
            )
        self._history, self._log_probs = state_dict["history"], state_dict["log_probs"]
        self._logged.records = state_dict["logged"]
        self._hasher = RowHasher(**state_dict["hashers"][self._rank])
        self._initial_weights, self._seconds = state_dict["initial_weights"], state_dict["seconds"]
        self._start_values = state_dict["start"]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, CausalLMModule)
        if trainer.interrupted or not self._history:
            return
        if self._history[-1]["step"] != trainer.global_step:
            self._evaluate(trainer, pl_module)
        self._start = None
        self._keep_log_probs(trainer, pl_module, "after")
        self._write_log_probs(trainer)
        # Its own, and not one that the base's callbacks may have chosen by some value or some steps ago.
        trainer.save_checkpoint(self.folder / CHECKPOINT, weights_only=True)
        self._write_fit(trainer, finished=True, final_weights=hash_weights(pl_module))
        if trainer.is_global_zero:
            (self.folder / PART).unlink(missing_ok=True)

    def _evaluate(self, trainer: pl.Trainer, module: CausalLMModule) -> None:
        telemetry = module.train_telemetry
        telemetry.stop_clock()
        limit = self.evaluation.limit
        record: dict[str, Any] = {"step": trainer.global_step}
        with served(trainer, module):
            for split in self._splits(trainer):
                record[split] = values = token_values(trainer, module, split, limit)
                if split == "forgetting" and self._start is not None:
                    values |= held_values(trainer, module, split, self._start, limit)
                if self._has_answers(split):
                    count = self._count if trainer.global_step else self._count_of_start
                    greedy = count(trainer, module, split, 0.0, 1)
                    sampled = count(trainer, module, split, self.evaluation.temperature, self.evaluation.num_samples)
                    values |= shares(greedy, sampled, self.evaluation.num_samples)
                shown = ", ".join(f"{n} {values[n]:.3f}" for n in ("greedy", "sampled", "nll") if n in values)
                rank_zero_info(f"step {trainer.global_step}, {split} rows: {shown}")
        self._history.append(record)
        self._write_fit(trainer, finished=False)
        telemetry.start_clock()

    def _count(
        self, trainer: pl.Trainer, module: CausalLMModule, split: str, temperature: float, num_samples: int
    ) -> list[int]:
        return count_correct(
            trainer,
            module,
            at_temperature(module.evaluation.generation, temperature),
            split=split,
            limit=self._limit(split),
            num_samples=num_samples,
            seed=self.evaluation.seed,
        )

    def _count_of_start(
        self, trainer: pl.Trainer, module: CausalLMModule, split: str, temperature: float, num_samples: int
    ) -> list[int]:
        problems = trainer.datamodule.splits.problems(split, self._limit(split))  # type: ignore[attr-defined]
        decided_by = {
            **{name: value for name, value in self._common(trainer).items() if name != "run"},
            "weights": self._initial_weights,
            "problems": hash_texts(problems),
            "generation": asdict(at_temperature(module.evaluation.generation, temperature)),
            "samples": [num_samples, self.evaluation.seed],
        }
        measure = partial(self._count, trainer, module, split, temperature, num_samples)
        return measured_once(trainer, decided_by, measure)

    def _keep_log_probs(self, trainer: pl.Trainer, module: CausalLMModule, when: str) -> None:
        module.train_telemetry.stop_clock()
        self._log_probs[when] = target_log_probs(trainer, module, "train", self.evaluation.probability_rows)
        module.train_telemetry.start_clock()

    def _write_log_probs(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            arrays: dict[str, Any] = {k: np.asarray(v, dtype=np.float32) for k, v in self._log_probs.items()}
            with replacing_file(self.folder / PROBABILITIES) as file:
                np.savez_compressed(file, **arrays)

    def _write_fit(self, trainer: pl.Trainer, finished: bool, final_weights: str | None = None) -> None:
        hashers = gather_lists([self._hasher], trainer.world_size)
        if not trainer.is_global_zero:
            return
        record = {
            **self._common(trainer),
            "seconds": time.time() - self._started,
            "finished": finished,
            "history": self._history,
            "logged": self._logged.records,
            "initial_weights": self._initial_weights,
            "final_weights": final_weights,
            "rows": combined([hasher.rows for hasher in hashers]),
            "targets": combined([hasher.targets for hasher in hashers]),
            "steps": hashers[0].steps,
        }
        write_json(self.folder / FIT, record)

    def _common(self, trainer: pl.Trainer) -> dict[str, Any]:
        packages = ("dft-lightning", "torch", "lightning", "transformers")
        return {
            "run": vars(self.run),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
            "device": _device_name(trainer),
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
        }

    # -- test --------------------------------------------------------------------------------------------------

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.time()
        if trainer.is_global_zero:
            (self.folder / PART).unlink(missing_ok=True)  # of a fit that was killed when it had ended

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, CausalLMModule)
        evaluation = self.evaluation
        samples = dict.fromkeys(evaluation.temperatures, evaluation.curve_samples)
        samples |= {0.0: 1, evaluation.temperature: evaluation.num_samples}
        with served(trainer, pl_module):
            counts = {t: self._count(trainer, pl_module, "test", t, n) for t, n in samples.items()}
        curve = [(t, sum(counts[t]) / (samples[t] * len(counts[t]))) for t in sorted(evaluation.temperatures)]
        weights = hash_weights(pl_module)
        if not trainer.is_global_zero:
            return
        logged = {k.removeprefix("test/"): float(v) for k, v in trainer.callback_metrics.items() if k[:5] == "test/"}
        greedy, sampled = counts[0.0], counts[evaluation.temperature]
        record = {
            **self._common(trainer),
            "seconds": time.time() - self._started,
            "weights": weights,
            "problems": hash_texts(trainer.datamodule.splits.problems("test")),  # type: ignore[attr-defined]
            "num_samples": evaluation.num_samples,
            "values": logged | shares(greedy, sampled, evaluation.num_samples),
            "curve": curve,
            "correct": {"greedy": greedy, "sampled": sampled},
        }
        write_json(self.folder / TEST, record)


class _LoggedValues(Logger):
    """Keeps what a run logs: ``(step, values)``, the learning-rate monitor's left out."""

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._save_dir = save_dir
        self.records: list[tuple[int, dict[str, float]]] = []

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def name(self) -> str:
        return "compare"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run's config is beside its record."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        values = {name: float(value) for name, value in metrics.items() if name.startswith("train/")}
        if values and step is not None:
            self.records.append((step, values))


def _device_name(trainer: pl.Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
