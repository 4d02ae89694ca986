"""What a call of the linear head is asked to do, apart from its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dft_lightning.losses.statistics import Statistic
from dft_lightning.ops.transform import LogitTransform

# 2048 tokens of a vocabulary of 150,000 in half precision. Within one chunk nothing is accumulated; every further one
# reads and writes the weight's gradient once more.
DEFAULT_CHUNK_BYTES = 640 * 2**20

# Gradients of logits are at most the loss's slope over the normaliser, and 5e-8 and less is 0 in float16. This factor
# goes on before rounding and off in float32. It leaves room for slopes of 15 times the normaliser.
_FLOAT16_FACTOR = 4096.0


@dataclass(frozen=True)
class HeadSettings:
    """Options of a linear head.

    Attributes:
        transform: what the model does to the product.
        statistics: what to compute, by name in ``ENTRIES``, in the order of the names.
        dtype: of the matrix products.
        chunk_bytes: size of the buffer of logits.
    """

    transform: LogitTransform
    statistics: Mapping[str, Statistic]
    dtype: torch.dtype
    chunk_bytes: int

    @property
    def wants_reference(self) -> bool:
        """Whether a statistic needs the reference model's logits."""
        return "reference_kl" in self.statistics

    @property
    def float16_factor(self) -> float:
        """What gradients of logits are multiplied by while they are in the products' dtype."""
        return _FLOAT16_FACTOR if self.dtype == torch.float16 else 1.0
