"""The fused linear head against full logits in float64, and what it must not do."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dft_lightning import CrossEntropyLoss, DFTLoss, FocalLoss, TargetSFTLoss, TokenLoss
from dft_lightning.losses import Statistic, statistics_from_logits
from dft_lightning.losses.statistics import normalise_needs
from dft_lightning.ops import (
    ReferenceHead,
    linear_head,
    linear_token_loss,
    linear_token_statistics,
    release_scratch,
)
from dft_lightning.ops.row_math import Coefficients, LogitTransform

EVERYTHING = ("entropy", "mean_log_prob", "sum_squared_prob", Statistic("top_k_entropy", k=3))
NAMES = tuple(statistic.name for statistic in normalise_needs(EVERYTHING))


class EntropyWeighted(TokenLoss):
    """The weight's own gradient counts: it is not detached."""

    needs = ("entropy",)

    def token_loss(self, stats):
        return -stats.entropy * stats.log_prob


class AllStatistics(TokenLoss):
    needs = ("entropy", "mean_log_prob", "sum_squared_prob")

    def token_loss(self, stats):
        return stats.sum_squared_prob * stats.log_prob + stats.entropy.square() - 0.1 * stats.mean_log_prob


class Anchored(TokenLoss):
    needs = ("reference_kl", "entropy")

    def token_loss(self, stats):
        return stats.reference_kl.square() - stats.log_prob * stats.reference_kl.detach() + 0.1 * stats.entropy


class OwnDFT(TokenLoss):
    """A user's three lines."""

    def token_loss(self, stats):
        return -stats.log_prob.detach().exp() * stats.log_prob


class SequenceLoss(TokenLoss):
    pointwise = False
    needs = ("sequence_index", "entropy")

    def token_loss(self, stats):
        of_sequence = torch.zeros(8, dtype=stats.log_prob.dtype).index_add(0, stats.sequence_index, stats.log_prob)
        return -of_sequence[stats.sequence_index].exp() * stats.log_prob - 0.1 * stats.entropy


# Each loss for itself is in test_every_loss.
POINTWISE = [CrossEntropyLoss(0.1), DFTLoss(), FocalLoss(2.0), FocalLoss(0.5), EntropyWeighted(), AllStatistics()]


def problem(n=37, hidden_size=8, vocabulary=50, *, bias=True, dtype=torch.float64, seed=0, ignored=True, spread=1.0):
    """Leaves and targets; the values are exact in ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, hidden_size, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, hidden_size, generator=generator) * spread).to(dtype).requires_grad_()
    offset = torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_() if bias else None
    targets = torch.randint(0, vocabulary, (n,), generator=generator)
    if ignored:
        targets[::5] = -100
    return hidden, weight, offset, targets


def reference_head(n, vocabulary, *, dtype=torch.float64, device="cpu", softcap=None, seed=9):
    """Another model's, of another width."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).to(device, dtype) for shape in ((n, 5), (vocabulary, 5), (vocabulary,))
    )
    return ReferenceHead(hidden, weight, bias, logit_scale=0.8, logit_softcap=softcap)


def full_logits(hidden, weight, bias, scale=1.0, softcap=None):
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits * scale


def full_loss(hidden, weight, bias, targets, loss, scale=1.0, softcap=None, sequence_index=None):
    """Another implementation: everything by autograd on the whole logits."""
    kept = targets != -100
    logits = full_logits(hidden, weight, bias, scale, softcap)[kept]
    index = None if sequence_index is None else sequence_index[kept]
    stats = statistics_from_logits(logits, targets[kept], loss.needs, sequence_index=index)
    return loss.token_loss(stats).sum()


def gradients(value, leaves, **options):
    return torch.autograd.grad(value, [leaf for leaf in leaves if leaf is not None], **options)


def relative(value, expected):
    expected = expected.double()
    return float((value.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def assert_same(value, expected, leaves, tolerance):
    assert relative(value.detach(), expected.detach()) < tolerance
    for own, reference in zip(gradients(value, leaves), gradients(expected, leaves), strict=True):
        assert own.dtype == reference.dtype
        assert relative(own, reference) < tolerance


# -- right numbers ---------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(POINTWISE),
    st.integers(0, 40),
    st.integers(1, 9),
    st.integers(1, 70),
    st.integers(1, 4000),
    st.floats(0.01, 5),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_chunk(loss, n, hidden_size, vocabulary, chunk_bytes, spread):
    """n = 0, a vocabulary of one, chunks of one token, a ragged last chunk."""
    hidden, weight, offset, targets = problem(n, hidden_size, vocabulary, seed=n, spread=spread)
    output = linear_token_loss(hidden, weight, targets, loss, bias=offset, chunk_bytes=chunk_bytes)
    expected = full_loss(hidden, weight, offset, targets, loss)
    leaves = (hidden, weight, offset)
    torch.testing.assert_close(output.loss, expected, rtol=1e-11, atol=1e-12)
    for own, reference in zip(gradients(output.loss, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-9, atol=1e-11)


@given(st.sampled_from(POINTWISE), st.integers(20, 300), st.integers(4, 64), st.integers(10, 1000), st.integers(1, 300))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_float32_within_1e_5(loss, n, hidden_size, vocabulary, tokens):
    leaves = problem(n, hidden_size, vocabulary, dtype=torch.float32, seed=n, spread=0.3)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves[:3]]
    output = linear_token_loss(*leaves[:2], leaves[3], loss, bias=leaves[2], chunk_bytes=vocabulary * 4 * tokens)
    expected = full_loss(*exact, leaves[3], loss)
    assert relative(output.loss.detach(), expected.detach()) < 1e-5
    for own, reference in zip(gradients(output.loss, leaves[:3]), gradients(expected, exact), strict=True):
        assert relative(own, reference) < 1e-5


PRECISE = [CrossEntropyLoss(), DFTLoss(), FocalLoss(2.0), EntropyWeighted()]


@given(
    st.sampled_from(PRECISE),
    st.integers(150, 400),
    st.integers(32, 96),
    st.integers(500, 2500),
    st.sampled_from([40, 100, 400]),
    st.sampled_from([0.02, 0.2]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_bfloat16_is_no_worse_than_the_plain_head(loss, n, hidden_size, vocabulary, tokens, spread):
    """Plain: logits in bfloat16, softmax in float32, products in bfloat16; a mean, over one chunk and over several.

    Where logits are so small that to round them does nothing, the roundings of what is kept, of a row's factor on the
    way in or out, and of the gradient are left, of 1.7e-3 to 2e-3 each.
    """
    leaves = problem(n, hidden_size, vocabulary, dtype=torch.bfloat16, spread=spread, bias=False, seed=n)
    hidden, weight, _, targets = leaves
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    expected = gradients(full_loss(*exact, None, targets, loss) / n, exact)
    plain = gradients(full_loss(hidden, weight, None, targets, loss) / n, (hidden, weight))
    output = linear_token_loss(hidden, weight, targets, loss, normalizer=n, chunk_bytes=2 * vocabulary * tokens)
    own = gradients(output.loss, (hidden, weight))
    for ours, theirs, reference in zip(own, plain, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert relative(ours, reference) <= max(1.1 * relative(theirs, reference), 3.4e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_statistics_are_those_of_logits(dtype):
    hidden, weight, offset, targets = problem(dtype=dtype)
    output = linear_token_loss(hidden, weight, targets, DFTLoss(), bias=offset, statistics=EVERYTHING)
    kept = targets != -100
    logits = full_logits(*(leaf.detach().double() for leaf in (hidden, weight, offset)))[kept]
    expected = statistics_from_logits(logits, targets[kept], EVERYTHING)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-3}[dtype]
    for name in ("log_prob", *NAMES):
        value = getattr(output, name)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not value.requires_grad
        torch.testing.assert_close(value.double(), getattr(expected, name), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(output.weight, output.log_prob.exp(), rtol=1e-6, atol=0)
    assert torch.equal(output.correct, logits.argmax(-1) == targets[kept])
    assert linear_token_loss(hidden, weight, targets, DFTLoss()).entropy is None


def test_argmax_takes_the_first_of_equal_logits():
    hidden, weight = torch.ones(4, 1), torch.tensor([[1.0], [3.0], [3.0], [2.0]])
    output = linear_token_loss(hidden, weight, torch.tensor([0, 1, 2, 3]), DFTLoss())
    assert output.correct.tolist() == [False, True, False, False]


def test_digits_of_one_minus_p_survive_near_certainty():
    """At p = 1 - 1e-13 in float32: the loss is 1e-13, and so is the target's gradient, not 0 or 1e-7."""
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[30.0], [0.0]], requires_grad=True)
    output = linear_token_loss(hidden, weight, torch.tensor([0]), CrossEntropyLoss(), statistics=["entropy"])
    q = torch.tensor(-30.0, dtype=torch.float64).exp()
    assert output.loss.item() == pytest.approx(q.item(), rel=1e-5)
    (gradient,) = gradients(output.loss, [weight])
    assert gradient.flatten().tolist() == pytest.approx([-q.item(), q.item()], rel=1e-5)
    assert output.entropy.item() == pytest.approx(31 * q.item(), rel=1e-5)  # -q log q - (1 - q) log(1 - q)


@pytest.mark.parametrize("loss", [CrossEntropyLoss(), DFTLoss(), FocalLoss(2.0), EntropyWeighted()], ids=repr)
def test_banned_tokens(loss):
    """Logits of -inf: probability 0, gradient 0, no nan."""
    hidden, weight, _, targets = problem(ignored=False)
    bias = torch.zeros(50, dtype=torch.float64)
    bias[40:] = float("-inf")
    targets = targets % 40
    bias.requires_grad_()
    output = linear_token_loss(hidden, weight, targets, loss, bias=bias, statistics=["entropy"])
    expected = full_loss(hidden[:], weight[:40], bias[:40], targets, loss)
    assert relative(output.loss.detach(), expected.detach()) < 1e-13
    for own, reference in zip(
        gradients(output.loss, (hidden, weight, bias)), gradients(expected, (hidden, weight, bias)), strict=True
    ):
        assert relative(own, reference) < 1e-12
    assert output.entropy.isfinite().all()


def test_a_banned_target():
    hidden, weight, _, _ = problem(3)
    bias = torch.zeros(50, dtype=torch.float64)
    bias[7] = float("-inf")
    output = linear_token_loss(hidden, weight, torch.tensor([7, 1, 2]), DFTLoss(), bias=bias)
    assert output.log_prob[0] == float("-inf")
    assert all(gradient.isfinite().all() for gradient in gradients(output.loss, (hidden, weight)))


def test_normalizer_token_weight_and_upstream_gradient():
    hidden, weight, offset, targets = problem()
    factors = torch.rand(37, dtype=torch.float64)
    kept = targets != -100
    for normalizer in (17, torch.tensor(17.0, dtype=torch.float64)):
        logits = full_logits(hidden, weight, offset)[kept]
        losses = FocalLoss(2.0, reduction="none")(logits, targets[kept])
        expected = (losses * factors[kept]).sum() / 17 * 3
        output = linear_token_loss(
            hidden, weight, targets, FocalLoss(2.0), bias=offset, normalizer=normalizer, token_weight=factors
        )
        assert_same(output.loss * 3, expected, (hidden, weight, offset), 1e-13)
        assert output.loss_sum.item() == pytest.approx(expected.item() * 17 / 3, rel=1e-12)
    unweighted = linear_token_loss(hidden, weight, targets, FocalLoss(2.0), bias=offset)
    torch.testing.assert_close(output.weight, unweighted.weight * factors[kept])


# -- two paths -------------------------------------------------------------------------------------------------------


def test_a_loss_of_whole_sequences_takes_the_recomputing_path(monkeypatch):
    hidden, weight, offset, targets = problem()
    index = torch.arange(37) // 5
    monkeypatch.setattr(linear_head, "one_pass", lambda *args: pytest.fail("one pass"))
    output = linear_token_loss(
        hidden, weight, targets, SequenceLoss(), bias=offset, token_inputs={"sequence_index": index}, chunk_bytes=4000
    )
    expected = full_loss(hidden, weight, offset, targets, SequenceLoss(), sequence_index=index)
    assert_same(output.loss, expected, (hidden, weight, offset), 1e-12)
    assert torch.equal(output.sequence_index, index[targets != -100])
    assert output.weight.shape == output.log_prob.shape


def test_a_pointwise_loss_takes_one_pass(monkeypatch):
    hidden, weight, _, targets = problem()
    monkeypatch.setattr(linear_head, "head_statistics", lambda *args: pytest.fail("recomputed"))
    linear_token_loss(hidden, weight, targets, OwnDFT()).loss.backward()


def test_gradients_of_statistics_and_strided_upstream_gradients():
    hidden, weight, _, targets = problem(bias=False, ignored=False)
    stats = linear_token_statistics(hidden, weight, targets, ["entropy"], chunk_bytes=4000)
    expected = statistics_from_logits(full_logits(hidden, weight, None), targets, ["entropy"])
    torch.testing.assert_close(stats.log_prob, expected.log_prob)
    factors = torch.rand(37, 2, dtype=torch.float64)
    for own, reference in (
        ((stats.log_prob * factors[:, 0]).sum(), (expected.log_prob * factors[:, 0]).sum()),  # strided
        (stats.log_prob.sum(), expected.log_prob.sum()),  # expanded
        ((stats.entropy * factors[:, 1]).sum(), (expected.entropy * factors[:, 1]).sum()),  # nothing by log_prob
        ((stats.entropy - stats.log_prob).square().sum(), (expected.entropy - expected.log_prob).square().sum()),
    ):
        for ours, theirs in zip(
            gradients(own, (hidden, weight), retain_graph=True),
            gradients(reference, (hidden, weight), retain_graph=True),
            strict=True,
        ):
            assert relative(ours, theirs) < 1e-12


# -- work and memory -------------------------------------------------------------------------------------------------


def products(call):
    """Floating-point operations of the matrix products, as multiples of n H V."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / (37 * 8 * 50)


def test_number_of_matrix_products():
    hidden, weight, offset, targets = problem(ignored=False)

    def run(hidden=hidden, weight=weight, loss=DFTLoss()):  # noqa: B008
        index = {"sequence_index": torch.arange(37) // 5} if isinstance(loss, SequenceLoss) else None
        output = linear_token_loss(
            hidden, weight, targets, loss, bias=offset, token_inputs=index, chunk_bytes=50 * 8 * 7
        )
        if output.loss.requires_grad:
            output.loss.backward()

    assert products(run) == 6
    assert products(lambda: run(loss=SequenceLoss())) == 8
    assert products(lambda: run(weight=weight.detach())) == 4  # frozen head
    assert products(lambda: run(hidden=hidden.detach())) == 4  # frozen backbone
    with torch.no_grad():
        assert products(run) == 2
    targets[10:] = -100
    assert products(run) == pytest.approx(6 * 10 / 37)  # ignored tokens cost nothing


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.nbytes)
        return result


@pytest.mark.parametrize("loss", [DFTLoss(), AllStatistics(), SequenceLoss()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_held(loss, dtype):
    hidden, weight, offset, targets = problem(4000, 4, 3000, dtype=dtype, ignored=False)
    release_scratch()
    with LargestTensor() as mode:
        index = {"sequence_index": torch.zeros(4000, dtype=torch.long)} if isinstance(loss, SequenceLoss) else None
        linear_token_loss(
            hidden, weight, targets, loss, bias=offset, token_inputs=index, chunk_bytes=3000 * dtype.itemsize * 16
        ).loss.backward()
    assert mode.largest <= 2 * 2**20  # the scratch of a block of rows; the logits are 24 or 48 MB
    with LargestTensor() as mode:
        full_loss(hidden, weight, offset, targets, DFTLoss())
    assert mode.largest == 4000 * 3000 * 4  # the measure sees them where they are (raised to float32)


@pytest.mark.parametrize("name", ["torch_kernels", "triton_kernels"])
def test_more_logits_than_an_int32_counts(name, request):
    """A row that begins behind 2**31 logits. The rows between are reserved, and never touched."""
    if name == "triton_kernels":
        request.getfixturevalue("triton_kernels")
    kernels = import_module(f"dft_lightning.ops.{name}")
    device = "cuda" if torch.cuda.is_available() and name == "triton_kernels" else "cpu"
    rows, steps = torch.randn(2, 100), [2**31, 1]
    logits, values = (
        torch.empty(2**31 + 100, dtype=dtype, device=device).as_strided((2, 100), steps)
        for dtype in (torch.float32, torch.bfloat16)
    )
    logits.copy_(rows)
    targets = torch.tensor([3, 99], device=device)
    moments, kept = kernels.row_moments(logits, targets, LogitTransform(), frozenset(), values)
    expected = statistics_from_logits(rows, targets.cpu()).log_prob
    torch.testing.assert_close(moments.log_prob.cpu(), expected, rtol=1e-5, atol=1e-6)
    slopes = Coefficients(-torch.ones(2, device=device))
    kernels.row_gradient_(kept, targets, LogitTransform(), moments, slopes, None)
    gradient = rows.softmax(-1)
    gradient[[0, 1], [3, 99]] -= 1
    torch.testing.assert_close(values.cpu().float(), gradient, rtol=0.01, atol=1e-3)


# -- autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [DFTLoss(), AllStatistics(), SequenceLoss()], ids=repr)
def test_retain_graph_and_accumulation(loss):
    """Every backward gives the same, and a gradient that was handed out is not changed by the next."""
    hidden, weight, offset, targets = problem()
    index = {"sequence_index": torch.arange(37) // 5} if isinstance(loss, SequenceLoss) else None
    value = linear_token_loss(hidden, weight, targets, loss, bias=offset, token_inputs=index).loss
    first = gradients(value, (hidden, weight, offset), retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    for _ in range(3):
        value.backward(retain_graph=True)
    (value * 5).backward()
    for leaf, copy, gradient in zip((hidden, weight, offset), copies, first, strict=True):
        assert torch.equal(copy, gradient)
        torch.testing.assert_close(leaf.grad, 8 * copy)


def test_scratch_is_shared_by_calls_that_wait_for_their_backward():
    calls = [problem(seed=seed) for seed in range(3)]
    values = [linear_token_loss(*leaves[:2], leaves[3], DFTLoss(), bias=leaves[2]).loss for leaves in calls]
    for value, leaves in zip(values, calls, strict=True):
        expected = full_loss(*leaves, DFTLoss())
        assert_same(value, expected, leaves[:3], 1e-13)


@pytest.mark.parametrize("loss", [DFTLoss(), SequenceLoss()], ids=repr)
def test_second_derivatives_are_refused(loss):
    hidden, weight, _, targets = problem()
    output = linear_token_loss(hidden, weight, targets, loss, token_inputs={"sequence_index": torch.arange(37) // 5})
    with pytest.raises(RuntimeError, match=r"no second derivative.*head: full"):
        gradients(output.loss, (hidden, weight), create_graph=True)


def test_no_grad_and_inference_mode_leave_nothing_behind():
    hidden, weight, offset, targets = problem()
    release_scratch()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            output = linear_token_loss(hidden, weight, targets, DFTLoss(), bias=offset, statistics=["entropy"])
            assert not output.loss.requires_grad
            assert (output.weight > 0).all()
    # Buffers made in inference mode could not be written to here.
    value = linear_token_loss(hidden, weight, targets, DFTLoss(), bias=offset).loss
    assert_same(value, full_loss(hidden, weight, offset, targets, DFTLoss()), (hidden, weight, offset), 1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])  # float16 is computed in float32 on the CPU
def test_autocast(dtype):
    """float32 leaves, half-precision products: the weight's gradient is float32 and was never half precision."""
    hidden, weight, offset, targets = problem(200, 32, 500, dtype=torch.float32, spread=0.2)
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight, offset)]
    expected = gradients(full_loss(*exact, targets, FocalLoss(2.0)), exact)
    with torch.autocast("cpu", dtype=dtype):
        output = linear_token_loss(hidden, weight, targets, FocalLoss(2.0), bias=offset, chunk_bytes=500 * 2 * 64)
        plain = gradients(full_loss(hidden, weight, offset, targets, FocalLoss(2.0)), (hidden, weight, offset))
    assert output.log_prob.dtype == torch.float32
    own = gradients(output.loss, (hidden, weight, offset))
    for ours, theirs, reference in zip(own, plain, expected, strict=True):
        assert ours.dtype == torch.float32
        assert relative(ours, reference) <= max(1.1 * relative(theirs, reference), 3.4e-3)


def test_float16_on_the_cpu_has_the_range_of_float32():
    """Sums over thousands of tokens and large slopes, both beyond 65504 on the way."""
    hidden, weight, _, targets = problem(2000, 32, 50, dtype=torch.float32, bias=False, ignored=False)
    hidden, weight = ((leaf.detach() * 3 + 3).half().requires_grad_() for leaf in (hidden, weight))
    targets = targets % 5
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    expected = gradients(full_loss(*exact, None, targets, CrossEntropyLoss()) / 2000, exact)
    factors = torch.full((2000,), 300.0)
    output = linear_token_loss(
        hidden, weight, targets, CrossEntropyLoss(), normalizer=2000 * 300.0, token_weight=factors
    )
    for own, reference in zip(gradients(output.loss, (hidden, weight)), expected, strict=True):
        assert own.dtype == torch.float16
        assert relative(own, reference) < 1e-3


def test_a_constant_loss_has_a_path_to_everything():
    """Data parallelism waits for a gradient of every parameter."""

    class Constant(TokenLoss):
        def token_loss(self, stats):
            return torch.ones_like(stats.log_prob)

    hidden, weight, offset, targets = problem()
    for whole_sequences in (False, True):
        loss = Constant()
        loss.pointwise = not whole_sequences
        output = linear_token_loss(hidden, weight, targets, loss, bias=offset)
        assert output.loss.item() == (targets != -100).sum()
        assert all((gradient == 0).all() for gradient in gradients(output.loss, (hidden, weight, offset)))


def test_normalizers():
    hidden, weight, offset, targets = problem()
    expected = full_loss(hidden, weight, offset, targets, DFTLoss()).item() / 7
    none = torch.full_like(targets, -100)
    for loss in (DFTLoss(), OwnDFT()):
        loss.pointwise = isinstance(loss, DFTLoss)
        # A count in another dtype loses no digit, and no targets over a count of 0 is 0.
        for seven, nothing in ((7, 0), (torch.tensor(7), torch.tensor(0)), (torch.tensor([7.0]), torch.tensor(0.0))):
            output = linear_token_loss(hidden, weight, targets, loss, bias=offset, normalizer=seven)
            assert output.loss.shape == ()
            assert output.loss.item() == pytest.approx(expected, rel=1e-14)
            assert linear_token_loss(hidden, weight, none, loss, normalizer=nothing).loss.item() == 0
        for wrong, match in (
            (0, "normalizer is 0, with"),
            (math.inf, "normalizer is inf, with"),
            (math.nan, "normalizer is nan, with"),
            (torch.ones(37), r"scalar tensor, got shape \[37\]"),
            (torch.ones((), requires_grad=True), "pass normalizer.detach"),
        ):
            with pytest.raises(ValueError, match=match):
                linear_token_loss(hidden, weight, targets, loss, normalizer=wrong)


# -- bad input -------------------------------------------------------------------------------------------------------


class Strange(TokenLoss):
    needs = ("reference_log_prob",)

    def token_loss(self, stats):
        return stats.reference_log_prob - stats.log_prob


def test_bad_input_is_named():
    hidden, weight, offset, targets = problem()

    def refused(error, match, **changes):
        arguments = {"hidden": hidden, "weight": weight, "targets": targets, "loss": DFTLoss(), **changes}
        with pytest.raises(error, match=match):
            linear_token_loss(**arguments)

    refused(ValueError, r"hidden must be \[n, H\].*weight \[8, 50\]", weight=weight.t())
    refused(ValueError, r"targets must be \[n\]", targets=targets[:5])
    refused(ValueError, r"bias must be \[V\]", bias=offset[:5])
    refused(TypeError, "targets must be integers", targets=targets.double())
    refused(
        ValueError,
        r"target 50 at position \[0\] is not a class index.*\[0, 50\)",
        targets=targets.clamp(min=0) * 0 + 50,
    )
    refused(TypeError, "cast one of them, or use torch.autocast", weight=weight.float())
    refused(TypeError, "plain tensor", weight=type("Sharded", (torch.Tensor,), {})(weight.detach()))
    refused(ValueError, "chunk_bytes must be positive", chunk_bytes=0)
    refused(ValueError, "logit_softcap must be positive", logit_softcap=0.0)
    refused(TypeError, "logit_scale must be a number", logit_scale=torch.tensor(2.0))
    refused(ValueError, "Strange needs Statistic.*token_inputs", loss=Strange())

    class Parameterised(DFTLoss):
        needs = (Statistic("entropy", k=3),)

    refused(ValueError, r"entropy', k=3.*takes no parameters", loss=Parameterised())
    refused(ValueError, "'surprise', which is none of", token_inputs={"surprise": torch.zeros(37)})
    refused(ValueError, r"reference_log_prob must be \[n\]", token_inputs={"reference_log_prob": torch.zeros(3)})
    refused(ValueError, "no gradient flows into token_weight", token_weight=torch.ones(37, requires_grad=True))


class TopK(TokenLoss):
    needs = (Statistic("top_k_entropy", k=3),)

    def token_loss(self, stats):
        return -stats.top_k_entropy * stats.log_prob


def test_given_statistics_reach_the_loss():
    hidden, weight, offset, targets = problem()
    factors = torch.rand(37, dtype=torch.float64)
    # Statistics that could depend on logits, but were given: constants. What the loss does not read does no harm.
    given = {"top_k_entropy": factors, "reference_kl": factors, "sequence_index": None}
    output = linear_token_loss(hidden, weight, targets, TopK(), bias=offset, token_inputs=given)
    other = linear_token_loss(hidden, weight, targets, CrossEntropyLoss(), bias=offset, token_weight=factors)
    assert_same(output.loss, other.loss, (hidden, weight, offset), 1e-13)
    reference = torch.randn(37, dtype=torch.float64)
    output = linear_token_loss(
        hidden, weight, targets, Strange(), token_inputs={"reference_log_prob": reference}, chunk_bytes=4000
    )
    kept = targets != -100
    expected = (reference[kept] - output.log_prob).sum()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)


# -- Triton ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def triton_kernels():
    pytest.importorskip("triton", reason="Triton comes with torch on CUDA, and beside it on Linux")
    if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        pytest.skip("neither a GPU nor TRITON_INTERPRET=1")
    from dft_lightning.ops import triton_kernels

    return triton_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    "loss",
    [DFTLoss(), CrossEntropyLoss(0.1), AllStatistics(), SequenceLoss(), Anchored(), TargetSFTLoss(0.4)],
    ids=repr,
)
def test_triton_kernels_are_the_torch_kernels(loss, softcap, dtype, triton_kernels, monkeypatch):
    """The whole head, once with each; over one block of the vocabulary and over several."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(triton_kernels, "_BLOCK", 64)
    leaves = [
        None if leaf is None else leaf.detach().to(device).requires_grad_(leaf.is_floating_point())
        for leaf in problem(9, 8, 150, dtype=dtype)
    ]
    hidden, weight, bias, targets = leaves
    targets = targets.repeat_interleave(2)[::2]  # strided
    targets[targets == -100] = 1
    index = torch.arange(9, device=device) // 4
    beside = reference_head(9, 150, device=device, dtype=dtype, softcap=2.0)
    results = []
    for name in ("torch_kernels", "triton_kernels"):
        kernels = import_module(f"dft_lightning.ops.{name}")
        monkeypatch.setattr("dft_lightning.ops.kernels.kernels_for", lambda *args, kernels=kernels: kernels)
        output = linear_token_loss(
            hidden,
            weight,
            targets,
            loss,
            bias=bias,
            logit_softcap=softcap,
            logit_scale=0.7,
            token_inputs={"sequence_index": index},
            reference=beside,
            statistics=(*EVERYTHING, "reference_kl"),
            chunk_bytes=150 * dtype.itemsize * 5,
        )
        results.append((output, gradients(output.loss, (hidden, weight, bias))))
    (plain, plain_gradients), (fused, fused_gradients) = results
    # What is made of rows as they are kept differs by where these round.
    close = 2e-4 if isinstance(loss, TargetSFTLoss) and dtype != torch.float32 else 2e-5
    for name in ("loss", "log_prob", "weight", "reference_kl", *NAMES):
        torch.testing.assert_close(getattr(fused, name), getattr(plain, name), rtol=close, atol=2e-6)
    assert torch.equal(fused.correct, plain.correct)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # the interpreter rounds half precision down
    for own, reference in zip(fused_gradients, plain_gradients, strict=True):
        assert relative(own, reference) < tolerance


@pytest.mark.parametrize("loss", [DFTLoss(), AllStatistics(), Anchored()], ids=repr)
@pytest.mark.parametrize("vocabulary", [63, 64, 65, 128, 50257])
def test_triton_blocks_of_odd_vocabularies(vocabulary, loss, triton_kernels, monkeypatch):
    """Whole blocks alone, the ragged last one alone, and both: against float64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if vocabulary < 1000:
        monkeypatch.setattr(triton_kernels, "_BLOCK", 64)
    monkeypatch.setattr("dft_lightning.ops.kernels.kernels_for", lambda *args: triton_kernels)
    exact = problem(5, 8, vocabulary, spread=0.3, ignored=False)
    own = [leaf.detach().float().to(device).requires_grad_() for leaf in exact[:3]]
    exact = [leaf.detach().float().double().requires_grad_() for leaf in exact[:3]]
    targets = torch.tensor([0, vocabulary - 1, vocabulary // 64 * 64 - 1, 7, 50]) % vocabulary
    beside = reference_head(5, vocabulary, device=device, dtype=torch.float32)
    hidden, weight, bias = (getattr(beside, name).cpu().double() for name in ("hidden", "weight", "bias"))
    output = linear_token_loss(
        *own[:2], targets.to(device), loss, bias=own[2], reference=beside, chunk_bytes=4 * vocabulary * 4
    )
    theirs = full_logits(hidden, weight, bias, beside.logit_scale)
    stats = statistics_from_logits(full_logits(*exact), targets, loss.needs, reference_logits=theirs)
    expected = loss.token_loss(stats).sum()
    assert relative(output.loss.detach().cpu(), expected.detach()) < 1e-5
    for ours, reference in zip(gradients(output.loss, own), gradients(expected, exact), strict=True):
        assert relative(ours.cpu(), reference) < 1e-5


def test_triton_moments_of_hard_rows(triton_kernels):
    """Ties, banned classes, a banned target, near certainty, a target that is alone."""
    from dft_lightning.ops import torch_kernels

    inf = float("inf")
    rows = torch.tensor(
        [
            [1.0, 3.0, 3.0, 2.0],
            [1.0, 3.0, 3.0, 2.0],
            [-inf, 0.0, 1.0, -inf],
            [-inf, 0.0, 1.0, 2.0],
            [30.0, 0.0, 0.0, 0.0],
            [5.0, -inf, -inf, -inf],
            [1.0, float("nan"), 2.0, 3.0],
        ]
    )
    targets = torch.tensor([1, 2, 2, 0, 0, 0, 3])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = frozenset({"sum_p_log_p", "sum_p_squared"})
    (fused, kept), (plain, expected) = (
        kernels.row_moments(*arguments, LogitTransform(), wanted, torch.empty_like(rows, device=device))
        for kernels in (triton_kernels, torch_kernels)
        for arguments in [(rows.to(device, copy=True), targets.to(device))]
    )
    assert fused.correct.tolist() == plain.correct.tolist() == [True, False, True, False, True, True, False]
    for name in ("log_prob", "log_normalizer", "sum_p_log_p", "sum_p_squared"):
        torch.testing.assert_close(getattr(fused, name), getattr(plain, name), rtol=1e-5, atol=1e-30, equal_nan=True)
    for own, reference in zip(kept, expected, strict=True):
        finite = kept.total.isfinite() & (kept.total > 0)  # one without other classes has no factor
        torch.testing.assert_close(own[finite], reference[finite], rtol=1e-5, atol=1e-6)


def test_triton_kernels_compile_for_a_gpu(tmp_path):
    """Down to machine code for compute capability 9.0; needs no GPU, but the interpreter must be off.

    A thread of 256 has 16 of a block's 4096 logits, which it loads and stores by 16 bytes at a time.
    """
    pytest.importorskip("triton", reason="Triton comes with torch on CUDA, and beside it on Linux")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("triton_compile.py")
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("cubin") == 30
    for line in done.stdout.splitlines():
        kernel, dtype, flags, *_, loads, _, stores = line.split()
        vectors = 16 * (4 if dtype == "*fp32" else 2) // 16
        expected = {  # logits in float32 once for the moments and once for what is kept; a row, and a reference's
            ("_moments_kernel", "True"): (8, vectors),
            ("_moments_kernel", "False"): (4, 0),
            ("_moments_kernel", "reference"): (8, vectors),
            ("_moments_kernel", "unkept"): (4, 0),
            ("_gradient_kernel", "True"): (2 * vectors, vectors),
            ("_gradient_kernel", "False"): (vectors, vectors),
            ("_column_largest_kernel", "True"): (2 * vectors, 0),  # a thread has 32 of a tile
            ("_column_largest_kernel", "False"): (2 * vectors, 0),
        }
        assert (int(loads), int(stores)) == expected.get((kernel, flags), (8, 0)), line
