"""Time, memory and gradient error of the fused head with DFT, against what else there is.

    python benchmarks/linear_head.py                      # two shapes, bfloat16 and float32; a table and a JSON file
    python benchmarks/linear_head.py --tokens 8192 --hidden 4096 --vocabulary 151936 --dtype bfloat16
    python benchmarks/linear_head.py --beside 2           # times alone, beside two busy processes of two threads each

Without the ``bench`` extra our head is compared with torch's alone. Every measurement is a process of its own. Times
are taken in pairs, the three bare matrix products and the candidate in turn, and the ratio is the median over pairs:
the speed of a shared machine moves by more than the difference between candidates. The gradient's error is against
float64 on full logits. "Extra memory" is the peak beyond inputs, "beyond gradients" is what remains of it without the
returned gradients and, for half precision, a float32 accumulator of the weight's gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
CPU_SHAPES = [(2048, 1024, 50304), (2048, 1536, 151936)]
CUDA_SHAPES = [(8192, 4096, 151936), (16384, 2048, 151936), (16384, 2048, 151665)]
BUSY_SECONDS = 600.0  # of a process beside, at most
PATIENCE = 120.0  # seconds a call may take
SAMPLED_ROWS = 4096  # of the weight's gradient, where its error is measured


# -- candidates: hidden, weight, targets -> mean DFT loss, or log-probs ------------------------------------------------


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from dft_lightning import DFTLoss
    from dft_lightning.ops import linear_token_loss

    return linear_token_loss(hidden, weight, targets, DFTLoss(), normalizer=float(len(targets))).loss


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probs by full logits, softmax in float32."""
    return F.linear(hidden, weight).float().log_softmax(-1).gather(-1, targets.unsqueeze(-1))


def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probs."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    size = _CHUNKED_LOGPROB_CHUNK_SIZE
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, size, None, 1.0, ())[0]


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probs."""
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options).float()


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(use_token_scaling=True)(weight, hidden, targets)


def cce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probs."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none").float()


Candidate = Callable[[Tensor, Tensor, Tensor], Tensor]


def dft_of(log_probs: Candidate) -> Candidate:
    """The mean DFT loss of a head that gives log-probs."""

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        log_prob = log_probs(hidden, weight, targets)
        return -(log_prob.detach().exp() * log_prob).mean()

    return loss


CANDIDATES: dict[str, tuple[Candidate, str | None, tuple[str, ...]]] = {
    "dft_lightning": (ours, None, ("cpu", "cuda")),
    "plain": (dft_of(plain), None, ("cpu", "cuda")),
    "trl": (dft_of(trl), "trl", ("cpu", "cuda")),
    "torch chunked": (dft_of(torch_chunked), None, ("cpu", "cuda")),
    "liger": (liger, "liger-kernel", ("cuda",)),
    "cce": (dft_of(cce), "cut-cross-entropy", ("cuda",)),
}


# -- one measurement, in its own process -----------------------------------------------------------------------------


def inputs(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """The same for every process: hidden states of unit variance, small weights, uniform targets."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, options.dtype)
    hidden = torch.randn(options.tokens, options.hidden, generator=generator).to(dtype)
    weight = (0.02 * torch.randn(options.vocabulary, options.hidden, generator=generator)).to(dtype)
    targets = torch.randint(0, options.vocabulary, (options.tokens,), generator=generator)
    device = options.device
    return hidden.to(device).requires_grad_(), weight.to(device).requires_grad_(), targets.to(device)


def bare_products(hidden: Tensor, weight: Tensor) -> object:
    """The three matrix products that no head can do without, into buffers that are kept."""
    h, w = hidden.detach(), weight.detach()
    logits = torch.empty(len(h), len(w), dtype=h.dtype, device=h.device)
    by_hidden, by_weight = torch.empty_like(h), torch.empty_like(w)

    def run() -> None:
        torch.mm(h, w.t(), out=logits)
        torch.mm(logits, w, out=by_hidden)
        torch.mm(logits.t(), h, out=by_weight)

    return run


def seconds(call: object, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_time(options: argparse.Namespace) -> dict:
    hidden, weight, targets = inputs(options)
    bare = bare_products(hidden, weight)
    candidate = CANDIDATES[options.candidate][0]

    def step() -> None:
        hidden.grad = weight.grad = None
        candidate(hidden, weight, targets).backward()

    pairs = [(seconds(bare, options.device), seconds(step, options.device))]  # warms up; kept if it is all there is
    started = time.perf_counter()
    while len(pairs) <= options.pairs and (len(pairs) < 4 or time.perf_counter() - started < options.budget):
        pairs.append((seconds(bare, options.device), seconds(step, options.device)))
        if pairs[0][1] > options.budget:
            break
    pairs = pairs[1:]
    middle = len(pairs) // 2
    return {
        "seconds": sorted(own for _, own in pairs)[middle],
        "bare_seconds": sorted(bare for bare, _ in pairs)[middle],
        "ratio_to_bare": sorted(own / bare for bare, own in pairs)[middle],
        "pairs": len(pairs),
    }


def busy() -> None:
    """What another process of two torch threads does: products and operations on their results."""
    torch.set_num_threads(2)
    a, out = torch.randn(1024, 1024), torch.empty(1024, 1024)
    print("begun", flush=True)
    end = time.monotonic() + BUSY_SECONDS
    while time.monotonic() < end and os.getppid() != 1:
        torch.mm(a, a, out=out).sub_(out.amax(-1, keepdim=True)).exp_()


@contextmanager
def beside(number: int) -> Iterator[None]:
    """So many busy processes meanwhile."""
    command = [sys.executable, __file__, "--measurement", "busy"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(number)]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # it has begun
        yield
        if ended := [process.returncode for process in processes if process.poll() is not None]:
            raise SystemExit(f"{len(ended)} of the busy processes ended before the measurement: take fewer --pairs")
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def resident(field: str) -> int:
    """Bytes of resident memory, now (``VmRSS``) or at its peak (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure_memory(options: argparse.Namespace) -> dict:
    """Of the first call in a fresh process."""
    hidden, weight, targets = inputs(options)
    candidate = CANDIDATES[options.candidate][0]
    # A tiny call first loads libraries and starts threads, which are not the head's memory.
    few = [tensor.detach()[:64].clone() for tensor in (hidden, weight)]
    candidate(few[0].requires_grad_(), few[1].requires_grad_(), targets[:64] % 64).backward()
    if options.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        candidate(hidden, weight, targets).backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = resident("VmRSS")
        candidate(hidden, weight, targets).backward()
        peak = resident("VmHWM") - before
    half = hidden.dtype != torch.float32
    gradients = hidden.grad.nbytes + weight.grad.nbytes + (weight.numel() * 4 if half else 0)
    return {"extra_memory": peak, "extra_memory_beyond_gradients": max(0, peak - gradients)}


def reference(options: argparse.Namespace) -> None:
    """float64 gradients by hand, on full logits a few tokens at a time, into a file."""
    hidden, weight, targets = (tensor.detach() for tensor in inputs(options))
    rows = sampled_rows(targets, options.vocabulary)
    weight64 = weight.double()
    by_hidden = torch.empty_like(hidden, dtype=torch.float64)
    by_rows = torch.zeros(len(rows), options.hidden, dtype=torch.float64, device=hidden.device)
    for start in range(0, options.tokens, 256):
        part, target = hidden[start : start + 256].double(), targets[start : start + 256, None]
        gradient = (part @ weight64.t()).softmax(-1)
        p = gradient.gather(-1, target)
        gradient.scatter_add_(-1, target, torch.full_like(p, -1.0))
        gradient *= p / options.tokens
        by_hidden[start : start + 256] = gradient @ weight64
        by_rows += gradient[:, rows].t() @ part
    torch.save((by_hidden.cpu(), by_rows.cpu()), options.reference)


def sampled_rows(targets: Tensor, vocabulary: int) -> Tensor:
    """Rows of the weight's gradient: targets, and others."""
    spread = torch.linspace(0, vocabulary - 1, SAMPLED_ROWS // 2, device=targets.device).long()
    return torch.cat([targets[: SAMPLED_ROWS // 2], spread]).unique()


def measure_error(options: argparse.Namespace) -> dict:
    hidden, weight, targets = inputs(options)
    by_hidden, by_rows = torch.load(options.reference)
    CANDIDATES[options.candidate][0](hidden, weight, targets).backward()
    rows = sampled_rows(targets, options.vocabulary)

    def relative(own: Tensor, exact: Tensor) -> float:
        return float((own.double().cpu() - exact).norm() / exact.norm())

    return {
        "hidden_gradient_error": relative(hidden.grad, by_hidden),
        "weight_gradient_error": relative(weight.grad[rows], by_rows),
    }


MEASUREMENTS = {"time": measure_time, "memory": measure_memory, "error": measure_error}


# -- the whole -------------------------------------------------------------------------------------------------------


def in_own_process(options: argparse.Namespace, measurement: str, candidate: str, reference_file: str) -> dict:
    arguments = [sys.executable, __file__, "--measurement", measurement, "--candidate", candidate]
    arguments += ["--reference", reference_file]
    for name in ("tokens", "hidden", "vocabulary", "dtype", "device", "pairs", "budget"):
        arguments += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"failed": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}


def available(device: str) -> dict[str, str]:
    """Candidates that run here, and why the others do not."""
    reasons = {}
    for name, (_, package, devices) in CANDIDATES.items():
        reasons[name] = ""
        if device not in devices:
            reasons[name] = f"runs on {', '.join(devices)} alone"
        elif package is not None:
            reasons[name] = missing(package)
    return reasons


def missing(package: str) -> str:
    """That a package is not installed, or nothing."""
    try:
        version(package)
    except PackageNotFoundError:
        return f"{package} is not installed (pip install -e '.[bench]')"
    return ""


def too_slow(options: argparse.Namespace, name: str, results: list[dict]) -> str:
    """A reason to leave a candidate out, from its time at another shape of the same dtype."""
    for row in results:
        if row["candidate"] == name and row["dtype"] == options.dtype and "seconds" in row:
            expected = row["seconds"] * options.tokens * options.hidden * options.vocabulary / row["size"]
            if expected > PATIENCE:
                return f"would take about {expected:.0f} s a call"
    return ""


def one_shape(options: argparse.Namespace, earlier: list[dict]) -> list[dict]:
    shape = f"N={options.tokens} H={options.hidden} V={options.vocabulary} {options.dtype}"
    results = []
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "reference.pt")
        if not options.beside:
            in_own_process(options, "reference", "plain", file)
        for name, reason in available(options.device).items():
            if name not in options.candidates:
                continue
            reason = reason or too_slow(options, name, earlier)
            if reason:
                print(f"{shape} {name}: skipped, {reason}", flush=True)
                continue
            size = options.tokens * options.hidden * options.vocabulary
            row = {"shape": shape, "candidate": name, "dtype": options.dtype, "size": size}
            for measurement in ["time"] if options.beside else MEASUREMENTS:
                with beside(options.beside):
                    row |= in_own_process(options, measurement, name, file)
            results.append(row)
            print(f"{shape} {name}: {row}", file=sys.stderr, flush=True)
    print_table(shape, results)
    return results


def print_table(shape: str, results: list[dict]) -> None:
    own = next((row for row in results if row["candidate"] == "dft_lightning" and "ratio_to_bare" in row), None)
    print(f"\n{shape}")
    print(f"{'':14} {'s':>8} {'x bare':>7} {'x ours':>7} {'MiB':>7} {'beyond':>7} {'dh error':>9} {'dW error':>9}")
    for row in results:
        if "failed" in row:
            print(f"{row['candidate']:14} failed: {row['failed']}")
            continue
        slower = row["ratio_to_bare"] / own["ratio_to_bare"] if own else float("nan")
        line = f"{row['candidate']:14} {row['seconds']:8.3f} {row['ratio_to_bare']:7.2f} {slower:7.2f}"
        if "extra_memory" in row:
            line += f" {row['extra_memory'] / 2**20:7.0f} {row['extra_memory_beyond_gradients'] / 2**20:7.0f}"
            line += f" {row['hidden_gradient_error']:9.2e} {row['weight_gradient_error']:9.2e}"
        print(line, flush=True)


def machine(device: str) -> dict:
    packages = {}
    for name in ("torch", "triton", "trl", "transformers", "liger-kernel", "cut-cross-entropy", "dft-lightning"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    name = torch.cuda.get_device_name() if device == "cuda" else f"{processor}, {torch.get_num_threads()} threads"
    return {"device": name, "python": platform.python_version(), "packages": packages, "date": time.strftime("%F")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="one shape instead of the device's own set")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, default=11, help="timed pairs of bare products and candidate")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds after which no further pair is begun")
    parser.add_argument("--beside", type=int, default=0, help="busy processes beside each; times alone are taken then")
    parser.add_argument("--candidates", nargs="*", choices=CANDIDATES, default=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--output", type=Path, help="JSON file; benchmarks/results/linear_head_DEVICE.json by default")
    parser.add_argument("--measurement", help=argparse.SUPPRESS)
    parser.add_argument("--candidate", help=argparse.SUPPRESS)
    parser.add_argument("--reference", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measurement == "reference":
        reference(options)
        return
    if options.measurement == "busy":
        busy()
        return
    if options.measurement:
        print(json.dumps(MEASUREMENTS[options.measurement](options)))
        return
    import dft_lightning.__main__  # noqa: F401 (what the command tells torch and OpenMP, here for every candidate)

    given = (options.tokens, options.hidden, options.vocabulary)
    if any(given) and not all(given):
        parser.error("--tokens, --hidden and --vocabulary go together")
    shapes = [given] if all(given) else CUDA_SHAPES if options.device == "cuda" else CPU_SHAPES
    dtypes = [options.dtype] if options.dtype else ["bfloat16"] if options.device == "cuda" else ["bfloat16", "float32"]
    name = f"linear_head_{options.device}" + (f"_beside_{options.beside}" if options.beside else "")
    output = options.output or RESULTS / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict] = []
    for dtype in dtypes:
        for tokens, hidden, vocabulary in shapes:
            options.tokens, options.hidden, options.vocabulary, options.dtype = tokens, hidden, vocabulary, dtype
            results += one_shape(options, results)
            output.write_text(json.dumps({**machine(options.device), "results": results}, indent=2) + "\n")
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
