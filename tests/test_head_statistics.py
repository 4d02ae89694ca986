"""The head's further statistics, top-k entropy and the divergence from a reference, against whole logits in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dft_lightning import AnchoredLoss, DFTLoss, TokenLoss
from dft_lightning.losses import Statistic, statistics_from_logits
from dft_lightning.ops import (
    ReferenceHead,
    linear_token_loss,
    linear_token_statistics,
    release_scratch,
)
from test_linear_head import (
    Anchored,
    LargestTensor,
    assert_same,
    full_logits,
    gradients,
    problem,
    products,
    reference_head,
    relative,
)


class AnchoredSequences(TokenLoss):
    """Takes the recomputing path."""

    pointwise = False
    needs = ("reference_kl", "entropy")
    token_loss = Anchored.token_loss


def reference_logits(reference, kept):
    return full_logits(
        reference.hidden, reference.weight, reference.bias, reference.logit_scale, reference.logit_softcap
    )[kept]


def test_divergence_is_torchs_and_by_hand():
    hidden, weight, bias, targets = problem()
    kept = targets != -100
    reference = reference_head(37, 50)
    stats = linear_token_statistics(
        hidden, weight, targets, ["reference_kl"], bias=bias, reference=reference, chunk_bytes=4000
    )
    own = full_logits(hidden, weight, bias)[kept].log_softmax(-1)
    other = reference_logits(reference, kept).log_softmax(-1)
    expected = torch.nn.functional.kl_div(own, other, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(stats.reference_kl, expected)
    assert relative(gradients(stats.reference_kl.sum(), [hidden])[0], gradients(expected.sum(), [hidden])[0]) < 1e-12
    # (3/4, 1/4) against (1/2, 1/2): log 2 - H
    half = statistics_from_logits(
        torch.zeros(1, 2), torch.tensor([0]), ["reference_kl"], reference_logits=torch.tensor([[math.log(3.0), 0.0]])
    )
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert half.reference_kl.item() == pytest.approx(by_hand, rel=1e-6)


def test_what_the_model_bans_and_the_reference_all_but():
    """The reference's probability is 0 in float32, and not its logit: nothing is added, by either head."""
    inf = float("inf")
    own, other = torch.tensor([[0.0, 1.0, -inf]]), torch.tensor([[0.5, 1.0, -200.0]])
    full = statistics_from_logits(own, torch.tensor([0]), ["reference_kl"], reference_logits=other).reference_kl
    hidden = torch.zeros(1, 1)
    fused = linear_token_statistics(
        hidden,
        torch.zeros(3, 1),
        torch.tensor([0]),
        ["reference_kl"],
        bias=own[0],
        reference=ReferenceHead(hidden, torch.zeros(3, 1), other[0]),
    ).reference_kl
    p, r = own.double().softmax(-1)[0, :2], other.double().softmax(-1)[0, :2]
    expected = float((r * (r / p).log()).sum())
    assert full.item() == pytest.approx(expected, rel=1e-5)
    assert fused.item() == pytest.approx(expected, rel=1e-5)


def test_a_reference_that_is_the_model_adds_nothing():
    hidden, weight, bias, targets = problem()
    same = ReferenceHead(hidden.detach(), weight.detach(), bias.detach())
    output = linear_token_loss(hidden, weight, targets, AnchoredLoss(5.0), bias=bias, reference=same)
    assert_same(
        output.loss,
        linear_token_loss(hidden, weight, targets, DFTLoss(), bias=bias).loss,
        (hidden, weight, bias),
        1e-12,
    )
    assert output.reference_kl.abs().max() < 1e-14


def test_what_the_reference_bans_adds_nothing():
    inf = float("inf")
    logits = torch.tensor([[0.0, 1.0, -inf]], dtype=torch.float64, requires_grad=True)
    banned = torch.tensor([[0.0, 1.0, -inf]], dtype=torch.float64)
    weight = torch.eye(3, dtype=torch.float64)
    offsets = torch.tensor([0.0, 1.0, -inf], dtype=torch.float64)
    hidden = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    for value in (
        statistics_from_logits(logits, torch.tensor([0]), ["reference_kl"], reference_logits=banned).reference_kl,
        linear_token_statistics(
            hidden,
            weight,
            torch.tensor([0]),
            ["reference_kl"],
            bias=offsets,
            reference=ReferenceHead(hidden.detach(), weight, offsets),
        ).reference_kl,
    ):
        assert value.item() == pytest.approx(0.0, abs=1e-15)
        leaf = logits if value.grad_fn.name().startswith("Sum") else hidden
        assert gradients(value.sum(), [leaf])[0][:, :2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 2.0), (-0.5, None)])
@pytest.mark.parametrize("k", [1, 7, 50])
def test_top_k_entropy(k, scale, softcap, dtype):
    hidden, weight, bias, targets = problem(dtype=dtype)
    output = linear_token_loss(
        hidden,
        weight,
        targets,
        DFTLoss(),
        bias=bias,
        logit_scale=scale,
        logit_softcap=softcap,
        statistics=[Statistic("top_k_entropy", k=k)],
        chunk_bytes=4000,
    )
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())[targets != -100]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    p = (logits * scale).softmax(-1).sort(descending=True).values[:, :k]
    p = p / p.sum(-1, keepdim=True)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-4  # probabilities to half a digit of bfloat16
    torch.testing.assert_close(
        output.top_k_entropy.double(), -(p * p.log()).sum(-1), rtol=tolerance, atol=10 * tolerance
    )
    assert not output.top_k_entropy.requires_grad


@pytest.mark.parametrize("vocabulary", [127, 900, 5000, 5120])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0])
def test_top_k_entropy_of_a_large_vocabulary(vocabulary, spread):
    """Ties, and the largest all in one block, in the last one or in what is left over."""
    rows = spread * torch.randn(4, vocabulary, dtype=torch.float64)
    rows[0, 10:17] += 5
    rows[1, -7:] += 5
    rows[2, -140:-133] += 5
    for sign in (1.0, -1.0):
        output = linear_token_loss(
            torch.eye(4, dtype=torch.float64),
            sign * rows.t(),
            torch.zeros(4, dtype=torch.long),
            DFTLoss(),
            logit_scale=sign,
            statistics=[Statistic("top_k_entropy", k=6)],
        )
        expected = torch.distributions.Categorical(logits=rows.sort(-1).values[:, -6:]).entropy()
        torch.testing.assert_close(output.top_k_entropy, expected)


def test_top_k_entropy_of_everything_is_the_entropy():
    hidden, weight, _, targets = problem()
    stats = linear_token_statistics(hidden, weight, targets, ["entropy", Statistic("top_k_entropy", k=50)])
    torch.testing.assert_close(stats.top_k_entropy, stats.entropy)
    assert stats.entropy.requires_grad
    assert not stats.top_k_entropy.requires_grad
    assert stats.vocab_size == 50


def test_products_and_memory_of_a_reference():
    """Two products more of its own width, or three where the loss is computed twice; no logits are held."""
    hidden, weight, bias, targets = problem(ignored=False)
    reference = reference_head(37, 50)

    def run(loss):
        linear_token_loss(hidden, weight, targets, loss, bias=bias, reference=reference).loss.backward()

    one = 2 * 5 / 8  # a product of width 5 in units of width 8
    assert products(lambda: run(AnchoredLoss())) == 6 + one
    assert products(lambda: run(AnchoredSequences())) == 8 + 2 * one
    assert products(lambda: run(DFTLoss())) == 6  # nobody asked for it
    hidden, weight, bias, targets = problem(4000, 4, 3000, dtype=torch.float32, ignored=False)
    beside = reference_head(4000, 3000, dtype=torch.float32)
    release_scratch()
    for loss in (AnchoredLoss(), AnchoredSequences()):
        with LargestTensor() as mode:
            linear_token_loss(
                hidden, weight, targets, loss, bias=bias, reference=beside, chunk_bytes=3000 * 4 * 16
            ).loss.backward()
        assert mode.largest <= 2 * 2**20  # the logits are 48 MB


def test_bad_input_is_named():
    hidden, weight, _, targets = problem()

    def refused(match, **changes):
        arguments = {"loss": AnchoredLoss(), "reference": reference_head(37, 50), **changes}
        with pytest.raises(ValueError, match=match):
            linear_token_loss(hidden, weight, targets, **arguments)

    refused(r"AnchoredLoss needs Statistic\('reference_kl'\): pass reference", reference=None)
    refused("vocabulary has 49 tokens and the model's 50", reference=reference_head(37, 49))
    refused("for the 37 tokens", reference=reference_head(36, 50))
    head = reference_head(37, 50)
    with_graph = ReferenceHead(head.hidden.clone().requires_grad_(), head.weight)
    refused(r"no gradient flows into the reference", reference=with_graph)
    refused("k from 1 to the size of the vocabulary, 50; got 51", statistics=[Statistic("top_k_entropy", k=51)])
    refused("top_k_entropy takes k", statistics=["top_k_entropy"])
    two = [Statistic("top_k_entropy", k=5), Statistic("top_k_entropy", k=6)]
    refused("not both", statistics=two)
