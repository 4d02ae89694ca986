"""The command ``score``: a data set with the log-probs of its targets under a model."""

from __future__ import annotations

import shlex
from pathlib import Path

from dft_lightning.callbacks.interruption import Interrupted
from dft_lightning.cli.commands import FitArguments, Stopped
from dft_lightning.files import check_replaceable
from dft_lightning.fit.one_device import ending_on_signals, status_of
from dft_lightning.scoring.run import RECORD, SPLITS, ScoringCLI, Split


def score(output: Path, overwrite: bool = False, splits: list[Split] | None = None, *, fit: FitArguments) -> None:
    """Run a model once over the rows of a fit config, on one device, and write them with the log-prob of each target
    token, for losses that read ``reference_log_prob``.

    ``--ckpt_path PATH`` scores with a trained checkpoint. All other options are those of fit.

    Args:
        output: a folder, which gets a folder for each split; a new one, or an empty one
        overwrite: replace what score has written there
        splits: which of train, validation, forgetting and test; all that the config has by default
        fit: whose model and rows

    Raises:
        InputError: anything wrong with the input.
        Stopped: on Ctrl-C and SIGTERM; nothing is written.
    """
    try:
        with ending_on_signals():
            check_replaceable(output, overwrite, (RECORD,), "--output", SPLITS)
            scored = ScoringCLI(fit, splits, output).scored
    except Interrupted as ending:
        raise Stopped("stopped: nothing was written", status_of(ending)) from None
    flags = " ".join(f"--data.{split} {shlex.quote(str(output / split))}" for split in scored)
    print(f"{output}: add to fit, with the same data options:\n    {flags}")
