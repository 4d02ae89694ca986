"""The fused head in float16, as CUDA has it: small gradients survive the rounding, and large ones fit.

Products of float16 that leave float32 behind are CUDA's alone; here they are torch's in float32.
"""

from __future__ import annotations

import math

import pytest
import torch

from dft_lightning import CrossEntropyLoss, DFTLoss, FocalLoss, ImportanceWeightedLoss, SequenceDFTLoss, TokenLoss
from dft_lightning.losses import statistics_from_logits
from dft_lightning.ops import linear_head, linear_token_loss, products
from dft_lightning.ops.products import GradientScale
from dft_lightning.ops.row_math import Coefficients
from test_gradient_threshold import raw_gradient
from test_linear_head import AllStatistics, EntropyWeighted, full_logits, full_loss, gradients, relative


class WholeSequences(TokenLoss):
    """Takes the recomputing path of the head."""

    pointwise = False

    def token_loss(self, stats):
        return -stats.log_prob.detach().exp() * stats.log_prob


LOSSES = [DFTLoss(), CrossEntropyLoss(), FocalLoss(2.0), EntropyWeighted(), AllStatistics(), WholeSequences()]
LOSSES_WITH_THRESHOLD = LOSSES[:4]


@pytest.fixture(autouse=True)
def products_of_cuda(monkeypatch):
    def product(a, b, *, out):
        out.copy_(a.float() @ b.float())

    def accumulate(total, a, b, *, add, exact):
        total.copy_(a.float() @ b.float() + (total if add else 0))

    monkeypatch.setattr(linear_head, "_product_dtype", lambda hidden, weight: torch.float16)
    monkeypatch.setattr(products, "_product", product)
    monkeypatch.setattr(products, "_accumulate", accumulate)


def leaves_of(n, vocabulary, spread, hidden_size=16):
    """float32 leaves whose values float16 holds, under autocast; and the same in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = (n, hidden_size), (vocabulary, hidden_size), (vocabulary,)
    values = [torch.randn(shape, generator=generator).half() for shape in shapes]
    values[1] *= spread
    values[2] *= spread
    return [[value.to(dtype).requires_grad_() for value in values] for dtype in (torch.float32, torch.float64)]


def assert_near(output, expected, own, exact, tolerance=2e-3):
    for ours, reference in zip(gradients(output.loss, own), gradients(expected, exact), strict=True):
        assert ours.isfinite().all()
        assert relative(ours, reference) < tolerance


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("chunks", [1, 3])
def test_near_one_over_v(loss, chunks):
    """At p of 3e-5 and a mean over 12 tokens or 1e5, no gradient is lost."""
    vocabulary = 30011
    own, exact = leaves_of(12, vocabulary, 0.1)
    targets = torch.randint(0, vocabulary, (12,))
    for normalizer in (12.0, 1e5):
        output = linear_token_loss(
            *own[:2], targets, loss, bias=own[2], normalizer=normalizer, chunk_bytes=-(-12 // chunks) * 2 * 30016
        )
        assert output.log_prob.exp().max() < 1e-4
        assert_near(output, full_loss(*exact, targets, loss) / normalizer, own, exact)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_near_one(loss):
    """1 - p of 1e-6 and less: the slope is 1 or next to nothing, the gradient next to nothing."""
    own, exact = leaves_of(12, 40, 1.0)
    targets = torch.arange(12)
    for hidden, weight, bias in (own, exact):  # logits that float16 holds
        hidden.data.copy_(8 * torch.eye(12, 16))
        weight.data.copy_(2.5 * torch.eye(40, 16))
        bias.data.mul_(64).round_().div_(64)
    output = linear_token_loss(*own[:2], targets, loss, bias=own[2], normalizer=12.0)
    assert (-torch.expm1(output.log_prob)).max() < 1e-5
    assert_near(output, full_loss(*exact, targets, loss) / 12, own, exact)


@pytest.mark.parametrize("loss", [DFTLoss(), CrossEntropyLoss(), FocalLoss(2.0), WholeSequences()], ids=repr)
@pytest.mark.parametrize("falling", [False, True])
def test_chunks_of_any_size_of_gradient(loss, falling):
    """Weights from 1e-6 to 1e6, one chunk after another, and a scale of the logits."""
    own, exact = leaves_of(40, 3001, 0.01)
    targets = torch.randint(0, 3001, (40,))
    factors = torch.logspace(-6, 6, 40)
    factors = factors.flip(0) if falling else factors
    output = linear_token_loss(
        *own[:2], targets, loss, bias=own[2], token_weight=factors, logit_scale=64.0, chunk_bytes=7 * 2 * 3008
    )
    stats = statistics_from_logits(full_logits(*exact, scale=64.0), targets, loss.needs)
    expected = (loss.token_loss(stats) * factors.double()).sum()
    (by_hidden, *rest), (hidden, *others) = gradients(output.loss, own), gradients(expected, exact)
    for ours, reference in zip(rest, others, strict=True):
        assert relative(ours, reference) < 3e-3
    # Each token's own is right, however small beside those of other chunks.
    assert max(relative(*pair) for pair in zip(by_hidden, hidden, strict=True)) < 3e-3


@pytest.mark.parametrize("loss", LOSSES_WITH_THRESHOLD, ids=repr)
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("token_weight", [1.0, 1e-5])
def test_with_a_gradient_threshold(loss, softcap, token_weight):
    """In two chunks, whose classes and errors are those in float64, whatever scale the gradient has in float16."""
    own, exact = leaves_of(24, 3001, 0.3)
    targets = torch.randint(0, 3001, (24,))
    for hidden, weight, _ in (own, exact):
        hidden.data += weight.data[targets].mul(4).round().div(4)
    factors = torch.full((24,), token_weight, dtype=torch.float64)
    largest = raw_gradient(exact, targets, loss, logit_softcap=softcap, token_weight=factors).abs().amax(0)
    options = {"logit_softcap": softcap, "gradient_threshold": float(largest.quantile(0.7)), "normalizer": 24.0}
    found = []
    for leaves, in_dtype in ((own, torch.float16), (exact, torch.float64)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear_head, "_product_dtype", lambda hidden, weight, dtype=in_dtype: dtype)
            output = linear_token_loss(
                *leaves[:2], targets, loss, bias=leaves[2], token_weight=factors.to(leaves[0].dtype),
                chunk_bytes=12 * 3008 * in_dtype.itemsize, **options,
            )  # fmt: skip
        found.append((output.dropped, *gradients(output.loss * 2.0**10, leaves)))
    (dropped, *ours), (expected, *theirs) = found
    assert 0.2 < (theirs[1] != 0).any(1).double().mean() < 0.4
    torch.testing.assert_close(dropped.double(), expected, rtol=1e-2, atol=1e-2 * float(expected.max()))
    for name, a, b in zip(("hidden", "weight", "bias"), ours, theirs, strict=True):
        assert a.isfinite().all()
        assert relative(a, b) < 1e-2, name


def test_float16_under_a_gradient_scaler():
    """Losses of whole sequences get the scaler's factor before their gradient is rounded to float16."""
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(shape, generator=generator).mul(0.3).half().double() for shape in ((64, 16), (80, 16))]
    targets = torch.randint(0, 80, (64,), generator=generator)
    index = {"sequence_index": torch.arange(64) // 16, "reference_log_prob": torch.full((64,), -20.0)}
    for loss in (SequenceDFTLoss(mean="geometric"), ImportanceWeightedLoss()):
        leaves = [leaf.half().requires_grad_() for leaf in exact]
        doubled = [leaf.clone().requires_grad_() for leaf in exact]
        for scale in (1.0, 2.0**16):
            output = linear_token_loss(*leaves, targets, loss, token_inputs=index, normalizer=64.0)
            own = gradients(output.loss.float() * scale, leaves)
            stats = statistics_from_logits(doubled[0] @ doubled[1].t(), targets, loss.needs, **index)
            expected = gradients(loss.token_loss(stats).sum() * scale / 64, doubled)
            for ours, theirs in zip(own, expected, strict=True):
                assert ours.isfinite().all()
                assert relative(ours, theirs) < 1e-2


@pytest.mark.parametrize("loss", [CrossEntropyLoss(), WholeSequences()], ids=repr)
def test_hidden_states_of_zero(loss):
    """They leave the scale to the bias, whose gradient is of another size than theirs."""
    own, exact = leaves_of(12, 40, 0.1)
    for hidden in (own[0], exact[0]):
        hidden.data.zero_()
    targets = torch.zeros(12, dtype=torch.long)
    output = linear_token_loss(*own[:2], targets, loss, bias=own[2])
    (found,) = gradients(output.loss * 2.0**16, own[2:])
    (expected,) = gradients(full_loss(*exact, targets, loss) * 2.0**16, exact[2:])
    assert relative(found, expected) < 2e-3


def test_scale_by_hand():
    scale = GradientScale()
    assert scale.next(torch.tensor([0.25, 3.0])) == 2**13
    assert scale.next(torch.tensor([1.0])) == 4
    assert scale.factor == 2**15
    assert scale.next(torch.tensor([2.0**20])) == 2**-20
    assert scale.next(torch.tensor([0.0])) == 2**60
    assert scale.factor == 2**55
    assert scale.next(torch.tensor([1.0, 2.0])) == 2**-41
    assert GradientScale().next(torch.empty(3, device="meta")).is_meta  # no value is waited for
    for largest, factor in ((0.0, 2.0**115), (math.inf, 1.0), (math.nan, 1.0)):
        scale = GradientScale()
        scale.next(torch.tensor([largest]))
        assert scale.factor == factor


@pytest.mark.parametrize("p", [1e-5, 0.1, 0.5, 0.9, 1 - 1e-6])
def test_no_element_is_larger_than_said(p):
    """By the formula of the gradient, for rows with one other class, and with a thousand."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    values[torch.rand(200, 6, generator=generator) < 0.5] = 0
    values[:, 0] += 1
    for others in (torch.ones(1, dtype=torch.float64), torch.rand(1000, generator=generator, dtype=torch.float64)):
        probs = torch.cat([torch.tensor([p], dtype=torch.float64), (1 - p) * others / others.sum()])
        names = ("at_target", "constant", "linear", "log_linear", "quadratic", "reference")
        terms = dict(zip(names, values.unbind(-1), strict=True))
        log_prob = torch.full((200,), p, dtype=torch.float64).log()
        own = Coefficients(**terms).largest_gradient(log_prob)
        a, c, b, d, e, r = (value.unsqueeze(-1) for value in values.unbind(-1))
        is_target = torch.zeros_like(probs)
        is_target[0] = 1
        base = a * (is_target - probs) + c + probs * (b + d * probs.log() + e * probs)
        for theirs in (torch.zeros_like(probs), torch.ones_like(probs)):
            assert ((base - r * theirs).abs().amax(-1) <= own * (1 + 1e-12)).all()
        alone = Coefficients(values[:, 0]).largest_gradient(log_prob)
        torch.testing.assert_close(alone, (a * (is_target - probs)).abs().amax(-1))
