"""peft, where it changes more than it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Run a model as its base meanwhile. What is trained stays marked as trained: ``enable_adapters()`` also freezes
    and unfreezes parameters, under a strategy that has wrapped them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [each for each in model.modules() if isinstance(each, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
