"""What a model has to do with rows before it is trained: tried on a few tokens, in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dft_lightning.errors import InputError, one_line
from dft_lightning.foreign.transformers import attention_of
from dft_lightning.models.blocks import uncompiled

_LONG, _SHORT = 8, 5


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; every submodule's own mode is restored, even after an error."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode


@contextmanager
def trying(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random states are left as they were, and nothing is compiled.

    Without autocast where the weights are float32: what it rounds, a model that is trained at a high rate may make
    large differences of.
    """
    device = next(model.parameters()).device
    exact = torch.autocast(device.type, enabled=False) if computes_exactly(model) else nullcontext()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(model), uncompiled(), exact:
        for module in model.modules():  # on the CPU these pack their weights anew at the first call in evaluation mode
            if type(module).__module__.startswith("bitsandbytes"):
                module.training = True
        yield


def computes_exactly(model: nn.Module) -> bool:
    """Whether a model can be run without rounding to half precision: its weights are not in it, nor flash attention."""
    return next(model.parameters()).dtype in (torch.float32, torch.float64) and "flash" not in attention_of(model)


def text_config(model: nn.Module) -> Any:
    """The config of the language model, within that of a multimodal one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def rounding(logits: Tensor, units: float, noise: float = 0.0) -> float:
    """How far equal logits may lie apart, by the order of sums alone.

    Args:
        logits: their size and dtype count.
        units: last digits of the largest logit; never less than 1e-5 of it, which what passes from one token to
            another exceeds.
        noise: what logits differ by that are known to be equal: of experts, whose products have the shapes that the
            other rows of the batch give them.
    """
    return max(units * torch.finfo(logits.dtype).eps, 1e-5) * logits.abs().max().item() + 4 * noise


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())


def vocabulary_of(model: nn.Module, otherwise: int) -> int:
    """How many tokens a model knows, where it shows that."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    return otherwise if embedding is None else len(embedding.weight)


def check_rows(model: nn.Module) -> bool:
    """Find out whether a model keeps the future from its tokens, and whether padding leaves a row as it is.

    A row of 8 tokens and one of 5, padded on the right: another last token of the first must not move its earlier
    logits, and the second's logits must be those of the second alone. The tokens are the same on every rank.

    Returns:
        Whether it needs an ``attention_mask`` for rows that are padded on the right. Tokens that attend to what is
        before them alone do not; the positions of some models (ALiBi) are made of the mask.

    Raises:
        InputError: one of the two does not hold, by model.
    """
    device = next(model.parameters()).device
    tokens = torch.arange(_LONG + _SHORT + 1, device=device) % vocabulary_of(model, _LONG + _SHORT + 1)
    long, short = tokens[:_LONG], tokens[_LONG:-1]
    other = torch.cat([long[:-1], tokens[-1:]])
    padded = torch.cat([short, short[-1:].expand(_LONG - _SHORT)])
    mask = torch.ones(2, _LONG, dtype=torch.int64, device=device)
    mask[1, _SHORT:] = 0
    name = f"model: {type(model).__name__}"
    try:
        with trying(model):
            first, second = (_logits(model, torch.stack([row, padded]), mask) for row in (long, other))
            alone = _logits(model, short[None], mask[:1, :_SHORT])[0]
    except InputError:
        raise
    except Exception as error:  # whatever a model's own code raises
        raise InputError(f"{name} does not run on two rows, of which one is padded ({one_line(error)})") from error
    if not all(logits.isfinite().all() for logits in (first[0], first[1, :_SHORT], alone)):
        return True  # a model of nan shows in the loss
    own = first[1, :_SHORT]
    noise = apart(own, second[1, :_SHORT])
    moved = apart(first[0, :-1], second[0, :-1])
    if moved > rounding(first[0], 2, noise):
        raise InputError(
            f"{name} sees the tokens that it is to predict: another last token moves the logits before it by "
            f"{moved:.3g}; {_way_to_causality(model)}"
        )
    moved = apart(own, alone)
    if moved > rounding(alone, 16, noise):
        raise InputError(
            f"{name} takes padding for tokens: padded on the right, a row's logits move by {moved:.3g}; train on rows "
            "of one length (data.batch_size: 1), or take another model"
        )
    return _needs_mask(model, torch.stack([long, padded]), first, noise)


def _needs_mask(model: nn.Module, rows: Tensor, masked: Tensor, noise: float) -> bool:
    """Whether the logits of two rows, of which the second is padded, are others without a mask."""
    if getattr(text_config(model), "output_router_logits", False):
        return True  # the auxiliary loss of experts is a mean over the tokens that the mask leaves
    try:
        with trying(model):
            unmasked = _logits(model, rows, None)
    except Exception:  # whatever a model's own code raises: it runs with one
        return True
    moved = max(apart(masked[0], unmasked[0]), apart(masked[1, :_SHORT], unmasked[1, :_SHORT]))
    return not moved <= rounding(masked[0], 2, noise)


def _logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    return logits.float() if logits.dtype == torch.float64 else logits


def _way_to_causality(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    if getattr(config, "is_decoder", None) is False:
        return (
            "it is loaded as an encoder: set is_decoder: true in its config (config.json of the folder, or the values "
            "of model.model)"
        )
    return "take a causal language model, or the setting of this one that makes it one"


def rotary_length(config: Any) -> tuple[str, int] | None:
    """The kind and the length beyond which a model's rotary frequencies depend on the longest row of a batch.

    Phi-3's LongRoPE and dynamic NTK take other frequencies for the whole batch as soon as one row is longer.

    Args:
        config: of the language model.
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes, *(each for each in ropes.values() if isinstance(each, dict))]:
        if rope.get("rope_type") in ("longrope", "dynamic"):
            length = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            return rope["rope_type"], int(getattr(config, "original_max_position_embeddings", None) or length)
    return None


@dataclass(frozen=True)
class Positions:
    """How many tokens of a row a model has positions for.

    Attributes:
        number: of them.
        learned: whether they are parameters, so that there is nothing beyond them; rotary ones go on, into what the
            model was not trained on.
    """

    number: int
    learned: bool


def positions_of(model: nn.Module, config: Any) -> Positions | None:
    """A language model's positions; ``None`` where its config names no number of them.

    Args:
        model: whose tables are looked at.
        config: of the language model.
    """
    number = getattr(config, "max_position_embeddings", None)
    if not isinstance(number, int) or number < 1 or getattr(config, "alibi", False):
        return None
    tables = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    tables += [name for name, _ in model.named_buffers()]
    names = [name.rpartition(".")[2] for name in tables]
    there = any(name == "wpe" or ("pos" in name and "emb" in name) for name in names)
    return Positions(number, there and not getattr(config, "rope_parameters", None))
