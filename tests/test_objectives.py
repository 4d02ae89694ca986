"""The family of objectives: identities of their gradients, limits, hand-worked cases; and bad input."""

from __future__ import annotations

import math
import sys

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
    FromReference,
    GEMLoss,
    ImportanceWeightedLoss,
    InfoSFTLoss,
    MixtureLoss,
    PowerLoss,
    PriorWeightedLoss,
    ProximalLoss,
    RectifiedLoss,
    ReferenceKLLoss,
    ScheduledLoss,
    SEDSFTLoss,
    SequenceDFTLoss,
    Statistic,
    TargetSFTLoss,
    ThresholdLoss,
    TokenLoss,
    TokenStats,
    TrustRegionLoss,
    compute_loss_func,
)
from dft_lightning.errors import InputError
from dft_lightning.losses import statistics_from_logits, token_loss_and_weight
from dft_lightning.ops import ReferenceHead, linear_token_loss, logits_token_loss
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


# What the authors' own expressions give, typed into plain torch in float64, for one token: the target, the loss, and
# its gradient by the logits.
Z, R = [1.0, 2.0, 0.5, -1.0], [0.8, 1.5, 1.0, -0.5]
AUTHORS = [
    (InfoSFTLoss(), 1, 0.2498696222, [0.1131356437, -0.1970671247, 0.0686202366, 0.0153112444]),
    (InfoSFTLoss(), 3, 0.2480953485, [0.0159147416, 0.0432607529, 0.0096527787, -0.0688282732]),
    (InfoSFTLoss(peak=0.55), 1, 0.0, [0.0, 0.0, 0.0, 0.0]),
    (TrustRegionLoss(), 1, -1.0, [0.2242078180, -0.3905399624, 0.1359889158, 0.0303432286]),
    (TrustRegionLoss(), 3, -0.3034322856, [0.0680318907, 0.1849298522, 0.0412634275, -0.2942251704]),
    (RectifiedLoss(), 1, 0.4951818981, [0.2242078180, -0.3905399624, 0.1359889158, 0.0303432286]),
    (RectifiedLoss(), 3, 0.1060551032, [0.0068031891, 0.0184929852, 0.0041263428, -0.0294225170]),
    (RectifiedLoss(threshold=0.7), 1, 0.3017935782, [0.1366457052, -0.2380185002, 0.0828798097, 0.0184929852]),
    (PriorWeightedLoss(), 1, 0.2212162980, [0.1001620287, -0.1744688266, 0.0607513414, 0.0135554565]),
    (PriorWeightedLoss(), 3, 0.2113163880, [0.0135554565, 0.0368475511, 0.0082218000, -0.0586248077]),
    (PriorWeightedLoss("mass"), 1, 0.4951818981, [0.2242078180, -0.3905399624, 0.1359889158, 0.0303432286]),
    (PriorWeightedLoss("mass"), 3, 0.0, [0.0, 0.0, 0.0, 0.0]),
    (
        MixtureLoss([CrossEntropyLoss(), ReferenceKLLoss()], [1.0, 0.1]),
        1,
        0.5039188934,
        [0.2244442747, -0.3742677036, 0.1224918114, 0.0273316175],
    ),
    (AnchoredLoss(0.1), 3, 0.1147920985, [0.0070396457, 0.0347652441, -0.0093707616, -0.0324341281]),
    (GEMLoss(), 1, -0.3333404945, [0.1748340950, -0.2704638480, 0.0855885730, 0.0100411800]),
    (GEMLoss(), 3, 2.6666595055, [0.1748340950, 0.7295361520, 0.0855885730, -0.9899588200]),
    (GEMLoss(form="logsigmoid"), 1, -0.1655258293, [0.0869799659, -0.1343985881, 0.0424733354, 0.0049452868]),
    (GEMLoss(form="logsigmoid"), 3, 1.3519727946, [0.0882911888, 0.3702391868, 0.0431152376, -0.5016456133]),
    (TargetSFTLoss(eta=0.5), 1, 0.7501130378, [0.1352952552, -0.2080239979, 0.0594611637, 0.0132675790]),
    (TargetSFTLoss(eta=0.5), 3, 1.2191703836, [0.0034502082, 0.0929651906, -0.0540189199, -0.0423964788]),
    (TargetSFTLoss(eta=1.0), 3, 1.3713050578, [0.0090960066, 0.1762780450, -0.1267492440, -0.0586248077]),
]


@pytest.mark.parametrize(("loss", "target", "value", "slopes"), AUTHORS, ids=repr)
def test_what_the_authors_compute(loss, target, value, slopes):
    logits = torch.tensor([Z], dtype=torch.float64, requires_grad=True)
    reference, targets = torch.tensor([R], dtype=torch.float64), torch.tensor([target])
    log_prob = reference_log_probs(reference, targets)
    found = loss(logits, targets, reference_log_prob=log_prob, reference_logits=reference)
    assert found.item() == pytest.approx(value, abs=1e-10)
    assert torch.autograd.grad(found, logits)[0][0].tolist() == pytest.approx(slopes, abs=1e-10)


def test_infosft_at_the_ends_of_its_weight():
    p = torch.tensor([0.5, 0.93, 0.95, 1.0, 1e-30], dtype=torch.float64)
    losses, weight = token_loss_and_weight(InfoSFTLoss(), TokenStats(log_prob=p.log()))
    assert weight.tolist() == pytest.approx([0.5, 0.0, 0.0, 0.0, 1e-30 * (1 + math.log(1e30) / math.log(0.93 / 0.07))])
    assert losses.isfinite().all()
    of_everything = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    weight = token_loss_and_weight(InfoSFTLoss(), TokenStats(log_prob=of_everything.log()))[1]
    assert weight.max().item() == pytest.approx(0.508, abs=5e-4)
    assert of_everything[weight.argmax()].item() == pytest.approx(0.57, abs=5e-3)


def test_trust_region_and_rectified_lie_between_cross_entropy_and_dft(batch):
    same(gradient(TrustRegionLoss(floor=1.0), batch), gradient(DFTLoss(), batch))
    same(gradient(TrustRegionLoss(floor=1e-9), batch), gradient(CrossEntropyLoss(), batch))
    same(gradient(RectifiedLoss(threshold=0.0), batch), gradient(CrossEntropyLoss(), batch))
    same(gradient(RectifiedLoss(threshold=1.0), batch), gradient(DFTLoss(), batch))
    at_threshold = TokenStats(log_prob=torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64).log())
    assert token_loss_and_weight(RectifiedLoss(), at_threshold)[1].tolist() == pytest.approx([0.25, 0.5, 1.0])


def test_weights_from_the_reference(batch):
    """Of the model itself they are its own; of cross-entropy 1; DFT's are the prior's."""
    logits, reference, targets = batch
    itself = {"reference_log_prob": reference_log_probs(logits.detach(), targets)}
    other = {"reference_log_prob": reference_log_probs(reference, targets)}
    for loss in (DFTLoss(), PowerLoss(0.3), ThresholdLoss(0.05)):
        same(gradient(FromReference(loss), batch, **itself), gradient(loss, batch))
    same(gradient(FromReference(CrossEntropyLoss()), batch, **other), gradient(CrossEntropyLoss(), batch))
    same(gradient(FromReference(DFTLoss()), batch, **other), gradient(PriorWeightedLoss(), batch, **other))
    step = ScheduledLoss(CrossEntropyLoss(), DFTLoss(), end_step=0)
    same(gradient(FromReference(step), batch, step=3, **other), gradient(PriorWeightedLoss(), batch, **other))


def test_the_mass_below_a_token_has_the_token_and_not_its_equals():
    logits = torch.tensor([[0.4, 0.3, 0.3]], dtype=torch.float64).log()
    needs = ["reference_mass_below"]
    found = [statistics_from_logits(logits, torch.tensor([y]), needs, reference_logits=logits) for y in range(3)]
    assert [stats.reference_mass_below.item() for stats in found] == pytest.approx([1.0, 0.3, 0.3])


def test_divergences_by_hand():
    """(3/4, 1/4) against (1/2, 1/2); of itself nothing; each is the other with model and reference exchanged."""
    own, other = torch.tensor([[0.0, 0.0]]).double(), torch.tensor([[math.log(3.0), 0.0]]).double()
    target = torch.tensor([0])
    forward = ReferenceKLLoss()(own, target, reference_logits=other).item()
    reverse = ReferenceKLLoss("reverse")(own, target, reference_logits=other).item()
    assert forward == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert reverse == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert ReferenceKLLoss("reverse")(other, target, reference_logits=own).item() == pytest.approx(forward)
    for direction in ("forward", "reverse"):
        logits = other.clone().requires_grad_()
        value = ReferenceKLLoss(direction)(logits, target, reference_logits=other)
        assert value.item() == pytest.approx(0.0, abs=1e-15)
        assert torch.autograd.grad(value, logits)[0].abs().max() < 1e-15


@pytest.mark.parametrize("eta", [0.0, 0.01, 0.5, 0.99, 1.0])
@pytest.mark.parametrize(("model", "teacher", "target"), [(3, None, 1), (None, 3, 1), (3, 3, 1), (3, 5, 3), (3, 5, 5)])
def test_banned_classes_alike_on_both_heads(eta, model, teacher, target):
    """Of the model, of the teacher, of both; the target among them. By logits, in float64, is what float32 has."""
    own, other = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind(0)
    for logits, banned in ((own, model), (other, teacher)):
        if banned is not None:
            logits[banned] = -math.inf
    targets = torch.tensor([target])
    for dtype in (torch.float64, torch.float32):
        bias = own.to(dtype).requires_grad_()
        hidden, weight = torch.zeros(1, 1, dtype=dtype), torch.zeros(8, 1, dtype=dtype)
        head = ReferenceHead(hidden, weight, other.to(dtype))
        fused = linear_token_loss(hidden, weight, targets, TargetSFTLoss(eta), bias=bias, reference=head)
        full = TargetSFTLoss(eta)(bias[None], targets, reference_logits=other.to(dtype)[None])
        torch.testing.assert_close(fused.loss, full, rtol=1e-5, atol=1e-6)
        assert fused.loss.isfinite()
        if eta == 1 and model not in (None, teacher):  # no logit of that class raises what the teacher wants of it
            continue
        slopes = [torch.autograd.grad(value, bias)[0] for value in (fused.loss, full)]
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)


def test_gem_at_beta_one_and_target_sft_without_a_teacher(batch):
    same(gradient(GEMLoss(beta=1.0), batch), gradient(CrossEntropyLoss(), batch))
    same(gradient(TargetSFTLoss(eta=0.0), batch), gradient(DFTLoss(), batch))
    same(gradient(SEDSFTLoss(threshold=1.0, weight=0.0), batch), gradient(CrossEntropyLoss(), batch))


def test_what_the_docs_say_of_others(batch):
    """One-Token Rollout in expectation, by its sum over all tokens; cross-entropy weighted by ``exp(l / tau)``."""
    logits, _, targets = batch
    log_probs, beta = logits.log_softmax(-1), 0.2
    reward = torch.full_like(log_probs, beta).scatter(-1, targets.clamp(min=0)[..., None], 1.0)
    rollout = -(log_probs.exp().detach() * reward * log_probs).sum(-1)[targets != -100].mean()
    same(torch.autograd.grad(rollout, logits, retain_graph=True)[0], (1 - beta) * gradient(DFTLoss(), batch))
    log_prob = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0][targets != -100]
    weighted = -((log_prob / 1.7).exp().detach() * log_prob).mean()
    same(torch.autograd.grad(weighted, logits)[0], gradient(PowerLoss(1 / 1.7), batch))


# -- statistics of one's own -----------------------------------------------------------------------------------------


def second(logits, targets):
    """The second largest logit."""
    return logits.topk(2, dim=-1).values[:, 1]


class Second(TokenLoss):
    needs = (Statistic.of(second),)

    def token_loss(self, stats):
        return -stats.second * stats.log_prob


def test_a_statistic_of_ones_own_is_a_constant(batch):
    logits, _, targets = batch
    kept = targets != -100
    expected = -(logits.topk(2, dim=-1).values[..., 1].detach()[kept] * logits.log_softmax(-1)[kept].gather(
        -1, targets[kept][:, None]
    )[:, 0]).mean()  # fmt: skip
    same(Second()(logits, targets), expected)
    same(gradient(Second(), batch), torch.autograd.grad(expected, logits)[0])
    output = logits_token_loss(logits, targets, Second(), statistics=["entropy"])
    same(output.own["second"], logits.topk(2, dim=-1).values[..., 1].detach()[kept])
    same(output.second, output.own["second"])
    same(gradient(MixtureLoss([Second(), DFTLoss()], [2.0, 0.0]), batch), 2 * gradient(Second(), batch))


class Times(TokenLoss):
    """Keeps the statistic for backward."""

    needs = (Statistic.of(second),)

    def token_loss(self, stats):
        return stats.second * -stats.log_prob


def test_a_statistic_of_ones_own_in_inference_mode(batch):
    """As ``validate`` and ``test`` run: by logits and by the fused head."""
    logits, _, targets = batch
    kept = targets != -100
    expected = logits_token_loss(logits, targets, Times())
    with torch.inference_mode():
        hidden, weight = logits.detach()[kept], torch.eye(V, dtype=torch.float64)
        found = [
            logits_token_loss(logits.detach(), targets, Times()),
            linear_token_loss(hidden, weight, targets[kept], Times()),
        ]
    for output in found:
        same(output.loss, expected.loss.detach())
        same(output.weight, expected.weight)


@pytest.mark.parametrize("name", ["cross", "reference_kl_", "sum_logits", "log_tempered", "any_name"])
def test_any_name_of_ones_own(name, batch):
    logits, _, targets = batch
    kept = targets != -100

    class Named(TokenLoss):
        needs = (Statistic.of(second, name), "entropy")

        def token_loss(self, stats):
            return -getattr(stats, name) * stats.log_prob + 0 * stats.entropy

    found = linear_token_loss(logits.detach()[kept], torch.eye(V, dtype=torch.float64), targets[kept], Named())
    same(found.loss, Second()(logits.detach(), targets) * kept.sum())


def test_a_statistic_of_ones_own_is_named_and_checked(batch):
    logits, _, targets = batch

    class Unnamed(Second):
        needs = ()

    class Misspelt(Second):
        def token_loss(self, stats):
            return stats.secnd

    with pytest.raises(InputError, match="Unnamed reads stats.second: there is no such statistic"):
        Unnamed()(logits, targets)
    with pytest.raises(InputError, match="Misspelt reads stats.secnd: there is no such statistic"):
        Misspelt()(logits, targets)
    wrong = (lambda z, y: z, r"\[12, 30\]"), (lambda z, y: z.sum(), r"\[\]"), (lambda z, y: 3.0, "float")
    for function, got in wrong:

        class Wrong(Second):
            needs = (Statistic.of(function, "second"),)

        with pytest.raises(InputError, match=rf"Statistic.of\(second\) must return one number for each .*, got {got}"):
            Wrong()(logits, targets)
    for name, message in (
        ("entropy", "entropy is a name that TokenStats has already"),
        ("own", "own is a name that TokenStats has already"),
        ("correct", "correct is a name that TokenStats has already"),
        ("losses", "losses is a name that TokenStats has already"),
        ("named", "named is a name that TokenStats has already"),
        ("_hidden", "'_hidden' cannot be read as stats.NAME"),
        ("two words", "cannot be read as stats.NAME"),
    ):
        with pytest.raises(InputError, match=message):
            Statistic.of(second, name)
    with pytest.raises(InputError, match="'<lambda>' cannot be read as stats.NAME: give name="):
        Statistic.of(lambda z, y: y)
    with pytest.raises(ValueError, match="MixtureLoss: one loss needs"):
        MixtureLoss([Second(), Wrong()])
    assert Statistic.of(second) == Statistic.of(second, "second")
    assert hash(Statistic.of(second)) == hash(Statistic.of(second))


# -- names and bad input ---------------------------------------------------------------------------------------------


def test_losses_are_listed_by_name():
    def below(cls):
        return {cls.__name__: cls} | {name: sub for child in cls.__subclasses__() for name, sub in below(child).items()}

    def is_there(name, cls):  # and not of a docstring's example
        room = sys.modules.get(cls.__module__)
        return cls.__module__.startswith("dft_lightning.") and name[0] != "_" and getattr(room, name, None) is cls

    own = {name: cls for name, cls in below(TokenLoss).items() if is_there(name, cls)}
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
        (lambda: InfoSFTLoss(peak=0.5), "peak is a probability between 1/2 and 1, got 0.5"),
        (lambda: TrustRegionLoss(floor=0.0), "floor is a probability, more than 0 and at most 1, got 0.0"),
        (lambda: RectifiedLoss(threshold=-0.1), "threshold is a probability and must lie in"),
        (lambda: PriorWeightedLoss(form="rank"), "form must be one of prob, mass, got 'rank'"),
        (lambda: PriorWeightedLoss(threshold=0.0), "threshold is a probability, more than 0"),
        (lambda: ReferenceKLLoss("backward"), "direction must be one of forward, reverse, got 'backward'"),
        (lambda: GEMLoss(beta=0), "beta must be finite and positive"),
        (lambda: GEMLoss(form="log"), "form must be one of linear, logsigmoid, got 'log'"),
        (lambda: TargetSFTLoss(eta=1.1), "eta is the teacher's share and must lie in"),
        (lambda: SEDSFTLoss(threshold=0.0), "threshold is a probability, more than 0"),
        (lambda: SEDSFTLoss(threshold=0.5, weight=-1), "weight must be finite and not negative"),
        (lambda: SEDSFTLoss(threshold=0.5, top_k=0), "top_k must be a whole number, 1 or more, got 0"),
        (lambda: FromReference(EAFTLoss()), "EAFTLoss reads top_k_entropy: give a loss of log_prob alone"),
        (lambda: FromReference(ProximalLoss()), "ProximalLoss reads reference_log_prob"),
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
    of_a_distribution = {"AnchoredLoss", "ReferenceKLLoss", "GEMLoss", "TargetSFTLoss"}
    assert {name for name, does in takes.items() if not does} == of_a_distribution | {"ProximalLoss", "SEDSFTLoss"}
    assert not MixtureLoss([DFTLoss(), ProximalLoss()]).takes_negative_weights
    assert MixtureLoss([DFTLoss(), PowerLoss()]).takes_negative_weights


def test_transformers_trainer_is_told_what_it_cannot_give():
    for loss in (ProximalLoss(), AnchoredLoss(), ImportanceWeightedLoss()):
        with pytest.raises(ValueError, match=f"{type(loss).__name__} needs reference_.*compute_loss of your own"):
            compute_loss_func(loss)
