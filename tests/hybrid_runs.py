"""Run by test_hybrid_sharding, on four processes: two replicas of two shards.

usage: hybrid_runs.py FOLDER PART...    (each part has a folder of its own in FOLDER, and leaves a file there)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dft_lightning import AnchoredLoss, CausalLMModule, DFTLoss, HuggingFaceExport, MixtureLoss
from dft_lightning.distributed import gather_lists
from sharded_runs import Collectives, WholeSequence, save, three_steps
from small_runs import TINY_ARITHMETIC, GradientRecorder, arithmetic_data, trainer, whole


def four(distributed: bool = True, **options: Any) -> dict[str, Any]:
    return {"devices": 4, "strategy": ModelParallelStrategy(4, 1, distributed), **options}


def checkpoints(folder: Path) -> None:
    """Three clipped steps from each checkpoint below ``folder``, loaded in either way."""
    found = {}
    for path in sorted(folder.glob("*-vocabulary-*")):
        for load in ("shards", "whole"):
            module = three_steps(path, 1, {"load": load, "replicas": 2}, **four())
            places = {str(parameter.placements) for parameter in module.parameters()}
            shapes = gather_lists([[list(p.to_local().shape) for p in module.parameters()]], 4)
            found[path.name, load] = module.gradients, module.clipped, places, shapes
    save(found, folder / "out.pt")


SHARDING: dict[str, dict[str, Any]] = {
    "accumulated": {},
    "kept": {"reshard_after_forward": False},
    "each": {"sync_micro_batches": True},
    "offloaded": {"cpu_offload": True},
}


def one_step(batch_size: int, sharding: dict[str, Any], **options: Any) -> Any:
    pl.seed_everything(0)
    module = GradientRecorder(TINY_ARITHMETIC, loss=DFTLoss(), loading={"dtype": "float64"}, sharding=sharding)
    run = trainer(accumulate_grad_batches=2, **options)
    run.fit(module, datamodule=arithmetic_data(16, batch_size=batch_size, shuffle=False))
    return module.gradients[0]


def options(folder: Path) -> None:
    save({name: one_step(2, {"replicas": 2, **more}, **four()) for name, more in SHARDING.items()}, folder / "out.pt")


def collectives(folder: Path) -> None:
    """What a step of two micro-batches exchanges, with one replica and with two."""
    found = {}
    for replicas in (1, 2):
        with Collectives() as seen:
            one_step(2, {"replicas": replicas}, **four())
        found[replicas] = {name: seen.names.count(name) for name in set(seen.names)}
    save(found, folder / "out.pt")


class Reduced(TorchDispatchMode):
    """How many numbers each reduction gives a rank, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.namespace == "c10d" and operation._opname == "_reduce_scatter_base_":
            self.sizes.append(args[0].numel())
        return operation(*args, **(kwargs or {}))


def order(folder: Path) -> None:
    """What a step reduces, in its order, of ends that are tied and not; and where they stand then."""
    found = {}
    for tied in (True, False):
        pl.seed_everything(0)
        module = CausalLMModule({**TINY_ARITHMETIC, "tie_word_embeddings": tied}, loss=DFTLoss())
        with Reduced() as reduced:
            trainer(**four()).fit(module, datamodule=arithmetic_data(4, batch_size=1))
        groups = [module.model.transformer.h[0], module.model.transformer.h[1]]
        sizes = [sum(p.to_local().numel() for p in group.parameters()) for group in groups]
        of_ends = [end.weight.to_local().numel() for end in (module.model.transformer.wte, module.model.lm_head)]
        found[tied] = reduced.sizes, sizes, of_ends
    save(found, folder / "out.pt")


def steps(number: int, ckpt_path: Path | None, sharding: dict[str, Any], **options: Any) -> pl.Trainer:
    pl.seed_everything(3)
    module = CausalLMModule(
        TINY_ARITHMETIC,
        loss=DFTLoss(),
        optimizer={"lr": 1e-2},
        schedule={"decay": "constant"},
        sharding=sharding,
    )
    run = trainer(max_steps=number, gradient_clip_val=0.5, **options)
    data = arithmetic_data(16, batch_size=4 // run.world_size, shuffle=False)
    run.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return run


def weights(run: pl.Trainer) -> torch.Tensor:
    return torch.cat([whole(p.detach()).flatten() for p in run.lightning_module.parameters()])


def resume(folder: Path) -> None:
    """A run of four steps, and one that goes on from its second, from shards and from a file; and an export."""
    two = {"replicas": 2}
    export = HuggingFaceExport(str(folder / "exported"))
    found = {"whole": weights(steps(4, None, two, **four(), callbacks=[export]))}
    for name in ("shards", "file"):
        run = steps(2, None, two, **four(name == "shards"))
        run.save_checkpoint(folder / f"{name}.ckpt")
        found[name] = weights(steps(4, folder / f"{name}.ckpt", two, **four()))
        found[f"{name}, one replica"] = weights(steps(4, folder / f"{name}.ckpt", {}, **four()))
    save(found, folder / "out.pt")


def with_reference(folder: Path) -> dict[str, dict[str, Any]]:
    """Options of a module whose loss compares with a model: the start, or another."""
    loss = AnchoredLoss(weight=0.3)
    double = {"dtype": "float64"}
    return {
        "the start": {"loss": loss},
        "full head": {"loss": loss, "loading": {**double, "head": "full"}},
        "another": {"loss": loss, "reference_model": str(folder / "other")},
        "recomputing head": {"loss": MixtureLoss([WholeSequence(), loss])},
    }


class LastStep(pl.Callback):
    """The collectives of the last step, in their order."""

    def __init__(self, seen: Collectives) -> None:
        self.seen = seen

    def on_train_batch_start(self, *args: Any) -> None:
        self.before = len(self.seen.names)

    def on_train_batch_end(self, *args: Any) -> None:
        self.names = self.seen.names[self.before :]


def reference(folder: Path) -> None:
    """Three steps of a loss that compares, by shards and replicas."""
    found: dict[str, Any] = {}
    ways = {"shards": {}, "replicas": {"replicas": 2}, "whole": {"load": "whole"}, "offloaded": {"cpu_offload": True}}
    for name, own in with_reference(folder).items():
        for way, sharding in ways.items() if name == "another" else [("replicas", ways["replicas"])]:
            module = three_steps(folder / "base", 1, sharding, own=own, **four())
            found[name, way] = module.gradients
            parameters = list(module._reference._model.parameters())
            assert not any(parameter.requires_grad for parameter in parameters)
            sharded = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
            found["held"] = len(sharded), len(parameters), {p.to_local().shape[0] / p.shape[0] for p in sharded}
    for name, own in (("with", with_reference(folder)["another"]), ("without", {})):
        with Collectives() as seen:
            last = LastStep(seen)
            three_steps(folder / "base", 1, {}, own=own, **four(), callbacks=[last])
        found[name] = last.names
    for precision in ("bf16-true", "bf16-mixed"):
        own = {**with_reference(folder)["another"], "loading": {}}
        module = three_steps(folder / "base", 1, {}, own=own, **four(), precision=precision)
        sharded = [p for p in module._reference._model.parameters() if isinstance(p, DTensor)]
        found[precision] = {str(p.dtype) for p in sharded}, module.gradients[0]
    save(found, folder / "out.pt")


if __name__ == "__main__":
    for part in sys.argv[2:]:
        globals()[part](Path(sys.argv[1]) / part)
