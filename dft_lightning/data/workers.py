"""The processes of a data loader."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

from lightning.fabric.utilities.seed import pl_worker_init_function


def start_worker(worker_id: int, rank: int) -> None:
    """Before a worker's first row: leave signals to the process that it works for, and seed it as Lightning would.

    A Ctrl-C goes to all processes of a terminal, and a cluster's SIGTERM to all of a job. A worker that ends by it
    takes the batch away that the run still needs to come to the end of its step. (macOS does not tell who sent a
    signal: there SIGTERM ends a worker, as it does by default.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        threading.Thread(target=_end_where_the_parent_says_so, daemon=True).start()
    if int(os.environ.get("PL_SEED_WORKERS", 0)):
        pl_worker_init_function(worker_id, rank)


def _end_where_the_parent_says_so() -> None:
    """A process that exits sends SIGTERM to those of its workers that are left, and waits for their end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != parent.pid:
        pass
    os._exit(0)
