"""Runs as processes of their own, several at once: one that fails takes no other with it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from queue import SimpleQueue
from typing import IO, Any

import torch
from tqdm import tqdm

from dft_lightning.cli.commands import handling
from dft_lightning.compare.files import PART, Clock
from dft_lightning.compare.grid import Run
from dft_lightning.errors import InputError

_GOES_ON = "\n--- goes on ---\n"  # in the log of a run that was interrupted


@dataclass(frozen=True)
class Failure:
    """A run that did not end well.

    Attributes:
        name: of the run.
        stage: ``"fit"`` or ``"test"``.
        message: its error, in a line.
    """

    name: str
    stage: str
    message: str


def execute(
    runs: Sequence[Run], jobs: int, describe: str, lock: int, clock: Clock, variables: Mapping[str, str]
) -> list[Failure]:
    """Run what is left of each run, ``jobs`` at a time.

    Args:
        runs: some of which may have ended.
        jobs: how many at once.
        describe: what the progress bar says.
        lock: a file descriptor that the processes keep open until they end.
        clock: of this call.
        variables: of the processes' environment.

    Returns:
        The runs that failed.

    Raises:
        KeyboardInterrupt: after every process has been ended.
    """
    left = [run for run in runs if run.commands()]
    failures: list[Failure] = []
    if runs:
        where = f", logs in {runs[0].folder.parent}" if left else ""
        print(f"{describe}: {len(left)} of {len(runs)} runs to do{where}", flush=True)
    if not left:
        return failures
    children = _Children(lock)
    places: SimpleQueue[dict[str, str]] = SimpleQueue()
    for environment in job_environments(jobs):
        places.put({**environment, **variables})
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(left), desc=describe, unit="run", dynamic_ncols=True) as bar:
        try:
            tasks = {pool.submit(_run_stages, run, places, children): run for run in left}
            for task in as_completed(tasks):
                failure = task.result()
                bar.update()
                clock.tick()
                if failure is not None:
                    failures.append(failure)
                    tqdm.write(f"failed: {failure.name} ({failure.stage}): {failure.message}", file=sys.stderr)
        except BaseException:
            children.end_all()
            pool.shutdown(wait=True, cancel_futures=True)
            clock.tick()
            raise
    return failures


def _run_stages(run: Run, places: SimpleQueue[dict[str, str]], children: _Children) -> Failure | None:
    place = places.get()
    try:
        for stage, arguments in run.commands().items():
            log = run.folder / f"{stage}.log"
            goes_on = str(run.folder / PART) in arguments
            if log.is_symlink() or not goes_on:
                log.unlink(missing_ok=True)
            with log.open("a", encoding="utf-8") as output:
                if goes_on:
                    print(end=_GOES_ON, file=output, flush=True)
                status = children.run([sys.executable, *run.program, *arguments], output, place)
            if status != 0:
                text = log.read_text(encoding="utf-8", errors="replace")
                return Failure(run.identity.name, stage, last_error(text, status))
    finally:
        places.put(place)
    left = run.commands()
    if left:  # it ended without an error and without its record
        stage = next(iter(left))
        return Failure(run.identity.name, stage, f"{stage} left no record")
    return None


def last_error(log: str, status: int | None = None) -> str:
    """What a process that did not end well said: the command's own message, or the last line of a traceback.

    Args:
        log: all that it wrote.
        status: its exit status, where that is known.

    Example:
        >>> last_error("step 3\\nerror: data.train: no such file\\n", 2)
        'data.train: no such file'
    """
    log = log.rpartition(_GOES_ON)[2]
    lines: list[str] = [line.strip() for line in re.split(r"[\r\n]+", log) if line.strip()]
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    for line in reversed(lines):
        if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)(:|$)", line):
            return line
    end = "stopped" if status is None else f"ended with status {status}"
    if status is not None and status < 0:
        end = f"ended by {signal.Signals(-status).name}"
    return f"{end}; last line: {lines[-1]}" if lines else f"{end}, and wrote nothing"


def job_environments(jobs: int) -> list[dict[str, str]]:
    """What each of the jobs finds set: its share of the cores and, where there are GPUs, of those.

    With as many GPUs as jobs or more, they are dealt out; with fewer, jobs take turns on them.
    """
    shared = dict(os.environ)
    if jobs > 1:
        shared.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
    devices = _visible_devices()
    if jobs == 1 or not devices:
        return [shared] * jobs
    shares = [devices[i::jobs] if len(devices) >= jobs else [devices[i % len(devices)]] for i in range(jobs)]
    return [{**shared, "CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]


def check_jobs(jobs: int, trainer: dict[str, Any]) -> None:
    """Raise ``InputError`` where each job wants more GPUs than its share."""
    wanted, visible = trainer["devices"], len(_visible_devices())
    if jobs > 1 and visible and isinstance(wanted, int) and wanted > max(1, visible // jobs):
        raise InputError(
            f"--jobs {jobs}: trainer.devices is {wanted}, and {visible} GPUs are visible: run fewer at once"
        )


def _visible_devices() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [device for device in named.split(",") if device.strip()]
    return [str(i) for i in range(torch.cuda.device_count())]


class _Children:
    """Processes that are ended together, each with the processes it started.

    Args:
        lock: a file descriptor that they keep open.
    """

    def __init__(self, lock: int) -> None:
        self._inherited = (lock,)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended = False

    def run(self, command: list[str], output: IO[Any], environment: dict[str, str]) -> int:
        with self._lock:
            if self._ended:
                return -signal.SIGTERM
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=self._inherited,
            )
            self._running.add(process)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.discard(process)

    def end_all(self) -> None:
        """End what runs, and let nothing more begin."""
        with self._lock:
            self._ended = True
            running = list(self._running)
        _signal(running, signal.SIGTERM)
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
        _signal(running, signal.SIGKILL)


def _signal(processes: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)


def ending_on_signals() -> contextlib.AbstractContextManager[None]:
    """A scheduler's SIGTERM and a closed terminal's SIGHUP end the comparison as Ctrl-C does: its runs with it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    return handling((signal.SIGTERM, signal.SIGHUP), interrupt)
