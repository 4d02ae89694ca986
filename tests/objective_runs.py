"""Training runs of every objective from a checkpoint, over rows with reference log-probs; on two processes by itself.

usage: objective_runs.py FOLDER OUT    (the base and its scored rows, as test_objective_runs makes them)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from dft_lightning import (
    AnchoredLoss,
    ChordPhiLoss,
    DEFTLoss,
    EAFTLoss,
    ImportanceWeightedLoss,
    InstructionDataModule,
    PowerLoss,
    ProximalLoss,
    SequenceDFTLoss,
    ThresholdLoss,
)
from small_runs import GradientRecorder, adapter_strategy, strategy_of, trainer

ROWS = 16
OBJECTIVES = {
    "power": PowerLoss(q=0.5),
    "above": ThresholdLoss(threshold=0.1),
    "below": ThresholdLoss(threshold=0.1, above=False, base=PowerLoss(q=1.0)),
    "chord": ChordPhiLoss(),
    "deft": DEFTLoss(),
    "eaft": EAFTLoss(top_k=7),
    "eaft of everything": EAFTLoss(top_k=None),
    "iw token": ImportanceWeightedLoss(level="token", clip=(0.2, 1.8)),
    "iw sequence": ImportanceWeightedLoss(),
    "proximal": ProximalLoss(epsilon=0.05),
    "sequence": SequenceDFTLoss(mean="product"),
    "geometric": SequenceDFTLoss(mean="geometric"),
    "anchored": AnchoredLoss(weight=0.5),
}
LORA = {"r": 3, "lora_alpha": 12, "target_modules": ["c_attn", "c_fc"], "init_lora_weights": True}

# Every step is over the same rows, whatever the split: a batch, micro-batches, packed rows, packed micro-batches.
SPLITS: dict[str, dict[str, Any]] = {
    "a batch": {"batch_size": ROWS},
    "accumulation": {"batch_size": 4},
    "packing": {"batch_size": ROWS, "packing": "bfd", "max_length": 256},
    "packing and accumulation": {"batch_size": 1, "packing": "bfd", "max_length": 256},
}


def steps(
    folder: Path, loss: Any, split: str, count: int = 3, ranks: int = 1, peft: Any = None, **options: Any
) -> list[torch.Tensor]:
    """Gradient of each of the first steps, every one over all rows."""
    pl.seed_everything(0)
    module = GradientRecorder(
        str(folder / "base"),
        loss=loss,
        loading={"dtype": "float64"},
        optimizer={"lr": 0.003},
        schedule={"decay": "constant"},
        peft=peft,
    )
    data_options = dict(SPLITS[split])
    data_options["batch_size"] = max(1, data_options["batch_size"] // ranks)
    rows, tokenizer = str(folder / "scored" / "train"), str(folder / "base")
    data = InstructionDataModule(rows, tokenizer=tokenizer, shuffle=False, **data_options)
    data.prepare_data()
    data.setup("fit")
    micro_batches = len(data.train_dataloader())
    run = trainer(
        max_steps=count,
        max_epochs=-1,
        devices=ranks,
        accumulate_grad_batches=-(-micro_batches // ranks),
        gradient_clip_val=1.0,
        **options,
    )
    run.fit(module, datamodule=data)
    assert len(module.gradients) == count
    return module.gradients


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = {}
    for name, loss in OBJECTIVES.items():
        splits = ("accumulation",) if name != "iw sequence" else ("accumulation", "packing and accumulation")
        for split in splits:
            found[name, "ddp", split] = steps(folder, loss, split, ranks=2, strategy="ddp")
        if name != "anchored":
            found[name, "fsdp2", "accumulation"] = steps(
                folder, loss, "accumulation", ranks=2, strategy=strategy_of("fsdp2")
            )
    found["anchored", "fsdp2", "adapter"] = steps(
        folder,
        OBJECTIVES["anchored"],
        "accumulation",
        ranks=2,
        peft=LORA,
        strategy=adapter_strategy(),
    )
    if torch.distributed.get_rank() == 0:
        torch.save(found, sys.argv[2])
