"""Runs that are killed, and what they end with: benchmarks/kill.py with two of its kills."""

from __future__ import annotations

import json

from conftest import ROOT
from small_runs import run_limited


def test_two_killed_runs_end_as_one_that_was_not(tmp_path):
    """SIGKILL in the middle of writing a checkpoint, and SIGTERM on two ranks under DDP."""
    output = tmp_path / "kill.json"
    arguments = ["--kills", "2", "--steps", "16", "--within", "0.2", "--output", str(output)]
    run_limited([str(ROOT / "benchmarks/kill.py"), *arguments], timeout=150)
    found = json.loads(output.read_text())
    first, second = found["runs"]
    assert found["same"] == 2
    assert (first["kind"], first["signal"], first["moment"]) == ("one process", "SIGKILL", "a write")
    assert first["statuses"] == [-9]
    assert (second["kind"], second["signal"]) == ("ddp", "SIGTERM")
    assert any(second["statuses"])
    assert second["went on"] == [0, 0]
