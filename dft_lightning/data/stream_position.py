"""Where a stream is, over its workers and the ranks of a run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dft_lightning.data.streaming import StreamPosition
from dft_lightning.distributed.gather import gather_lists
from dft_lightning.errors import InputError


class StreamRecord:
    """Follows the batches of a stream as they are trained on.

    Attributes:
        bad: rows skipped on this rank.
        dropped: rows without a target on this rank.
    """

    def __init__(self) -> None:
        self.bad = 0
        self.dropped = 0
        self._workers: dict[int, dict[str, int]] = {}
        self._next_worker = 0
        self._num_workers = 0
        self._loaded: list[dict[str, Any]] | None = None

    def take(self, batch: Any) -> Any:
        """A batch without its ``stream`` entry, which is noted.

        Raises:
            InputError: it is no batch, but what is wrong with a row.
        """
        report = batch.pop("stream", None) if isinstance(batch, dict) else None
        if report is None:
            return batch
        if "error" in report:
            raise InputError(report["error"])
        if report["bad"] and not self.bad:
            rank_zero_warn(f"data.on_bad_rows: skip: {report['bad'][0]} (the first of this run)")
        self.bad += len(report["bad"])
        self.dropped += report["dropped"]
        self._workers[report["worker"]] = report["state"]
        self._num_workers = report["workers"]
        self._next_worker = (report["worker"] + 1) % report["workers"]
        return batch

    def state_dict(self, world_size: int) -> dict[str, Any]:
        """Every rank's place. A collective."""
        start = {"passes": 0, "rows": 0, "items": 0}
        workers = [self._workers.get(worker, start) for worker in range(self._num_workers)]
        own = {"next_worker": self._next_worker, "workers": workers, "bad": self.bad, "dropped": self.dropped}
        return {"stream": gather_lists([own], world_size)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._loaded = state_dict.get("stream")

    def position(self, rank: int, world_size: int) -> StreamPosition | None:
        """Where this rank's stream goes on; ``None`` for its start.

        Raises:
            InputError: the checkpoint is of another number of processes, whose rows were dealt out otherwise.
        """
        if self._loaded is None:
            return None
        if len(self._loaded) != world_size:
            raise InputError(
                f"the checkpoint's stream was read by {len(self._loaded)} processes and there are {world_size}: "
                "resume on as many"
            )
        own = self._loaded[rank]
        if not own["workers"]:
            return None
        self.bad, self.dropped = own["bad"], own["dropped"]
        self._next_worker, self._num_workers = own["next_worker"], len(own["workers"])
        self._workers = dict(enumerate(own["workers"]))
        rank_zero_info(f"the stream goes on in pass {own['workers'][0]['passes'] + 1}")
        return StreamPosition(own["next_worker"], own["workers"])
