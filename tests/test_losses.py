"""The losses against independent references: torch, published formulas, identities, hand-worked cases."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dft_lightning.losses import (
    ChordPhiLoss,
    CrossEntropyLoss,
    DEFTLoss,
    DFTLoss,
    EAFTLoss,
    FocalLoss,
    MixtureLoss,
    PowerLoss,
    SequenceDFTLoss,
    Statistic,
    ThresholdLoss,
    TokenLoss,
    TokenStats,
    dft_cross_entropy,
    focal_cross_entropy,
    statistics_from_logits,
    token_loss_and_weight,
)

LOSSES = [
    CrossEntropyLoss(),
    CrossEntropyLoss(label_smoothing=0.1),
    DFTLoss(),
    FocalLoss(),
    FocalLoss(gamma=0.5, alpha=0.25),
    FocalLoss(gamma=2.0, detach_weight=True),
]
# Those whose formulas test_objectives.py has; what holds for every loss is held to here.
FAMILY = [
    PowerLoss(q=0.5),
    ThresholdLoss(threshold=0.3, above=False),
    ThresholdLoss(threshold=0.3, base=FocalLoss()),
    ChordPhiLoss(),
    DEFTLoss(),
    EAFTLoss(top_k=2),
    EAFTLoss(alpha=0.5, top_k=None),
    SequenceDFTLoss(),
    SequenceDFTLoss(mean="geometric"),
    MixtureLoss([DFTLoss(), PowerLoss(q=2.0)]),
]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)
every_kind = pytest.mark.parametrize("loss", LOSSES + FAMILY, ids=repr)


@st.composite
def logits_and_targets(draw, ignored=True):
    """Float64 logits [B, T, V] and index targets [B, T], some ignored."""
    batch, length, classes = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(2, 9))
    logits = draw(hnp.arrays("float64", (batch, length, classes), elements=st.floats(-30, 30)))
    targets = draw(hnp.arrays("int64", (batch, length), elements=st.integers(0, classes - 1)))
    targets = torch.from_numpy(targets)
    if ignored:
        targets[torch.from_numpy(draw(hnp.arrays("bool", (batch, length))))] = -100
    return torch.from_numpy(logits).requires_grad_(), targets


def grad(value, logits):
    return torch.autograd.grad(value, logits)[0]


def reference(loss, logits, targets):
    """Unreduced losses at kept targets, from the published formulas, by torch's log_softmax."""
    kept = targets != -100
    log_probs = logits.log_softmax(-1)[kept]
    log_p = log_probs.gather(-1, targets[kept].unsqueeze(-1)).squeeze(-1)
    p = log_p.exp()
    if isinstance(loss, DFTLoss):
        return -(p.detach() * log_p)
    if isinstance(loss, FocalLoss):
        weight = loss.alpha * (1 - p) ** loss.gamma
        return -(weight.detach() if loss.detach_weight else weight) * log_p
    return -(1 - loss.label_smoothing) * log_p - loss.label_smoothing * log_probs.mean(-1)


@given(logits_and_targets())
@settings(max_examples=50, deadline=None)
def test_cross_entropy_is_torchs(data):
    logits, targets = data
    for smoothing in (0.0, 0.2):
        expected = F.cross_entropy(logits.movedim(-1, 1), targets, reduction="sum", label_smoothing=smoothing)
        value = CrossEntropyLoss(smoothing, reduction="sum")(logits, targets)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad(value, logits), grad(expected, logits), rtol=1e-10, atol=1e-12)


def test_mean_is_torchs():
    logits, targets = torch.randn(5, 7, dtype=torch.float64), torch.tensor([1, -100, 3, 6, -100])
    torch.testing.assert_close(CrossEntropyLoss()(logits, targets), F.cross_entropy(logits, targets))


@every_loss
@given(data=logits_and_targets())
@settings(max_examples=30, deadline=None)
def test_published_formula(loss, data):
    logits, targets = data
    # Away from p = 1, where the textbook 1 - p loses its digits and cannot be a reference.
    logits = (logits / 8).detach().requires_grad_()
    summed = copy.deepcopy(loss)
    summed.reduction = "sum"
    value, expected = summed(logits, targets), reference(loss, logits, targets).sum()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad(value, logits), grad(expected, logits), rtol=1e-8, atol=1e-10)


@given(logits_and_targets())
@settings(max_examples=50, deadline=None)
def test_dft_gradient_is_that_of_minus_p(data):
    logits, targets = data
    kept = targets != -100
    p = logits.softmax(-1)[kept].gather(-1, targets[kept].unsqueeze(-1))
    value = dft_cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(grad(value, logits), grad(-p.sum(), logits), rtol=1e-9, atol=1e-13)


@given(logits_and_targets())
@settings(max_examples=30, deadline=None)
def test_focal_at_gamma_zero_is_cross_entropy(data):
    logits, targets = data
    torch.testing.assert_close(
        focal_cross_entropy(logits, targets, gamma=0.0), CrossEntropyLoss()(logits, targets), rtol=0, atol=0
    )


@every_kind
@given(data=logits_and_targets(ignored=False))
@settings(max_examples=30, deadline=None)
def test_one_hot_targets_equal_index_targets(loss, data):
    logits, targets = data
    one_hot = F.one_hot(targets, logits.shape[-1])
    for soft in (one_hot, one_hot.double()):
        by_soft, by_index = loss(logits, soft), loss(logits, targets)
        torch.testing.assert_close(by_soft, by_index, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(grad(by_soft, logits), grad(by_index, logits), rtol=1e-7, atol=1e-10)


@every_kind
@given(data=logits_and_targets())
@settings(max_examples=30, deadline=None)
def test_reductions_ignored_rows_and_untouched_targets(loss, data):
    logits, targets = data
    before = targets.clone()
    values = {}
    for reduction in ("none", "mean", "sum"):
        each = copy.deepcopy(loss)
        each.reduction = reduction
        values[reduction] = each(logits, targets)
    kept = targets != -100
    assert values["none"].shape == targets.shape
    assert (values["none"][~kept] == 0).all()
    torch.testing.assert_close(values["none"].sum(), values["sum"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(values["mean"], values["sum"] / max(int(kept.sum()), 1), rtol=1e-12, atol=1e-12)
    assert (grad(values["mean"], logits)[~kept] == 0).all()
    assert torch.equal(targets, before)


@every_kind
def test_ignored_rows_may_hold_nan(loss):
    logits = torch.randn(3, 5)
    logits[1] = float("nan")
    logits.requires_grad_()
    value = loss(logits, torch.tensor([0, -100, 4]))
    gradient = grad(value, logits)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()


@every_kind
def test_all_ignored_is_zero_with_a_gradient(loss):
    logits = torch.randn(2, 3, 5, requires_grad=True)
    value = loss(logits, torch.full((2, 3), -100))
    assert value == 0
    assert torch.equal(grad(value, logits), torch.zeros_like(logits))


def test_soft_targets_by_hand():
    q = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64)
    logits = torch.tensor([[0.0, math.log(2.0), 0.0]], dtype=torch.float64)  # p = 1/4, 1/2, 1/4
    log_prob = 0.25 * math.log(0.25) + 0.75 * math.log(0.5)
    expected_prob = 0.25 * 0.25 + 0.75 * 0.5
    assert DFTLoss()(logits, q).item() == pytest.approx(-expected_prob * log_prob, rel=1e-12)
    assert FocalLoss(2.0)(logits, q).item() == pytest.approx(-((1 - expected_prob) ** 2) * log_prob, rel=1e-12)
    torch.testing.assert_close(CrossEntropyLoss()(logits, q), F.cross_entropy(logits, q))
    torch.testing.assert_close(CrossEntropyLoss(0.3)(logits, q), F.cross_entropy(logits, q, label_smoothing=0.3))


def test_soft_targets_with_a_banned_class():
    logits = torch.tensor([[1.0, 2.0, float("-inf")]], requires_grad=True)
    q = torch.tensor([[0.5, 0.5, 0.0]])
    for loss in LOSSES[2:]:
        value = loss(logits, q)
        assert value.isfinite()
        assert grad(value, logits).isfinite().all()


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_to_float32(loss, dtype):
    logits, targets = torch.randn(6, 11).to(dtype), torch.randint(0, 11, (6,))
    value = loss(logits, targets)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(logits.float(), targets), rtol=0, atol=0)
    assert loss(logits.double(), targets).dtype == torch.float64


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


@every_loss
def test_weight_is_minus_the_slope(loss):
    """Against central differences in float64, with and without gradients, and under inference mode."""
    logits, targets = torch.randn(6, 9, dtype=torch.float64), torch.randint(0, 9, (6,))
    stats = statistics_from_logits(logits, targets, loss.needs)
    detach = isinstance(loss, DFTLoss) or getattr(loss, "detach_weight", False)
    step = 1e-6

    def at(log_prob):
        # a stop-gradient holds the weight where it is
        return loss.token_loss(
            TokenStats(log_prob, stats.log_prob if detach else log_prob, mean_log_prob=stats.mean_log_prob)
        )

    slope = (at(stats.log_prob + step) - at(stats.log_prob - step)) / (2 * step)
    with torch.inference_mode():
        inference_stats = statistics_from_logits(logits, targets, loss.needs)
        _, in_inference = token_loss_and_weight(loss, inference_stats)
    with torch.no_grad():
        _, in_no_grad = token_loss_and_weight(loss, stats)
    losses, weight = token_loss_and_weight(loss, stats)
    for value in (weight, in_no_grad, in_inference):
        torch.testing.assert_close(value, -slope, rtol=1e-6, atol=1e-8)
        assert not value.requires_grad
    torch.testing.assert_close(losses, loss.token_loss(stats))


def test_weight_of_cross_entropy_and_dft():
    stats = TokenStats(log_prob=torch.tensor([-0.5, -3.0]))
    assert token_loss_and_weight(CrossEntropyLoss(), stats)[1].tolist() == [1.0, 1.0]
    torch.testing.assert_close(token_loss_and_weight(DFTLoss(), stats)[1], stats.log_prob.exp())


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
            assert stats.mean_log_prob is None
            assert stats.sequence_index.tolist() == [0, 0, 1]
            return -stats.log_prob + stats.entropy

    targets = torch.tensor([[1, 2, -100], [-100, 0, -100]])
    logits = torch.randn(2, 3, 4, requires_grad=True)
    assert Own()(logits, targets).isfinite()


def test_statistic_that_logits_cannot_give_is_refused():
    class Own(TokenLoss):
        needs = ("reference_log_prob",)

    with pytest.raises(ValueError, match=r"cannot be computed from logits alone: pass reference_log_prob"):
        Own()(torch.randn(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"unknown statistic 'nope'; the known ones are log_prob"):
        Statistic("nope")


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


@every_kind
def test_survives_copy_and_pickle(loss):
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(other) == repr(loss)
        logits, targets = torch.randn(3, 5), torch.tensor([0, 1, -100])
        assert torch.equal(other(logits, targets), loss(logits, targets))


@every_kind
def test_other_ignore_index(loss):
    other = copy.deepcopy(loss)
    other.ignore_index = 0
    logits = torch.randn(4, 5)
    expected = loss(logits, torch.tensor([-100, 1, 2, -100]))
    torch.testing.assert_close(other(logits, torch.tensor([0, 1, 2, 0])), expected)


@every_kind
def test_gradients_at_the_edges_are_finite(loss):
    """Rows of zeros as padding of one-hot targets, a banned target, all other classes banned."""
    inf = float("inf")
    soft = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    logits = torch.randn(2, 3, requires_grad=True)
    gradient = grad(loss(logits, soft), logits)
    assert gradient.isfinite().all()
    if getattr(loss, "label_smoothing", 0):
        return  # the mean over the vocabulary is -inf where a class is banned, as in torch
    for values, target in (([-inf, 1.0, 2.0], 0), ([3.0, -inf, -inf], 0)):
        logits = torch.tensor([values], requires_grad=True)
        gradient = grad(loss(logits, torch.tensor([target])), logits)
        assert gradient[logits.isfinite()].isfinite().all()
        expected = grad(F.cross_entropy(logits, torch.tensor([target])), logits)
        if isinstance(loss, CrossEntropyLoss):
            torch.testing.assert_close(gradient, expected)
    assert DFTLoss()(torch.tensor([[-inf, 1.0]]), torch.tensor([0])) == 0
    assert (gradient == 0).all()  # p = 1: nothing to learn


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
