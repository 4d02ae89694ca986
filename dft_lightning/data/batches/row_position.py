"""Where a run is in the order of its training rows."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from dft_lightning.data.batches.sampling import RowSampler
from dft_lightning.progress import RowsOfBatches, last_step


class RowPosition:
    """The epoch, and how many of its rows are behind the last optimizer step, over all ranks.

    It is what was trained on. A loader's own state is where it has read to: with workers, or between two steps, further
    on.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._warned = False

    def reset(self) -> None:
        """Before a fit: from the first row."""
        self._loaded, self._warned = None, False

    def state_dict(self, trainer: pl.Trainer, rows: RowsOfBatches, order: dict[str, Any]) -> dict[str, Any]:
        """The position.

        Args:
            trainer: its loops know how many batches there were.
            rows: of micro-batches.
            order: what the order of the rows hangs on.
        """
        step = last_step(trainer)
        return {"epoch": step.epoch, "rows": rows.rows_of(step.batches), "full": step.epoch_full, "order": order}

    def load_state_dict(self, state_dict: dict[str, Any] | None) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._loaded = state_dict

    def apply(self, sampler: RowSampler, rows_of_batches: RowsOfBatches, order: dict[str, Any]) -> None:
        """Have a loader's sampler begin there, at a whole batch, or step of a number of tokens.

        Warns where rows come twice: where batches are of other sizes now, or the rows in another order.

        Args:
            sampler: of the loader.
            rows_of_batches: of micro-batches now.
            order: as in :meth:`state_dict`.
        """
        loaded = self._loaded
        if loaded is None:
            return
        again = 0 if loaded["full"] else loaded["rows"] % rows_of_batches.rows
        rows = sampler.total_size if loaded["full"] else loaded["rows"] - again
        sampler.load_state_dict({"epoch": loaded["epoch"], "rows": rows})
        if loaded["rows"] and not self._warned:
            self._warned = True  # loaders are made more than once
            _warn(loaded, again, rows_of_batches, order)


def _warn(loaded: dict[str, Any], again: int, rows_of_batches: RowsOfBatches, order: dict[str, Any]) -> None:
    where = f"--ckpt_path: the checkpoint is {loaded['rows']} rows into its epoch, and"
    if again:
        what = f"batches are of {rows_of_batches.rows} rows now (over all ranks)"
        if rows_of_batches.batches > 1:
            what = f"steps are of {rows_of_batches.rows} rows now, which are not taken apart"
        rank_zero_warn(f"{where} {what}: {again} rows come twice")
    changed = [name for name, value in loaded["order"].items() if order.get(name) != value]
    if changed:
        named = ", ".join(f"{name} {order.get(name)} (it was {loaded['order'][name]})" for name in changed)
        rank_zero_warn(
            f"{where} the rows are in another order now: {named}. Some rows of this epoch come twice, and some not at "
            "all"
        )
