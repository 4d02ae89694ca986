"""The family of objectives: identities of their gradients, limits, hand-worked cases; and bad input."""

from __future__ import annotations

import math

import pytest
import torch

from dft_lightning import (
    LOSSES,
    AnchoredLoss,
    CrossEntropyLoss,
    DEFTLoss,
    DFTLoss,
    EAFTLoss,
    FocalLoss,
    ImportanceWeightedLoss,
    MixtureLoss,
    PowerLoss,
    ProximalLoss,
    SequenceDFTLoss,
    Statistic,
    ThresholdLoss,
    TokenLoss,
    TokenStats,
    compute_loss_func,
)
from dft_lightning.losses import statistics_from_logits, token_loss_and_weight
from dft_lightning.ops import logits_token_loss
from test_every_loss import fixed

V = 30


@pytest.fixture
def batch():
    found = fixed()
    return found.logits, found.reference, found.targets


def reference_log_probs(reference, targets):
    return reference.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)


# -- identities ------------------------------------------------------------------------------------------------------


def gradient(loss, batch, **options):
    logits, _, targets = batch
    return torch.autograd.grad(loss(logits, targets, **options), logits)[0]


def same(own, other):
    torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-14)


def test_power_lies_between_cross_entropy_and_dft(batch):
    logits, _, targets = batch
    same(gradient(PowerLoss(0.0), batch), gradient(CrossEntropyLoss(), batch))
    same(gradient(PowerLoss(1.0), batch), gradient(DFTLoss(), batch))
    assert PowerLoss(1e-9)(logits, targets).item() == pytest.approx(
        CrossEntropyLoss()(logits, targets).item(), rel=1e-7
    )
    small = PowerLoss(1e-9)(logits.detach().float(), targets)  # 1 - p**q would have no digit left
    assert small.item() == pytest.approx(CrossEntropyLoss()(logits, targets).item(), rel=1e-5)


@pytest.mark.parametrize("base", [None, DFTLoss(), FocalLoss(2.0), SequenceDFTLoss()], ids=repr)
def test_threshold_zero_is_the_base(base, batch):
    logits, _, targets = batch
    loss, alone = ThresholdLoss(0.0, base=base), base or CrossEntropyLoss()
    assert loss(logits, targets) == alone(logits, targets)
    assert torch.equal(gradient(loss, batch), gradient(alone, batch))
    assert loss.pointwise == alone.pointwise


def test_a_threshold_is_met_by_its_own_probability():
    stats = TokenStats(log_prob=torch.tensor([0.5, 0.25]).log())
    assert (ThresholdLoss(0.5).token_loss(stats) > 0).tolist() == [True, False]
    assert (ThresholdLoss(0.5, above=False).token_loss(stats) > 0).tolist() == [False, True]


def test_deft_at_its_ends():
    """A one-hot distribution: ``1 - p`` and DFT's gradient; uniform over many: cross-entropy."""
    log_prob = torch.tensor([-0.3, -2.0, -9.0], dtype=torch.float64)
    certain = TokenStats(log_prob=log_prob, sum_squared_prob=torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(DEFTLoss().token_loss(certain), 1 - log_prob.exp())
    torch.testing.assert_close(token_loss_and_weight(DEFTLoss(), certain)[1], log_prob.exp())
    for size in (10**4, 10**7):
        logits, target = torch.zeros(1, size, dtype=torch.float64), torch.tensor([0])
        value, ce = DEFTLoss()(logits, target).item(), CrossEntropyLoss()(logits, target).item()
        assert value == pytest.approx(ce, rel=1.1 * math.log(size) / size / 2)


@pytest.mark.parametrize("top_k", [2, 20, None])
def test_eaft_with_alpha_zero_is_cross_entropy(top_k, batch):
    same(gradient(EAFTLoss(0.0, top_k), batch), gradient(CrossEntropyLoss(), batch))
    certain = torch.tensor([[100.0] + [-100.0] * 29])
    assert EAFTLoss(0.0, top_k)(certain, torch.tensor([1])).item() == pytest.approx(200.0)


def test_eaft_by_hand_and_beside_other_frameworks():
    """Three of four tokens equally likely among the first four: ``ln 3 / ln 4``; LLaMA-Factory divides by 3.0."""
    logits = torch.tensor([[0.0, 0.0, 0.0, -60.0] + [-80.0] * 26], dtype=torch.float64)
    value = EAFTLoss(top_k=4)(logits, torch.tensor([0])).item()
    assert value == pytest.approx(math.log(3) / math.log(4) * math.log(3), rel=1e-9)
    flat = torch.zeros(1, 30, dtype=torch.float64)
    assert EAFTLoss()(flat, torch.tensor([0])).item() == pytest.approx(math.log(30), rel=1e-12)  # the weight is 1
    theirs = math.log(20) / 3.0 * math.log(30)
    assert theirs / math.log(30) == pytest.approx(0.9986, abs=1e-4)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_of_the_model_itself_are_cross_entropy(level, batch):
    logits, _, targets = batch
    options = {"reference_log_prob": reference_log_probs(logits.detach(), targets)}
    loss = ImportanceWeightedLoss(level=level)
    same(loss(logits, targets, **options), CrossEntropyLoss()(logits, targets))
    same(gradient(loss, batch, **options), gradient(CrossEntropyLoss(), batch))
    assert loss.pointwise == (level == "token")


def test_importance_weights_are_clipped():
    log_prob, reference = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-9.0, -1.0, -0.1])
    stats = TokenStats(log_prob=log_prob, reference_log_prob=reference, sequence_index=torch.tensor([4, 4, 9]))
    weight = token_loss_and_weight(ImportanceWeightedLoss(level="token", clip=(0.5, 16.0)), stats)[1]
    torch.testing.assert_close(weight, torch.tensor([16.0, 1.0, 0.5]))
    weight = token_loss_and_weight(ImportanceWeightedLoss(clip=None), stats)[1]  # means 4 and -0.9
    torch.testing.assert_close(weight, torch.tensor([4.0, 4.0, -0.9]).exp())


def test_proximal_at_the_reference_and_beyond():
    """At ``r = 1`` cross-entropy's gradient; above ``1 + epsilon`` none; next to impossible references stay finite."""
    log_prob = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    reference = torch.tensor([-1.0, -2.0, -0.5, -500.0])
    stats = TokenStats(log_prob=log_prob, reference_log_prob=reference)
    losses, weight = token_loss_and_weight(ProximalLoss(0.2), stats)
    torch.testing.assert_close(losses, torch.tensor([-1.0, -1.2, -math.exp(-0.5), -1.2]))
    torch.testing.assert_close(weight, torch.tensor([1.0, 0.0, math.exp(-0.5), 0.0]))


def test_an_anchor_of_no_weight_or_on_the_model_is_dft(batch):
    logits, _, targets = batch
    same(gradient(AnchoredLoss(0.0), batch), gradient(DFTLoss(), batch))
    assert AnchoredLoss(0.0).needs == ()
    on_itself = AnchoredLoss(3.0)(logits, targets, reference_logits=logits.detach())
    same(on_itself, DFTLoss()(logits, targets))
    same(torch.autograd.grad(on_itself, logits)[0], gradient(DFTLoss(), batch))


# -- names and bad input ---------------------------------------------------------------------------------------------


def test_losses_are_listed_by_name():
    def below(cls):
        return {cls.__name__: cls} | {name: sub for child in cls.__subclasses__() for name, sub in below(child).items()}

    own = {n: c for n, c in below(TokenLoss).items() if c.__module__.startswith("dft_lightning.") and n[0] != "_"}
    assert {"TokenLoss": TokenLoss, **LOSSES} == own


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PowerLoss(q=-0.5), "q must be finite and not negative .*, got -0.5"),
        (lambda: PowerLoss(q=math.inf), "q must be finite"),
        (lambda: ThresholdLoss(threshold=1.5), r"threshold is a probability and must lie in \[0, 1\], got 1.5"),
        (lambda: ThresholdLoss(threshold=math.nan), "threshold is a probability"),
        (lambda: ThresholdLoss(threshold=0.0, above=False), "no token is below a threshold of 0"),
        (lambda: ThresholdLoss(base=DFTLoss(reduction="sum")), "set ignore_index and reduction of ThresholdLoss"),
        (lambda: EAFTLoss(alpha=-1), "alpha must be finite and not negative"),
        (lambda: EAFTLoss(top_k=1), "top_k must be 2 or more, or None for the whole vocabulary, got 1"),
        (lambda: ImportanceWeightedLoss(level="batch"), "level must be one of token, sequence, got 'batch'"),
        (lambda: ImportanceWeightedLoss(clip=(2.0, 1.0)), r"0 <= lower <= upper, or None, got \(2.0, 1.0\)"),
        (lambda: ImportanceWeightedLoss(temperature=math.nan), "temperature must be finite"),
        (lambda: ProximalLoss(epsilon=0), "epsilon must be finite and positive"),
        (lambda: SequenceDFTLoss(mean="arithmetic"), "mean must be one of product, geometric"),
        (lambda: AnchoredLoss(weight=-1), "weight must be finite and not negative"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_missing_or_wrong_reference_is_named(batch):
    logits, _, targets = batch
    with pytest.raises(ValueError, match="cannot be computed from logits alone: pass reference_log_prob"):
        ProximalLoss()(logits, targets)
    with pytest.raises(ValueError, match="cannot be computed from logits alone: pass reference_logits"):
        AnchoredLoss()(logits, targets)
    with pytest.raises(ValueError, match=r"reference_log_prob must have shape \[3, 5\].*got \[3, 4\]"):
        ProximalLoss()(logits, targets, reference_log_prob=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="top_k_entropy takes k from 1 to the size of the vocabulary, 5; got 20"):
        EAFTLoss()(torch.zeros(2, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"top_k_entropy takes k"):
        statistics_from_logits(logits[0], targets[0].clamp(min=0), ["top_k_entropy"])
    with pytest.raises(ValueError, match=r"entropy takes no parameters"):
        statistics_from_logits(logits[0], targets[0].clamp(min=0), [Statistic("entropy", k=3)])


def test_weights_that_overflow_stay_finite():
    log_prob, reference = torch.tensor([0.0, -1e-3]), torch.tensor([-500.0, -500.0])
    stats = TokenStats(log_prob=log_prob, reference_log_prob=reference)
    losses, weight = token_loss_and_weight(ImportanceWeightedLoss(level="token", clip=None), stats)
    assert losses.isfinite().all()
    assert weight.isfinite().all()
    assert (weight > 1e37).all()


def test_entropy_of_everything_needs_its_size():
    stats = TokenStats(log_prob=torch.zeros(1), entropy=torch.zeros(1))
    with pytest.raises(ValueError, match=r"divides by the logarithm of stats.vocab_size, which is not given"):
        EAFTLoss(top_k=None).token_loss(stats)


def test_full_logits_give_what_telemetry_asks_for(batch):
    logits, reference, targets = batch
    options = {"statistics": ("reference_kl", "entropy"), "reference_logits": reference}
    output = logits_token_loss(logits, targets, CrossEntropyLoss(), **options)
    kept = targets != -100
    own, other = logits.log_softmax(-1)[kept], reference.log_softmax(-1)[kept]
    torch.testing.assert_close(output.reference_kl, (other.exp() * (other - own)).sum(-1).detach())
    with pytest.raises(ValueError, match="not both"):
        logits_token_loss(logits, targets, EAFTLoss(top_k=5), statistics=[Statistic("top_k_entropy", k=6)])


def test_losses_that_negative_weights_mean_nothing_to():
    takes = {name: cls.takes_negative_weights for name, cls in LOSSES.items()}
    assert {name for name, does in takes.items() if not does} == {"ProximalLoss", "AnchoredLoss"}
    assert not MixtureLoss([DFTLoss(), ProximalLoss()]).takes_negative_weights
    assert MixtureLoss([DFTLoss(), PowerLoss()]).takes_negative_weights


def test_transformers_trainer_is_told_what_it_cannot_give():
    for loss in (ProximalLoss(), AnchoredLoss(), ImportanceWeightedLoss()):
        with pytest.raises(ValueError, match=f"{type(loss).__name__} needs reference_.*compute_loss of your own"):
            compute_loss_func(loss)
