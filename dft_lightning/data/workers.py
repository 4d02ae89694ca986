"""The processes of a data loader."""

from __future__ import annotations

import os
import signal

from lightning.fabric.utilities.seed import pl_worker_init_function


def start_worker(worker_id: int, rank: int) -> None:
    """Before a worker's first row: leave signals to the process that it works for, and seed it as Lightning would.

    A Ctrl-C goes to all processes of a terminal, and a cluster's SIGTERM to all of a job. A worker that ends by it
    takes the batch away that the run still needs to come to the end of its step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if int(os.environ.get("PL_SEED_WORKERS", 0)):
        pl_worker_init_function(worker_id, rank)
