"""Where a training step would wait for the device, and what its ranks exchange, counted without a device.

    python benchmarks/waits.py                    # one process
    python benchmarks/waits.py --processes 2      # two, over gloo
    python benchmarks/waits.py --lines            # each place, by file and line

A call such as ``tensor.item()`` has the host wait until a GPU is done with everything that it was given. On the CPU
nothing waits, so such calls are watched instead: what a function of torch is called with is told apart into numbers
that the host has (made from Python's own, or read by ``.cpu()``) and everything else, which a GPU would have. Counted
are calls that would read the latter, and every collective, whatever the backend. They are given to whoever made them:
``own`` to this package and what it calls; ``lightning`` to Lightning's loops and fp16's gradient scaler; ``torch`` to
DDP and FSDP, whose collectives run beside the forward and the backward pass.

The model is a tiny Llama; what is counted does not depend on its size. The first two steps, in which the model is
looked at once, do not count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from linear_head import machine
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

WARM_UP = 2
STEPS = 6
MICRO_BATCHES = 4
VARIANTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padding-free": {"batches": {"padding_free": True}},
    "packed": {"batches": {"packing": "bfd", "padding_free": True}},
    "mixture": {"mixed": True},
    "full head": {"head": "full"},
    "renormalized": {"renormalize": True},
    "fp16": {"fp16": True},
}
OWN, LIGHTNING, TORCH = "own", "lightning", "torch"
TINY = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 20}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}

_READS = {
    "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "__format__", "__repr__",
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "equal", "allclose",
    "is_nonzero",
}  # fmt: skip
_MADE = {"tensor", "as_tensor", "zeros", "ones", "full", "empty", "arange", "linspace", "rand", "randn", "randperm"}
_HOST = (None, "cpu")  # a device that is asked for by an object is the run's
COLLECTIVE = "collective"
_COLLECTIVES = ("c10d::", "_c10d_functional::")


class Watch(TorchFunctionMode):
    """Counts what would wait, by owner, micro-batch and place, once :attr:`counting` is set."""

    def __init__(self, kind: Callable[[], str]) -> None:
        super().__init__()
        self.kind = kind
        self.counting = False
        self.found: Counter[tuple[str, str, str]] = Counter()
        self.host = WeakIdKeyDictionary()

    def count(self, what: str) -> None:
        if self.counting and (caller := _caller()) is not None:
            owner, where = caller
            self.found[owner, self.kind(), f"{where}: {what}"] += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, tensors = getattr(func, "__name__", ""), list(_tensors((args, kwargs)))
        on_device = any(tensor not in self.host for tensor in tensors)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if on_device and (name in _READS or name == "cpu" or _is_masked(name, args)):
            self.count(name)
        if name == "repeat_interleave" and on_device and kwargs.get("output_size") is None:
            self.count(name)
        if name == "cpu":  # itself, on the CPU: an alias stands for what was read
            result = torch.ops.aten.alias(result)
            self.host[result] = True
        elif name == "to" and not on_device and isinstance(result, torch.Tensor) and _names_device(args, kwargs):
            self._moved(result, kwargs)
        elif not on_device and (tensors or (name in _MADE and kwargs.get("device") in _HOST)):
            for tensor in _tensors(result):
                self.host[tensor] = True
        elif name in ("tensor", "as_tensor") and kwargs.get("device") not in _HOST:
            self.count(f"{name}(device=...)")
        return result

    def _moved(self, result: torch.Tensor, kwargs: dict[str, Any]) -> None:
        self.host.pop(result, None)
        if not kwargs.get("non_blocking"):
            self.count("to(device)")


class Collectives(TorchDispatchMode):
    """Gives every collective to a :class:`Watch`."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith(_COLLECTIVES):
            self.watch.count(f"{COLLECTIVE} {func.name().partition('::')[2].strip('_')}")
        return func(*args, **(kwargs or {}))


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _is_masked(name: str, args: Any) -> bool:
    """Whether a tensor is indexed by one of booleans, whose number has to be known first."""
    if name == "where":
        return len(args) == 1
    if name not in ("__getitem__", "__setitem__"):
        return False
    masked = any(each.dtype in (torch.bool, torch.uint8) for each in _tensors(args[1]))
    return masked and not (name == "__setitem__" and not isinstance(args[2], torch.Tensor))


def _names_device(args: Any, kwargs: Any) -> bool:
    return "device" in kwargs or any(isinstance(each, (torch.device, str)) for each in args[1:])


_OF_TORCH = ("torch/autograd/graph.py", "torch/nn/parallel/distributed.py", "torch/distributed/fsdp/")
# A batch, which goes to a GPU from pinned memory; and what a GPU has another path for.
_ON_THE_CPU_ALONE = ("batch_to", "_first_largest")
_ROOT = str(Path(__file__).parents[1] / "dft_lightning")


def _caller() -> tuple[str, str] | None:
    """Who called, and the file and line; ``None`` for what is no part of the step's host side, such as reading rows."""
    frames = [frame for frame in traceback.extract_stack()[:-2] if frame.filename != __file__]
    names = [frame.filename for frame in frames]
    if any("/torch/utils/data/" in name or "/torchdata/" in name or name.startswith(f"{_ROOT}/data") for name in names):
        return None
    if any(frame.name in _ON_THE_CPU_ALONE for frame in frames[-6:]):
        return None
    caller = max((i for i, name in enumerate(names) if "/torch/" not in name), default=0)
    short = names[caller].rpartition("site-packages/")[2].replace(str(Path(_ROOT).parent) + "/", "")
    if any(each in name for name in names[caller + 1 :] for each in _OF_TORCH):
        owner = TORCH
    else:
        owner = OWN if any(name.startswith(_ROOT) for name in names) else LIGHTNING
    return owner, f"{short}:{frames[caller].lineno}"


class Counted(Callback):
    """Watches a fit, and says in which micro-batch of its step something was called."""

    def __init__(self) -> None:
        self.watch = Watch(self.kind)
        self.modes: list[Any] = []
        self.trainer: pl.Trainer | None = None

    def kind(self) -> str:
        """Of the micro-batch that is computed."""
        number = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if number % MICRO_BATCHES:
            return "within"
        return "logged" if number // MICRO_BATCHES % self.trainer.log_every_n_steps == 0 else "end"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.trainer = trainer
        self.modes = [self.watch, Collectives(self.watch)]
        for mode in self.modes:
            mode.__enter__()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        ready = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self.watch.counting = ready > WARM_UP * MICRO_BATCHES

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.watch.counting = False
        for mode in reversed(self.modes):
            mode.__exit__(None, None, None)


def measure(
    batches: dict[str, Any] | None = None,
    mixed: bool = False,
    head: str = "fused",
    renormalize: bool = False,
    fp16: bool = False,
    strategy: Any = "auto",
    devices: int = 1,
) -> dict[str, Any]:
    """Counts of a run.

    Returns:
        ``waits`` and ``exchanges``: by owner and kind of micro-batch, how many there are in one of them: ``within`` (it
        ends no step), ``end`` (it ends one) and ``logged`` (it ends one that is logged); ``places``: by owner, how
        often each.
    """
    from dft_lightning import CausalLMModule, DFTLoss, InstructionDataModule
    from dft_lightning.callbacks.interruption import InterruptionCheckpoint
    from dft_lightning.data import ArithmeticRows, MixedRows

    rows = {name: ArithmeticRows(400, min_digits=1, max_digits=9, seed=seed) for seed, name in enumerate(("a", "b"))}
    data = InstructionDataModule(
        MixedRows(rows) if mixed else rows["a"],
        text={"tokenizer": "asset://arithmetic-base", "max_length": 192},
        batches=batches or {},
        batch_size=2,
    )
    loading = {"head": head, "attn_implementation": "documents" if batches else "sdpa"}
    module = CausalLMModule(TINY, loss=DFTLoss(), loading=loading, step={"renormalize": renormalize})
    counted = Counted()
    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=strategy,
            max_steps=WARM_UP + STEPS,
            max_epochs=-1,
            accumulate_grad_batches=MICRO_BATCHES,
            gradient_clip_val=1.0,
            log_every_n_steps=2,
            logger=CSVLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[counted, InterruptionCheckpoint()],
            plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))] if fp16 else None,
        ).fit(module, datamodule=data)
    return summary(counted.watch.found)


def summary(found: Counter[tuple[str, str, str]]) -> dict[str, Any]:
    """What :func:`measure` returns, of calls by owner, kind and place."""
    logged = STEPS // 2
    numbers = {"within": STEPS * (MICRO_BATCHES - 1), "end": STEPS - logged, "logged": logged}
    owners = (OWN, LIGHTNING, TORCH)
    counts = {what: {owner: dict.fromkeys(numbers, 0.0) for owner in owners} for what in ("waits", "exchanges")}
    places: dict[str, Counter[str]] = {owner: Counter() for owner in owners}
    for (owner, kind, place), times in found.items():
        counts["exchanges" if COLLECTIVE in place else "waits"][owner][kind] += times / numbers[kind]
        places[owner][place] += times
    return {**counts, "places": {owner: dict(each.most_common()) for owner, each in places.items()}}


def ranks(processes: int, variant: str) -> dict[str, Any]:
    """:func:`measure` of a variant, under DDP over gloo where there are several processes."""
    options = VARIANTS[variant]
    if processes == 1:
        return measure(**options)
    found = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_rank, args=(processes, options, found), nprocs=processes)
    return found.get()


def _rank(rank: int, processes: int, options: dict[str, Any], found: Any) -> None:
    torch.set_num_threads(1)
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611", "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    values |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "TORCHELASTIC_RUN_ID": "waits"}
    os.environ.update({name: str(value) for name, value in values.items()})
    result = measure(**options, strategy="ddp", devices=processes)
    if rank == 0:
        found.put(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--lines", action="store_true", help="each place, by file and line")
    parser.add_argument("--output", type=Path, help="a JSON file of the counts")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for processes in options.processes:
        for variant in options.variants:
            found = ranks(processes, variant)
            results.setdefault(str(processes), {})[variant] = {what: found[what] for what in ("waits", "exchanges")}
            for what, owner in itertools.product(("waits", "exchanges"), found["places"]):
                line = ", ".join(f"{kind} {number:.2f}" for kind, number in found[what][owner].items())
                print(f"{processes} x {variant:12} {what:9} {owner:9} {line}", flush=True)
            for owner, places in found["places"].items():
                for place, times in places.items() if options.lines else ():
                    print(f"    {owner:9} {times:5} {place}")
    if options.output is not None:
        options.output.write_text(json.dumps({"machine": machine("cpu"), "processes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
