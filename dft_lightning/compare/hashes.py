"""Hashes of what a run is given: the first place where two of them differ is where they parted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dft_lightning.losses.base import IGNORE_INDEX
from dft_lightning.models.fingerprints import add_tensor


def hash_texts(texts: Iterable[str]) -> str:
    """SHA-256 of texts in their order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


@dataclass
class RowHasher:
    """Hashes of the tokens and of the targets of a run's micro-batches, each with the hash of those before it.

    Attributes:
        rows: SHA-256 of all tokens, their weights and their log-probs under a reference so far, in order.
        targets: SHA-256 of all targets so far, in order.
        steps: for each micro-batch its number of targets, and the first 8 digits of the hash of all targets so far.
    """

    rows: str = ""
    targets: str = ""
    steps: list[tuple[int, str]] = field(default_factory=list)

    def add(self, batch: Mapping[str, Any]) -> None:
        """Count a micro-batch."""
        names = ("input_ids", "attention_mask", "position_ids", "token_weight", "reference_log_prob")
        self.rows = _chained(self.rows, {name: batch[name] for name in names if name in batch})
        targets = batch["labels"][..., 1:]
        self.targets = _chained(self.targets, {"labels": targets})
        self.steps.append((int((targets != IGNORE_INDEX).sum()), self.targets[:8]))


def _chained(before: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(before.encode())
    for name, tensor in tensors.items():
        add_tensor(digest, name, tensor)
    return digest.hexdigest()


def combined(hashes: list[str]) -> str:
    """One hash of those of all ranks; of one rank it is its own."""
    return hashes[0] if len(hashes) == 1 else hash_texts(hashes)
