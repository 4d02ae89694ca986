"""How a transformers model's last hidden states become logits, so that the fused head can do it instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dft_lightning.errors import InputError, one_line
from dft_lightning.foreign.torch import is_hooked
from dft_lightning.models.row_checks import text_config, trying
from dft_lightning.ops import linear_token_statistics
from dft_lightning.ops.row_math import LogitTransform

WAY_OUT = "set model.loading.head: full, which trains on the model's own logits"

# What a model does to its head's output, by model_type: the config's value that scales or caps it. What is not here
# is checked against the model's own log-probabilities all the same.
_SOFTCAP = {
    "beam": "final_logit_softcapping",
    "gemma2": "final_logit_softcapping",
    "gemma3_text": "final_logit_softcapping",
    "gemma3n_text": "final_logit_softcapping",
    "gemma4_text": "final_logit_softcapping",
    "gemma4_unified_text": "final_logit_softcapping",
    "inkling2_loop_text": "final_logit_softcapping",
    "inkling2_text": "final_logit_softcapping",
    "nanochat": "final_logit_softcapping",
    "recurrent_gemma": "logits_soft_cap",
    "vaultgemma": "final_logit_softcapping",
    "xlstm": "output_logit_soft_cap",
}
_SCALE: dict[str, tuple[str, Callable[[Any], float]]] = {
    "cohere": ("logit_scale", float),
    "cohere2": ("logit_scale", float),
    "cohere2_moe": ("logit_scale", float),
    "cohere_compass_text": ("logit_scale", lambda value: 1.0 if value is None else float(value)),
    "falcon_h1": ("lm_head_multiplier", float),
    "granite": ("logits_scaling", lambda value: 1.0 / value),
    "granite_swa": ("logits_scaling", lambda value: 1.0 / value),
    "granitemoe": ("logits_scaling", lambda value: 1.0 / value),
    "granitemoe_swa": ("logits_scaling", lambda value: 1.0 / value),
    "granitemoehybrid": ("logits_scaling", lambda value: 1.0 / value),
    "granitemoeshared": ("logits_scaling", lambda value: 1.0 / value),
    "hyperclovax": ("logits_scaling", float),
}


@dataclass(frozen=True)
class LanguageModelHead:
    """The output layer of a causal language model and what the model does to its logits.

    Attributes:
        layer: the layer; its weight is read at each call.
        logit_scale: see :func:`~dft_lightning.ops.linear_token_loss`.
        logit_softcap: see :func:`~dft_lightning.ops.linear_token_loss`.
    """

    layer: nn.Linear
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
    changed = "forward" in layer.__dict__ or is_hooked(layer)
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward or changed:
        raise InputError(
            f"model: the output layer is a {type(layer).__module__}.{type(layer).__qualname__} whose forward is "
            "wrapped or hooked, which the fused head would bypass (an adapter on it would not be trained): leave it "
            f"out of the adapter or wrapper, or {WAY_OUT}"
        )
    if type(layer.weight.data) is not Tensor or not layer.weight.is_floating_point():
        raise InputError(
            f"model: the output layer's weight is a {type(layer.weight.data).__name__} of {layer.weight.dtype}, and "
            f"the fused head needs a plain floating-point tensor; {WAY_OUT}"
        )
    config = text_config(model)
    kind = getattr(config, "model_type", "")
    softcap = getattr(config, _SOFTCAP[kind]) if kind in _SOFTCAP else None
    scale = 1.0
    if kind in _SCALE:
        name, convert = _SCALE[kind]
        scale = convert(getattr(config, name))
    return LanguageModelHead(layer, scale, softcap)


def ends_of(model: nn.Module) -> list[Any]:
    """A model's input embedding and its output layer; ``None`` for one that it does not show."""
    return [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]


def ends_apart(model: nn.Module) -> list[nn.Module]:
    """The input embedding and the output layer of a model whose ends are torch's layers and share no weight."""
    ends = ends_of(model)
    if not all(isinstance(end, (nn.Embedding, nn.Linear)) for end in ends):
        return []
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return ends if all(owners[id(parameter)] == 1 for end in ends for parameter in end.parameters()) else []


def run_without_head(model: nn.Module, head: LanguageModelHead, **inputs: Any) -> tuple[Tensor, Any]:
    """Run a model without its last matrix product.

    Returns:
        The hidden states ``[B, T, H]`` that its head was given, and its output, whose logits mean nothing.

    Raises:
        InputError: the model does not call its head exactly once on ``[B, T, H]``, or trains something behind it.
    """
    given: list[Tensor] = []

    def pass_through(input: Tensor) -> Tensor:
        given.append(input)
        return input.detach()  # what the model does to its logits costs next to nothing on these

    with forward_replaced(head.layer, pass_through):
        output = model(**inputs)
    hidden = _only(given, model)
    if getattr(output, "logits", hidden.detach()).requires_grad:
        raise InputError(
            f"model: {type(model).__name__} has something to train between its output layer and its logits; {WAY_OUT}"
        )
    return hidden, output


@contextmanager
def forward_replaced(layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A layer that does something else meanwhile."""
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def _only(given: list[Tensor], model: nn.Module) -> Tensor:
    if len(given) != 1:
        raise InputError(
            f"model: {type(model).__name__} called its output layer {len(given)} times in one pass, the fused head "
            f"expects once; {WAY_OUT}"
        )
    if given[0].ndim != 3:
        raise InputError(
            f"model: {type(model).__name__} gives its output layer hidden states {list(given[0].shape)}, the fused "
            f"head expects [B, T, H]; {WAY_OUT}"
        )
    return given[0]


_CHECKED_TOKENS = 8
_PROBED_LOGIT = 30.0


@torch.no_grad()
def check_head(model: nn.Module, head: LanguageModelHead) -> None:
    """Compare the fused head's log-probabilities of 8 tokens with the model's own, and what follows the head.

    The tokens are the same on every rank, so that all ranks come to the same verdict. Random states are left as they
    were: a run with dropout is the same with and without the check.

    Raises:
        InputError: the model does something that the fused head does not.
    """
    layer = head.layer
    vocabulary, device = layer.weight.shape[0], layer.weight.device
    input_ids = torch.arange(_CHECKED_TOKENS + 1, device=device).unsqueeze(0) % vocabulary
    inputs = {"input_ids": input_ids, "attention_mask": None, "use_cache": False}
    with trying(model):
        _check_log_probs(model, head, inputs)
        _check_transform(model, head, inputs)
        try:
            run_without_head(model, head, **inputs)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"model: {type(model).__name__} does not run without its logits ({one_line(error)}); {WAY_OUT}"
            ) from error


def _check_log_probs(model: nn.Module, head: LanguageModelHead, inputs: dict[str, Any]) -> None:
    """From hidden states to log-probabilities."""
    given: list[Tensor] = []
    own_forward = head.layer.forward

    def watched(input: Tensor) -> Tensor:
        given.append(input)
        return own_forward(input)

    with forward_replaced(head.layer, watched):
        logits = model(**inputs).logits
    hidden = _only(given, model)
    rows, vocabulary = inputs["input_ids"].shape, head.layer.weight.shape[0]
    if hidden.shape[:-1] != rows or logits.shape != (*rows, vocabulary):
        raise InputError(
            f"model: {type(model).__name__}'s output layer is given {list(hidden.shape)} and its logits are "
            f"{list(logits.shape)}, where the fused head expects a row and {vocabulary} logits per token; {WAY_OUT}"
        )
    logits, targets = logits[0, :-1], inputs["input_ids"][0, 1:]
    fused = linear_token_statistics(hidden[0, :-1], targets=targets, **head.options).log_prob
    own = logits.double().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if own.isfinite().all():  # a model of nan shows in the loss
        _compare(fused, own, logits, model)


def _check_transform(model: nn.Module, head: LanguageModelHead, inputs: dict[str, Any]) -> None:
    """What follows the head, on logits far from 0: a model fresh from initialisation would not show a cap."""
    vocabulary = head.layer.weight.shape[0]
    rows = torch.linspace(-_PROBED_LOGIT, _PROBED_LOGIT, vocabulary, device=head.layer.weight.device)
    probe = torch.stack([rows.roll(token) for token in range(_CHECKED_TOKENS + 1)]).unsqueeze(0)
    with forward_replaced(head.layer, lambda input: probe.clone()):
        logits = model(**inputs).logits
    transform = LogitTransform(head.logit_scale, head.logit_softcap)
    _compare(transform.apply_(probe), logits.double(), logits, model)


def _compare(fused: Tensor, own: Tensor, logits: Tensor, model: nn.Module) -> None:
    difference = (own - fused).abs().max().item()
    tolerance = 1e-3 + 4 * torch.finfo(logits.dtype).eps * logits.abs().nan_to_num(posinf=0).max().item()
    if not difference <= tolerance:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise InputError(
            f"model: the fused head does not reproduce {kind}'s own log-probabilities (they differ by "
            f"{difference:.3g}, {tolerance:.1g} would be rounding): the model does something to its logits that the "
            f"head does not know; {WAY_OUT}"
        )
