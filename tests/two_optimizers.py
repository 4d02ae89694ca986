"""Run by test_optimizers on two processes: steps of optimizers on parameters that FSDP2 shards, to a file.

usage: two_optimizers.py OUT
"""

from __future__ import annotations

import copy
import sys
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dft_lightning.modules.optimizers import build_optimizer, optimizer_values, parameter_groups

# Rows that two ranks share evenly, unevenly and not at all.
WIDTHS = (16, 64, 16, 5, 1)
CASES: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.01},
    "Muon": {"class_path": "Muon", "init_args": {"lr": 0.01}},
    "SGD": {"class_path": "SGD", "init_args": {"lr": 0.01, "momentum": 0.9}},
    "Adafactor": {"class_path": "Adafactor", "init_args": {"lr": 0.01}},
    "Adafactor, foreach": {"class_path": "Adafactor", "init_args": {"lr": 0.01, "foreach": True}},
}


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in pairwise(WIDTHS)]
    return nn.Sequential(nn.Embedding(7, WIDTHS[0]), *layers).double()


def steps(module: nn.Module, values: dict[str, Any], mesh: Any = None) -> list[dict[str, torch.Tensor]]:
    """Whole parameters after each of four steps, whose gradients are drawn; states are saved and restored half-way."""
    options: dict[str, Any] = {"device": torch.device("cpu"), "scales_gradients": False}
    make = lambda: build_optimizer(values, parameter_groups(module, values, ()), **options)  # noqa: E731
    optimizer, seen = make(), []
    draws = torch.Generator().manual_seed(1)
    for step in range(4):
        if step == 2:
            state = copy.deepcopy(get_optimizer_state_dict(module, optimizer))
            optimizer = make()
            set_optimizer_state_dict(module, optimizer, state)
        for parameter in module.parameters():
            gradient = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.step()
        whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in module.named_parameters()}
        seen.append({name: value.detach().clone() for name, value in whole.items()})
    return seen


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name, given in CASES.items():
        sharded = model()
        for layer in sharded:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        try:
            found[name] = steps(sharded, optimizer_values(given), mesh)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    if torch.distributed.get_rank() == 0:
        torch.save(found, sys.argv[1])
