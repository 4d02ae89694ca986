"""How a transformers model's last hidden states become logits, so that the fused head can do it instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dft_lightning.errors import InputError
from dft_lightning.ops import linear_token_statistics

WAY_OUT = "set model.head: full, which trains on the model's own logits"

# What a model does to its head's output, by model_type: the config's value that scales or caps it. What is not here
# is checked against the model's own log-probabilities all the same.
_SOFTCAP = {
    "gemma2": "final_logit_softcapping",
    "gemma3_text": "final_logit_softcapping",
    "gemma3n_text": "final_logit_softcapping",
    "gemma4_text": "final_logit_softcapping",
    "nanochat": "final_logit_softcapping",
    "recurrent_gemma": "logits_soft_cap",
    "vaultgemma": "final_logit_softcapping",
    "xlstm": "output_logit_soft_cap",
}
_SCALE: dict[str, tuple[str, Callable[[float], float]]] = {
    "cohere": ("logit_scale", float),
    "cohere2": ("logit_scale", float),
    "falcon_h1": ("lm_head_multiplier", float),
    "granite": ("logits_scaling", lambda value: 1.0 / value),
    "granitemoe": ("logits_scaling", lambda value: 1.0 / value),
    "granitemoehybrid": ("logits_scaling", lambda value: 1.0 / value),
    "granitemoeshared": ("logits_scaling", lambda value: 1.0 / value),
}


@dataclass(frozen=True)
class LanguageModelHead:
    """The output layer of a causal language model and what the model does to its logits.

    Attributes:
        layer: the layer; its weight is read at each call.
        logit_scale: see :func:`~dft_lightning.ops.linear_token_loss`.
        logit_softcap: see :func:`~dft_lightning.ops.linear_token_loss`.
    """

    layer: nn.Module
    logit_scale: float
    logit_softcap: float | None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the fused head beyond hidden states and targets."""
        return {
            "weight": self.layer.weight,
            "bias": self.layer.bias,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
        }


def find_head(model: nn.Module) -> LanguageModelHead:
    """The head of a model.

    Raises:
        InputError: it has no linear output layer, or one that is wrapped (LoRA) or stored in another form.
    """
    layer = getattr(model, "get_output_embeddings", lambda: getattr(model, "lm_head", None))()
    if layer is None:
        raise InputError(
            f"model: {type(model).__name__} shows the fused head no output layer, neither by get_output_embeddings() "
            f"nor as lm_head: define one of them, or {WAY_OUT}"
        )
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise InputError(
            f"model: the output layer is a {type(layer).__module__}.{type(layer).__qualname__}, which the fused head "
            f"would bypass (an adapter on it would not be trained): leave it out of the adapter, or {WAY_OUT}"
        )
    if not layer.weight.is_floating_point():
        raise InputError(f"model: the output layer's weight is {layer.weight.dtype}, not floating point; {WAY_OUT}")
    config = _text_config(model)
    kind = getattr(config, "model_type", "")
    softcap = getattr(config, _SOFTCAP[kind]) if kind in _SOFTCAP else None
    scale = 1.0
    if kind in _SCALE:
        name, convert = _SCALE[kind]
        scale = convert(getattr(config, name))
    return LanguageModelHead(layer, scale, softcap)


def _text_config(model: nn.Module) -> Any:
    """The config of the language model, within that of a multimodal one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def run_without_head(model: nn.Module, head: LanguageModelHead, **inputs: Any) -> tuple[Tensor, Any]:
    """Run a model without its last matrix product.

    Returns:
        The hidden states ``[B, T, H]`` that its head was given, and its output, whose logits mean nothing.

    Raises:
        InputError: the model does not call its head exactly once.
    """
    given: list[Tensor] = []

    def pass_through(hidden: Tensor) -> Tensor:
        given.append(hidden)
        return hidden.detach()  # what the model does to its logits costs next to nothing on these

    with _forward_replaced(head.layer, pass_through):
        output = model(**inputs)
    return _only(given, model), output


@contextmanager
def _forward_replaced(layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    own = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


def _only(given: list[Tensor], model: nn.Module) -> Tensor:
    if len(given) != 1:
        raise InputError(
            f"model: {type(model).__name__} called its output layer {len(given)} times in one pass, the fused head "
            f"expects once; {WAY_OUT}"
        )
    return given[0]


@torch.no_grad()
def check_head(model: nn.Module, head: LanguageModelHead, input_ids: Tensor, **inputs: Any) -> None:
    """Compare the fused head's log-probabilities with the model's own.

    Random states are left as they were, so that a run with dropout is the same with and without the check.

    Args:
        model: the model.
        head: its head as :func:`find_head` understands it.
        input_ids: ``[1, T]``.
        **inputs: the model's other inputs.

    Raises:
        InputError: they differ by more than rounding.
    """
    given: list[Tensor] = []
    devices = [input_ids.device] if input_ids.device.type == "cuda" else []
    handle = head.layer.register_forward_pre_hook(lambda layer, args: given.append(args[0]))
    try:
        with torch.random.fork_rng(devices):
            logits = model(input_ids=input_ids, **inputs).logits[0, :-1]
    finally:
        handle.remove()
    targets = input_ids[0, 1:]
    fused = linear_token_statistics(_only(given, model)[0, :-1], targets=targets, **head.options).log_prob
    own = logits.double().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    largest = logits[logits.isfinite()].abs().max().item()
    tolerance = 1e-3 + 4 * torch.finfo(logits.dtype).eps * largest
    difference = (own - fused).abs().max().item()
    if not difference <= tolerance:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise InputError(
            f"model: the fused head does not reproduce {kind}'s own log-probabilities (they differ by {difference:.3g} "
            f"nats, {tolerance:.1g} would be rounding): the model does something to its logits that the head does not "
            f"know; {WAY_OUT}"
        )


def auxiliary_loss(model: nn.Module, output: Any) -> Tensor | None:
    """A mixture-of-experts model's load-balancing loss times its coefficient, ``None`` where it computes none.

    Raises:
        InputError: the model has such a loss but no coefficient that is known.
    """
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):  # models with the loss switched off leave None or 0
        return None
    for holder in (model, _text_config(model)):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            coefficient = getattr(holder, name, None)
            if coefficient is not None:
                return loss * float(coefficient)
    raise InputError(f"model: {type(model).__name__} returns aux_loss, but its config has no router_aux_loss_coef")
