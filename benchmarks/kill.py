"""Kill runs at random moments, have them go on, and compare what they end with.

    python benchmarks/kill.py --kills 20

Small runs with dropout, validation and accumulation, in one process, under DDP and under FSDP2 with checkpoints in
shards (two gloo processes), which are also written while training goes on. Each is killed by SIGKILL at a random moment
or in the middle of writing a checkpoint, or stopped by SIGTERM or SIGINT, which one of two ranks alone may get; then
started again with ``--ckpt_path auto``. Its last checkpoint has to have the weights and optimizer states, bit for bit,
of a run that was not stopped. The processes are forked from this one, which has imported everything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets  # noqa: F401 (what a run imports late, once for all of them)
import torch
import torch.distributed.checkpoint.state_dict
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
from linear_head import RESULTS, machine

from dft_lightning.errors import InputError
from dft_lightning.export.checkpoint import open_checkpoint
from dft_lightning.fit import main as command

MODEL = {"model_type": "gpt2", "n_embd": 96, "n_layer": 4, "n_head": 4, "vocab_size": 20, "n_positions": 256}
MODEL |= {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
SHARDS = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}
SHARDS["init_args"] = {"data_parallel_size": 2, "tensor_parallel_size": 1}
KINDS = {"one process": "auto", "ddp": "ddp", "shards": SHARDS, "shards, meanwhile": SHARDS}
HARD_LIMIT = 120.0  # seconds that a run may take


def config(folder: Path, kind: str, steps: int) -> list[str]:
    def rows(number: int, seed: int) -> dict:
        return {"class_path": "dft_lightning.data.ArithmeticRows", "init_args": {"num_rows": number, "seed": seed}}

    saver = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    saver["init_args"] = {
        "dirpath": str(folder / "saved"),
        "every_n_train_steps": 4,
        "save_top_k": 2,
        "monitor": "step",
    }
    saver["init_args"] |= {"mode": "max", "filename": "{step}", "enable_version_counter": False}
    values = {
        "model": {
            "model": MODEL,
            "loss": {"class_path": "dft_lightning.DFTLoss"},
            "optimizer": {"lr": 1e-3},
            "sharding": {"async_save": kind == "shards, meanwhile"},
        },
        "data": {"train": rows(90, 1), "validation": rows(16, 2), "text": {"tokenizer": "asset://arithmetic-base"}},
        "trainer": {
            "max_steps": steps,
            "accelerator": "cpu",
            "devices": 1 if kind == "one process" else 2,
            "strategy": KINDS[kind],
            "accumulate_grad_batches": 2,
            "val_check_interval": 7,
            "check_val_every_n_epoch": None,
            "callbacks": [saver],
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
        },
    }
    values["data"]["batch_size"] = 4
    path = folder / "config.yaml"
    path.write_text(json.dumps(values))
    return ["fit", "--config", str(path), "--ckpt_path", "auto"]


def start(folder: Path, kind: str, steps: int) -> list[int]:
    """Fork the processes of a run, each leader of a session of its own. Returns their numbers."""
    arguments, ranks = config(folder, kind, steps), 1 if kind == "one process" else 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for rank in range(ranks):
        number = os.fork()
        if number == 0:
            os.setsid()
            log = os.open(folder / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if ranks > 1:  # as torchrun starts them
                where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                where |= {
                    "GROUP_RANK": 0,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "TORCHELASTIC_RUN_ID": "kill",
                }
                os.environ.update({name: str(value) for name, value in where.items()})
            os._exit(run(arguments))
        found.append(number)
    return found


def run(arguments: list[str]) -> int:
    """The command, in a process that is to end without this script's own ending."""
    code = 1
    try:
        command(arguments)
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def wait(processes: list[int], limit: float) -> list[int | None]:
    """Statuses of processes (negative for a signal); one that takes longer is killed, and its status ``None``."""
    until, found = time.monotonic() + limit, dict[int, int | None]()
    while len(found) < len(processes) and time.monotonic() < until:
        for number in processes:
            if number not in found:
                ended, status = os.waitpid(number, os.WNOHANG)
                if ended:
                    found[number] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    for number in processes:
        if number not in found:
            os.killpg(number, signal.SIGKILL)
            os.waitpid(number, 0)
    return [found.get(number) for number in processes]


def wait_for(plan: dict, folder: Path, processes: list[int]) -> None:
    """Until it is time to kill; a run that has ended by itself is too late for it."""
    saved, until = folder / "saved", time.monotonic() + HARD_LIMIT
    while not (saved.is_dir() and any(saved.glob("*.ckpt"))):
        time.sleep(0.002)
        if have_ended(processes) or time.monotonic() > until:
            return
    time.sleep(plan["after"])
    while plan["moment"] == "a write" and not is_writing(saved) and not have_ended(processes):
        time.sleep(0.0002)


def is_writing(folder: Path) -> bool:
    return any(not name.endswith(".ckpt") for name in os.listdir(folder))


def have_ended(processes: list[int]) -> bool:
    """Whether nothing runs any more; what has ended is not yet waited for."""
    states = (Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] for number in processes)
    return all(state == "Z" for state in states)


def kill(folder: Path, processes: list[int], plan: dict, chance: random.Random) -> dict:
    """End a run as planned. Returns what was seen."""
    wait_for(plan, folder, processes)
    writing = is_writing(folder / "saved") if (folder / "saved").is_dir() else False
    # A machine that fails takes all ranks; else one dies, and the others have to notice.
    hit = processes if plan["all ranks"] else [chance.choice(processes)]
    begun = time.monotonic()
    for number in hit:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, getattr(signal, plan["signal"]))
    statuses = wait(processes, HARD_LIMIT)
    return {"mid-write": writing, "statuses": statuses, "seconds to end": round(time.monotonic() - begun, 2)}


def content(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint."""
    newest = max((folder / "saved").glob("*.ckpt"), key=step_of)
    if newest.is_dir():
        return {"step": torch.tensor(step_of(newest)), **shards(newest)}
    return dict(tensors(torch.load(newest, weights_only=True), ("state_dict", "optimizer_states", "global_step")))


def step_of(path: Path) -> int:
    return int(path.stem.partition("step=")[2] or -1)


def tensors(value: object, keys: tuple[str, ...] = (), name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, dict):
        for key, each in value.items():
            if not keys or key in keys:
                yield from tensors(each, (), f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, each in enumerate(value):
            yield from tensors(each, (), f"{name}.{i}")
    elif isinstance(value, (torch.Tensor, int, float)):
        yield name, torch.as_tensor(value)


def shards(path: Path) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    wanted = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is meant to be
        load(wanted, storage_reader=FileSystemReader(path), no_dist=True)
    return wanted


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def plans(options: argparse.Namespace, chance: random.Random) -> Iterator[dict]:
    """What is done to each run: every kind, every signal; most of what is killed is writing."""
    signals = ("SIGKILL", "SIGTERM", "SIGKILL", "SIGINT", "SIGKILL")
    for i in range(options.kills):
        kind, name = options.kinds[i % len(options.kinds)], signals[i % len(signals)]
        yield {
            "kind": kind,
            "signal": name,
            "moment": "a write" if (name == "SIGKILL" and chance.random() < 0.7) or i == 0 else "anywhere",
            "after": round(chance.uniform(0, options.within), 3),  # seconds since there is a checkpoint
            "all ranks": kind == "one process" or chance.random() < 0.5,
        }


def kill_one(folder: Path, plan: dict, steps: int, chance: random.Random, expected: dict[str, torch.Tensor]) -> dict:
    for attempt in range(5):  # a run may be over before it is killed
        own = folder / str(attempt)
        own.mkdir(parents=True)
        seen = kill(own, start(own, plan["kind"], steps), plan, chance)
        if any(seen["statuses"]):
            break
        plan = {**plan, "after": plan["after"] / 2}
    whole = [path for path in (own / "saved").glob("*.ckpt") if is_whole(path)]
    again = wait(start(own, plan["kind"], steps), HARD_LIMIT)
    equal = all(status == 0 for status in again) and same(expected, content(own))
    return {**plan, **seen, "whole checkpoints left": len(whole), "went on": again, "same": equal}


def is_whole(path: Path) -> bool:
    try:
        open_checkpoint(path)
    except InputError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--within", type=float, default=2.5, help="seconds after the first checkpoint")
    parser.add_argument("--output", type=Path, default=RESULTS / "kill.json")
    options = parser.parse_args()
    chance, results, expected = random.Random(options.seed), [], {}
    folder = Path(tempfile.mkdtemp(prefix="kill-"))
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    for i, plan in enumerate(plans(options, chance)):
        kind = plan["kind"]
        if kind not in expected:
            (folder / kind).mkdir()
            statuses = wait(start(folder / kind, kind, options.steps), HARD_LIMIT)
            if any(statuses):
                raise SystemExit(f"{kind}: the run that nothing stops ended with {statuses}: see {folder / kind}")
            expected[kind] = content(folder / kind)
        results.append(kill_one(folder / str(i), plan, options.steps, chance, expected[kind]))
        print(json.dumps(results[-1]), flush=True)
    passed = sum(result["same"] for result in results)
    mid_write = sum(result["mid-write"] for result in results)
    print(f"{passed} of {len(results)} runs ended as one that nothing stopped; {mid_write} were killed within a write")
    found = {
        "machine": machine("cpu"),
        "options": {"kills": options.kills, "steps": options.steps, "seed": options.seed},
    }
    options.output.write_text(
        json.dumps({**found, "same": passed, "killed within a write": mid_write, "runs": results}, indent=1) + "\n"
    )
    if passed != len(results):
        raise SystemExit(f"see {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
