"""Chat templates that do not come to an end: they are programs, and come with a tokenizer."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from dft_lightning.errors import InputError

SECONDS = 20.0
"""Of this process's computing, in which templates render the longest of conversations many times over."""


class EndlessTemplateError(InputError):
    """A chat template that computes and computes."""


_running = False


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Have what is rendered meanwhile end within :data:`SECONDS`; no limit beside the main thread and on Windows.

    Within another the time begins anew: many renderings have their handler set once, which takes longer than a short
    one.

    Raises:
        EndlessTemplateError: it has not.
    """
    global _running
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    if _running:
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _end)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    _running = True
    try:
        yield
    finally:
        _running = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _end(*_: Any) -> None:
    raise EndlessTemplateError(f"the chat template has not come to its end after {SECONDS:g} s of computing")
