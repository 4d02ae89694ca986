"""Several documents in one row: attention within each, and the check that nothing passes from one to the next."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from dft_lightning.errors import InputError, one_line
from dft_lightning.foreign.transformers import attention_of, told_of_documents
from dft_lightning.models.attention import ATTENTION
from dft_lightning.models.head import LanguageModelHead, check_head, find_head
from dft_lightning.models.layout import KEY, BatchLayout, document_lengths, with_layout
from dft_lightning.models.row_checks import (
    apart,
    check_rows,
    computes_exactly,
    rotary_length,
    rounding,
    text_config,
    trying,
    vocabulary_of,
)

WAY_OUT = "train on padded rows (data.batches.padding_free: false, no data.batches.packing)"


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
    if attention_of(model) == ATTENTION:
        if len(positions) != 1:
            raise InputError(
                "attn_implementation: documents takes one row at a time: set data.batches.padding_free: true"
            )
        if getattr(text_config(model), "output_router_logits", False):
            raise InputError(
                "attn_implementation: documents puts documents' lengths in place of a mask, which the auxiliary loss "
                "of experts reads: use sdpa or flash_attention_2, or set model.step.router_aux_loss_coef: 0"
            )
        lengths, chunk = _lengths(batch), getattr(text_config(model), "attention_chunk_size", None)
        if isinstance(chunk, int) and max(lengths) > chunk:
            raise InputError(
                f"attn_implementation: documents attends to whole documents, and one of {max(lengths)} tokens is "
                f"longer than the model's chunk of attention, {chunk}: use sdpa or flash_attention_2, or a smaller "
                "data.text.max_length"
            )
        # transformers hands a mask of four dimensions to the attention as it is.
        inputs["attention_mask"] = torch.tensor(lengths).view(1, 1, 1, -1)
    return inputs | _options_of_documents(model, batch)


def _options_of_documents(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Where documents begin, for an attention that would wait for the device in every layer to find out."""
    layout, attention = batch.get(KEY), attention_of(model)
    if not isinstance(layout, BatchLayout) or len(batch["input_ids"]) != 1:
        return {}
    if not (attention == ATTENTION or attention.startswith("flash_attention")) or not takes_any_option(model):
        return {}
    starts, longest = layout.cu_seq_lens, layout.max_length
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def takes_any_option(model: nn.Module) -> bool:
    """Whether a model hands options that it does not know on to its attention."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)


def knowing_documents(batch: Mapping[str, Any]) -> AbstractContextManager[None]:
    """A model that is run on a batch meanwhile need not find out what its layout says."""
    layout = batch.get(KEY)
    if not isinstance(layout, BatchLayout) or layout.documents is None:
        return nullcontext()
    return told_of_documents(layout.joined and len(layout.documents) > layout.shape[0])


def _lengths(batch: Mapping[str, Any]) -> list[int]:
    layout = batch.get(KEY)
    known = layout.documents if isinstance(layout, BatchLayout) else None
    return document_lengths(batch["position_ids"]) if known is None else known


def check_documents(model: nn.Module, num_rows: int = 1, longest: int | None = None) -> None:
    """Find out whether a model keeps the documents of a row apart, and starts each anew.

    A row of two documents (or two such rows: some attentions find the documents of one row alone): the second's logits
    must not move when the first is changed, and must be those of the second alone, run as the model itself would,
    without ``position_ids``. Tried with short documents, and with ones beyond the model's attention window or chunk.
    Recurrent and hybrid models fail here, and so does code that ignores ``position_ids``, or starts them elsewhere than
    at 0. Random states are left as they were, and dropout is off meanwhile.

    Args:
        model: the language model.
        num_rows: rows of the batches to come; more than one are checked by two.
        longest: tokens of the longest document to come, where it is known.

    Raises:
        InputError: something passes from the first document to the second, by model and attention implementation.
    """
    _check_documents_of(_CHECKED_TOKENS, model, num_rows)
    span = attention_span(model)
    if attention_of(model) == ATTENTION and getattr(text_config(model), "attention_chunk_size", None) == span:
        return  # documents beyond a chunk are refused one by one
    if span is not None and (longest is None or longest > span):
        _check_documents_of(span + _CHECKED_TOKENS, model, num_rows)


def _check_documents_of(length: int, model: nn.Module, num_rows: int) -> None:
    device = next(model.parameters()).device
    span = attention_span(model) or 0
    # The second begins nowhere near a multiple of a chunk.
    first = length if length <= _CHECKED_TOKENS or length % span else length + 1
    tokens = torch.arange(2 * first + length, device=device) % vocabulary_of(model, 3 * _CHECKED_TOKENS)
    documents = tokens[:first], tokens[first : 2 * first], tokens[2 * first :]
    name = f"model: {type(model).__name__} with attn_implementation {attention_of(model)}"
    try:
        with trying(model):
            packed = [_last_logits(model, [documents[i], documents[2]], num_rows) for i in (0, 1)]
            beside = [_last_logits_of_rows(model, documents[i][:length], documents[2]) for i in (0, 1)]
            own = _last_logits_of_rows(model, documents[2])
            beyond = torch.cat([documents[2], documents[0][:length]])
            longer = own if computes_exactly(model) else _last_logits_of_rows(model, beyond, length=length)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name} does not run on a row of documents ({one_line(error)}); {WAY_OUT}") from error
    if not own.isfinite().all():  # a model of nan shows in the loss
        return
    # The first two differ in numbers far away alone, the third in its shape, and so in the order of its sums. What
    # rows of a batch differ by, which do not meet, is none that passes between documents either; nor is what a row
    # differs by that goes on, which in half precision may be much.
    same, shape = apart(*beside), max(apart(other, own) for other in (*beside, longer))
    for other, units, noise, change in (
        (packed[1], 2, same, "another first document"),
        (own, 16, shape, "no first document"),
    ):
        difference = apart(packed[0], other)
        if not difference <= rounding(own, units, noise):
            raise InputError(
                f"{name} does not keep the documents of a row apart: with {change} the logits of a second of {length} "
                f"tokens move by {difference:.3g}; "
                + ("set data.batches.padding_free: true, " if num_rows > 1 else "")
                + (f"set data.text.max_length to {span} or less, " if length > _CHECKED_TOKENS else "")
                + f"use another attn_implementation (sdpa, documents, flash_attention_2), or {WAY_OUT}"
            )


def attention_span(model: nn.Module) -> int | None:
    """The shortest window or chunk that some layer of a model attends in; ``None`` where all attend to everything."""
    config = text_config(model)
    kinds = getattr(config, "layer_types", None)
    spans = [
        getattr(config, name, None)
        for name, kind in (("sliding_window", "sliding_attention"), ("attention_chunk_size", "chunked_attention"))
        if kinds is None or kind in kinds
    ]
    return min((span for span in spans if isinstance(span, int) and span > 0), default=None)


_CHECKED_TOKENS = 6


def _last_logits(model: nn.Module, documents: Sequence[Tensor], num_rows: int) -> Tensor:
    """Of the last document of a row, whose positions start anew with each."""
    rows = min(num_rows, 2)
    positions = torch.cat([torch.arange(len(document), device=document.device) for document in documents])
    ids, positions = torch.cat(list(documents)).expand(rows, -1), positions.expand(rows, -1)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    output: Tensor = model(**model_inputs(model, with_layout(batch))).logits
    return output[:, -_CHECKED_TOKENS:]


def _last_logits_of_rows(model: nn.Module, *rows: Tensor, length: int | None = None) -> Tensor:
    """Of the last of rows of their own, or of so many of its tokens."""
    output: Tensor = model(**model_inputs(model, {"input_ids": torch.stack(rows)})).logits
    return output[-1:, :length][:, -_CHECKED_TOKENS:]


class ModelChecks:
    """Each check is made once, at the first batch that needs it."""

    def __init__(self) -> None:
        self._rows = self._documents = self._head = False
        self._needs_mask = True
        self._rotary: tuple[str, int] | None = None

    def before_batch(self, model: nn.Module, batch: Mapping[str, Any], max_length: int | None = None) -> dict[str, Any]:
        """Try the model with padded rows, and with several documents in a row where the batch has such rows.

        Args:
            model: the language model.
            batch: as the module takes it.
            max_length: of documents, where that is known.

        Returns:
            What the model is to be run on: the batch, without an ``attention_mask`` that it does not need. Of one, a
            model makes a mask of ``[B, 1, T, T]``, for which it waits and which flash attention does not take.

        Raises:
            InputError: the model sees tokens that it must not see.
        """
        if "position_ids" in batch and not self._documents:
            check_documents(model, len(batch["position_ids"]), max_length)
            self._documents = True
        if not self._rows:
            self._needs_mask = check_rows(model)
            self._rows, self._rotary = True, rotary_length(text_config(model))
        if self._rotary is not None and batch["input_ids"].shape[1] > self._rotary[1]:
            kind, length = self._rotary
            rank_zero_warn(
                f"model: {type(model).__name__}'s rotary frequencies ({kind}) are others for the whole batch as soon "
                f"as one of its rows is longer than {length} tokens, so that losses and metrics depend on what comes "
                f"together: set data.text.max_length to {length} or less, or a batch size of 1"
            )
            self._rotary = None  # said once
        layout = batch.get(KEY)
        right = isinstance(layout, BatchLayout) and layout.lengths is not None
        return {name: each for name, each in batch.items() if name != "attention_mask" or self._needs_mask or not right}

    def head_of(self, model: nn.Module) -> LanguageModelHead:
        """The model's head, held against the model's own logits.

        Raises:
            InputError: it is none that the fused head knows.
        """
        head = find_head(model)
        if not self._head:
            check_head(model, head)
            self._head = True
        return head
