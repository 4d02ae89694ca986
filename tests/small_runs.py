"""Small runs shared by tests, in this process and on two gloo processes."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.fabric.strategies.fsdp import _setup_activation_checkpointing
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from dft_lightning import CausalLMModule, InstructionDataModule
from dft_lightning.data import ArithmeticRows
from dft_lightning.data.options import BatchOptions, RowOptions, StreamOptions, TextOptions

# GPT-2 computes in the parameters' dtype throughout. Llama's norms and rotary embedding go through float32, whose
# rounding (1e-8 on a gradient) would hide what a float64 test is after.
TINY_GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 256}
TINY_GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TINY_ARITHMETIC = {**TINY_GPT2, "vocab_size": 20}
CLIP = 0.01  # less than any of these gradients' norms


def data_options(**options):
    """The arguments of a data module from options by name, those of its groups put into them."""
    found = {}
    for name, value in options.items():
        group = next((key for key, cls in _GROUPS.items() if name in cls.__dataclass_fields__), None)
        if group is None:
            found[name] = {**found.get(name, {}), **value} if name == "streaming" and value is not None else value
        else:
            found.setdefault(group, {})[name] = value
    return found


_GROUPS = {"rows": RowOptions, "text": TextOptions, "batches": BatchOptions, "streaming": StreamOptions}


def arithmetic_data(num_rows: int = 16, **options: Any) -> InstructionDataModule:
    """Very ragged rows: 1 to 9 digits."""
    rows = ArithmeticRows(num_rows, min_digits=1, max_digits=9, seed=3)
    return InstructionDataModule(rows, **data_options(**{"tokenizer": "asset://arithmetic-base", **options}))


def save_base(folder: Path) -> Path:
    """A GPT-2 of random weights, far enough from each other that its tokens are: it computes in float64 throughout."""
    torch.manual_seed(0)
    module = CausalLMModule({**TINY_ARITHMETIC, "initializer_range": 0.3}, loading={"dtype": "float64"})
    module.configure_model()
    module.model.save_pretrained(folder)
    return folder


def trainer(**options: Any) -> pl.Trainer:
    """A silent CPU trainer that writes nothing."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "inference_mode": False,
        "max_steps": 1,
    }
    return pl.Trainer(**{**defaults, **options})


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, of all its shards where it has some."""
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.clone()


class GradientRecorder(CausalLMModule):
    """Keeps each optimizer step's gradient, before clipping and as the optimizer gets it."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.gradients: list[torch.Tensor] = []
        self.clipped: list[torch.Tensor] = []

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        self.gradients.append(self._whole_gradient())
        super().configure_gradient_clipping(*args, **kwargs)
        self.clipped.append(self._whole_gradient())

    def _whole_gradient(self) -> torch.Tensor:
        with whole_parameters(self.trainer.model):
            return torch.cat([whole(p.grad).flatten() for p in self.parameters() if p.requires_grad])


class Rounded(GradientRecorder):
    """Weights are drawn in ``dtype`` and rounded, so that every precision starts from the same model."""

    rounded: torch.dtype | None = None

    def build_model(self) -> torch.nn.Module:
        return super().build_model().to(self.rounded)


def whole_parameters(root: Any) -> Any:
    """FSDP1's parameters and gradients in their own shapes."""
    if isinstance(root, FullyShardedDataParallel):
        return FullyShardedDataParallel.summon_full_params(root, with_grads=True)
    return contextlib.nullcontext()


class FSDP1OnCPU(FSDPStrategy):
    """Lightning's refuses the CPU, where torch's FSDP1 runs."""

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:
        options = {**self.kwargs, "mixed_precision": self.mixed_precision_config}
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)
        _setup_activation_checkpointing(wrapped, self._activation_checkpointing_kwargs)
        return wrapped


def adapter_strategy() -> ModelParallelStrategy:
    """FSDP2 on two processes with a checkpoint of one file, which adapters need."""
    return ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)


def strategy_of(name: str) -> Any:
    """A strategy for two processes, which a trainer of its own needs each time."""
    if name == "fsdp2 of adapters":
        return adapter_strategy()
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    if name == "fsdp1":
        from transformers.models.gpt2.modeling_gpt2 import GPT2Block

        return FSDP1OnCPU(auto_wrap_policy={GPT2Block}, activation_checkpointing_policy={GPT2Block})
    return name


@contextlib.contextmanager
def graphs_of(backend: Any = "eager") -> Iterator[list[Any]]:
    """The graphs that blocks are compiled to meanwhile, by a backend that takes less time than torch's default."""
    made: list[Any] = []

    def compiled(graph: Any, inputs: list[Any]) -> Any:
        made.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compile_in_place = torch.nn.Module.compile
    in_place = patch.object(torch.nn.Module, "compile", lambda self, **o: compile_in_place(self, backend=compiled, **o))
    # pytest keeps what is logged, and torch would log each of its guards for it.
    no_trace = patch.object(logging.getLogger("torch.__trace"), "handlers", [])
    torch._dynamo.reset()
    with in_place, no_trace:
        yield made
    torch._dynamo.reset()


def step_gradient(
    batch_size: int,
    accumulate: int,
    dtype: str,
    loss: str,
    num_rows: int = 16,
    clip: float = CLIP,
    devices: int = 1,
    strategy: Any = "auto",
    data: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the first step of a fit on arithmetic rows, before and after clipping."""
    pl.seed_everything(0)
    loss_options = {"class_path": f"dft_lightning.{loss}"}
    module = Rounded(TINY_ARITHMETIC, loss=loss_options, loading={"dtype": "float64"}, **options)
    module.rounded = getattr(torch, dtype)
    rows = arithmetic_data(num_rows, **{"batch_size": batch_size, "shuffle": False, **(data or {})})
    run = trainer(accumulate_grad_batches=accumulate, gradient_clip_val=clip, devices=devices, strategy=strategy)
    run.fit(module, datamodule=rows)
    assert {p.dtype for p in module.parameters()} == {module.rounded}
    return module.gradients[0], module.clipped[0]


def run_processes(script: str, *args: str, number: int = 2, timeout: float = 150) -> str:
    """Run a script of ``tests/`` on gloo processes; a hard limit ends them all.

    On Linux they are forked from this one, which has imported everything. They are given what torchrun gives.

    Returns:
        Standard output of rank 0.
    """
    path = os.path.join(os.path.dirname(__file__), script)
    if sys.platform != "linux":
        return run_limited([path, *args], timeout)
    assert not torch.distributed.is_initialized(), "a test left a process group behind, which forks would take along"
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        ranks = [_forked(rank, number, port, folder, path, args, timeout) for rank in range(number)]
        statuses = _limited(ranks, timeout)
        said = [Path(folder, f"{rank}.{kind}").read_text() for rank in range(number) for kind in ("out", "err")]
    # Of threads at the limit, what is dumped first is where they stand.
    assert statuses == [0] * number, f"{statuses}\n" + "\n".join(text[-20000:] for text in said)
    return said[0]


def on_two_processes(function: Callable[..., Any], cases: list[dict[str, Any]]) -> list[Any]:
    """What a function of these files returns on rank 0 for each case's options, among them a strategy's name."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "found.pt")
        run_processes("two_calls.py", function.__module__, function.__name__, out, json.dumps(cases))
        return torch.load(out)


def _forked(rank: int, ranks: int, port: int, folder: str, path: str, args: tuple[str, ...], timeout: float) -> int:
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        os.setsid()
        for descriptor, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(os.path.join(folder, f"{rank}.{kind}"), os.O_WRONLY | os.O_CREAT), descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
        where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
        os.environ.update({name: str(value) for name, value in where.items()})
        torch.set_num_threads(1)  # threads of OpenMP are not forked
        faulthandler.dump_traceback_later(timeout - 1, file=2)  # where it stands at the limit
        sys.argv = [path, *args]
        runpy.run_path(path, run_name="__main__")
        status = 0
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(bool(ending.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # none of what the tests do at their end


def _limited(processes: list[int], timeout: float) -> list[int | None]:
    """Exit statuses; when one fails the others are given a moment, and at the limit all are killed."""
    until, found = time.monotonic() + timeout, dict[int, int | None]()
    while len(found) < len(processes) and time.monotonic() < until:
        for number in processes:
            ended, status = os.waitpid(number, os.WNOHANG) if number not in found else (0, 0)
            if ended:
                found[number] = os.waitstatus_to_exitcode(status)
                until = min(until, time.monotonic() + 20) if found[number] else until
        time.sleep(0.02)
    for number in processes:
        with contextlib.suppress(ProcessLookupError):  # it and what it has started have ended
            os.killpg(number, signal.SIGKILL)
        if number not in found:
            os.waitpid(number, 0)
    return [found.get(number) for number in processes]


def run_script(name: str, *arguments: object, copied_to: Path | None = None) -> dict[str, Any]:
    """Run a script of the project in this process as ``python NAME ARGUMENTS`` does.

    Args:
        name: below the project's root, or absolute.
        copied_to: a folder from which a copy is run, for a script that writes beside itself.

    Returns:
        Its globals.
    """
    path = Path(__file__).parents[1] / name
    if copied_to is not None:
        path = Path(shutil.copy(path, copied_to))
    given = patch.object(sys, "argv", [str(path), *map(str, arguments)])
    with given, patch.object(sys, "path", [str(path.parent), *sys.path]):
        return runpy.run_path(str(path), run_name="__main__")


def run_limited(args: list[str], timeout: float) -> str:
    """Run Python on these arguments; a hard limit ends it and all that it starts.

    Returns:
        Its standard output.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=env,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err[-4000:]
    return out
