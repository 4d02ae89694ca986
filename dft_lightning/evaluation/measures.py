"""What is measured of a run: names, titles, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass

from dft_lightning.errors import InputError
from dft_lightning.metrics import reported_k


@dataclass(frozen=True)
class Measure:
    """Something that a run is judged or described by.

    Attributes:
        name: as in the records of a run.
        title: as a reader sees it.
        higher_is_better: ``None`` for what describes a model and judges nothing.
        by_problem: whether it is a mean over problems, so that losses can be compared problem by problem.
    """

    name: str
    title: str
    higher_is_better: bool | None
    by_problem: bool = False

    @property
    def is_share(self) -> bool:
        """Whether it lies between 0 and 1."""
        return self.by_problem or self.name == "token_accuracy"


_TOKEN_MEASURES = (
    Measure("nll", "nll (nats per token)", False),
    Measure("perplexity", "perplexity", False),
    Measure("token_accuracy", "token accuracy", True),
    Measure("loss", "objective", None),
    Measure("entropy", "entropy (nats)", None),
    Measure("mean_weight", "mean weight", None),
    Measure("kl", "KL to the start (nats per token)", None),
)


def measures_of(num_samples: int, temperature: float = 1.0) -> dict[str, Measure]:
    """Every measure of a comparison with so many samples per problem, by name."""
    found = [
        Measure("greedy", "exact match, greedy", True, by_problem=True),
        Measure("sampled", f"avg@{num_samples} at temperature {temperature:g}", True, by_problem=True),
        *(Measure(f"pass_at_{k}", f"pass@{k}", True, by_problem=True) for k in reported_k(num_samples)),
        *_TOKEN_MEASURES,
    ]
    return {measure.name: measure for measure in found}


def default_measures(num_samples: int) -> list[str]:
    """What a report compares where the config does not say."""
    largest = [f"pass_at_{k}" for k in reported_k(num_samples)[-1:]]
    return ["greedy", "sampled", *largest, "nll", "token_accuracy"]


def check_measures(names: list[str], num_samples: int, where: str) -> None:
    """Raise ``InputError`` for a measure that is never recorded, or that no way is better by."""
    known = measures_of(num_samples)
    judging = [name for name, measure in known.items() if measure.higher_is_better is not None]
    for name in names:
        if name not in known:
            raise InputError(f"{where}: {name!r} is never measured; known: {', '.join(judging)}")
        if name not in judging:
            raise InputError(f"{where}: {name!r} judges nothing (the report shows it); choose of {', '.join(judging)}")
