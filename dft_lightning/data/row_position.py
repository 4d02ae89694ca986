"""Where a run is in the order of its training rows."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from dft_lightning.data.batches import RowSampler
from dft_lightning.progress import last_step


class RowPosition:
    """The epoch, and how many of its rows are behind the last optimizer step, over all ranks.

    It is what was trained on. A loader's own state is where it has read to: with workers, or between two steps, further
    on.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._warned = False  # loaders are made more than once

    def reset(self) -> None:
        """Before a fit: from the first row."""
        self._loaded, self._warned = None, False

    def state_dict(self, trainer: pl.Trainer, batch_size: int, order: dict[str, Any]) -> dict[str, Any]:
        """The position.

        Args:
            trainer: its loops know how many batches there were.
            batch_size: rows of a micro-batch and rank.
            order: what the order of the rows hangs on.
        """
        step = last_step(trainer)
        return {"epoch": step.epoch, "rows": step.batches * batch_size * trainer.world_size, "order": order}

    def load_state_dict(self, state_dict: dict[str, Any] | None) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._loaded = state_dict

    def apply(self, sampler: RowSampler, order: dict[str, Any]) -> None:
        """Have a loader's sampler begin there; warns where the rows are in another order now."""
        loaded = self._loaded
        if loaded is None:
            return
        sampler.load_state_dict(loaded)
        changed = [name for name, value in loaded["order"].items() if order.get(name) != value]
        if changed and loaded["rows"] and not self._warned:
            self._warned = True
            named = ", ".join(f"{name} {order.get(name)} (it was {loaded['order'][name]})" for name in changed)
            rank_zero_warn(
                f"--ckpt_path: the checkpoint is {loaded['rows']} rows into its epoch, and the rows are in another "
                f"order now: {named}. Some rows of this epoch come twice, and some not at all"
            )
