"""The processes of a command, which Lightning's launcher starts by the same command line: they end together."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import lightning.pytorch as pl

from dft_lightning.callbacks.interruption import Interrupted
from dft_lightning.cli.commands import Stopped, user_message

_STARTED_BY = "DFT_LIGHTNING_STARTED_BY"
_PATIENCE = 4.0  # seconds in which the first process should have met the same mistake
_LAST_WAIT = 60.0


@contextlib.contextmanager
def ending_together(trainers: list[pl.Trainer]) -> Iterator[None]:
    """Around a command: where it fails in one process, those of the same machine end, and one of them says why.

    Args:
        trainers: those that were made, as soon as they are: their launchers know what they started.

    Raises:
        SystemExit: in place of an error that the first process reports, and in a process that another started, where
            the user has ended the command.
    """
    is_started = _is_started_by_the_first()
    try:
        yield
    except Exception as error:
        for process in _started_by(trainers):  # before they say what they think of its end
            process.kill()
        if isinstance(error, Stopped) and is_started:
            raise SystemExit(0) from error
        _leave_to_the_first(error, is_started or "TORCHELASTIC_RUN_ID" in os.environ)
        raise
    except Interrupted as ended:
        if is_started:  # Lightning kills a process that started one of another status
            raise SystemExit(0) from ended
        raise
    finally:
        if not is_started:
            os.environ.pop(_STARTED_BY, None)
        for process in _started_by(trainers):
            atexit.register(_let_end, process)


def started_by_another() -> bool:
    """Whether another process of the command started this one."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and _STARTED_BY in os.environ


def _is_started_by_the_first() -> bool:
    """Whether Lightning's launcher in another process started this one, which on Linux ends with that then."""
    if not started_by_another():
        os.environ[_STARTED_BY] = str(os.getpid())
        return False
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.environ[_STARTED_BY] != str(os.getppid()):  # it ended before
        os._exit(1)
    return True


def _leave_to_the_first(error: Exception, ends_with_the_first: bool) -> None:
    """Report an error once on each machine: every rank there meets the same mistake, as a rule."""
    is_first = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) == 0
    if is_first or user_message(error) is None:
        return
    if not ends_with_the_first:
        raise SystemExit(2) from error
    time.sleep(_PATIENCE)  # its end is this one's, if it has met the same


def _started_by(trainers: list[pl.Trainer]) -> list[subprocess.Popen[bytes]]:
    procs = [each for trainer in trainers for each in getattr(trainer.strategy.launcher, "procs", [])]
    return [each for each in procs if isinstance(each, subprocess.Popen)]


def _let_end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_LAST_WAIT)
