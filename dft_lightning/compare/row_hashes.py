"""Hashes that tell whether two runs saw the same rows and targets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from torch import Tensor

from dft_lightning.losses.base import IGNORE_INDEX
from dft_lightning.models.fingerprints import add_tensor


def hash_texts(texts: Iterable[str]) -> str:
    """SHA-256 of texts in their order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


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
