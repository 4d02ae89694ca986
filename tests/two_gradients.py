"""Run by test_normalization on two processes: the gradient of one optimizer step of each case, to a file.

usage: two_gradients.py OUT CASES    (JSON: a list of dicts of `strategy` and the arguments of `step_gradient`)
"""

from __future__ import annotations

import json
import sys

import torch

from small_runs import step_gradient, strategy_of

if __name__ == "__main__":
    gradients = []
    for case in json.loads(sys.argv[2]):
        strategy = strategy_of(case.pop("strategy"))
        gradients.append(step_gradient(**case, trainer_options={"devices": 2, "strategy": strategy}))
    if torch.distributed.get_rank() == 0:
        torch.save(gradients, sys.argv[1])
