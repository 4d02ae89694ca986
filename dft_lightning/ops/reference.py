"""The head of a reference model, whose logits stand beside the model's own, a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dft_lightning.ops.products import HeadProducts, Wanted
from dft_lightning.ops.settings import HeadSettings
from dft_lightning.ops.transform import LogitTransform


@dataclass(frozen=True)
class ReferenceHead:
    """A reference model's last hidden states and head; constants, into which no gradient flows.

    Attributes:
        hidden: ``[n, H']``, aligned with the model's own; its width may be another.
        weight: ``[V, H']``, over the model's own vocabulary, of any floating dtype.
        bias: ``[V]``.
        logit_scale: factor of the logits.
        logit_softcap: cap of the logits before the scale.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def check(self, num_tokens: int, weight: Tensor) -> None:
        """Raise ``ValueError`` where it does not fit the model's ``n`` tokens and head ``[V, H]``."""
        shapes = f"got hidden {list(self.hidden.shape)} and weight {list(self.weight.shape)}"
        fits = self.hidden.ndim == self.weight.ndim == 2 and self.hidden.shape[1] == self.weight.shape[1]
        if not fits or len(self.hidden) != num_tokens:
            raise ValueError(f"reference must have hidden [n, H] for the {num_tokens} tokens, weight [V, H]: {shapes}")
        if len(self.weight) != len(weight):
            raise ValueError(
                f"the reference model's vocabulary has {len(self.weight)} tokens and the model's {len(weight)}: a "
                "divergence needs the same"
            )
        if self.hidden.requires_grad:
            raise ValueError("no gradient flows into the reference: run it under torch.no_grad()")

    def of(self, kept: Tensor) -> ReferenceHead:
        """The same for some of the tokens, by index."""
        return replace(self, hidden=self.hidden.index_select(0, kept))

    @property
    def transform(self) -> LogitTransform:
        """What makes its logits of the product."""
        return LogitTransform(self.logit_scale, self.logit_softcap)


@dataclass(frozen=True)
class ReferenceRows:
    """A chunk's rows of reference logits.

    Attributes:
        logits: ``[c, V]`` before the transform.
        transform: what makes the reference's logits of these.
        log_normalizer: ``[c]``, their ``logsumexp``.
    """

    logits: Tensor
    transform: LogitTransform
    log_normalizer: Tensor


@contextmanager
def reference_products(reference: ReferenceHead | None, settings: HeadSettings) -> Iterator[HeadProducts | None]:
    """The reference's logits, in chunks of the same tokens as the model's own; ``None`` where they are not wanted."""
    if reference is None or not settings.wants_reference:
        yield None
        return
    bias = None if reference.bias is None else reference.bias.detach()
    nothing = Wanted(False, False, False)
    with torch.no_grad():
        head = (reference.hidden, reference.weight.detach(), bias)
        with HeadProducts(*head, settings.dtype, settings.chunk_bytes, nothing, "reference ") as products:
            yield products
