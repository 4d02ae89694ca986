"""Metrics of one's own beside those that are always there: of the target tokens, and of generated texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torchmetrics
import torchmetrics.text
from torch import Tensor, nn
from torchmetrics import Metric

from dft_lightning.component import imported
from dft_lightning.errors import InputError, did_you_mean, one_line
from dft_lightning.foreign.torchmetrics import ExactMetric, alone
from dft_lightning.losses.statistics import normalise_needs

_RESERVED = ("loss", "nll", "perplexity", "token_accuracy", "entropy", "mean_weight", "target_tokens", "exact_match")
_SHORT = (torchmetrics.text, torchmetrics)  # where a name without a path is looked for


class TargetMetric(ExactMetric):
    """A metric of one's own of the target tokens, in validation and test.

    It reads what the head has of each token anyway, so that it takes no second forward. Subclass and write, as for any
    metric of torchmetrics:

    - ``__init__(self, **kwargs)``: states by ``add_state``, with ``dist_reduce_fx="sum"`` for sums over ranks;
    - ``update(self, output, batch)``: add a batch. ``output`` is a :class:`~dft_lightning.ops.TokenOutput`, whose
      per-token tensors are ``[n]``, float32 and detached: ``log_prob``, ``weight``, ``correct``, and what ``needs``
      names. ``batch`` is as the module takes it;
    - ``compute(self)``: a number, or a dict of numbers.

    Attributes:
        needs: statistics beyond these that it reads, such as ``"entropy"``, each a name or a
            :class:`~dft_lightning.losses.Statistic`.

    Example:
        >>> import torch
        >>> class Unlikely(TargetMetric):
        ...     def __init__(self, below=0.1, **kwargs):
        ...         super().__init__(**kwargs)
        ...         self.below = below
        ...         self.add_state("found", torch.tensor(0), dist_reduce_fx="sum")
        ...         self.add_state("targets", torch.tensor(0), dist_reduce_fx="sum")
        ...
        ...     def update(self, output, batch):
        ...         self.found += (output.log_prob.exp() < self.below).sum()
        ...         self.targets += len(output.log_prob)
        ...
        ...     def compute(self):
        ...         return self.found / self.targets
        >>> from dft_lightning import CausalLMModule
        >>> module = CausalLMModule({"model_type": "gpt2"}, evaluation={"metrics": {"unlikely": Unlikely()}})
    """

    full_state_update = False
    needs: Sequence[Any] = ()


def metrics_by_name(given: Mapping[str, Any], key: str = "evaluation.metrics") -> dict[str, Metric]:
    """Metrics of their names and what a config says of each.

    Args:
        given: by name a class path, a dict of ``class_path`` and ``init_args``, or a metric. A class of
            ``torchmetrics.text`` needs no path.
        key: what an error message calls them.

    Raises:
        InputError: a name is taken or can be none; there is no such class, or none of a metric; it cannot be made, or
            lacks a method.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"{key}: expected a dict of names and metrics, {{'NAME': METRIC}}, got {type(given).__name__}")
    for name in given:
        if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
            raise InputError(f"{key}: {name!r}: a metric's name has letters, digits and underscores")
        if name in _RESERVED or hasattr(nn.ModuleDict, name):
            raise InputError(f"{key}.{name}: that name is taken: choose another")
    return {name: _metric(value, f"{key}.{name}") for name, value in given.items()}


def _metric(given: Any, key: str) -> Metric:
    if isinstance(given, Metric):
        found = given
    else:
        spec: Any = {"class_path": given} if isinstance(given, str) else given
        if not isinstance(spec, Mapping) or not set(spec) <= {"class_path", "init_args"} or "class_path" not in spec:
            raise InputError(f"{key}: expected a class path, class_path and init_args, or a metric; got {given!r}")
        found = _made(_class(str(spec["class_path"]), key), dict(spec.get("init_args") or {}), key)
    if isinstance(found, TargetMetric):
        _check_needs(found, key)
        return found
    return _tried(alone(found), key)


def _class(path: str, key: str) -> type[Metric]:
    if "." in path:
        try:
            found = imported(path)
        except Exception as error:  # whatever the module's own code raises
            raise InputError(f"{key}: cannot import {path!r}: {one_line(error)}") from error
    else:
        found = next((getattr(module, path) for module in _SHORT if hasattr(module, path)), None)
        if found is None:
            near = did_you_mean(path, torchmetrics.text.__all__)
            raise InputError(f"{key}: torchmetrics has no {path!r}{near}; of your own give the dotted path")
    if not (isinstance(found, type) and issubclass(found, Metric)):
        raise InputError(f"{key}: {path} is no torchmetrics.Metric")
    return found


def _made(cls: type[Metric], options: dict[str, Any], key: str) -> Metric:
    lacking = sorted(getattr(cls, "__abstractmethods__", ()))
    if lacking:
        raise InputError(f"{key}: {cls.__name__} must define {' and '.join(lacking)}")
    try:
        return cls(**options)
    except Exception as error:  # of an option, or of a package that it needs
        raise InputError(f"{key}: {cls.__name__}: {one_line(error)}") from error


def _check_needs(metric: TargetMetric, key: str) -> None:
    try:
        normalise_needs(metric.needs)
    except (TypeError, ValueError) as error:
        raise InputError(f"{key}: {type(metric).__name__}.needs: {one_line(error)}") from error


def _tried(metric: Metric, key: str) -> Metric:
    """The metric, which has scored a text and is empty again: after hours of generation is too late to find out."""
    name = type(metric).__name__
    try:
        metric.update(["a text"], _references(metric, ["a text"]))
        numbers(key, metric.compute())
        metric.reset()
    except Exception as error:  # whatever it makes of texts
        raise InputError(
            f"{key}: {name} takes no lists of texts, completions and answers: {one_line(error)}. A metric of token "
            "statistics is a subclass of dft_lightning.metrics.TargetMetric"
        ) from error
    return metric


def numbers(name: str, value: Any) -> dict[str, float]:
    """What a metric has computed, as it is logged: a number under its name, of a dict each under ``NAME/KEY``.

    Raises:
        InputError: it is neither.
    """
    if isinstance(value, Mapping):
        return {f"{name}/{key}": number for key, each in value.items() for number in numbers(name, each).values()}
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
        return {name: float(value)}
    raise InputError(
        f"evaluation.metrics.{name}: expected a number or a dict of numbers from compute, got {type(value).__name__}"
    )


def _references(metric: Metric, answers: Sequence[str]) -> list[Any]:
    """The answers as a metric takes them: BLEU wants a list of references of each, and takes a text for its letters."""
    return [[answer] for answer in answers] if isinstance(metric, torchmetrics.text.BLEUScore) else list(answers)


def of_texts(metrics: Mapping[str, Metric], texts: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """What metrics of texts make of all completions and the rows' answers at once, in the order of the rows."""
    values: dict[str, float] = {}
    for name, metric in metrics.items():
        metric.reset()
        metric.update(list(texts), _references(metric, answers))
        values |= numbers(name, metric.compute())
    return values
