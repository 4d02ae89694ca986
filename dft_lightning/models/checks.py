"""What a model is tried for at its first batch, where also a sharded one can be run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from dft_lightning.models.documents import check_documents
from dft_lightning.models.head import LanguageModelHead, check_head, find_head, text_config
from dft_lightning.models.row_checks import check_rows, rotary_length


class ModelChecks:
    """Each check is made once, at the first batch that needs it."""

    def __init__(self) -> None:
        self._rows = self._documents = self._head = False
        self._rotary: tuple[str, int] | None = None

    def before_batch(self, model: nn.Module, batch: Mapping[str, Any], max_length: int | None = None) -> None:
        """Try the model with padded rows, and with several documents in a row where the batch has such rows.

        Args:
            model: the language model.
            batch: as the module takes it.
            max_length: of documents, where that is known.

        Raises:
            InputError: the model sees tokens that it must not see.
        """
        if "position_ids" in batch and not self._documents:
            check_documents(model, len(batch["position_ids"]), max_length)
            self._documents = True
        if not self._rows:
            check_rows(model)
            self._rows, self._rotary = True, rotary_length(text_config(model))
        if self._rotary is not None and batch["input_ids"].shape[1] > self._rotary[1]:
            kind, length = self._rotary
            rank_zero_warn(
                f"model: {type(model).__name__}'s rotary frequencies ({kind}) are others for the whole batch as soon "
                f"as one of its rows is longer than {length} tokens, so that losses and metrics depend on what comes "
                f"together: set data.max_length to {length} or less, or a batch size of 1"
            )
            self._rotary = None  # said once

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
