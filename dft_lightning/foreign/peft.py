"""peft, where it changes or says more than it is asked for, and what its messages leave unsaid."""

from __future__ import annotations

import sys
import warnings
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


def has_adapter(model: nn.Module) -> bool:
    """Whether there is an adapter in a model, whoever put it there."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(each, BaseTunerLayer) for each in model.modules())


@contextmanager
def looking_for_experts() -> Iterator[None]:
    """Without the warning that peft's own patterns of experts, looked for among the modules, are not there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        yield


def way_out(error: Exception) -> str:
    """What peft leaves unsaid of modules that ``all-linear`` takes along."""
    if "ParamWrapper" in str(error):
        return " (it is what adapts a model's experts: leave that out, or list target_modules without the experts')"
    if "incompatible with Mamba" in str(error):
        return " (or name it in model.peft.exclude_modules)"
    return ""
