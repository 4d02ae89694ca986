"""What is measured of the tokens of a stage, of training between two logged steps, and of generated answers."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import Metric

from dft_lightning.distributed import gather_lists
from dft_lightning.errors import InputError
from dft_lightning.losses import TokenLoss
from dft_lightning.losses.statistics import normalise_needs
from dft_lightning.metrics import ExactMatch, GradientMetrics, SourceMetrics, TargetMetric, TokenMetrics
from dft_lightning.metrics.exact_sums import NamedSums, WorkMetrics, computed
from dft_lightning.metrics.own import numbers, of_texts
from dft_lightning.models.flops import ModelFlops
from dft_lightning.models.layout import layout_of
from dft_lightning.modules.options import EvaluationOptions
from dft_lightning.ops import TokenOutput


class StageTelemetry(nn.Module):
    """Token metrics of a stage, of all its targets and of each source of a mixture.

    Device tensors are only added up; nothing waits for the device until :meth:`collect`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens = TokenMetrics()
        self.sources = SourceMetrics()

    def metrics(self) -> dict[str, NamedSums]:
        """All of them by name."""
        return {name: cast(NamedSums, metric) for name, metric in self.named_children()}

    def update(self, output: TokenOutput, batch: Mapping[str, Any], loss: TokenLoss) -> None:
        """Count a batch, as the module takes it."""
        layout = layout_of(batch)
        self.tokens.update(output, layout.num_tokens)
        if "source" not in batch:
            return
        place = layout.target_index + 1  # a target stands behind what predicts it
        with torch.no_grad():
            losses = loss.token_loss(output)
        if "token_weight" in batch:
            losses = losses * batch["token_weight"].flatten()[place]
        self.sources.update(batch["source"].flatten()[place], losses, -output.log_prob)

    def collect(self, source_names: Sequence[str]) -> dict[str, Any]:
        """All values since the last call, over all ranks and on the host; none where nothing was counted. A collective.

        Of a mixture of sources also ``loss/NAME`` and ``nll/NAME`` of each that had targets.
        """
        metrics = self.metrics()
        if not any(metric.update_called for metric in metrics.values()):
            return {}
        # All of them, whichever this rank has counted in: ranks exchange as many numbers.
        found = dict(zip(metrics, computed(list(metrics.values())), strict=True))
        of_sources = found.pop("sources")
        values = found.pop("tokens")
        for name, each in found.items():
            values |= each if metrics[name].update_called else {}
        for metric in metrics.values():
            metric.reset()
        return values | {
            f"{kind}/{name}": of_sources[kind][i]
            for i, name in enumerate(source_names)
            for kind in ("loss", "nll")
            if of_sources["targets"][i] > 0
        }

    def reset(self) -> None:
        """Forget everything counted."""
        for metric in self.metrics().values():
            metric.reset()


class TrainTelemetry(StageTelemetry):
    """Beside the tokens' metrics the gradient's norm, the share of clipped steps, the speed and the memory.

    Attributes:
        seconds: of training since the last :meth:`collect`.
        model_flops: what the model's operations are counted by; ``None`` before it is known.
        peak_flops: operations a second of all ranks' devices together at their best; ``None`` where it is not known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gradients = GradientMetrics()
        self.work = WorkMetrics()
        self.model_flops: ModelFlops | None = None
        self.peak_flops: float | None = None
        self.seconds = 0.0
        self._mark: float | None = None

    def update(self, output: TokenOutput, batch: Mapping[str, Any], loss: TokenLoss) -> None:
        """Count a micro-batch, as the module takes it."""
        super().update(output, batch, loss)
        if self.model_flops is not None:
            self.work.update(self.model_flops.of_batch(layout_of(batch)))

    def update_gradient(self, norm: float, clip_val: float | int | None, skips_non_finite: bool = False) -> None:
        """Count an optimizer step by its gradient norm before clipping."""
        self.gradients.update(norm, clip_val, skips_non_finite)

    def start_clock(self) -> None:
        """Time from here counts as training."""
        self._mark = time.perf_counter()

    def stop_clock(self) -> None:
        """Time from here (validation, generation, saving) does not count."""
        if self._mark is not None:
            self.seconds += time.perf_counter() - self._mark
            self._mark = None

    def collect(self, source_names: Sequence[str]) -> dict[str, Any]:
        """As :meth:`StageTelemetry.collect`, with ``tokens_per_second``, ``grad_norm``, ``clipped_steps``,
        ``peak_memory_gib`` of this process and, where the devices' peak is known, ``mfu``."""
        if not self.tokens.update_called:  # all steps since the last call were skipped
            return {}
        self.stop_clock()
        values = super().collect(source_names)
        seconds, flops = max(self.seconds, 1e-9), values.pop("flops", None)
        values["tokens_per_second"] = values.pop("tokens") / seconds
        if flops is not None and self.peak_flops is not None:
            values["mfu"] = flops / seconds / self.peak_flops
        if (memory := peak_memory(self.tokens.device)) is not None:
            values |= exact({"peak_memory_gib": memory / 2**30})
        self.seconds = 0.0
        self.start_clock()
        return values

    def reset(self) -> None:
        """Forget everything counted, and the time."""
        super().reset()
        self.seconds = 0.0


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the most: of tensors on CUDA since the last call, of the process elsewhere since it began, where the
    system says so."""
    if device.type == "cuda":
        found = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return found
    if find_spec("resource") is None:  # Windows
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(device: torch.device, precision: str, given: float | None) -> float | None:
    """Operations a second of a device at its best: what is given, or by the name of a GPU that Lightning knows."""
    if given is not None or device.type != "cuda":
        return given
    kinds = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    dtype = next((kind for name, kind in kinds.items() if precision.startswith(name)), torch.float32)
    found = get_available_flops(device, dtype)
    return None if found is None else float(found)


STAGES = ("val", "forgetting", "test")


class Evaluation(nn.Module):
    """Token metrics of each stage, and what is scored of generated answers: exact match, and metrics of texts.

    Attributes:
        names: of the metrics of one's own that validation has, too.
        statistics: per-token statistics that it reads beyond what is always there.
    """

    def __init__(self, options: EvaluationOptions) -> None:
        super().__init__()
        further = options.further_metrics()
        own = {name: metric for name, metric in further.items() if isinstance(metric, TargetMetric)}
        self.stages = nn.ModuleDict({stage: StageTelemetry() for stage in STAGES})
        self.own = nn.ModuleDict({stage: nn.ModuleDict(copy.deepcopy(own)) for stage in STAGES})
        self.exact_match = ExactMatch(options.extractor)
        self.names = tuple(own)
        needs = [need for metric in own.values() for need in normalise_needs(metric.needs)]
        self.statistics: tuple[Any, ...] = ("entropy", *needs)
        # No modules: they stay where texts are, and each rank gives them all texts.
        self._of_texts = {name: metric for name, metric in further.items() if name not in own}
        self._asked_for = options.answer_extractor is not None or bool(options.metrics and self._of_texts)
        self._records: list[dict[str, Any]] = []
        self._said = False

    def telemetry(self, stage: str) -> StageTelemetry:
        """Of one of :data:`STAGES`."""
        return cast(StageTelemetry, self.stages[stage])

    def update(self, stage: str, output: TokenOutput, batch: Mapping[str, Any], loss: TokenLoss) -> None:
        """Count a batch's targets."""
        self.telemetry(stage).update(output, batch, loss)
        for metric in cast(nn.ModuleDict, self.own[stage]).values():
            cast(Metric, metric).update(output, batch)

    def collect(self, stage: str, source_names: Sequence[str]) -> dict[str, Any]:
        """All values of a stage, reduced over ranks; none where nothing was counted. A collective."""
        values = self.telemetry(stage).collect(source_names)
        values.pop("tokens", None)
        for name, metric in cast(nn.ModuleDict, self.own[stage]).items():
            if cast(Metric, metric).update_called:
                values |= exact(numbers(name, cast(Metric, metric).compute()))
                cast(Metric, metric).reset()
        return values

    def collect_texts(self, world_size: int) -> dict[str, Any]:
        """What is scored of the generated answers of all ranks; none where nothing was generated. A collective."""
        records, self._records = gather_lists(self._records, world_size), []
        if not records:
            return {}
        records.sort(key=lambda record: int(record["index"]))
        values: dict[str, Any] = {"exact_match": sum(record["correct"] for record in records) / len(records)}
        texts = [[record[name] for record in records] for name in ("completion", "answer")]
        return exact(values | of_texts(self._of_texts, *texts))

    def check_answers(self, datamodule: pl.LightningDataModule | None) -> None:
        """Whether what test rows have is what is to be scored, before anything is trained or generated.

        On every rank: one that stops alone leaves the others waiting.

        Raises:
            InputError: a row has no answer, or none that the extractor finds.
        """
        if not getattr(datamodule, "has_split", lambda split: False)("test"):
            return
        answers = cast(Any, datamodule).answers("test")
        if self._asked_for or any(answer is not None for answer in answers):
            self.exact_match.check(answers, "test")

    def begin(self, *stages: str) -> None:
        """Forget what stages have left that did not come to their end."""
        if "test" in stages:
            self._records = []
        for stage in stages:
            for metric in (self.telemetry(stage), *cast(nn.ModuleDict, self.own[stage]).values()):
                cast(Metric, metric).reset()

    def scores(self, batch: Mapping[str, Any]) -> bool:
        """Whether answers are to be generated to a batch's prompts and scored. One without is of token metrics alone,
        unless somebody asked for more."""
        if "prompt_input_ids" in batch or self._asked_for:
            return True
        if not self._said:
            self._said = True
            rank_zero_info("test: token metrics alone, as the rows have no prompts to generate answers to")
        return False

    def score(self, records: list[dict[str, Any]]) -> None:
        """Add ``correct`` to records of :func:`records_of`, and keep them until the end of the test."""
        lacking = [name for name in ("index", "completion", "answer") for each in records if name not in each]
        if lacking:
            raise InputError(
                f"predict_step must return records with index, completion and answer; {lacking[0]} is missing"
            )
        self._records += records
        for record in records:
            record["correct"] = self.exact_match.score(record["completion"], record["answer"])


def exact(values: Mapping[str, float]) -> dict[str, Tensor]:
    """As tensors in float64 on the host: Lightning makes float32 of a number, and puts it on the device."""
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


_OF_PROMPTS = ("prompt_input_ids", "prompt_attention_mask", "index", "prompt", "answer")


def check_prompts(batch: Mapping[str, Any]) -> None:
    """Raise ``InputError`` for batches without prompts to complete."""
    lacking = [name for name in _OF_PROMPTS if not isinstance(batch, Mapping) or name not in batch]
    if lacking:
        raise InputError(
            "test and predict generate from prompt_input_ids and prompt_attention_mask, with index, prompt and "
            f"answer beside them, and these batches lack {', '.join(lacking)}: use InstructionDataModule, or override "
            "the step"
        )


def records_of(batch: Mapping[str, Any], completions: Sequence[str]) -> list[dict[str, Any]]:
    """``index``, ``prompt``, ``completion`` and ``answer`` of each row, but for those that only make ranks even."""
    rows = zip(batch["index"].tolist(), batch["prompt"], completions, batch["answer"], strict=True)
    return [
        {"index": index, "prompt": prompt, "completion": completion, "answer": answer}
        for index, prompt, completion, answer in rows
        if index >= 0  # rows of index -1 only make the ranks even
    ]
