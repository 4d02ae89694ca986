"""Run by test_compare_runs on two processes: a recorded fit and test.

usage: two_recorder.py FOLDER
"""

from __future__ import annotations

import sys

from dft_lightning import DFTLoss
from small_runs import trainer
from test_compare_runs import fit, rows_of

if __name__ == "__main__":
    options = {"devices": 2, "strategy": "ddp", "precision": "64-true"}
    module, recorder = fit(sys.argv[1], DFTLoss(), batch_size=2, dtype="float64", **options)
    trainer(callbacks=[recorder], **options).test(module, datamodule=rows_of(), verbose=False)
