"""Hashes that tell whether two runs began alike and saw the same rows and targets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dft_lightning.losses.base import IGNORE_INDEX


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and every bit of the values, whatever the device and the order of the mapping.

    Example:
        >>> a, b = {"w": torch.zeros(2)}, {"w": torch.tensor([0.0, -0.0])}
        >>> hash_tensors(a) == hash_tensors({"w": torch.zeros(2)}), hash_tensors(a) == hash_tensors(b)
        (True, False)
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        add_tensor(digest, name, tensors[name])
    return digest.hexdigest()


def hash_weights(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers without those of its ``loss``, by which runs may differ.

    Of all of them: a module's own ``state_dict`` may leave out what is frozen.
    """
    state = nn.Module.state_dict(module)
    return hash_tensors({name: tensor for name, tensor in state.items() if not name.startswith("loss.")})


def hash_texts(texts: Iterable[str]) -> str:
    """SHA-256 of texts in their order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Add one tensor's bits to a hash."""
    plain = tensor.detach().cpu().contiguous()
    digest.update(f"{name} {plain.dtype} {list(plain.shape)}".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())


class RowHasher:
    """Hashes of the tokens and of the targets of a run's micro-batches, one after the other.

    Attributes:
        steps: for each micro-batch its number of targets, and the first 8 digits of the hash of all targets so far:
            the first place where two runs differ is where they parted.
    """

    def __init__(self) -> None:
        self._rows = hashlib.sha256()
        self._targets = hashlib.sha256()
        self.steps: list[tuple[int, str]] = []

    def add(self, batch: Mapping[str, Tensor]) -> None:
        """Count a micro-batch."""
        for name in ("input_ids", "attention_mask", "position_ids", "token_weight", "reference_log_prob"):
            if name in batch:
                add_tensor(self._rows, name, batch[name])
        targets = batch["labels"][..., 1:]
        add_tensor(self._targets, "labels", targets)
        self.steps.append((int((targets != IGNORE_INDEX).sum()), self._targets.hexdigest()[:8]))

    @property
    def rows(self) -> str:
        """SHA-256 of all tokens, their weights and their log-probs under a reference so far, in order."""
        return self._rows.hexdigest()

    @property
    def targets(self) -> str:
        """SHA-256 of all targets so far, in order."""
        return self._targets.hexdigest()


def combined(hashes: list[str]) -> str:
    """One hash of those of all ranks; of one rank it is its own."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
