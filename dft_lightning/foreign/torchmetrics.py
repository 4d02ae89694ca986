"""torchmetrics, where it has no public form: dtypes that stay, and a count of updates that can be set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric


def alone(metric: Metric) -> Metric:
    """Have a metric, and those within it, exchange nothing with other processes, as all of them give it the same. There
    is an argument for that, which a class of somebody's own need not take."""
    for each in metric.modules():
        if isinstance(each, Metric):
            each.distributed_available_fn = _never
    return metric


def _never() -> bool:
    return False


class ExactMetric(Metric):
    """A metric whose states move between devices with a module, and keep their dtype whatever the module is cast to.

    torchmetrics has ``set_dtype`` against ``half()`` and ``to(dtype)`` on the metric itself, and nothing against those
    of a module around it.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), *args, **kwargs)

    def set_update_count(self, count: int) -> None:
        """Say how often it was updated: ``update_count`` and ``update_called`` can be read alone."""
        self._update_count = count
