"""``attn_implementation="documents"``: attention within each document of a row."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dft_lightning.errors import InputError
from dft_lightning.foreign.torch import attention_backward, attention_with_normalizer
from dft_lightning.models.row_checks import text_config

ATTENTION = "documents"


def register_documents_attention() -> None:
    """Make ``attn_implementation="documents"`` known to transformers.

    Attention within each document of a row. On CUDA it is one call for all of them where torch has a kernel for that
    (half precision, no dropout), elsewhere one of torch's attention for each. transformers' ``sdpa`` takes the row as
    one sequence under a block-diagonal mask instead, whose cost grows with the square of the row's length. Batches that
    are not padding-free go to ``sdpa``.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _documents_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def ends_graphs(model: nn.Module, device: torch.device, precision: str) -> bool:
    """Whether ``torch.compile`` has to leave documents to eager calls, by the device and the trainer's precision."""
    has_operator = device.type == "cpu" or (device.type == "cuda" and not precision.startswith(("32", "64")))
    return not has_operator or _drops(model)


def _drops(model: nn.Module) -> bool:
    """Whether some attention of a model has dropout in training, whatever its config calls it."""
    config = text_config(model)
    names = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
    return any((getattr(config, name, None) or 0.0) > 0.0 for name in names)


def _documents_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention outputs ``[B, T, heads, D]`` from ``[B, heads, T, D]``.

    ``attention_mask`` holds the documents' lengths, as integers; any other mask is for ``sdpa``, and has the window in
    it.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    for name, what in (("s_aux", "attention sinks"), ("softcap", "softcap"), ("position_bias", "bias of positions")):
        if options.get(name) is not None:
            raise InputError(
                f"attn_implementation: documents computes no {what}, which {type(module).__name__} has: set "
                "flash_attention_2 or eager"
            )
    dropout, scaling = options.get("dropout", 0.0), options.get("scaling")
    if in_one_call(query, dropout):
        starts, longest = options.get("cu_seq_lens_q"), options.get("max_length_q")
        return _all_documents(query, key, value, attention_mask, sliding_window, scaling, starts, longest), None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu" and dropout == 0 and query.shape[-1] == value.shape[-1]:
        # In half precision a CPU takes longer for it than in float32, whose digits are better, too.
        wide = [t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in (query, key, value)]
        return document_attention(*wide, attention_mask, sliding_window, scaling)[0].to(query.dtype), None
    return _document_by_document(query, key, value, attention_mask, sliding_window, scaling, dropout), None


# -- all documents in one call (CUDA) ----------------------------------------------------------------------------------


def in_one_call(query: Tensor, dropout: float) -> bool:
    """Whether torch's attention over documents takes such queries ``[B, heads, T, D]``."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and dropout == 0 and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0


def _all_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    sliding_window: int | None,
    scaling: float | None,
    cu_seq_lens: Tensor | None,
    max_length: int | None,
) -> Tensor:
    from torch.nn.attention import varlen

    if cu_seq_lens is None or max_length is None:  # a model that hands no such options on to its attention
        ends = lengths.flatten().cumsum(0, dtype=torch.int32)
        cu_seq_lens, max_length = nn.functional.pad(ends, (1, 0)).to(query.device), int(lengths.max())
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output = varlen.varlen_attn(
        q,
        k,
        v,
        cu_seq_lens,
        cu_seq_lens,
        max_length,
        max_length,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),  # a token is in its own window
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)


# -- one operator for all documents (CPU) ------------------------------------------------------------------------------
# torch.compile and autograd see one operation, whatever the number of documents. torch's own kernels do the work:
# scaled_dot_product_attention itself would need autograd for its backward, which is off within an operator.


@torch.library.custom_op("dft_lightning::document_attention", mutates_args=(), device_types="cpu")
def document_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, sliding_window: int | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Causal attention within each document of a row, and the logarithm of each token's normalizer.

    Args:
        query: ``[B, heads, T, D]``, float32 or float64.
        key: ``[B, key heads, T, D]``, where the number of heads is a multiple of key heads.
        value: the same.
        lengths: of the documents, int64, whose sum is ``T``.
        sliding_window: the last so many tokens are seen, the own one included; all of the document if ``None``.
        scaling: factor of the scores.

    Returns:
        ``[B, T, heads, D]`` and ``[B, T, heads]``.
    """
    batch, heads, tokens, size = query.shape
    output, normalizer = query.new_empty(batch, tokens, heads, size), query.new_empty(batch, tokens, heads)
    for place, q, k, v, mask in _by_document(query, key, value, lengths, sliding_window):
        own, log_sum = attention_with_normalizer(q, k, v, mask, scaling)
        output[:, place], normalizer[:, place] = own.transpose(1, 2), log_sum.transpose(1, 2)
    return output, normalizer


@torch.library.custom_op("dft_lightning::document_attention_backward", mutates_args=(), device_types="cpu")
def _document_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    normalizer: Tensor,
    lengths: Tensor,
    sliding_window: int | None,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = [_as_the_outputs(tensor) for tensor in (query, key, value)]
    for place, q, k, v, mask in _by_document(query, key, value, lengths, sliding_window):
        of_output, own, log_sum = (tensor[:, place].transpose(1, 2) for tensor in (gradient, output, normalizer))
        of_own = attention_backward(of_output, q, k, v, own, log_sum, mask=mask, scale=scaling)
        for whole, part in zip(gradients, of_own, strict=True):
            groups = part.shape[1] // whole.shape[1]
            whole[:, :, place] = part.reshape(len(part), -1, groups, *part.shape[2:]).sum(2) if groups > 1 else part
    return gradients[0], gradients[1], gradients[2]


def _by_document(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, sliding_window: int | None) -> Any:
    """Each document's place, queries, keys and values, of as many heads, and the mask that its window needs."""
    start, groups = 0, query.shape[1] // key.shape[1]
    for length in lengths.flatten().tolist():
        place = slice(start, start + length)
        q, *keys = (tensor[:, :, place] for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(groups, 1) if groups > 1 else tensor for tensor in keys)
        seen = _window(length, sliding_window, query.device)
        mask = None if seen is None else torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, -torch.inf)
        yield place, q, k, v, mask
        start += length


def _window(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """Whether a token sees another, of a document longer than the window."""
    if sliding_window is None or length <= sliding_window:
        return None
    place = torch.arange(length, device=device)
    behind = place[:, None] - place[None]
    return (behind >= 0) & (behind < sliding_window)


def _as_the_outputs(tensor: Tensor) -> Tensor:
    """``[B, heads, T, D]``, which lies in memory as ``[B, T, heads, D]``, as the projections before it have it."""
    batch, heads, tokens, size = tensor.shape
    return tensor.new_empty(batch, tokens, heads, size).transpose(1, 2)


@document_attention.register_fake
def _shapes(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, size = query.shape
    return query.new_empty(batch, tokens, heads, size), query.new_empty(batch, tokens, heads)


@_document_attention_backward.register_fake
def _shapes_of_gradients(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _as_the_outputs(query), _as_the_outputs(key), _as_the_outputs(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.sliding_window, ctx.scaling = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, lengths, output, normalizer = ctx.saved_tensors
    gradients = _document_attention_backward(
        gradient, query, key, value, output, normalizer, lengths, ctx.sliding_window, ctx.scaling
    )
    return (*gradients, None, None, None)


document_attention.register_autograd(_backward, setup_context=_save)


# -- one call a document (elsewhere) -----------------------------------------------------------------------------------


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore] # another number of documents in every batch
def _document_by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    sliding_window: int | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    sizes, dtype, groups, outputs = lengths.flatten().tolist(), query.dtype, query.shape[1] // key.shape[1], []
    wide = query.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)
    with torch.autocast("cpu", enabled=False) if wide else nullcontext():
        tensors = [tensor.float() if wide else tensor for tensor in (query, key, value)]
        if groups > 1:  # kernels of float32 take as many keys as queries
            tensors[1:] = [tensor.repeat_interleave(groups, 1) for tensor in tensors[1:]]
        for q, k, v in zip(*(torch.split(tensor, sizes, dim=2) for tensor in tensors), strict=True):
            mask = _window(q.shape[2], sliding_window, q.device)
            of_one = nn.functional.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling
            )
            outputs.append(of_one.transpose(1, 2))
        return torch.cat(outputs, dim=1).to(dtype)
