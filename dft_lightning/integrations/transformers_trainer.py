"""Any token loss in ``transformers.Trainer``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dft_lightning.losses.base import IGNORE_INDEX, TokenLoss, require_default_forward_options
from dft_lightning.losses.statistics import normalise_needs


def compute_loss_func(loss: TokenLoss) -> Callable[..., Tensor]:
    """Make of a token loss what ``transformers.Trainer(compute_loss_func=...)`` takes.

    The returned function ``(outputs, labels, num_items_in_batch=None)`` shifts the labels by one (the logits at
    position ``t`` predict the label at ``t + 1``), leaves them untouched, and divides the sum over targets by
    ``num_items_in_batch``, or by the number of targets where that is ``None`` (evaluation).

    Args:
        loss: any token loss with the default ``ignore_index`` and ``reduction``.

    Raises:
        ValueError: ``loss`` has other values of ``ignore_index`` or ``reduction``, follows a schedule, or needs a
            reference model's numbers.

    Example:
        >>> import torch
        >>> from dft_lightning.losses import DFTLoss
        >>> outputs = {"logits": torch.zeros(1, 3, 4)}
        >>> compute_loss_func(DFTLoss())(outputs, torch.tensor([[-100, 2, 3]]))
        tensor(0.3466)
    """
    require_default_forward_options(loss, "compute_loss_func")
    if loss.uses_step:
        raise ValueError(
            f"{type(loss).__name__} follows a schedule, and transformers.Trainer tells compute_loss_func no step: "
            "call loss(logits, targets, step=trainer.state.global_step) in a compute_loss of your own"
        )
    for need in normalise_needs(loss.needs):
        if need.name in ("reference_log_prob", "reference_kl"):
            given = "reference_log_prob" if need.name == "reference_log_prob" else "reference_logits"
            raise ValueError(
                f"{type(loss).__name__} needs {need.name}, which transformers.Trainer does not give compute_loss_func: "
                f"call loss(logits, targets, {given}=...) in a compute_loss of your own"
            )
    summed = copy.deepcopy(loss)
    summed.reduction = "sum"

    def loss_function(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        targets = labels[..., 1:].to(logits.device)
        total: Tensor = summed(logits[..., :-1, :], targets)
        if num_items_in_batch is None:
            return total / (targets != IGNORE_INDEX).sum().clamp(min=1)
        if isinstance(num_items_in_batch, Tensor):
            return total / num_items_in_batch.to(total.device).clamp(min=1)
        return total / max(num_items_in_batch, 1)

    return loss_function
