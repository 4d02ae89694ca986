"""Several documents in one row: attention within each, and the check that nothing passes from one to the next."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from dft_lightning.errors import InputError, one_line

ATTENTION = "documents"
WAY_OUT = "train on padded rows (data.padding_free: false, no data.packing)"


def register_documents_attention() -> None:
    """Make ``attn_implementation="documents"`` known to transformers.

    One ``scaled_dot_product_attention`` for each document of a row. transformers' ``sdpa`` takes the row as one
    sequence under a block-diagonal mask instead, whose cost grows with the square of the row's length. Batches that
    are not padding-free go to ``sdpa``.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _documents_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _documents_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention outputs ``[B, T, heads, D]`` from ``[B, heads, T, D]``.

    ``attention_mask`` holds the documents' lengths, as integers; any other mask is for ``sdpa``.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    lengths = attention_mask.flatten().tolist()
    window = options.get("sliding_window")
    if window is not None and max(lengths) > window:
        raise InputError(
            f"attn_implementation: documents attends to whole documents, and one of {max(lengths)} tokens is longer "
            f"than the model's sliding window of {window}: use sdpa or flash_attention_2, or a smaller data.max_length"
        )
    documents = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in documents]
    return torch.cat(outputs, dim=1), None


def model_inputs(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """What a model is called with for a batch: padded, or padding-free with ``position_ids``."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch.get("attention_mask"), "use_cache": False}
    positions = batch.get("position_ids")
    if positions is None:
        return inputs
    inputs["position_ids"] = positions
    if inputs["attention_mask"] is not None or positions.shape != batch["input_ids"].shape:
        raise InputError(
            "a batch with position_ids has rows of whole documents, input_ids and position_ids [B, T] without "
            f"attention_mask; got {list(batch['input_ids'].shape)} and {list(positions.shape)}"
        )
    if _attention_of(model) == ATTENTION:
        if len(positions) != 1:
            raise InputError("attn_implementation: documents takes one row at a time: set data.padding_free: true")
        # transformers hands a mask of four dimensions to the attention as it is.
        inputs["attention_mask"] = torch.tensor(document_lengths(positions)).view(1, 1, 1, -1)
    return inputs


def document_lengths(position_ids: Tensor) -> list[int]:
    """Tokens of each document of rows: one begins wherever ``position_ids`` ``[B, T]`` do not go up by one.

    Every row begins one, at position 0.
    """
    positions = position_ids.flatten()
    starts = (positions.diff(prepend=positions[:1] - 2) != 1).nonzero().flatten().tolist()
    return [end - start for start, end in itertools.pairwise([*starts, len(positions)])]


def document_index(position_ids: Tensor) -> Tensor:
    """The number ``[B * T]`` of the document of each token."""
    lengths = torch.tensor(document_lengths(position_ids), device=position_ids.device)
    return torch.arange(len(lengths), device=position_ids.device).repeat_interleave(lengths)


@torch.no_grad()
def check_documents(model: nn.Module, num_rows: int = 1) -> None:
    """Find out whether a model keeps the documents of a row apart, and starts each anew.

    A row of two short documents (or two such rows: some attentions find the documents of one row alone): the second's
    logits must not move when the first is changed, and must be those of the second alone. Recurrent and hybrid models
    fail here, and so does code that ignores ``position_ids``. Random states are left as they were, and dropout is off
    meanwhile.

    Args:
        model: the language model.
        num_rows: rows of the batches to come; more than one are checked by two.

    Raises:
        InputError: something passes from the first document to the second, by model and attention implementation.
    """
    device = next(model.parameters()).device
    vocabulary = _vocabulary(model)
    name = f"model: {type(model).__name__} with attn_implementation {_attention_of(model)}"
    documents = torch.arange(3 * _CHECKED_TOKENS, device=device).view(3, -1) % vocabulary
    positions = torch.arange(_CHECKED_TOKENS, device=device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            rows = [(documents[0], documents[2]), (documents[1], documents[2]), (documents[2],)]
            logits = [_last_logits(model, torch.cat(row), positions.repeat(len(row)), num_rows) for row in rows]
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name} does not run on a row of documents ({one_line(error)}); {WAY_OUT}") from error
    finally:
        for module in training:
            module.training = True
    own = logits[2]
    if not own.isfinite().all():  # a model of nan shows in the loss
        return
    unit = torch.finfo(own.dtype).eps * own.abs().max().item()
    # The first two differ in numbers far away alone, the third in its shape, and so in the order of its sums.
    for other, units, change in ((logits[1], 2, "another first document"), (own, 16, "no first document")):
        difference = (logits[0] - other).abs().max().item()
        if not difference <= units * unit:
            raise InputError(
                f"{name} does not keep the documents of a row apart: with {change} the second's logits move by "
                f"{difference:.3g}; "
                + ("set data.padding_free: true, " if num_rows > 1 else "")
                + f"use another attn_implementation (sdpa, documents, flash_attention_2), or {WAY_OUT}"
            )


_CHECKED_TOKENS = 6


def _last_logits(model: nn.Module, input_ids: Tensor, position_ids: Tensor, num_rows: int) -> Tensor:
    rows = min(num_rows, 2)
    batch = {"input_ids": input_ids.expand(rows, -1), "position_ids": position_ids.expand(rows, -1)}
    output: Tensor = model(**model_inputs(model, batch)).logits
    return output[:, -_CHECKED_TOKENS:]


def _vocabulary(model: nn.Module) -> int:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    return len(embedding.weight) if embedding is not None else 3 * _CHECKED_TOKENS


def _attention_of(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_attn_implementation", "of its own"))
