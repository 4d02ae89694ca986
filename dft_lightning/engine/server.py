"""A server that is started for a run, and ended with it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from dft_lightning.engine import keeper
from dft_lightning.engine.api import Api
from dft_lightning.errors import InputError, printable, shortened


class Server:
    """A server process. A context manager: it answers inside, and is gone after, with all that it has started.

    It has a session and process group of its own, so that Ctrl-C reaches this process alone, which then ends the group:
    SIGTERM, and SIGKILL to what is left after ``grace`` seconds. A small process beside it does so where this one is
    killed (:mod:`dft_lightning.engine.keeper`).

    Args:
        command: starts it; ``{folder}`` and ``{port}`` are filled in.
        folder: of the model.
        log: file for what it prints; an older one is replaced.
        start_timeout: seconds until it has to answer.
        grace: seconds that it may take to end.

    Attributes:
        url: its address.

    Raises:
        InputError: it cannot be started, ends, or does not answer in time: with the last lines that it printed.
    """

    def __init__(
        self, command: str, folder: Path, log: Path, start_timeout: float = 600.0, grace: float = 10.0
    ) -> None:
        self.folder = folder
        self.log = log
        self.start_timeout = start_timeout
        self.grace = grace
        self.port = _free_port()
        self.url = f"http://localhost:{self.port}/v1"
        filled = {"{folder}": str(folder), "{port}": str(self.port)}
        self.command = [_filled(word, filled) for word in shlex.split(command)]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        try:
            self._start()
            self._wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = self.ended()
        self.close()
        if ended is not None and isinstance(error, InputError):
            raise InputError(f"{error}; {ended}") from error

    def ended(self) -> str | None:
        """What became of it where it has ended by itself, and the last lines that it printed; else ``None``."""
        if self._process is None or (status := self._process.poll()) is None:
            return None
        how = f"by signal {status - 128}" if status > 128 else f"with status {status}"
        return f"{shlex.join(self.command)} has ended {how}; {self._said()}"

    def close(self) -> None:
        """End it, and all that it has started."""
        if self._process is None:
            return
        process, self._process = self._process, None
        try:
            _signal(process.pid, signal.SIGTERM)
            until = time.monotonic() + self.grace
            while _is_there(process.pid) and time.monotonic() < until:
                process.poll()  # so that an ended one is not counted
                time.sleep(0.05)
        finally:  # at a second Ctrl-C, too
            _signal(process.pid, signal.SIGKILL)
            process.wait()

    def _start(self) -> None:
        start = [sys.executable, "-IS", keeper.__file__, str(os.getpid()), str(self.grace), *self.command]
        # A server would take what a launcher says of this run's ranks for its own.
        env = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    start, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=env
                )
        except OSError as error:
            raise InputError(f"engine.command: cannot be started with its output in {self.log}: {error}") from error

    def _wait(self) -> None:
        until = time.monotonic() + self.start_timeout
        api = Api(self.url, timeout=5.0, retries=0)
        with contextlib.closing(api):
            while time.monotonic() < until:
                answers = _lists_models(api)
                if (ended := self.ended()) is not None:
                    raise InputError(f"engine.command: {ended}")
                if answers:
                    return
                time.sleep(0.2)
        raise InputError(
            f"engine.command: {shlex.join(self.command)} does not answer at {self.url} within {self.start_timeout:g} "
            f"seconds (engine.start_timeout); {self._said()}"
        )

    def _said(self) -> str:
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 8000))
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        if not lines:
            return f"it printed nothing to {self.log}"
        return f"{self.log} ends in\n" + printable("\n".join(shortened(line, 300) for line in lines[-_LINES:]))


_LINES = 12
_OF_RANKS = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
}


def _filled(word: str, values: dict[str, str]) -> str:
    # All at once: what a folder is called is filled in no further.
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found[0]], word)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _lists_models(api: Api) -> bool:
    try:
        return bool(api.models())
    except InputError:
        return False


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended; macOS has the second for that
        os.killpg(group, number)


def _is_there(group: int) -> bool:
    """Whether anything of a process group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return False
    return True
