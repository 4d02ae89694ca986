"""Where a stream is, over its workers and the ranks of a run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dft_lightning.data.batches.streaming import START, StreamPosition
from dft_lightning.data.notes import Notes
from dft_lightning.distributed.ranks import gather_lists
from dft_lightning.errors import InputError


class StreamRecord:
    """Follows the batches of a stream as they are trained on.

    Attributes:
        place: after the last of them. It is changed in place: a stream that has it goes on there in the next epoch.
        bad: rows skipped on this rank.
        dropped: rows without a target on this rank.
    """

    def __init__(self) -> None:
        self._loaded: list[dict[str, Any]] | None = None
        self.place = StreamPosition()
        self._step: dict[str, Any] = {}
        self.reset()

    def reset(self) -> None:
        """Before the first batch of a run."""
        self.bad = self.dropped = 0
        self._said: set[tuple[int, str, str]] = set()
        self.place.next_worker, self.place.workers = 0, []

    def take(self, batch: Any, begins_step: bool = True) -> Any:
        """A batch without its ``stream`` entry, which is noted.

        Args:
            batch: of a loader.
            begins_step: whether it is the first of an optimizer step's micro-batches.

        Raises:
            InputError: it is no batch, but what is wrong with a row.
        """
        report = batch.pop("stream", None) if isinstance(batch, dict) else None
        if report is None:
            return batch
        if begins_step:
            self._step = self._now()
        if "error" in report:
            raise InputError(report["error"])
        if report["bad"] and not self.bad:
            rank_zero_warn(f"data.rows.on_bad_rows: skip: {report['bad'][0]} (the first of this run)")
        self._say(report["notes"])
        self.bad += len(report["bad"])
        self.dropped += report["dropped"]
        self.place.workers = self.place.workers or [START] * report["workers"]
        self.place.workers[report["worker"]] = report["state"]
        self.place.next_worker = (report["worker"] + 1) % report["workers"]
        return batch

    def _say(self, notes: dict[int, list[tuple[str, str, int]]]) -> None:
        """What is to be said of the rows, when it is met first."""
        for part, counts in notes.items():
            new = [note for note in counts if (part, *note[:2]) not in self._said]
            self._said.update((part, kind, name) for kind, name, _ in new)
            for line, warns in Notes(new).lines("data.train", counted=False):
                (rank_zero_warn if warns else rank_zero_info)(line)

    def _now(self) -> dict[str, Any]:
        place = {"next_worker": self.place.next_worker, "workers": [*self.place.workers]}
        return {**place, "bad": self.bad, "dropped": self.dropped}

    def state_dict(self, world_size: int, within_step: bool = False) -> dict[str, Any]:
        """Every rank's place. A collective.

        Args:
            world_size: number of ranks.
            within_step: whether micro-batches were taken since the last optimizer step, which are to be read again.
        """
        return {"stream": gather_lists([self._step if within_step else self._now()], world_size)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.reset()
        self._loaded = state_dict.get("stream")

    def position(self, rank: int, world_size: int, num_workers: int = 0) -> StreamPosition:
        """Where this rank's stream goes on: :attr:`place`, by what was loaded if anything was.

        Raises:
            InputError: the checkpoint is of another number of processes or workers, whose rows were dealt out
                otherwise.
        """
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return self.place
        if len(loaded) != world_size:
            raise InputError(
                f"the checkpoint's stream was read by {len(loaded)} processes and there are {world_size}: "
                "resume on as many"
            )
        own = loaded[rank]
        workers = max(num_workers, 1)  # this process is one
        if own["workers"] and len(own["workers"]) != workers:
            raise InputError(
                f"the checkpoint's stream was read by {len(own['workers'])} workers and there are {workers}: "
                "set data.num_workers as it was"
            )
        self.bad, self.dropped = own["bad"], own["dropped"]
        self.place.next_worker, self.place.workers = own["next_worker"], [*own["workers"]]
        if own["workers"]:
            rank_zero_info(f"the stream goes on in pass {own['workers'][0]['passes'] + 1}")
        return self.place
