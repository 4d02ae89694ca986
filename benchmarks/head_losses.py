"""What each token loss costs in the fused head, over the three bare matrix products.

    python benchmarks/head_losses.py [--tokens 1024 --hidden 1024 --vocabulary 50304 --dtype float32]

Losses take turns, each with its own bare products just before it; medians of the turns' ratios. The reference of
AnchoredLoss is a head of the same size, whose product is part of its time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dft_lightning import (
    AnchoredLoss,
    ChordPhiLoss,
    CrossEntropyLoss,
    DEFTLoss,
    DFTLoss,
    EAFTLoss,
    FocalLoss,
    ImportanceWeightedLoss,
    PowerLoss,
    ProximalLoss,
    SequenceDFTLoss,
    ThresholdLoss,
    TokenLoss,
)
from dft_lightning.ops import ReferenceHead, linear_token_loss

RESULTS = Path(__file__).with_name("results")
LOSSES: dict[str, TokenLoss] = {
    "CrossEntropyLoss": CrossEntropyLoss(),
    "DFTLoss": DFTLoss(),
    "FocalLoss": FocalLoss(),
    "PowerLoss": PowerLoss(0.5),
    "ThresholdLoss": ThresholdLoss(0.1),
    "ChordPhiLoss": ChordPhiLoss(),
    "ProximalLoss": ProximalLoss(),
    "ImportanceWeightedLoss, token": ImportanceWeightedLoss("token"),
    "DEFTLoss": DEFTLoss(),
    "EAFTLoss": EAFTLoss(),
    "EAFTLoss, whole entropy": EAFTLoss(top_k=None),
    "SequenceDFTLoss": SequenceDFTLoss(),
    "ImportanceWeightedLoss, sequence": ImportanceWeightedLoss(),
    "AnchoredLoss": AnchoredLoss(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/head_losses_DEVICE.json")
    options = parser.parse_args()
    output = options.output or RESULTS / f"head_losses_{options.device}.json"
    run = Run(options)
    ratios: dict[str, list[float]] = {name: [] for name in LOSSES}
    products: list[float] = []
    for turn in range(options.turns + 1):  # the first warms up
        for name, loss in LOSSES.items():
            bare, taken = (timed(call, options.device) for call in (run.bare, lambda loss=loss: run.loss(loss)))
            if turn:
                ratios[name].append(taken / bare)
                products.append(bare)
    medians = {name: round(statistics.median(values), 3) for name, values in ratios.items()}
    for name, ratio in medians.items():
        print(f"{name:34} {ratio:.2f} times the bare products")
    place = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    shape = {name: getattr(options, name) for name in ("tokens", "hidden", "vocabulary", "dtype", "turns")}
    found = {"device": place, "torch": torch.__version__, "date": str(datetime.date.today()), **shape}
    found |= {"bare_seconds": round(statistics.median(products), 4), "times_the_bare_products": medians}
    output.write_text(json.dumps(found, indent=2) + "\n")


class Run:
    """Inputs, and the two things that are timed."""

    def __init__(self, options: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        kind = {"dtype": getattr(torch, options.dtype), "device": options.device}
        tokens, hidden, vocabulary = options.tokens, options.hidden, options.vocabulary

        def drawn(rows: int, factor: float) -> torch.Tensor:
            return (factor * torch.randn(rows, hidden, generator=generator)).to(**kind)

        self.hidden, self.weight = drawn(tokens, 1.0).requires_grad_(), drawn(vocabulary, 0.02).requires_grad_()
        self.targets = torch.randint(0, vocabulary, (tokens,), generator=generator).to(options.device)
        self.reference = ReferenceHead(drawn(tokens, 1.0), drawn(vocabulary, 0.02))
        place = options.device
        self.inputs = {
            "sequence_index": (torch.arange(tokens) // 256).to(place),
            "reference_log_prob": torch.full((tokens,), -10.0, device=place),
        }
        self.logits = torch.empty(tokens, vocabulary, **kind)
        self.products = torch.empty_like(self.hidden), torch.empty_like(self.weight)

    def bare(self) -> None:
        """The three matrix products that no head can do without."""
        hidden, weight = self.hidden.detach(), self.weight.detach()
        torch.mm(hidden, weight.t(), out=self.logits)
        torch.mm(self.logits, weight, out=self.products[0])
        torch.mm(self.logits.t(), hidden, out=self.products[1])

    def loss(self, loss: TokenLoss) -> None:
        """Forward and backward."""
        self.hidden.grad = self.weight.grad = None
        output = linear_token_loss(
            self.hidden,
            self.weight,
            self.targets,
            loss,
            token_inputs=self.inputs,
            reference=self.reference,
            normalizer=float(len(self.targets)),
        )
        output.loss.backward()


def timed(call: Callable[[], None], device: str) -> float:
    """Seconds of a call."""
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
