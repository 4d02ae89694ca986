"""What a gradient threshold does to the fused head on a real model's weights and hidden states: time, errors, bounds.

    python ../shared/get_smollm2.py smollm2
    python benchmarks/gradient_threshold.py --model smollm2 --rows ../shared/data/gsm8k_train.jsonl
    python benchmarks/gradient_threshold.py --plot docs/gradient_threshold.svg

Needs a model folder with tokenizer, and rows with ``question`` and ``answer``; hidden states are as in ``head_error``.
Times are of forward and backward in bfloat16 and on huge pages, each candidate after its own three bare matrix
products; the ratio is the median over rounds, after one that warms up. What is right for errors is the gradient in
float32 of what was not rounded, so that the rounding of the inputs is part of each. ``--plot`` draws all results that
are there, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from head_error import Problem
from linear_head import CANDIDATES, RESULTS, bare_products, machine, missing, seconds
from torch import Tensor

import dft_lightning.__main__  # noqa: F401 (large tensors on huge pages for all, as the command has them)
from dft_lightning import CrossEntropyLoss, DFTLoss, TokenLoss
from dft_lightning.ops import TokenOutput, linear_token_loss

LOSSES: dict[str, TokenLoss] = {"CE": CrossEntropyLoss(), "DFT": DFTLoss()}
EXPONENTS = (10, 12, 14, 16)
POINTS = 60  # of a plot's curve


class Leaves:
    """Hidden states, weight and targets in a dtype, and what a head makes of them."""

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self.hidden, self.weight = (
            each.to(dtype, copy=True).requires_grad_() for each in (problem.hidden, problem.weight)
        )
        self.targets = problem.targets

    def run(self, loss: TokenLoss, threshold: float) -> TokenOutput:
        """Forward and backward of the fused head."""
        self.hidden.grad = self.weight.grad = None
        output = linear_token_loss(
            self.hidden, self.weight, self.targets, loss, normalizer=float(len(self.targets)),
            gradient_threshold=threshold,
        )  # fmt: skip
        output.loss.backward()
        return output

    def run_other(self, name: str) -> None:
        """Of another head with DFT."""
        self.hidden.grad = self.weight.grad = None
        CANDIDATES[name][0](self.hidden, self.weight, self.targets).backward()

    @property
    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of the last run, in float32."""
        assert self.hidden.grad is not None
        assert self.weight.grad is not None
        return self.hidden.grad.float(), self.weight.grad.float()


def times(leaves: Leaves, rounds: int, others: list[str]) -> dict[str, float]:
    """Seconds of the bare products, and of each candidate in these."""
    bare = bare_products(leaves.hidden, leaves.weight)
    calls: dict[str, Callable[[], object]] = {}
    for name, loss in LOSSES.items():
        for exponent in (None, *EXPONENTS):
            threshold = 0.0 if exponent is None else 2.0**-exponent
            calls[f"{name}, {of(exponent)}"] = partial(leaves.run, loss, threshold)
    for name in others:
        package = CANDIDATES[name][1]
        if package is None or not missing(package):
            calls[name] = partial(leaves.run_other, name)
    found: dict[str, list[float]] = {name: [] for name in calls}
    of_products = []
    for number in range(rounds + 1):
        for name, call in calls.items():
            if name in others and number > 2:  # many times as long
                continue
            products, taken = seconds(bare, "cpu"), seconds(call, "cpu")
            if number:
                of_products.append(products)
                found[name].append(taken / products)
    ratios = {name: round(statistics.median(each), 3) for name, each in found.items()}
    return {"bare_seconds": round(statistics.median(of_products), 4), **ratios}


def of(exponent: int | None) -> str:
    """A threshold in a table."""
    return "exact" if exponent is None else f"2^-{exponent}"


def power(exponent: int) -> str:
    """A threshold in a plot."""
    return "2\N{SUPERSCRIPT MINUS}" + str(exponent).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def relative(found: Tensor, right: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found - right).norm() / right.norm())


def errors(problem: Problem, leaves: Leaves, name: str) -> dict[str, dict[str, float]]:
    """Of both gradients with each threshold: against float32; against the exact head, and the bounds of that."""
    loss, right = LOSSES[name], Leaves(problem, torch.float32)
    right.run(loss, 0.0)
    leaves.run(loss, 0.0)
    exact = leaves.gradients
    found = {"exact": {f"d{letter}": relative(a, b) for letter, a, b in zip("hW", exact, right.gradients, strict=True)}}
    longest, lengths = problem.weight.norm(dim=1).max(), problem.hidden.norm(dim=1)
    for exponent in EXPONENTS:
        output = leaves.run(loss, 2.0**-exponent)
        own = leaves.gradients
        dropped = output.dropped / len(problem.targets)  # type: ignore[operator]
        found[of(exponent)] = {
            **{f"d{letter}": relative(a, b) for letter, a, b in zip("hW", own, right.gradients, strict=True)},
            **{f"d{letter} left out": relative(a, b) for letter, a, b in zip("hW", own, exact, strict=True)},
            "dh bound": float((dropped * longest).norm() / exact[0].norm()),
            "dW bound": float((dropped * lengths).sum() / exact[1].norm()),
            "kept": float((own[1] != 0).any(1).float().mean()),
            "dropped": float(output.dropped.mean()),  # type: ignore[union-attr]
        }
    return found


def largest_gradients(problem: Problem) -> dict[str, list[list[float]]]:
    """The size of each class's largest gradient over the tokens, in order: ``[share of the classes, size]``."""
    found = {name: torch.zeros(len(problem.weight)) for name in LOSSES}
    for rows in torch.arange(len(problem.targets)).split(128):
        gradient = (problem.hidden[rows] @ problem.weight.t()).softmax(-1)
        of_target = gradient.gather(1, problem.targets[rows].unsqueeze(1))
        gradient.scatter_(1, problem.targets[rows].unsqueeze(1), of_target - 1)
        gradient.abs_()
        for name, weight in (("CE", 1.0), ("DFT", of_target)):
            found[name] = torch.maximum(found[name], (gradient * weight).amax(0))
    places = [int(len(problem.weight) ** (i / (POINTS - 1))) - 1 for i in range(POINTS)]
    ordered = {name: sizes.sort(descending=True).values.tolist() for name, sizes in found.items()}
    return {
        name: [[(place + 1) / len(sizes), sizes[place]] for place in sorted(set(places))]
        for name, sizes in ordered.items()
    }


def plot(results: dict[str, dict], path: Path) -> None:
    """Which classes are kept, and what the others' absence does to both gradients, with its bounds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, NullLocator

    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.5), constrained_layout=True)
    for color, (model, found) in zip(("tab:blue", "tab:orange"), results.items(), strict=False):
        for name, style in (("CE", "--"), ("DFT", "-")):
            shares, sizes = zip(*found["largest"][name], strict=True)
            axes[0].loglog(shares, sizes, style, color=color, label=f"{model}, {name}")
            each = found["errors"][name]
            exponents = [2.0**-exponent for exponent in EXPONENTS]
            for axis, letter in zip(axes[1:], "hW", strict=True):
                values = {
                    what: [each[of(e)][f"d{letter}{what}"] for e in EXPONENTS] for what in (" left out", " bound")
                }
                axis.loglog(exponents, values[" left out"], style, color=color, marker="o", label=f"{model}, {name}")
                axis.loglog(exponents, values[" bound"], style, color=color, alpha=0.35)
                if name == "DFT":
                    axis.axhline(each["exact"][f"d{letter}"], color=color, lw=0.8, ls=":")
    for exponent in EXPONENTS:
        axes[0].axhline(2.0**-exponent, color="grey", lw=0.6)
        axes[0].text(1.2e-5, 2.0**-exponent * 1.15, power(exponent), color="grey", fontsize=7)
    axes[0].set(xlabel="share of the classes", ylabel="largest gradient at any token", ylim=(1e-7, 2), xlim=(1e-5, 1))
    axes[0].set_title("Classes above the threshold are kept", fontsize=9)
    for axis, what in zip(axes[1:], ("hidden states", "weight"), strict=True):
        axis.set(xlabel="threshold", ylabel="error, of the gradient's norm")
        axis.set_xscale("log", base=2)
        axis.set_title(f"Gradient of the {what}\n(pale: bound; dotted: bfloat16)", fontsize=9)
        axis.set_xticks([2.0**-exponent for exponent in EXPONENTS], [power(exponent) for exponent in EXPONENTS])
        axis.xaxis.set_minor_locator(NullLocator())
    axes[0].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    axes[0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder with weights and tokenizer")
    parser.add_argument("--rows", type=Path, help="JSON lines with question and answer")
    parser.add_argument("--tokens", type=int, default=1645, help="of answers")
    parser.add_argument("--rounds", type=int, default=7, help="of ours; others have two")
    others = ["plain", "trl", "torch chunked"]
    parser.add_argument("--others", nargs="*", choices=others, default=others, help="heads to compare with")
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/gradient_threshold_MODEL.json")
    parser.add_argument("--plot", type=Path, help="draw the results that are there")
    options = parser.parse_args()
    if options.plot is not None:
        files = sorted((options.output or RESULTS).glob("gradient_threshold_*.json"), reverse=True)
        plot({json.loads(file.read_text())["model"]: json.loads(file.read_text()) for file in files}, options.plot)
        return
    if options.model is None or options.rows is None:
        parser.error("give --model and --rows, or --plot")
    name = options.model.resolve().name
    problem = Problem(options)
    leaves = Leaves(problem, torch.bfloat16)
    found = {**machine("cpu"), "model": name, "tokens": len(problem.targets), "vocabulary": len(problem.weight)}
    found["times_the_bare_products"] = times(leaves, options.rounds, options.others)
    for key, value in found["times_the_bare_products"].items():
        print(f"{key:20} {value:.3f}", flush=True)
    found["errors"] = {loss: errors(problem, leaves, loss) for loss in LOSSES}
    for loss, by_threshold in found["errors"].items():
        for threshold, values in by_threshold.items():
            print(
                f"{loss:4} {threshold:6}" + "".join(f" {key} {value:.1e}" for key, value in values.items()), flush=True
            )
    found["largest"] = largest_gradients(problem)
    assert all(math.isfinite(size) for each in found["largest"].values() for _, size in each)
    output = options.output or RESULTS / f"gradient_threshold_{name}.json"
    output.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
