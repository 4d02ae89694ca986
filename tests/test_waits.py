"""What a training step waits for, and what its ranks exchange: benchmarks/waits.py, and the numbers that it holds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from small_runs import on_two_processes

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import waits

NOTHING = {"within": 0, "end": 0, "logged": 0}
# The finiteness of the gradient, with all that is counted of the step; at logged steps what is logged.
OWN = {"within": 0, "end": 1, "logged": 2}


@pytest.mark.parametrize("variant", waits.VARIANTS)
def test_a_step_waits_once(variant):
    found = waits.measure(**waits.VARIANTS[variant])
    assert found["waits"]["own"] == OWN, found["places"]
    # fp16's gradient scaler looks for itself, before it lets the optimizer step.
    scaler = {"within": 0, "end": 1, "logged": 1}
    assert found["waits"]["lightning"] == (scaler if variant == "fp16" else NOTHING), found["places"]
    assert found["waits"]["torch"] == NOTHING
    assert all(counts == NOTHING for counts in found["exchanges"].values())


CASES = [{**options, "strategy": "ddp"} for name, options in waits.VARIANTS.items() if name != "fp16"]
CASES.append({"strategy": "fsdp2"})


@pytest.fixture(scope="module")
def on_two():
    return on_two_processes(waits.measure, CASES)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_two_processes_exchange_once_a_step(on_two, index):
    """Under FSDP2 a second time, for the norm of a gradient in shards."""
    found, sharded = on_two[index], CASES[index]["strategy"] == "fsdp2"
    assert found["waits"]["own"] == OWN, found["places"]
    assert found["waits"]["lightning"] == NOTHING, found["places"]
    assert found["exchanges"]["own"] == {"within": 0, "end": 1 + sharded, "logged": 2 + sharded}, found["places"]
    assert found["exchanges"]["lightning"] == NOTHING, found["places"]
    if not sharded:  # one bucket of gradients, at the end of a step alone
        assert found["exchanges"]["torch"] == {"within": 0, "end": 1, "logged": 1}


def test_the_watch_sees_what_waits():
    """Each kind of call, on what a GPU would have and on what the host has."""
    watch = waits.Watch(lambda: "within")
    device = torch.arange(6.0)
    with watch:
        watch.counting = True
        host = torch.tensor([1.0, 2.0])
        assert [float(host.sum()), *host.tolist()] == [3, 1, 2]
        read = device.cpu()  # 1
        assert read.tolist() == device.tolist()  # 2
        assert bool((device > 1).any())  # 3
        assert len(device[device > 3]) == 2  # 4
        assert len((device > 3).nonzero()) == 2  # 5
        assert int(torch.bincount(device.long()).sum()) == 6  # 6 and 7
        assert torch.tensor(2.0, device=device.device) == 2  # 8 and 9
        assert device[torch.tensor([1])] is not None
        device[device > 3] = 0.0  # a masked fill, which knows its shape
    assert sum(watch.found.values()) == 9, watch.found
