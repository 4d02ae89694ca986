"""Cross-entropy, DFT and focal loss: torch's, identities, hand-worked cases, digits near certainty; and bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from dft_lightning.errors import InputError
from dft_lightning.losses import (
    CrossEntropyLoss,
    DFTLoss,
    FocalLoss,
    Statistic,
    TokenLoss,
    TokenStats,
    dft_cross_entropy,
    focal_cross_entropy,
    statistics_from_logits,
)
from test_every_loss import batches


def grad(value, logits):
    return torch.autograd.grad(value, logits)[0]


@given(batches(fewest=2))
@settings(max_examples=50, deadline=None)
def test_cross_entropy_is_torchs(batch):
    logits, targets = batch.logits, batch.targets
    for smoothing in (0.0, 0.2):
        expected = F.cross_entropy(logits.movedim(-1, 1), targets, reduction="sum", label_smoothing=smoothing)
        value = CrossEntropyLoss(smoothing, reduction="sum")(logits, targets)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad(value, logits), grad(expected, logits), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("values", "target"), [([-math.inf, 1.0, 2.0], 0), ([3.0, -math.inf, -math.inf], 0)])
def test_cross_entropy_of_banned_classes_is_torchs(values, target):
    logits, targets = torch.tensor([values], requires_grad=True), torch.tensor([target])
    own, theirs = (grad(each(logits, targets), logits) for each in (CrossEntropyLoss(), F.cross_entropy))
    torch.testing.assert_close(own, theirs)


@given(batches(fewest=2))
@settings(max_examples=50, deadline=None)
def test_dft_gradient_is_that_of_minus_p(batch):
    logits, targets = batch.logits, batch.targets
    kept = targets != -100
    p = logits.softmax(-1)[kept].gather(-1, targets[kept].unsqueeze(-1))
    value = dft_cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(grad(value, logits), grad(-p.sum(), logits), rtol=1e-9, atol=1e-13)


@given(batches(fewest=2))
@settings(max_examples=30, deadline=None)
def test_focal_at_gamma_zero_is_cross_entropy(batch):
    logits, targets = batch.logits, batch.targets
    torch.testing.assert_close(
        focal_cross_entropy(logits, targets, gamma=0.0), CrossEntropyLoss()(logits, targets), rtol=0, atol=0
    )


def test_soft_targets_by_hand():
    q = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64)
    logits = torch.tensor([[0.0, math.log(2.0), 0.0]], dtype=torch.float64)  # p = 1/4, 1/2, 1/4
    log_prob = 0.25 * math.log(0.25) + 0.75 * math.log(0.5)
    expected_prob = 0.25 * 0.25 + 0.75 * 0.5
    assert DFTLoss()(logits, q).item() == pytest.approx(-expected_prob * log_prob, rel=1e-12)
    assert FocalLoss(2.0)(logits, q).item() == pytest.approx(-((1 - expected_prob) ** 2) * log_prob, rel=1e-12)
    torch.testing.assert_close(CrossEntropyLoss()(logits, q), F.cross_entropy(logits, q))
    torch.testing.assert_close(CrossEntropyLoss(0.3)(logits, q), F.cross_entropy(logits, q, label_smoothing=0.3))


@pytest.mark.parametrize("gap", [20.0, 40.0, 80.0])
def test_log_prob_keeps_its_digits_near_certainty(gap):
    """log p = -log1p(exp(-gap)): float32 z - logsumexp(z) would give 0 or a rounding of 100."""
    logits = torch.tensor([[100.0, 100.0 - gap]])
    log_prob = statistics_from_logits(logits, torch.tensor([0])).log_prob
    assert log_prob.item() == pytest.approx(-math.log1p(math.exp(-gap)), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("log_prob", [-1e-3, -1e-6, -1e-12, -1e-20])
def test_focal_keeps_its_digits_near_certainty(gamma, log_prob):
    leaf = torch.tensor([log_prob], requires_grad=True)
    value = FocalLoss(gamma).token_loss(TokenStats(log_prob=leaf))
    u, p, x = -math.expm1(leaf.item()), math.exp(leaf.item()), leaf.item()
    assert value.item() == pytest.approx(-(u**gamma) * x, rel=1e-5)
    slope = -(u**gamma) + gamma * u ** (gamma - 1) * p * x
    assert torch.autograd.grad(value, leaf)[0].item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [1e-3, 0.1, 0.5, 1.0, 2.0, 10.0])
def test_focal_gradient_is_finite_at_certainty(gamma, dtype):
    tiny = torch.finfo(dtype).smallest_normal
    leaf = torch.tensor([0.0, -tiny, -tiny / 2, -1e-30, -1e-7], dtype=dtype, requires_grad=True)
    for stats in (TokenStats(log_prob=leaf), TokenStats(log_prob=leaf, log_expected_prob=leaf.clone())):
        value = FocalLoss(gamma).token_loss(stats)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        assert gradient[0] == 0
    logits = torch.tensor([[200.0, -200.0]], dtype=dtype, requires_grad=True)
    assert grad(FocalLoss(gamma)(logits, torch.tensor([0])), logits).isfinite().all()


def test_dft_handles_certain_and_impossible_targets():
    logits = torch.tensor([[300.0, 0.0], [300.0, 0.0]], requires_grad=True)
    value = dft_cross_entropy(logits, torch.tensor([0, 1]), reduction="none")
    assert value.tolist() == [0.0, 0.0]
    assert torch.equal(grad(value.sum(), logits), torch.zeros_like(logits))
    assert DFTLoss()(torch.tensor([[-math.inf, 1.0]]), torch.tensor([0])) == 0


def test_statistics_against_their_definitions():
    logits, targets = torch.randn(5, 8, dtype=torch.float64), torch.randint(0, 8, (5,))
    stats = statistics_from_logits(logits, targets, ["entropy", Statistic("sum_squared_prob"), "mean_log_prob"])
    p = logits.softmax(-1)
    torch.testing.assert_close(stats.entropy, torch.distributions.Categorical(logits=logits).entropy())
    torch.testing.assert_close(stats.sum_squared_prob, p.square().sum(-1))
    torch.testing.assert_close(stats.mean_log_prob, p.log().mean(-1))
    assert stats.log_expected_prob is stats.log_prob
    assert stats.top_k_entropy is None


def test_own_loss_gets_what_it_needs_and_no_more():
    class Own(TokenLoss):
        needs = ("entropy", "sequence_index")

        def token_loss(self, stats):
            with pytest.raises(InputError, match=r'^Own reads stats.mean_log_prob .*needs = \("mean_log_prob",\)'):
                _ = stats.mean_log_prob
            assert stats.sequence_index.tolist() == [0, 0, 1]
            return -stats.log_prob + stats.entropy

    targets = torch.tensor([[1, 2, -100], [-100, 0, -100]])
    logits = torch.randn(2, 3, 4, requires_grad=True)
    assert Own()(logits, targets).isfinite()


def test_statistic_that_logits_cannot_give_is_refused():
    class Own(TokenLoss):
        needs = ("reference_log_prob",)

        def token_loss(self, stats):
            return stats.reference_log_prob

    with pytest.raises(ValueError, match=r"cannot be computed from logits alone: pass reference_log_prob"):
        Own()(torch.randn(2, 3), torch.tensor([0, 1]))
    for name, end in (
        ("nope", "the known ones are log_prob"),
        ("entropi", "did you mean entropy"),
        ("step", "uses_step = True"),
    ):
        with pytest.raises(InputError, match=f"unknown statistic '{name}'; .*{end}"):
            Statistic(name)


@pytest.mark.parametrize(
    ("logits", "targets", "error", "message"),
    [
        (torch.zeros(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 5]]), ValueError, r"target 5 at position \[1, 2\]"),
        (torch.zeros(2, 5), torch.tensor([-1, 0]), ValueError, r"target -1 at position \[0\].*\[0, 5\)"),
        (torch.zeros(2, 5), torch.zeros(3).long(), ValueError, r"\[2, 5\] do not match targets of shape \[3\]"),
        (torch.zeros(2, 5, 3), torch.zeros(2, 3).long(), ValueError, r"classes seem to be on axis 1.*movedim"),
        (torch.zeros(2, 5), torch.zeros(2), TypeError, r"must be integers, got torch.float32"),
        (torch.zeros(2, 5).long(), torch.zeros(2).long(), TypeError, r"logits must be floating point"),
        (torch.zeros(2, 5), torch.full((2, 5), -0.1), ValueError, r"must not be negative"),
        (torch.zeros(()), torch.zeros(()).long(), ValueError, r"logits must be \[\.\.\., V\]"),
    ],
)  # fmt: skip
def test_bad_input_says_what_and_where(logits, targets, error, message):
    with pytest.raises(error, match=message):
        DFTLoss()(logits, targets)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DFTLoss(reduction="avg"), "reduction must be one of none, mean, sum, got 'avg'"),
        (lambda: FocalLoss(gamma=-1), "gamma must be finite and not negative"),
        (lambda: FocalLoss(gamma=float("nan")), "gamma must be finite"),
        (lambda: FocalLoss(alpha=0), "alpha must be finite and positive"),
        (lambda: CrossEntropyLoss(1.5), r"label_smoothing must lie in \[0, 1\]"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_loss_that_reduces_by_itself_is_refused():
    class Mean(TokenLoss):
        def token_loss(self, stats):
            return -stats.log_prob.mean()

    with pytest.raises(
        ValueError, match=r"Mean.token_loss must return one loss per token, of shape \[2\], got shape \[\]"
    ):
        Mean()(torch.randn(2, 3), torch.tensor([0, 1]))


def test_small_integer_targets_are_not_mistaken_for_ignore_index():
    logits = torch.randn(1, 200)
    value = CrossEntropyLoss()(logits, torch.tensor([156], dtype=torch.uint8))  # 156 - 256 = -100
    torch.testing.assert_close(value, F.cross_entropy(logits, torch.tensor([156])))
