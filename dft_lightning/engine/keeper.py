"""A small process between a run and the server it starts: ends the server when the run is gone.

Run by its path, in a session and process group of its own: ``keeper.py PARENT GRACE COMMAND...``. It ends with the
server and its status. The kernel's own signal for a parent's death (``PR_SET_PDEATHSIG``) is not used: it comes when
the *thread* ends that started the server, reaches none of the server's own children, and is Linux's alone.
"""

import os
import signal
import subprocess
import sys
import time

_EVERY = 0.25  # seconds between two looks at whether the run is there


def keep(parent: int, grace: float, command: list[str]) -> int:
    """Run a command; end its whole process group, this process too, when ``parent`` is no longer the parent."""
    # A handler, and not SIG_IGN, which the server would inherit: this process outlives SIGTERM to see the others end.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", flush=True)
        return 127
    while os.getppid() == parent:
        try:
            return server.wait(_EVERY)
        except subprocess.TimeoutExpired:
            continue
    os.killpg(0, signal.SIGTERM)
    until = time.monotonic() + grace
    while server.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)
    return 1


if __name__ == "__main__":
    status = keep(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
    sys.exit(status if status >= 0 else 128 - status)
