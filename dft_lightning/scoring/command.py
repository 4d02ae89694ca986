"""The command ``score``: a data set with the log-probs of its targets under a model."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from dft_lightning.callbacks.interruption import Interrupted
from dft_lightning.cli.errors import CommandParser
from dft_lightning.cli.own_classes import PACKAGE, Classes
from dft_lightning.files import check_replaceable
from dft_lightning.fit.command import quiet, report
from dft_lightning.scoring.run import RECORD, SPLITS, ScoringCLI

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main(args: list[str], classes: Classes = PACKAGE) -> int:
    """Run the command, with classes of one's own or without; returns the exit status, 2 after one message on standard
    error where the input was wrong."""
    parser = CommandParser(
        prog="python -m dft_lightning score",
        description="Run a model once over the rows of a fit config, on one device, and write them with the log-prob "
        "of each target token, for losses that read reference_log_prob.",
        epilog="Every other option is one of fit: --config FILE, --data.max_length 1024, ...; --ckpt_path PATH scores "
        "with a trained checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="gets a folder for each split")
    parser.add_argument("--overwrite", action="store_true", help="replace what score has written there")
    parser.add_argument(
        "--splits",
        nargs="+",
        choices=SPLITS,
        metavar="NAME",
        help=f"which of {', '.join(SPLITS)} (default: all that the config has)",
    )
    options, of_fit = parser.parse_known_args(args)
    quiet()
    try:
        with _ending_on_signals():
            check_replaceable(options.output, options.overwrite, (RECORD,), "--output", SPLITS)
            scored = ScoringCLI(["predict", *of_fit], options.splits, options.output, classes).scored
    except Interrupted as ending:
        sys.stderr.write("stopped: nothing was written\n")
        return int(ending.code) if isinstance(ending.code, int) else 1
    except Exception as error:
        return report(error)
    flags = " ".join(f"--data.{split} {shlex.quote(str(options.output / split))}" for split in scored)
    print(f"{options.output}: add to fit, with the same data options:\n    {flags}")
    return 0


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the command as an error would, so that what was begun is deleted."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other set them
        yield
        return
    before = {number: signal.signal(number, _end) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    for each in _SIGNALS:  # a second one would leave the deleting half done
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(128 + number)
