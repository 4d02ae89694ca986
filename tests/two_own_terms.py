"""Run by test_own_terms on two processes.

usage: two_own_terms.py OUT.pt CASES    (a JSON list of options of found_steps, with a strategy)
"""

from __future__ import annotations

import json
import sys

import torch

from own_term_runs import found_steps
from small_runs import strategy_of

if __name__ == "__main__":
    found = []
    for case in json.loads(sys.argv[2]):
        strategy = strategy_of(case.pop("strategy"))
        found.append(found_steps(**case, strategy=strategy, devices=2))
    if torch.distributed.get_rank() == 0:
        torch.save(found, sys.argv[1])
