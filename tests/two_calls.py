"""Run by small_runs.on_two_processes: calls a function once for each of some cases, its results to a file.

usage: two_calls.py MODULE FUNCTION OUT CASES    (JSON: a list of the function's options, each with a strategy)
"""

from __future__ import annotations

import json
import sys
from importlib import import_module

import torch

from small_runs import strategy_of

if __name__ == "__main__":
    module, name, out, cases = sys.argv[1:]
    function = getattr(import_module(module), name)
    found = [function(**{**case, "strategy": strategy_of(case["strategy"])}, devices=2) for case in json.loads(cases)]
    if torch.distributed.get_rank() == 0:
        torch.save(found, out)
