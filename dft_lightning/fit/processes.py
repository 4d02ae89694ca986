"""A run of several processes, one of which dies: the others end with one message, and none is left behind.

A process that waits for one that is gone hears of it from gloo at once, and from NCCL in its own time. One that
computes hears of it here: the first process looks after those that it started, and they look whether it is there.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import lightning.pytorch as pl
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from dft_lightning.checkpoints import newest_saved
from dft_lightning.errors import one_line, shortened

LOST = 1
"""Exit status of a process that ended because another was gone."""

_STARTED_BY = "DFT_LIGHTNING_STARTED_BY"
_PATIENCE = 4.0  # seconds in which a process should end by itself; Lightning kills all after 5
_LAST_WAIT = 60.0

# Of gloo, of NCCL and torch's watchdog over it, and of the store that ranks meet at.
_GONE = re.compile(
    "Connection closed by peer|Connection reset by peer|gloo.*Broken pipe|remote process exited|ncclRemoteError"
    "|NCCL communicator was aborted|[Ww]atchdog caught collective operation timeout|Did the remote server shutdown",
    re.DOTALL,
)


def is_of_a_lost_process(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone, by the words of gloo, NCCL and torch.

    Example:
        >>> is_of_a_lost_process(RuntimeError("gloo/transport/tcp/pair.cc: Connection closed by peer [127.0.0.1]:412"))
        True
        >>> is_of_a_lost_process(RuntimeError("shapes do not match"))
        False
    """
    return isinstance(error, RuntimeError) and _GONE.search(str(error)) is not None


class RunProcesses:
    """The processes of one run, as one of them sees them.

    Args:
        trainer: of the run; its launcher may start processes.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._said = threading.Lock()
        self._ended = self._failed = False
        self._local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        self._parent = os.getppid()
        launcher = trainer.strategy.launcher
        by_script = isinstance(launcher, _SubprocessScriptLauncher)
        starts = by_script and not launcher.cluster_environment.creates_processes_externally  # type: ignore[union-attr]
        self._launcher: _SubprocessScriptLauncher | None = launcher if starts else None  # type: ignore[assignment]
        self._is_child = by_script and not starts and os.environ.get(_STARTED_BY) == str(self._parent)

    def watch(self) -> None:
        """Look after the others from here on, if this process or Lightning in it starts or was started by one."""
        if self._launcher is not None:
            os.environ[_STARTED_BY] = str(os.getpid())
            atexit.register(self._wait_for_children)
            threading.Thread(target=self._watch_children, daemon=True).start()
        elif self._is_child:
            threading.Thread(target=self._watch_parent, daemon=True).start()
        elif self.is_first and self.is_one_of_several:
            self._trainer.callbacks.insert(0, _SayAtOnce(self))  # type: ignore[attr-defined]

    def ended(self, failed: bool) -> None:
        """The run of this process is over."""
        self._ended, self._failed = True, failed

    @property
    def is_one_of_several(self) -> bool:
        """Whether there are others to lose."""
        return self._trainer.world_size > 1

    @property
    def is_first(self) -> bool:
        """Whether this is the first process on its machine, which speaks for the others."""
        return self._local_rank == 0

    def say(self, message: str) -> None:
        """Write a message to standard error, if it is the first of this process."""
        if self._said.acquire(blocking=False):
            sys.stderr.write(f"error: {message}\n")
            sys.stderr.flush()

    def say_of_this_alone(self, message: str) -> None:
        """Write a message, unless the first process of the machine has met the same mistake, and ends with this one."""
        is_looked_after = self._is_child or "TORCHELASTIC_RUN_ID" in os.environ  # and ended with the others
        if is_looked_after and not self._within(_PATIENCE, self._parent_is_gone):
            self.say(f"process {self._local_rank} alone: {message}")

    def report_lost(self, error: Exception) -> int:
        """Say that a process is gone, once on each machine, and return the exit status."""
        threading.Thread(target=self._end_late, daemon=True).start()  # whatever torch may still wait for
        why = _of_backend(error)
        if self._launcher is not None:
            self._within(_PATIENCE, lambda: self._dead_child() is not None)
            dead = self._dead_child()
            self.say(self._message(_of_child(*dead) if dead else why))
        elif self._is_child:
            if self._within(_PATIENCE, self._parent_is_gone):
                self._say_of_parent()
        elif self.is_first or not self._within(_PATIENCE, lambda: False):  # torchrun would have ended it meanwhile
            self.say(self._message(why))
        return LOST

    def say_at_once(self, error: BaseException) -> None:
        """Where another program started the processes: it ends those that are left as soon as one is gone."""
        if isinstance(error, Exception) and is_of_a_lost_process(error) and self.is_one_of_several:
            self.say(self._message(_of_backend(error)))

    def _message(self, why: str) -> str:
        saved = newest_saved(self._trainer)
        return (
            f"{why}; this process ends too. Checkpoints saved before are whole"
            + (f" (the newest: {saved})" if saved else "")
            + ": go on with --ckpt_path last"
        )

    # -- the first process ---------------------------------------------------------------------------------------

    def _children(self) -> list[subprocess.Popen[bytes]]:
        return [] if self._launcher is None else list(self._launcher.procs)

    def _dead_child(self) -> tuple[int, int] | None:
        for rank, process in enumerate(self._children(), 1):
            if status := process.poll():
                return rank, status
        return None

    def _watch_children(self) -> None:
        while not self._ended:
            time.sleep(0.2)
            _dismiss_observers()
            dead = self._dead_child()
            if dead is None or self._ended:
                continue
            if dead[1] != 2:  # with 2 it has met a mistake, as this process will
                self.say(self._message(_of_child(*dead)))
            time.sleep(_PATIENCE)
            self._end_children(0)
            os._exit(LOST)

    def _wait_for_children(self) -> None:
        """At the end of the first process: it outlives those it started, unless it is killed."""
        if self._failed:
            self._end_children(1)
        for process in self._children():
            self._within(_LAST_WAIT, lambda process=process: process.poll() is not None)  # type: ignore[misc]

    def _end_children(self, patience: float) -> None:
        children = self._children()
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in children:
                if process.poll() is None:
                    process.send_signal(number)
            self._within(patience, lambda: all(process.poll() is not None for process in children))

    # -- those it started ----------------------------------------------------------------------------------------

    def _parent_is_gone(self) -> bool:
        return os.getppid() != self._parent

    def _watch_parent(self) -> None:
        while not self._ended:
            time.sleep(0.2)
            if self._parent_is_gone() and not self._ended:
                self._say_of_parent()
                time.sleep(_PATIENCE)
                os._exit(LOST)

    def _say_of_parent(self) -> None:
        if self._local_rank == 1:
            self.say(self._message("process 0 of this run, which started the others, was killed"))

    @staticmethod
    def _end_late() -> None:
        time.sleep(2 * _PATIENCE)
        os._exit(LOST)

    @staticmethod
    def _within(seconds: float, holds: Callable[[], bool]) -> bool:
        """Whether something comes to hold within some time."""
        end = time.monotonic() + seconds
        while not (held := holds()) and time.monotonic() < end:
            time.sleep(0.1)
        return held


class _SayAtOnce(pl.Callback):
    def __init__(self, processes: RunProcesses) -> None:
        self._processes = processes

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._processes.say_at_once(exception)


def _dismiss_observers() -> None:
    """Lightning's own watch looks after the children every 5 seconds, and kills this process before it has said why."""
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []


def _of_backend(error: Exception) -> str:
    words = re.sub(r"^\[\S*?\] *", "", one_line(error))  # gloo begins with a place in its sources
    return f"another process of this run is gone ({shortened(words.partition('. This is')[0], 80)})"


def _of_child(rank: int, status: int) -> str:
    if status > 0:
        return f"process {rank} of this run ended with status {status}, and has said why"
    memory = ", as Linux does where memory runs out" if -status == signal.SIGKILL else ""
    return f"process {rank} of this run was ended by {signal.Signals(-status).name}{memory}"
