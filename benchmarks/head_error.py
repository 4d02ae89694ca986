"""Errors of heads in bfloat16 on a real model's weights and hidden states: log-probs, statistics, gradients.

    python ../shared/get_smollm2.py smollm2
    python benchmarks/head_error.py --model smollm2 --rows ../shared/data/gsm8k_train.jsonl

Needs a model folder with tokenizer, and rows with ``question`` and ``answer``. Hidden states of the answers' tokens are
the model's own in float32; every head is given them and the weight in bfloat16. What is right is computed in float64
from what was not rounded, so that the rounding of the inputs is part of every error: ``float32 logits`` shows how large
that part is. A reference model, where a loss asks for one, is the model with hidden states moved by a twentieth.

Log-probs and statistics: root mean square of the differences, in nats (``sum_squared_prob`` has no unit). Gradients:
the norm of the difference over the norm; they are bfloat16, as the leaves are, but for ``mixed``, where the weight is
float32 under autocast. TRL's, torch's and Liger's heads know losses of the log-prob alone; Liger's needs CUDA, and is
here by its formulas.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from head_losses import LOSSES
from linear_head import RESULTS, machine, missing, plain, torch_chunked, trl
from torch import Tensor

from dft_lightning import CrossEntropyLoss, TokenLoss
from dft_lightning.losses import Statistic, TokenStats
from dft_lightning.ops import ReferenceHead, linear_token_loss, logits_token_loss
from dft_lightning.ops.call import TokenOutput

LOSSES = {"CrossEntropyLoss, smoothed": CrossEntropyLoss(0.1), **LOSSES}
STATISTICS = ("entropy", "mean_log_prob", "sum_squared_prob", Statistic("top_k_entropy", k=10), "reference_kl")
NAMES = ("log_prob", "entropy", "mean_log_prob", "sum_squared_prob", "top_k_entropy", "reference_kl")


class Problem:
    """Hidden states, weight and targets of a real model, a reference, and what losses are given from outside."""

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        hidden, targets = [], []
        with options.rows.open() as rows, torch.no_grad():
            for line in rows:
                row = json.loads(line)
                prompt = tokenizer(row["question"] + "\n").input_ids
                ids = torch.tensor([prompt + tokenizer(row["answer"], add_special_tokens=False).input_ids])
                states = model.get_decoder()(ids).last_hidden_state[0]
                hidden.append(states[len(prompt) - 1 : -1])
                targets.append(ids[0, len(prompt) :])
                if sum(map(len, targets)) >= options.tokens:
                    break
        sizes = torch.tensor([len(each) for each in targets])
        self.hidden, self.targets = (torch.cat(each)[: options.tokens] for each in (hidden, targets))
        self.weight = model.get_output_embeddings().weight.detach()
        noise = torch.randn(self.hidden.shape, generator=torch.Generator().manual_seed(0))
        self.reference = self.hidden * (1 + 0.05 * noise)
        reference = (self.reference.double() @ self.weight.double().t()).log_softmax(-1)
        self.given = {
            "sequence_index": torch.arange(len(sizes)).repeat_interleave(sizes)[: options.tokens],
            "reference_log_prob": reference.gather(-1, self.targets.unsqueeze(-1)).squeeze(-1).float(),
        }


Head = Callable[[Problem, Tensor, Tensor, TokenLoss], TokenOutput]


def ours(problem: Problem, hidden: Tensor, weight: Tensor, loss: TokenLoss) -> TokenOutput:
    reference = ReferenceHead(problem.reference.to(hidden.dtype), weight.detach())
    return linear_token_loss(
        hidden, weight, problem.targets, loss, token_inputs=problem.given, reference=reference,
        statistics=extra(loss), normalizer=float(len(problem.targets)),
    )  # fmt: skip


def mixed(head: Head) -> Head:
    """Of a weight in float32, as ``bf16-mixed`` has it."""

    def under_autocast(problem: Problem, hidden: Tensor, weight: Tensor, loss: TokenLoss) -> TokenOutput:
        with torch.autocast("cpu", torch.bfloat16):
            return head(problem, hidden, weight, loss)

    return under_autocast


def extra(loss: TokenLoss) -> list[Statistic | str]:
    """What is looked at beyond what a loss needs; one call computes one entropy of the likeliest."""
    return [] if any(getattr(need, "name", need) == "top_k_entropy" for need in loss.needs) else list(STATISTICS)


def full(dtype: torch.dtype) -> Head:
    """Logits as a whole, in a dtype, of what the head is given."""

    def head(problem: Problem, hidden: Tensor, weight: Tensor, loss: TokenLoss) -> TokenOutput:
        with torch.autocast("cpu", enabled=False):
            logits, beside = (
                F.linear(each.to(hidden.dtype).to(dtype), of_head.to(hidden.dtype).to(dtype))
                for each, of_head in ((hidden, weight), (problem.reference, weight.detach()))
            )
        return logits_token_loss(
            logits.unsqueeze(1), problem.targets.unsqueeze(1), loss, reference_logits=beside.unsqueeze(1),
            sequence_index=problem.given["sequence_index"].unsqueeze(1),
            reference_log_prob=problem.given["reference_log_prob"].to(dtype).unsqueeze(1),
            statistics=extra(loss), normalizer=float(len(problem.targets)),
        )  # fmt: skip

    return head


def of_log_prob(log_probs: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Head:
    """A head that gives log-probs alone."""

    def head(problem: Problem, hidden: Tensor, weight: Tensor, loss: TokenLoss) -> TokenOutput:
        log_prob = log_probs(hidden, weight, problem.targets).float()
        stats = TokenStats(log_prob=log_prob, step=0, vocab_size=len(weight), **problem.given)
        value = loss.token_loss(stats).mean()
        values = {name: each for name, each in vars(stats).items() if name != "log_expected_prob"}
        return TokenOutput(loss=value, weight=log_prob, correct=log_prob, **values)

    return head


class LigerFormulas(torch.autograd.Function):
    """Logits of a chunk in bfloat16, their gradient in their place, the weight's gradient summed in bfloat16."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        return plain(hidden, weight, targets).squeeze(-1)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, targets = ctx.saved_tensors
        by_hidden, by_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        chunk = max(1, len(hidden) // -(-len(weight) // hidden.shape[1]))  # as many as the vocabulary is wider
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            gradient = F.linear(hidden[rows], weight).float().softmax(-1)
            gradient.scatter_add_(-1, targets[rows].unsqueeze(-1), -torch.ones_like(gradient[:, :1]))
            gradient = (-gradient * upstream[rows].unsqueeze(-1)).to(weight.dtype)
            by_hidden[rows] = gradient @ weight
            by_weight += gradient.t() @ hidden[rows]
        return by_hidden, by_weight, None


OF_LOG_PROB = {"trl": trl, "torch chunked": torch_chunked, "liger's formulas": LigerFormulas.apply}
HEADS: dict[str, Head] = {
    "dft_lightning": ours,
    "dft_lightning, mixed": mixed(ours),
    "float32 logits": full(torch.float32),
    "float32 logits, mixed": mixed(full(torch.float32)),
    "bfloat16 logits": full(torch.bfloat16),
    **{name: of_log_prob(log_probs) for name, log_probs in OF_LOG_PROB.items()},
}


def run(
    head: Head, problem: Problem, loss: TokenLoss, dtype: torch.dtype, of_weight: torch.dtype
) -> tuple[TokenOutput, Tensor, Tensor]:
    """The output and the gradients of hidden states and weight."""
    hidden = problem.hidden.to(dtype, copy=True).requires_grad_()
    weight = problem.weight.to(of_weight, copy=True).requires_grad_()
    output = head(problem, hidden, weight, loss)
    output.loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return output, hidden.grad, weight.grad


def errors(options: argparse.Namespace, name: str, problem: Problem, heads: list[str]) -> dict[str, dict]:
    """Of every head with one loss."""
    loss = LOSSES[name]
    exact, *gradients = run(full(torch.float64), problem, loss, torch.float64, torch.float64)
    needs = {getattr(need, "name", need) for need in loss.needs}
    found = {}
    for head in heads:
        if head in OF_LOG_PROB and needs - set(problem.given):
            continue
        of_weight = torch.float32 if head.endswith("mixed") else torch.bfloat16
        output, *own = run(HEADS[head], problem, loss, torch.bfloat16, of_weight)
        found[head] = {
            f"d{letter}": float((mine.double() - right).norm() / right.norm())
            for letter, mine, right in zip("hW", own, gradients, strict=True)
        }
        for statistic in NAMES:
            mine, right = getattr(output, statistic), getattr(exact, statistic)
            if mine is not None and right is not None:
                found[head][statistic] = float((mine.detach().double() - right).square().mean().sqrt())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with weights and tokenizer")
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines with question and answer")
    parser.add_argument("--tokens", type=int, default=512, help="of answers")
    parser.add_argument("--losses", nargs="*", choices=LOSSES, default=list(LOSSES), metavar="NAME")
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/head_error_MODEL.json")
    options = parser.parse_args()
    output = options.output or RESULTS / f"head_error_{options.model.resolve().name}.json"
    heads = [head for head in HEADS if head != "trl" or not missing("trl")]
    problem = Problem(options)
    results: dict[str, dict] = {}
    for name in options.losses:
        results[name] = errors(options, name, problem, heads)
        for head, found in results[name].items():
            print(f"{name:34} {head:22}" + "".join(f" {key} {value:.1e}" for key, value in found.items()), flush=True)
    found = {**machine("cpu"), "tokens": options.tokens, "results": results}
    output.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
