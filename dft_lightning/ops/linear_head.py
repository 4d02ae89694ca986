"""A linear head fused with any token loss: hidden states and weight in, loss and gradients out, no logits kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dft_lightning.losses.base import IGNORE_INDEX, TokenLoss, required_step, token_loss_and_weight
from dft_lightning.losses.statistics import (
    Statistic,
    TokenStats,
    check_params,
    names_of,
    normalise_needs,
    reads_reference,
)
from dft_lightning.ops.call import (
    ALWAYS,
    HeadSettings,
    ReferenceHead,
    TargetTokens,
    TokenOutput,
    reduced,
    target_tokens,
)
from dft_lightning.ops.passes import head_statistics, one_pass
from dft_lightning.ops.row_math import ENTRIES, LogitTransform, reaches_far, tempering_of


@torch.compiler.disable
def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss: TokenLoss,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    target_index: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    token_inputs: Mapping[str, Tensor] | None = None,
    token_weight: Tensor | None = None,
    reference: ReferenceHead | None = None,
    statistics: Iterable[Statistic | str] = (),
    step: int | None = None,
    chunk_bytes: int | None = None,
    gradient_threshold: float = 0.0,
) -> TokenOutput:
    """The summed token loss of a linear head, with per-token statistics, without ever holding its logits.

    The logits are ``logit_scale * softcap(hidden @ weight.T + bias)``. Tokens go through in chunks. For a pointwise
    loss what is kept of a chunk's logits becomes their gradient in place and goes into the gradient products at once:
    three matrix products in all, and backward only scales the result. A loss with ``pointwise = False`` is computed
    from the statistics of all tokens, and the logits are computed again in backward.

    Logits are not rounded to half precision: statistics are those of the float32 sums of the product, and what is kept
    of a row are its exponentials. (On the CPU this takes a second product for a softcap, and for a ``logit_scale`` that
    is no power of two.) The weight's gradient is accumulated in float32 and returned in the weight's dtype; of a single
    chunk in bfloat16 it is rounded once, by the product. Under autocast the products run in autocast's dtype. In
    float16, a factor of the gradient products is first multiplied by the power of two that its largest element has room
    for. Rows lie 16 elements aligned, whatever the vocabulary. Backward scales the gradients in place where they are in
    the leaf's dtype and the graph is not retained. Gradients that nobody asks for (frozen head, frozen backbone,
    ``torch.no_grad``) are not computed.

    On the CPU gradients are fresh tensors, which are written a few times faster on huge pages: under Linux torch takes
    them where ``THP_MEM_ALLOC_ENABLE=1`` is set before its first large tensor, as the command sets it.

    Args:
        hidden: ``[n, H]``, the last hidden states.
        weight: ``[V, H]``, of the hidden states' dtype (any under autocast).
        targets: ``[n]`` class indices, aligned with ``hidden`` (already shifted). Tokens with ``ignore_index`` are
            dropped before the first product.
        loss: any token loss.
        bias: ``[V]``.
        logit_scale: factor of the logits.
        logit_softcap: logits become ``softcap * tanh(logits / softcap)`` before the scale.
        ignore_index: the target that is left out.
        target_index: ``[m]``, the positions of the targets in order, for a caller who knows them: then the call does
            not wait for the device, nothing at other positions counts, and targets at these are not checked: one that
            is no class index makes the result undefined. ``None`` finds them by ``ignore_index``.
        normalizer: what the sum is divided by: a number or a scalar tensor on the same device (which is not waited
            for), a constant. ``None`` leaves the sum, and so does a batch without targets.
        token_inputs: ``[n]`` tensors that the loss needs and a head cannot know, by their name in
            :class:`TokenStats`: ``sequence_index``, ``reference_log_prob``. Constants: no gradient flows into them.
        token_weight: ``[n]`` factors of the tokens' losses. They count in the statistic ``weight``, not in the
            normaliser.
        reference: last hidden states and head of a reference model, for what is taken from its distribution. Its logits
            stand beside the model's own chunk by chunk, and take as much again as ``chunk_bytes``.
        statistics: what to compute beyond ``loss.needs``, such as ``"entropy"``.
        step: the optimizer step, which losses with a schedule need.
        chunk_bytes: at most what a chunk's exponentials take in the dtype of the products (and never less than one
            token's). Beside half precision float32 logits of an eighth of its rows, or of 512, take a quarter more, but
            not on the CPU where the product gives exponentials. ``None`` is 640 MiB; on CUDA, where the
            weight's gradient is wanted, at least 4096 tokens if their logits take no more than a quarter of the free
            memory, and all tokens in one chunk where the larger buffer is less than the accumulator that it saves. On
            the CPU buffers are kept for the next call (:func:`release_scratch` frees them), but for what the product
            itself makes, and what a ``gradient_threshold`` keeps of a chunk.
        gradient_threshold: classes whose gradient ``|dL/dz_v|``, for ``L`` each token's loss before the normaliser and
            ``z = hidden @ weight.T + bias`` before cap and scale, is below this at every token of a chunk, and that are
            no target there, are left out of both gradient products.
            The output's ``dropped`` ``[n]`` says what each token's gradient loses and bounds the error: of a token's
            hidden gradient by ``dropped max |W_v|``, of the weight's by ``sum dropped |h|`` (both over the normaliser,
            and but for rounding). The loss and all statistics are as without. 0 is exact. It costs a wait for the
            device each chunk.

    Returns:
        A :class:`TokenOutput` over the targets that are not ignored, in order.

    Raises:
        TypeError: dtypes that do not fit together.
        ValueError: shapes that do not match, a target out of range, a statistic that cannot be had here.
        RuntimeError: in backward with ``create_graph=True``.

    Example:
        >>> from dft_lightning import DFTLoss
        >>> hidden, weight = torch.ones(3, 2, requires_grad=True), torch.zeros(4, 2)
        >>> output = linear_token_loss(hidden, weight, torch.tensor([0, -100, 3]), DFTLoss(), normalizer=2)
        >>> output.loss  # log(4) / 4, the mean of two equal tokens
        tensor(0.3466, grad_fn=<OnePassBackward>)
        >>> output.weight
        tensor([0.2500, 0.2500])
    """
    check_threshold(gradient_threshold, loss)
    step = required_step(loss, step)
    needs = (*normalise_needs(loss.needs), *normalise_needs(statistics))
    given = (token_inputs, token_weight, target_index)
    batch = target_tokens(hidden, weight, targets, bias, ignore_index, reference, *given)
    settings = _settings(batch, weight, needs, logit_scale, logit_softcap, chunk_bytes, type(loss).__name__)
    _check_cap(normalise_needs(loss.needs), settings)
    settings = replace(settings, gradient_threshold=gradient_threshold)
    if loss.pointwise:
        return one_pass(batch, weight, bias, loss, settings, normalizer, step)
    stats, correct = head_statistics(batch, weight, bias, settings)
    beside: dict[str, Any] = {"step": step, **batch.inputs}
    stats = replace(stats, **beside)
    losses, slope = token_loss_and_weight(loss, stats, batch.weight)
    return reduced(losses, stats, normalizer, weight=slope, correct=correct)


@torch.compiler.disable
def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Iterable[Statistic | str] = (),
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    reference: ReferenceHead | None = None,
    chunk_bytes: int | None = None,
) -> TokenStats:
    """Differentiable per-token statistics of a linear head, without holding its logits.

    For what :func:`linear_token_loss` does not reduce: unreduced log-probabilities, an entropy bonus, losses over
    several models. The logits are computed again in backward: four matrix products in all.

    Arguments that are not listed here, and what is raised, are those of :func:`linear_token_loss`.

    Args:
        hidden: ``[n, H]``.
        weight: ``[V, H]``.
        targets: ``[n]`` class indices; those with ``ignore_index`` are left out of the result.
        statistics: which fields of :class:`TokenStats` beyond ``log_prob``.

    Returns:
        ``log_prob`` and the statistics asked for, each ``[number of targets not ignored]``, in order.

    Example:
        >>> hidden, weight = torch.ones(1, 2, requires_grad=True), torch.zeros(4, 2)
        >>> stats = linear_token_statistics(hidden, weight, torch.tensor([1]), ["entropy"])
        >>> stats.log_prob.exp().detach(), stats.entropy.exp().detach()
        (tensor([0.2500]), tensor([4.]))
    """
    batch = target_tokens(hidden, weight, targets, bias, ignore_index, reference)
    needs = normalise_needs(statistics)
    settings = _settings(batch, weight, needs, logit_scale, logit_softcap, chunk_bytes, "the caller")
    _check_cap(needs, settings)
    return head_statistics(batch, weight, bias, settings)[0]


def _settings(
    batch: TargetTokens,
    weight: Tensor,
    needs: Iterable[Statistic],
    logit_scale: float,
    logit_softcap: float | None,
    chunk_bytes: int | None,
    who: str,
) -> HeadSettings:
    wanted: dict[str, Statistic] = {}
    for need in needs:
        if need.name in batch.inputs or need.name in ALWAYS:
            continue
        if need.name not in ENTRIES and need.function is None:
            raise ValueError(
                f"{who} needs {need!r}, which a linear head cannot compute: it has {', '.join([*ALWAYS, *ENTRIES])}; "
                "pass others in token_inputs"
            )
        check_params(need)
        if reads_reference(need) and batch.reference is None:
            raise ValueError(f"{who} needs {need!r}: pass reference, the reference model's hidden states and head")
        if wanted.setdefault(need.name, need) != need:
            raise ValueError(f"one call computes {wanted[need.name]!r} or {need!r}, not both")
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes must be positive, got {chunk_bytes}")
    dtype = _product_dtype(batch.hidden, weight)
    if far := [name for name, need in wanted.items() if dtype == torch.float16 and reaches_far(need)]:
        raise ValueError(
            f"{who} needs {far[0]}, in which classes count that float16 has no numbers for: take bfloat16 or float32, "
            "or the model's logits with logits_token_loss (model.loading.head: full)"
        )
    beside = batch.reference if any(map(reads_reference, wanted.values())) else None
    return HeadSettings(
        transform=LogitTransform(logit_scale, logit_softcap),
        reference_transform=None if beside is None else LogitTransform(beside.logit_scale, beside.logit_softcap),
        statistics=dict(sorted(wanted.items())),
        dtype=dtype,
        chunk_bytes=chunk_bytes,
        tempering=tempering_of(wanted),
    )


def check_threshold(gradient_threshold: float, loss: TokenLoss) -> None:
    """Raise ``ValueError`` for a threshold that is no number from 0 on, or that the loss has no gradient for."""
    if not 0 <= gradient_threshold < math.inf:
        raise ValueError(f"gradient_threshold must be a number from 0 on, got {gradient_threshold}")
    name = type(loss).__name__
    if gradient_threshold and not loss.pointwise:
        raise ValueError(
            f"{name} with a gradient_threshold of {gradient_threshold:g}: the gradient of a loss that is not pointwise "
            "is computed in backward, where nothing is left out: set it to 0"
        )
    if gradient_threshold and "mean_log_prob" in names_of(loss.needs):
        raise ValueError(
            f"{name} with a gradient_threshold of {gradient_threshold:g}: mean_log_prob (label smoothing) has a "
            "gradient at every class, of which nothing can be left out: set it to 0"
        )


def _check_cap(needs: Iterable[Statistic], settings: HeadSettings) -> None:
    """Refuse gradients beyond what is kept of logits.

    Where a class has none of the probability, the slope of its cap is lost, and these statistics have a gradient that
    is not multiplied by the probability.
    """
    beyond = ("mean_log_prob", "reference_kl", "tempered_log_prob")
    asked = [need.name for need in needs if need.name in beyond]
    cap, scale = settings.transform.softcap, settings.transform.scale
    nats = {torch.float16: 26.0, torch.float64: 700.0}.get(settings.dtype, 85.0)
    if asked and cap is not None and 2 * abs(scale) * cap > nats:
        raise ValueError(
            f"{asked[0]} with a logit_softcap of {cap:g} and a logit_scale of {scale:g} has no gradient in "
            f"{settings.dtype}, whose exponentials do not reach from one end of the logits to the other: take another "
            "dtype, or the model's logits with logits_token_loss (model.loading.head: full)"
        )


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that ``torch.nn.functional.linear`` would compute in; float32 for float16 anywhere but on CUDA."""
    if type(weight) is not Tensor and type(weight) is not torch.nn.Parameter:
        raise TypeError(
            f"weight is a {type(weight).__name__}: the head needs the whole weight as a plain tensor (call it inside "
            "the forward of the sharded module, or gather the weight first)"
        )
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise TypeError(f"hidden and weight must be floating point, got {hidden.dtype} and {weight.dtype}")
    if hidden.device != weight.device:
        raise ValueError(f"hidden is on {hidden.device} and weight on {weight.device}")
    kind = hidden.device.type
    dtype = hidden.dtype
    if torch.is_autocast_enabled(kind) and torch.float64 not in (hidden.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(kind)
    elif hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one of them, or use torch.autocast")
    # Elsewhere float16 products can only be left rounded to float16, whose range sums over tokens exceed.
    return torch.float32 if kind != "cuda" and dtype == torch.float16 else dtype
