"""What some models do to the logits after the matrix product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """``scale * softcap * tanh(z / softcap)``; without a softcap ``scale * z``.

    Attributes:
        scale: Cohere's ``logit_scale``, one over Granite's ``logits_scaling``.
        softcap: Gemma-2's ``final_logit_softcapping``.

    Raises:
        TypeError: the scale is a tensor, whose gradient would be lost.
        ValueError: a scale of 0, a softcap that is not positive.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("logit_scale", self.scale), ("logit_softcap", self.softcap)):
            if isinstance(value, Tensor):
                raise TypeError(f"{name} must be a number, got a tensor: multiply hidden by a trained scale instead")
        if self.scale == 0:
            raise ValueError("logit_scale must not be 0")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"logit_softcap must be positive, or None for no cap, got {self.softcap}")

    def apply_(self, z: Tensor) -> Tensor:
        """Transform in place."""
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z if self.scale == 1.0 else z.mul_(self.scale)

    def cap_derivative(self, transformed: Tensor, *, out: Tensor) -> None:
        """Derivative of the softcap from transformed logits: ``1 - tanh**2``."""
        assert self.softcap is not None
        torch.mul(transformed, 1 / (self.scale * self.softcap), out=out)
        out.square_().neg_().add_(1.0)
