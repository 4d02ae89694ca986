"""How long a comparison takes by the clock, over all calls of the command that ran a part of it."""

from __future__ import annotations

import time
from pathlib import Path

from dft_lightning.compare.files import CALLS, read_json, write_json


class Clock:
    """Keeps when a call ran something, in the comparison's folder.

    A call that is killed has lost what came after the end of its last run.

    Args:
        output: the folder.
    """

    def __init__(self, output: Path) -> None:
        self._path = output / CALLS
        self._before = read_calls(output)
        self._began = time.time()

    def tick(self) -> None:
        """Something ran until now."""
        write_json(self._path, [*self._before, {"began": self._began, "ended": time.time()}])


def read_calls(output: Path) -> list[dict[str, float]]:
    """``began`` and ``ended`` of each call, in seconds since 1970; none where all runs were made by hand.

    Raises:
        InputError: the file is broken.
    """
    calls: list[dict[str, float]] = read_json(output / CALLS) or []
    return calls
