"""What each token loss costs in the fused head, over the three bare matrix products.

    python benchmarks/head_losses.py [--tokens 1024 --hidden 1024 --vocabulary 50304]
    python benchmarks/head_losses.py --dtype bfloat16

Losses take turns, each with its own bare products just before it; medians of the turns' ratios. The reference model's
head is of the same size, and its product part of the time of a loss that reads its distribution.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from linear_head import RESULTS, bare_products, inputs, seconds

import dft_lightning.__main__  # noqa: F401 (large tensors on huge pages, as the command has them)
from dft_lightning import (
    AnchoredLoss,
    ChordPhiLoss,
    CrossEntropyLoss,
    DEFTLoss,
    DFTLoss,
    EAFTLoss,
    FocalLoss,
    FromReference,
    GEMLoss,
    ImportanceWeightedLoss,
    InfoSFTLoss,
    PowerLoss,
    PriorWeightedLoss,
    ProximalLoss,
    RectifiedLoss,
    ReferenceKLLoss,
    SEDSFTLoss,
    SequenceDFTLoss,
    Statistic,
    TargetSFTLoss,
    ThresholdLoss,
    TokenLoss,
    TokenStats,
    TrustRegionLoss,
)
from dft_lightning.ops import ReferenceHead, linear_token_loss


def margin(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How far the target is below the likeliest token."""
    return logits.amax(-1) - logits.gather(-1, targets[:, None])[:, 0]


class NearTheTop(TokenLoss):
    """With a statistic of its own."""

    needs = (Statistic.of(margin),)

    def token_loss(self, stats: TokenStats) -> torch.Tensor:
        return -torch.exp(-stats.margin) * stats.log_prob


LOSSES: dict[str, TokenLoss] = {
    "CrossEntropyLoss": CrossEntropyLoss(),
    "DFTLoss": DFTLoss(),
    "FocalLoss": FocalLoss(),
    "PowerLoss": PowerLoss(0.5),
    "ThresholdLoss": ThresholdLoss(0.1),
    "ChordPhiLoss": ChordPhiLoss(),
    "InfoSFTLoss": InfoSFTLoss(),
    "TrustRegionLoss": TrustRegionLoss(),
    "RectifiedLoss": RectifiedLoss(),
    "ProximalLoss": ProximalLoss(),
    "PriorWeightedLoss": PriorWeightedLoss(),
    "FromReference": FromReference(PowerLoss(0.5)),
    "ImportanceWeightedLoss, token": ImportanceWeightedLoss("token"),
    "DEFTLoss": DEFTLoss(),
    "EAFTLoss": EAFTLoss(),
    "EAFTLoss, whole entropy": EAFTLoss(top_k=None),
    "SequenceDFTLoss": SequenceDFTLoss(),
    "ImportanceWeightedLoss, sequence": ImportanceWeightedLoss(),
    "GEMLoss": GEMLoss(),
    "GEMLoss, logsigmoid": GEMLoss(form="logsigmoid"),
    "SEDSFTLoss": SEDSFTLoss(threshold=0.9),
    "a statistic of one's own": NearTheTop(),
    "AnchoredLoss": AnchoredLoss(),
    "ReferenceKLLoss": ReferenceKLLoss(),
    "ReferenceKLLoss, reverse": ReferenceKLLoss("reverse"),
    "TargetSFTLoss": TargetSFTLoss(eta=0.5),
    "PriorWeightedLoss, mass": PriorWeightedLoss(form="mass"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/head_losses_DEVICE_DTYPE.json")
    options = parser.parse_args()
    output = options.output or RESULTS / f"head_losses_{options.device}_{options.dtype}.json"
    run, bare = loss_call(options)
    ratios: dict[str, list[float]] = {name: [] for name in LOSSES}
    products: list[float] = []
    for turn in range(options.turns + 1):  # the first warms up
        for name, loss in LOSSES.items():
            bare_taken, taken = (seconds(call, options.device) for call in (bare, partial(run, loss)))
            if turn:
                ratios[name].append(taken / bare_taken)
                products.append(bare_taken)
    medians = {name: round(statistics.median(values), 3) for name, values in ratios.items()}
    for name, ratio in medians.items():
        print(f"{name:34} {ratio:.2f} times the bare products")
    place = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    shape = {name: getattr(options, name) for name in ("tokens", "hidden", "vocabulary", "dtype", "turns")}
    found = {"device": place, "torch": torch.__version__, "date": str(datetime.date.today()), **shape}
    found |= {"bare_seconds": round(statistics.median(products), 4), "times_the_bare_products": medians}
    output.write_text(json.dumps(found, indent=2) + "\n")


def loss_call(options: argparse.Namespace) -> tuple[Callable[[TokenLoss], None], Callable[[], None]]:
    """Forward and backward of a loss, and the bare products of the same inputs."""
    hidden, weight, targets = inputs(options)
    count, place = len(targets), targets.device
    reference = ReferenceHead(hidden.detach().flip(0), weight.detach().flip(0))
    given = {
        "sequence_index": (torch.arange(count) // 256).to(place),
        "reference_log_prob": torch.full((count,), -10.0, device=place),
    }

    def run(loss: TokenLoss) -> None:
        hidden.grad = weight.grad = None
        output = linear_token_loss(
            hidden, weight, targets, loss, token_inputs=given, reference=reference, normalizer=float(count)
        )
        output.loss.backward()

    return run, bare_products(hidden, weight)


if __name__ == "__main__":
    main()
