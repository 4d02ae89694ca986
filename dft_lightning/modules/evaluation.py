"""What validation, test and prediction measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import lightning.pytorch as pl
from torch import nn

from dft_lightning.errors import InputError
from dft_lightning.losses import TokenLoss
from dft_lightning.metrics import AnswerExtractor, ExactMatch
from dft_lightning.modules.telemetry import StageTelemetry
from dft_lightning.ops import TokenOutput

STAGES = ("val", "forgetting", "test")


class Evaluation(nn.Module):
    """Token metrics of each stage, and exact match of the generated answers.

    Args:
        answer_extractor: finds the answer that is compared.
    """

    def __init__(self, answer_extractor: AnswerExtractor) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({stage: StageTelemetry() for stage in STAGES})
        self.exact_match = ExactMatch(answer_extractor)

    def telemetry(self, stage: str) -> StageTelemetry:
        """Of one of :data:`STAGES`."""
        return cast(StageTelemetry, self.stages[stage])

    def update(self, stage: str, output: TokenOutput, batch: Mapping[str, Any], loss: TokenLoss) -> None:
        """Count a batch's targets."""
        self.telemetry(stage).update(output, batch, loss)

    def collect(self, stage: str, source_names: Sequence[str]) -> dict[str, Any]:
        """All values of a stage, reduced over ranks; none where nothing was counted. A collective."""
        values = self.telemetry(stage).collect(source_names)
        values.pop("tokens", None)
        if stage == "test" and self.exact_match.update_called:
            values["exact_match"] = self.exact_match.compute()
            self.exact_match.reset()
        return values

    def check_answers(self, datamodule: pl.LightningDataModule | None) -> None:
        """Whether test rows have an answer to compare with, before anything is generated.

        On every rank: one that stops alone leaves the others waiting.
        """
        answers = getattr(datamodule, "answers", None)
        if answers is not None:
            self.exact_match.check(answers("test"), "test")

    def score(self, records: list[dict[str, Any]]) -> None:
        """Add ``correct`` to records of :func:`records_of`, and count them."""
        for record in records:
            record["correct"] = self.exact_match.score(record["completion"], record["answer"])
        self.exact_match.update([r["completion"] for r in records], [r["answer"] for r in records])


def check_prompts(batch: Mapping[str, Any]) -> None:
    """Raise ``InputError`` for batches without prompts to complete."""
    if "prompt_input_ids" not in batch:
        raise InputError(
            "test and predict generate from prompt_input_ids and prompt_attention_mask, with index, prompt and "
            "answer beside them, which these batches lack: use InstructionDataModule, or override the step"
        )


def records_of(batch: Mapping[str, Any], completions: Sequence[str]) -> list[dict[str, Any]]:
    """``index``, ``prompt``, ``completion`` and ``answer`` of each row, but for those that only make ranks even."""
    rows = zip(batch["index"].tolist(), batch["prompt"], completions, batch["answer"], strict=True)
    return [
        {"index": index, "prompt": prompt, "completion": completion, "answer": answer}
        for index, prompt, completion, answer in rows
        if index >= 0  # rows of index -1 only make the ranks even
    ]
