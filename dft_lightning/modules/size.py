"""What a run trains and the memory that takes before the first batch, in one line."""

from __future__ import annotations

from collections.abc import Iterable

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import AdamW, Optimizer

from dft_lightning.distributed.sharding import local_part
from dft_lightning.modules.batch_loss import auxiliary_line
from dft_lightning.modules.optimizers import describe
from dft_lightning.modules.training import scales_gradients

_MIB = 2**20


def training_size(module: nn.Module, optimizers: Iterable[Optimizer], counted: str = "parameters") -> str:
    """How many parameters are trained, and bytes of weights, gradients and AdamW's states on this rank.

    Activations and logits come on top: see docs/sharding.md. ``counted`` is what a parameter's values are called.

    Example:
        >>> layer = nn.Linear(1023, 1024)
        >>> training_size(layer, [AdamW(layer.parameters())])
        'training 1,048,576 of 1,048,576 parameters (100%); on each rank: weights 4 MiB, gradients 4 MiB, AdamW 8 MiB'
    """
    parameters = list(module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    count, total = sum(map(_whole, trained)), sum(map(_whole, parameters))
    sizes = {"weights": sum(map(_bytes, parameters)), "gradients": sum(map(_bytes, trained))}
    for optimizer in optimizers:
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if isinstance(optimizer, AdamW):
            sizes["AdamW"] = 2 * sum(map(_bytes, own))
        elif type(optimizer).__name__ == "AdamW8bit":
            sizes["AdamW8bit"] = 2 * sum(p.numel() if p.numel() >= 4096 else 4 * p.numel() for p in own)
    shown = ", ".join(f"{name} {size / _MIB:,.4g} MiB" for name, size in sizes.items())
    return f"training {count:,} of {total:,} {counted} ({100 * count / max(total, 1):.3g}%); on each rank: {shown}"


def announce(module: nn.Module, model: nn.Module, trainer: pl.Trainer) -> None:
    """Say at the start of a run, with its optimizers made, what it trains and how."""
    # FSDP1 has cut the parameters themselves.
    counted = "parameters" if not isinstance(trainer.model, FullyShardedDataParallel) else "values on rank 0"
    lines = [training_size(module, trainer.optimizers, counted), *map(describe, trainer.optimizers)]
    for line in [*lines, auxiliary_line(model)]:
        if line is not None:
            rank_zero_info(line)
    in_float16 = any(p.dtype == torch.float16 and p.requires_grad for p in module.parameters())
    if in_float16 and not scales_gradients(trainer):
        rank_zero_warn(
            f"trainer.precision: {trainer.precision} trains parameters in float16 without a gradient scaler: gradients "
            "below 6e-8 are lost and updates are rounded to three digits, so that it may learn little or diverge. Use "
            "bf16-mixed, or 16-mixed on a GPU, with model.loading.dtype: float32"
        )


def _bytes(parameter: Tensor) -> int:
    local = local_part(parameter)
    return local.numel() * local.element_size()


def _whole(parameter: Tensor) -> int:
    """Of all ranks' shards; of the quantized ones what they stand for."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()
