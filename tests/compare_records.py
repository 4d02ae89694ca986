"""Records of runs that never were, for tests of what is made of records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

LOSSES = {
    "CE": {"class_path": "dft_lightning.CrossEntropyLoss", "init_args": {"reduction": "mean"}},
    "DFT": {"class_path": "dft_lightning.DFTLoss", "init_args": {"reduction": "mean"}},
}
PROBLEMS = 40


def write_settings(output: Path, **changes: Any) -> None:
    settings = {
        "config": "compare.yaml",
        "base": ["base.yaml"],
        "losses": LOSSES,
        "learning_rates": [1e-4, 1e-3],
        "seeds": [0],
        "seeds_at_best": [1, 2],
        "overrides": {},
        "best_by": ["greedy", "sampled"],
        "measures": ["greedy", "sampled", "pass_at_4", "nll"],
        "evaluation": {"num_samples": 4, "temperature": 1.0},
        **changes,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "compare.yaml").write_text(yaml.safe_dump(settings))


def values(greedy: float, sampled: float, **more: float) -> dict[str, float]:
    tokens = {"loss": 0.1, "nll": 0.5, "perplexity": 1.6, "token_accuracy": 0.9, "entropy": 0.2, "mean_weight": 0.8}
    return {"greedy": greedy, "sampled": sampled, "pass_at_2": sampled, "pass_at_4": sampled, **tokens, **more}


def of_prose(nll: float, kl: float) -> dict[str, float]:
    """What is measured of forgetting rows beside the usual, for a mixture of one source."""
    return {"kl": kl, "nll/prose": nll, "token_accuracy/prose": 0.5, "kl/prose": kl}


def write_run(
    output: Path,
    loss: str | None,
    rate: float | None = None,
    seed: int = 0,
    *,
    validation: tuple[float, float] = (0.5, 0.5),
    right: int = 20,
    finished: bool = True,
    tested: bool = True,
    targets: str = "t",
    folder: str | None = None,
    **more: float,
) -> Path:
    """A run whose test got the first ``right`` problems right, greedy and in all four samples."""
    name = "base" if loss is None else f"{loss.lower()}-lr{rate:g}-seed{seed}"
    path = output / "runs" / (folder or name)
    path.mkdir(parents=True)
    run = {"name": name, "loss": loss, "learning_rate": rate, "seed": seed}
    common = {"run": run, "versions": {"torch": "2"}, "device": "cpu", "world_size": 1, "precision": "32-true"}
    config = {
        "model": {"loss": LOSSES.get(loss), "optimizer": {"init_args": {"lr": rate}}},
        "data": {"batches": {"seed": seed}},
        "seed_everything": seed,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    if loss is not None:
        start, end = values(0.3, 0.3), values(*validation, **more)
        fit = {
            **common,
            "seconds": 60.0,
            "finished": finished,
            "history": [
                {"step": 0, "validation": start, "forgetting": start | of_prose(2.0, 0.0)},
                {"step": 10, "validation": end, "forgetting": end | of_prose(2.5 + seed, rate)},
            ],
            "logged": [[5, {"train/grad_norm": 0.5, "train/clipped_steps": 0.0}], [10, {"train/grad_norm": 0.25}]],
            "initial_weights": "w",
            "final_weights": f"{name} after",
            "rows": f"r{seed}",
            "targets": targets,
            "steps": [[3, "aa"], [3, targets]],
        }
        (path / "fit.json").write_text(json.dumps(fit))
        before = np.log(np.array([0.05, 0.3, 0.7, 0.95, 0.99], dtype=np.float32))
        np.savez(path / "probabilities.npz", before=before, after=before / 2)
    if tested:
        share = right / PROBLEMS
        test = {
            **common,
            "weights": "w" if loss is None else f"{name} after",
            "problems": "p",
            "num_samples": 4,
            "values": values(share, share, **more),
            "curve": [[0.0, share], [1.0, share]],
            "correct": {
                "greedy": [1] * right + [0] * (PROBLEMS - right),
                "sampled": [4] * right + [0] * (PROBLEMS - right),
            },
        }
        (path / "test.json").write_text(json.dumps(test))
    return path


def whole_comparison(output: Path) -> None:
    """Two losses at two rates, with further seeds at the better one; DFT gets ten problems more."""
    write_settings(output)
    write_run(output, None, right=12)
    for loss, extra in (("CE", 0), ("DFT", 10)):
        write_run(output, loss, 1e-4, validation=(0.6, 0.2), right=18 + extra)
        write_run(output, loss, 1e-3, validation=(0.7, 0.1), right=20 + extra)
        for seed in (1, 2):
            write_run(output, loss, 1e-3, seed, validation=(0.9, 0.9), right=20 + extra + seed)
