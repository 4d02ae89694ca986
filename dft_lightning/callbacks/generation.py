"""Exact match of generated answers along ``fit``: where a loss sharpens and where it spoils shows only there."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from dft_lightning.callbacks.engine import check_along_fit, served
from dft_lightning.callbacks.interruption import asked_to_stop
from dft_lightning.errors import InputError
from dft_lightning.evaluation.completions import (
    at_temperature,
    check_prompts,
    count_correct,
    require_instruction_data,
    sampled_shares,
    shares,
)
from dft_lightning.foreign.lightning import believe_reduced
from dft_lightning.metrics import reported_k
from dft_lightning.modules.causal_lm import CausalLMModule


class GenerationEvaluation(Callback):
    """Generates answers to validation prompts before, along and after ``fit``, and scores them by exact match.

    Logs ``generation/greedy`` (likeliest tokens), and ``generation/sampled``: the mean over ``num_samples`` samples
    per problem at ``temperature``, which is avg@k, with ``generation/pass_at_K`` (at least one of K samples right, for
    powers of two up to ``num_samples``). All are also in ``trainer.callback_metrics``, for a
    ``ModelCheckpoint`` to monitor, from the first evaluation after a training step. Sampling has its own random
    state: a run trains the same with or without it.

    Args:
        at_start: evaluate before the first step.
        every_n_steps: evaluate after every so many optimizer steps; ``None`` for never.
        at_end: evaluate after the last step.
        num_samples: samples per problem; 0 for greedy alone.
        temperature: of sampling, more than 0.
        limit: problems, from the start of the validation rows, or of the test rows in ``test``; ``None`` for all.
        seed: of the sampling.
        at_test: in the command ``test``, sample answers to the test problems: logs ``test/sampled`` and
            ``test/pass_at_K`` beside the greedy ``test/exact_match``.

    Raises:
        ValueError: options out of range.

    Attributes:
        history: ``(step, {"greedy": share, "sampled": share, ...})`` of each evaluation.

    Example:
        >>> callback = GenerationEvaluation(every_n_steps=100, num_samples=4, temperature=1.0, limit=200)
        >>> callback.history
        []
    """

    def __init__(
        self,
        at_start: bool = True,
        every_n_steps: int | None = None,
        at_end: bool = True,
        num_samples: int = 1,
        temperature: float = 1.0,
        limit: int | None = 200,
        seed: int = 0,
        at_test: bool = False,
    ) -> None:
        if at_test and num_samples < 1:
            raise ValueError("at_test samples: num_samples must be at least 1")
        for name, value, least in (("every_n_steps", every_n_steps, 1), ("num_samples", num_samples, 0)):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        if not temperature > 0:
            raise ValueError(f"temperature must be more than 0, got {temperature}; greedy is always scored")
        self.at_start = at_start
        self.every_n_steps = every_n_steps
        self.at_end = at_end
        self.num_samples = num_samples
        self.temperature = temperature
        self.limit = limit
        self.seed = seed
        self.at_test = at_test
        self.history: list[tuple[int, dict[str, float]]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "test" and self.at_test and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            require_instruction_data(trainer, "GenerationEvaluation")
            if isinstance(trainer.limit_test_batches, int) or trainer.limit_test_batches != 1.0:
                raise InputError(
                    "GenerationEvaluation.at_test takes all test rows or the first `limit`: leave "
                    "trainer.limit_test_batches out"
                )
        if stage != "fit":
            return
        self.history = []
        require_instruction_data(trainer, "GenerationEvaluation")
        assert isinstance(pl_module, CausalLMModule)
        if self.every_n_steps is not None or self.at_end:
            check_along_fit(pl_module)
        if self.at_start or self.every_n_steps is not None or self.at_end:
            check_prompts(trainer, pl_module, "validation", self.limit)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.at_test or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, CausalLMModule)
        with served(trainer, pl_module):
            sampled = self._count(trainer, pl_module, self.temperature, self.num_samples, "test")
        for name, value in sampled_shares(sampled, self.num_samples).items():
            believe_reduced(f"test/{name}")  # from the counts of all ranks
            pl_module.log(f"test/{name}", value, batch_size=1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        # Of a run that goes on: an evaluation that it was stopped in, or before.
        due = self.at_start if step == 0 else self.every_n_steps is not None and step % self.every_n_steps == 0
        if due and not self._evaluated(step):
            self._evaluate(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step, self.every_n_steps
        if every is None or step == 0 or step % every or self._evaluated(step):
            return
        values = self._evaluate(trainer, pl_module)
        for name, value in values.items():
            pl_module.log(f"generation/{name}", value, logger=False, on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.at_end and not self._evaluated(trainer.global_step):
            self._evaluate(trainer, pl_module, gives_up=False)  # no run would go on to do it
        if len(self.history) > 1:
            rank_zero_info(self.table())

    def logged_names(self) -> list[str]:
        """What callbacks and schedulers can monitor along ``fit``; evaluations at its start and end are not logged."""
        if self.every_n_steps is None:
            return []
        sampled = ["sampled", *(f"pass_at_{k}" for k in reported_k(self.num_samples))] if self.num_samples else []
        return [f"generation/{name}" for name in ("greedy", *sampled)]

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [(int(step), dict(values)) for step, values in state_dict["history"]]

    def _evaluated(self, step: int) -> bool:
        return bool(self.history) and self.history[-1][0] == step

    def table(self) -> str:
        """What was measured, a line per evaluation."""
        names = list(self.history[0][1])
        lines = ["exact match" + "".join(f"{name:>10}" for name in names)]
        lines += [f"step {step:<6}" + "".join(f"{v[name]:>10.3f}" for name in names) for step, v in self.history]
        return "\n".join(lines)

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, gives_up: bool = True) -> dict[str, float]:
        assert isinstance(pl_module, CausalLMModule)
        telemetry = pl_module.train_telemetry
        telemetry.stop_clock()
        try:
            with served(trainer, pl_module):
                greedy = self._count(trainer, pl_module, 0.0, 1, gives_up=gives_up)
                sampled = None
                if self.num_samples:
                    sampled = self._count(trainer, pl_module, self.temperature, self.num_samples, gives_up=gives_up)
        except _GaveUpError:
            telemetry.start_clock()
            return {}  # it is evaluated when the run goes on
        values = shares(greedy, sampled, self.num_samples)
        self.history.append((trainer.global_step, values))
        for logger in trainer.loggers:
            logger.log_metrics({f"generation/{k}": v for k, v in values.items()}, step=trainer.global_step)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        rank_zero_info(f"step {trainer.global_step}: exact match {shown}")
        telemetry.start_clock()
        return values

    def _count(
        self,
        trainer: pl.Trainer,
        module: CausalLMModule,
        temperature: float,
        num_samples: int,
        split: str = "validation",
        gives_up: bool = False,
    ) -> list[int]:
        options = at_temperature(module.evaluation.generation, temperature)
        return count_correct(
            trainer,
            module,
            options,
            split=split,
            limit=self.limit,
            num_samples=num_samples,
            seed=self.seed,
            after_batch=partial(_give_up_if_asked, trainer, gives_up),
        )


class _GaveUpError(Exception):
    """The run is to stop."""


def _give_up_if_asked(trainer: pl.Trainer, may: bool) -> None:
    if may and asked_to_stop(trainer):
        raise _GaveUpError
