"""The load-balancing loss of a mixture of experts, which is part of the objective or not, as the run says."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dft_lightning.errors import InputError
from dft_lightning.models.head import text_config

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def set_auxiliary_loss(model: nn.Module, coefficient: float | None) -> None:
    """Put a model's auxiliary loss into the objective with a coefficient, or take it out with 0.

    Args:
        model: a mixture of experts.
        coefficient: ``None`` leaves the model's config as it comes.

    Raises:
        InputError: the model has no such loss.
    """
    if coefficient is None:
        return
    config, holders = text_config(model), _holders(model)
    if not hasattr(config, "output_router_logits") or not holders:
        raise InputError(
            f"model.step.router_aux_loss_coef: {type(model).__name__} has no auxiliary loss of a router in "
            "transformers: leave it out"
        )
    config.output_router_logits = coefficient > 0
    for holder, name in holders:
        setattr(holder, name, float(coefficient))


def auxiliary_loss(model: nn.Module, output: Any, required: bool = False) -> Tensor | None:
    """A mixture-of-experts model's load-balancing loss times its coefficient, ``None`` where it computes none.

    Args:
        model: the language model.
        output: what it returned.
        required: whether the run asked for it.

    Raises:
        InputError: it is required and there is none, or the model has such a loss but no coefficient that is known.
    """
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):  # models with the loss switched off leave None or 0
        if required:
            raise InputError(
                f"model.step.router_aux_loss_coef: {type(model).__name__} computes no auxiliary loss: leave it out"
            )
        return None
    for holder, name in _holders(model):
        return loss * float(getattr(holder, name))
    raise InputError(f"model: {type(model).__name__} returns aux_loss, but its config has no router_aux_loss_coef")


def auxiliary_line(model: nn.Module) -> str | None:
    """What to say of the auxiliary loss when a run starts; ``None`` for models without one."""
    config, holders = text_config(model), _holders(model)
    if not hasattr(config, "output_router_logits") or not holders:
        return None
    coefficient = getattr(*holders[0])
    if config.output_router_logits:
        return f"auxiliary loss of the experts' router: in the objective, with coefficient {coefficient:g}"
    return (
        "auxiliary loss of the experts' router: not in the objective (output_router_logits: false in its config); "
        f"model.step.router_aux_loss_coef: {coefficient:g} puts it in with the model's own coefficient"
    )


def _holders(model: nn.Module) -> list[tuple[Any, str]]:
    """What has the coefficient: the model, which copies it when it is made, before its config."""
    return [
        (holder, name)
        for holder in (model, text_config(model))
        for name in _COEFFICIENTS
        if isinstance(getattr(holder, name, None), (int, float))
    ]
