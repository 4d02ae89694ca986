"""The runs of a comparison in processes that are forked from a server, which has imported everything once.

For tests of what the runs do; that they begin and end as processes of their own is for others.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from typing import IO, Any
from unittest.mock import patch

from commands import compare

_LIMIT = 150.0  # seconds
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["dft_lightning.fit.command", "dft_lightning.compare.recorder", "datasets"])


def compare_forked(args: list[str]) -> int:
    """``python -m dft_lightning compare``, whose runs are forked."""
    with patch("dft_lightning.compare.execute._Children.run", _run):
        return compare(args)


def run_forked(arguments: list[str], log: str, environment: dict[str, str]) -> int:
    """``python -m dft_lightning`` with these arguments; its exit status."""
    process = _SERVER.Process(target=_main, args=(arguments, log, environment))
    process.start()
    process.join(_LIMIT)
    process.kill()  # if it has not ended
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run(children: Any, command: list[str], output: IO[Any], environment: dict[str, str]) -> int:
    assert command[:3] == [sys.executable, "-m", "dft_lightning"]
    return run_forked(command[3:], output.name, environment)


def _main(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    import datasets
    import torch

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    datasets.config.HF_DATASETS_CACHE = environment["HF_DATASETS_CACHE"]  # read when it was imported
    torch.set_num_threads(1)
    sys.argv = ["dft_lightning", *arguments]
    try:
        runpy.run_module("dft_lightning", run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
