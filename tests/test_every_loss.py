"""Every loss of the package through what holds for all: its formula, both heads, differences, half precision, ignored
rows, splits of a step, two processes. A new loss is one entry of ``TRAINED``, another setting of one an entry of
``SETTINGS``; what only one loss promises is tried in ``test_losses.py`` and ``test_objectives.py``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torch.overrides import TorchFunctionMode

from commands import score
from conftest import at_hand
from dft_lightning import (
    LOSSES,
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
    InstructionDataModule,
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
)
from dft_lightning.data.text.tokenizer import load_tokenizer
from dft_lightning.errors import InputError
from dft_lightning.losses import statistics_from_logits, token_loss_and_weight
from dft_lightning.ops import TokenOutput, linear_token_loss, linear_token_statistics, logits_token_loss
from small_runs import (
    GradientRecorder,
    data_options,
    on_two_processes,
    save_base,
    trainer,
)
from test_linear_head import (
    AllStatistics,
    Anchored,
    EntropyWeighted,
    assert_same,
    full_logits,
    gradients,
    problem,
    reference_head,
    relative,
)

# -- the losses, and their formulas in the words of the papers ---------------------------------------------------------


@dataclasses.dataclass
class Tokens:
    """What a formula reads of the n target tokens of a sequence, in float64: ``[n, V]`` and ``[n]``."""

    log_probs: Tensor
    log_p: Tensor
    others: Tensor  # of the reference model
    log_r: Tensor
    step: int

    @property
    def p(self) -> Tensor:
        return self.log_p.exp()

    @property
    def q(self) -> Tensor:
        """The probability as a constant."""
        return self.p.detach()

    @property
    def ratio(self) -> Tensor:
        return (self.log_p - self.log_r).exp()

    @property
    def entropy(self) -> Tensor:
        return -(self.log_probs.exp() * self.log_probs).sum(-1)

    @property
    def divergence(self) -> Tensor:
        """From the reference."""
        return F.kl_div(self.log_probs, self.others, reduction="none", log_target=True).sum(-1)

    @property
    def reverse_divergence(self) -> Tensor:
        """Of the model from the reference."""
        return F.kl_div(self.others, self.log_probs, reduction="none", log_target=True).sum(-1)


def deft(t: Tokens) -> Tensor:
    a = t.log_probs.detach().exp().square().sum(-1)
    return (1 - t.p**a) / a


def eaft(alpha: float, k: int | None) -> Callable[..., Tensor]:
    def formula(t: Tokens) -> Tensor:
        size = k or t.log_probs.shape[-1]
        largest = t.log_probs.detach().exp().sort(descending=True).values[:, :size]
        entropy = torch.distributions.Categorical(probs=largest).entropy()
        return -((entropy / math.log(size)) ** alpha) * t.log_p

    return formula


def infosft(t: Tokens, peak: float = 0.93) -> Tensor:
    odds = math.log(peak / (1 - peak))
    return -t.q * torch.relu(1 - torch.special.logit(t.q) / odds) * t.log_p


def prior_mass(t: Tokens) -> Tensor:
    """The reference's probabilities from the smallest up, until the target's is in."""
    r = t.others.exp()
    below = [row[row < own].sum() + own for row, own in zip(r, t.log_r.exp(), strict=True)]
    return -(torch.tensor(below) >= 0.1).double() * t.log_p


def gem(form: str, beta: float = 0.7) -> Callable[..., Tensor]:
    def formula(t: Tokens) -> Tensor:
        q = (t.log_probs.detach() / beta).softmax(-1)
        rivals = t.log_p[:, None] - t.log_probs
        if form == "linear":
            return -(q * rivals).sum(-1)
        return -(q * torch.sigmoid(-0.01 * rivals.detach()) * rivals).sum(-1)

    return formula


def target_sft(eta: float) -> Callable[..., Tensor]:
    """Cross-entropy with a distribution: the target's own mass, and of the rest the geometric mean with a teacher."""

    def formula(t: Tokens) -> Tensor:
        mean = t.log_probs.detach().exp() ** (1 - eta) * t.others.exp() ** eta
        mean = mean / mean.sum(-1, keepdim=True)
        return -t.q * t.log_p - (1 - t.q) * (mean * t.log_probs).sum(-1)

    return formula


def sedsft(t: Tokens) -> Tensor:
    mass = t.log_probs.detach().exp().sort(descending=True).values[:, :3].sum(-1)
    return -t.log_p + 2 * (t.p * (t.p - 1) + 0.25) * (mass < 0.8)


def of_sequence(values: Tensor, size: float) -> Tensor:
    """The same constant for each token: the exponential of the sequence's sum over ``size``."""
    return torch.full_like(values, math.exp(values.sum().item() / max(size, 1)), requires_grad=False)


Formula = Callable[[Tokens], Tensor]
# Each is tried in training, too.
TRAINED: dict[str, tuple[TokenLoss, Formula]] = {
    "cross-entropy": (CrossEntropyLoss(), lambda t: -t.log_p),
    "dft": (DFTLoss(), lambda t: -t.q * t.log_p),
    "focal": (FocalLoss(), lambda t: -((1 - t.p) ** 2) * t.log_p),
    "power": (PowerLoss(q=0.3), lambda t: (1 - t.p**0.3) / 0.3),
    "above": (ThresholdLoss(threshold=0.0917), lambda t: torch.where(t.q >= 0.0917, -t.log_p, 0.0)),
    "below": (
        ThresholdLoss(threshold=0.0917, above=False, base=PowerLoss(q=1.0)),
        lambda t: torch.where(t.q < 0.0917, 1 - t.p, 0.0),
    ),
    "chord": (ChordPhiLoss(), lambda t: -t.q * (1 - t.q) * t.log_p),
    "deft": (DEFTLoss(), deft),
    "eaft": (EAFTLoss(alpha=2.0, top_k=7), eaft(2.0, 7)),
    "eaft of everything": (EAFTLoss(top_k=None), eaft(1.0, None)),
    "iw token": (
        ImportanceWeightedLoss(level="token", clip=(0.2, 1.8), temperature=1.5),
        lambda t: -(t.ratio.detach() ** 1.5).clip(0.2, 1.8) * t.log_p,
    ),
    "iw sequence": (
        ImportanceWeightedLoss(),
        lambda t: -of_sequence(t.log_p - t.log_r, len(t.log_p)).clip(0, 16) * t.log_p,
    ),
    "proximal": (ProximalLoss(epsilon=0.05), lambda t: -torch.minimum(t.ratio, t.ratio.clip(0.95, 1.05))),
    "sequence": (SequenceDFTLoss(mean="product"), lambda t: -of_sequence(t.log_p, 1) * t.log_p),
    "geometric": (SequenceDFTLoss(mean="geometric"), lambda t: -of_sequence(t.log_p, len(t.log_p)) * t.log_p),
    "anchored": (
        AnchoredLoss(weight=0.5),
        lambda t: -t.q * t.log_p + 0.5 * t.divergence,
    ),
    "infosft": (InfoSFTLoss(peak=0.8), lambda t: infosft(t, 0.8)),
    "trust region": (TrustRegionLoss(floor=0.3), lambda t: -t.p / torch.clamp(t.q, min=0.3)),
    "rectified": (RectifiedLoss(threshold=0.1), lambda t: -torch.where(t.q > 0.1, 1.0, t.q) * t.log_p),
    "prior": (PriorWeightedLoss(), lambda t: -t.log_r.exp() * t.log_p),
    "prior mass": (PriorWeightedLoss(form="mass", threshold=0.1), prior_mass),
    "from reference": (
        FromReference(FocalLoss(gamma=1.0)),
        lambda t: -(1 - t.log_r.exp() - t.log_r.exp() * t.log_r) * t.log_p,
    ),
    "sft and divergence": (
        MixtureLoss([CrossEntropyLoss(), ReferenceKLLoss()], [1.0, 0.5]),
        lambda t: -t.log_p + 0.5 * t.divergence,
    ),
    "gem": (GEMLoss(), gem("linear")),
    "target": (TargetSFTLoss(eta=0.3), target_sft(0.3)),
    "sed": (SEDSFTLoss(threshold=0.8, weight=2.0, top_k=3), sedsft),
    "mixture": (
        MixtureLoss([CrossEntropyLoss(), DFTLoss(), FocalLoss(2.0)], weights=[0.5, 2.0, 0.25]),
        lambda t: -(0.5 + 2.0 * t.q + 0.25 * (1 - t.p) ** 2) * t.log_p,
    ),
    "schedule": (  # in training its three steps are the first loss, half of each, the second
        ScheduledLoss(CrossEntropyLoss(), DFTLoss(), end_step=2),
        lambda t: -(1 - t.step / 2 + t.step / 2 * t.q) * t.log_p,
    ),
}
# Other values of the options, tried on logits and on both heads.
SETTINGS: dict[str, tuple[TokenLoss, Formula]] = {
    "smoothed": (CrossEntropyLoss(label_smoothing=0.1), lambda t: -0.9 * t.log_p - 0.1 * t.log_probs.mean(-1)),
    "focal of a half": (FocalLoss(gamma=0.5, alpha=0.25), lambda t: -0.25 * (1 - t.p) ** 0.5 * t.log_p),
    "focal detached": (FocalLoss(detach_weight=True), lambda t: -((1 - t.q) ** 2) * t.log_p),
    "power of one": (PowerLoss(q=1.0), lambda t: 1 - t.p),
    "power of four": (PowerLoss(q=4.0), lambda t: (1 - t.p**4) / 4),
    "above, power": (
        ThresholdLoss(threshold=0.0917, base=PowerLoss(q=0.5)),
        lambda t: torch.where(t.q >= 0.0917, 2 * (1 - t.p**0.5), 0.0),
    ),
    "above, focal": (
        ThresholdLoss(threshold=0.0031, base=FocalLoss()),
        lambda t: torch.where(t.q >= 0.0031, -((1 - t.p) ** 2) * t.log_p, 0.0),
    ),
    "eaft of half power": (EAFTLoss(alpha=0.5, top_k=2), eaft(0.5, 2)),
    "iw sequence, warm": (
        ImportanceWeightedLoss(temperature=2.0),
        lambda t: -of_sequence(2 * (t.log_p - t.log_r), len(t.log_p)).clip(0, 16) * t.log_p,
    ),
    "iw sequence, not clipped": (
        ImportanceWeightedLoss(clip=None),
        lambda t: -of_sequence(t.log_p - t.log_r, len(t.log_p)) * t.log_p,
    ),
    "infosft of its own peak": (InfoSFTLoss(), infosft),
    "trust region of dft": (TrustRegionLoss(floor=1.0), lambda t: -t.p),
    "rectified, half": (RectifiedLoss(), lambda t: -torch.where(t.q > 0.5, 1.0, t.q) * t.log_p),
    "gem, logsigmoid": (GEMLoss(form="logsigmoid"), gem("logsigmoid")),
    "gem, warm": (GEMLoss(beta=2.0), gem("linear", 2.0)),
    "target without a teacher": (TargetSFTLoss(eta=0.0), target_sft(0.0)),
    "target, the teacher's": (TargetSFTLoss(eta=1.0), target_sft(1.0)),
    "reverse divergence": (ReferenceKLLoss("reverse"), lambda t: t.reverse_divergence),
    "divergence": (ReferenceKLLoss(), lambda t: t.divergence),
    "everything by class": (
        MixtureLoss([DFTLoss(), GEMLoss(form="logsigmoid"), AnchoredLoss(0.3), ReferenceKLLoss("reverse")]),
        lambda t: (-2 * t.q * t.log_p + 0.3 * t.divergence + t.reverse_divergence + gem("logsigmoid")(t)) / 4,
    ),
    "proximal, wide": (ProximalLoss(), lambda t: -torch.minimum(t.ratio, t.ratio.clip(0.72, 1.28))),
    "mean of two": (MixtureLoss([DFTLoss(), PowerLoss(q=2.0)]), lambda t: -t.q * t.log_p / 2 + (1 - t.p**2) / 4),
    "mixture of sequences": (
        MixtureLoss([DEFTLoss(), SequenceDFTLoss(mean="geometric")], [1.0, 3.0]),
        lambda t: deft(t) - 3 * of_sequence(t.log_p, len(t.log_p)) * t.log_p,
    ),
}


class WholeEntropy(TokenLoss):
    """A loss of one's own of whole sequences, which reads all that comes from logits."""

    pointwise = False
    needs = ("sequence_index", "entropy", "reference_kl")

    def token_loss(self, stats: TokenStats) -> Tensor:
        _, index = stats.sequence_index.unique(return_inverse=True)
        sums = torch.zeros(len(stats.log_prob), dtype=stats.log_prob.dtype).index_add(0, index, stats.log_prob)
        return -sums[index].exp() * stats.log_prob - 0.1 * stats.entropy * stats.reference_kl


def gap(logits: Tensor, targets: Tensor) -> Tensor:
    """A statistic of one's own: how far the likeliest is above the target."""
    return logits.amax(-1) - logits.gather(-1, targets[:, None])[:, 0]


class OwnStatistic(TokenLoss):
    needs = (Statistic.of(gap), "entropy")

    def token_loss(self, stats: TokenStats) -> Tensor:
        return -(-stats.gap).exp() * stats.log_prob + 0.1 * stats.entropy


# Losses of one's own, whose gradients go through every statistic.
OWN: dict[str, tuple[TokenLoss, Formula]] = {
    "own, entropy": (EntropyWeighted(), lambda t: -t.entropy * t.log_p),
    "own, all statistics": (
        AllStatistics(),
        lambda t: t.log_probs.exp().square().sum(-1) * t.log_p + t.entropy**2 - 0.1 * t.log_probs.mean(-1),
    ),
    "own, anchored": (Anchored(), lambda t: t.divergence**2 - t.log_p * t.divergence.detach() + 0.1 * t.entropy),
    "own, mixture": (
        MixtureLoss([DFTLoss(), EntropyWeighted(), EntropyWeighted()]),
        lambda t: -(t.q + 2 * t.entropy) * t.log_p / 3,
    ),
    "own, statistic": (
        OwnStatistic(),
        lambda t: -(t.log_p - t.log_probs.amax(-1)).exp().detach() * t.log_p + 0.1 * t.entropy,
    ),
    "own, sequences": (WholeEntropy(), lambda t: -t.log_p.sum().exp() * t.log_p - 0.1 * t.entropy * t.divergence),
}
EVERY = {**TRAINED, **SETTINGS, **OWN}
STEP = 1


def test_every_loss_is_tried():
    tried = {type(part) for loss, _ in TRAINED.values() for part in loss.modules() if isinstance(part, TokenLoss)}
    assert tried == set(LOSSES.values())


# -- on logits ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    """Logits [B, T, V] of the model and of another, and class indices [B, T], some of them ignored."""

    logits: Tensor
    reference: Tensor
    targets: Tensor

    @property
    def kept(self) -> Tensor:
        return self.targets != -100

    def given(self) -> dict[str, Any]:
        """What losses may read beside logits and targets; at ignored targets it does not matter."""
        log_prob = self.reference.log_softmax(-1).gather(-1, self.targets.clamp(min=0)[..., None])[..., 0]
        return {
            "step": STEP,
            "reference_log_prob": log_prob.masked_fill(~self.kept, math.nan),
            "reference_logits": self.reference,
        }

    def value(self, loss: TokenLoss, reduction: str = "mean") -> Tensor:
        other = copy.deepcopy(loss)
        other.reduction = reduction
        return other(self.logits, self.targets, **self.given())

    def expected(self, formula: Formula) -> Tensor:
        """Unreduced losses [B, T] in plain torch, a sequence at a time; 0 where there is no target."""
        rows = []
        for log_probs, others, kept, targets in zip(
            self.logits.log_softmax(-1), self.reference.log_softmax(-1), self.kept, self.targets, strict=True
        ):
            own, other, places = log_probs[kept], others[kept], targets[kept][:, None]
            tokens = Tokens(own, own.gather(1, places)[:, 0], other, other.gather(1, places)[:, 0], STEP)
            rows.append(torch.zeros(len(kept), dtype=own.dtype).masked_scatter(kept, formula(tokens)))
        return torch.stack(rows)

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.logits, retain_graph=True)[0]


def fixed(size: tuple[int, int, int] = (3, 5, 30), dtype: torch.dtype = torch.float64) -> Batch:
    """With likely and unlikely targets, and gaps."""
    generator = torch.Generator().manual_seed(3)
    logits = (2 * torch.randn(size, generator=generator)).to(dtype)
    reference = logits + (0.5 * torch.randn(size, generator=generator)).to(dtype)
    targets = torch.randint(0, size[-1], size[:2], generator=generator)
    targets[:, 1] = logits[:, 1].argmax(-1)
    targets[0, 2] = targets[-1, :2] = -100
    return Batch(logits.requires_grad_(), reference, targets)


@st.composite
def batches(draw: Any, ignored: bool = True, fewest: int = 7) -> Batch:
    """Anything: also without a target, and with probabilities of 0 and 1."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(fewest, 9))
    logits = torch.from_numpy(draw(hnp.arrays("float64", shape, elements=st.floats(-30, 30))))
    targets = torch.from_numpy(draw(hnp.arrays("int64", shape[:2], elements=st.integers(0, shape[2] - 1))))
    if ignored:
        targets[torch.from_numpy(draw(hnp.arrays("bool", shape[:2])))] = -100
    return Batch(logits.requires_grad_(), logits.detach().flip(-1) / 2, targets)


class Held(TorchFunctionMode):
    """What a loss takes for a constant stays as it was the first time, so that differences do not see it move."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []

    def __enter__(self) -> Held:
        self.replayed = iter(list(self.values)) if self.values else None
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.detach:
            return func(*args, **(kwargs or {}))
        if self.replayed is None:
            self.values.append(func(*args))
            return self.values[-1]
        return next(self.replayed)


@pytest.mark.parametrize(("loss", "formula"), EVERY.values(), ids=list(EVERY))
class TestOnLogits:
    def test_formula(self, loss, formula):
        batch = fixed()
        values = batch.value(loss, "none")
        expected = batch.expected(formula)
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-14)
        assert len(set(expected[batch.kept].tolist())) > 3
        factors = torch.rand(values.shape, dtype=torch.float64)
        gradients = [batch.gradient((value * factors).sum()) for value in (values, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-14)

    @given(batch=batches())
    @settings(max_examples=15, deadline=None)
    def test_formula_on_anything(self, loss, formula, batch):
        # Away from p = 1, where the textbook 1 - p loses its digits and cannot be a reference.
        batch = Batch((batch.logits / 8).detach().requires_grad_(), batch.reference / 8, batch.targets)
        value = batch.value(loss, "sum")
        expected = batch.expected(formula).sum()
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(batch.gradient(value), batch.gradient(expected), rtol=1e-8, atol=1e-10)

    def test_gradcheck(self, loss, formula):
        """Central differences in float64 of what the loss does not take for a constant."""
        batch = fixed((2, 3, 8))
        held = Held()

        def value(logits):
            with held:
                return loss(logits, batch.targets, **batch.given())

        value(batch.logits)
        assert torch.autograd.gradcheck(value, (batch.logits,))

    def test_weight_is_minus_the_slope(self, loss, formula):
        """Against central differences, with gradients and without them, and under inference mode."""
        batch = fixed((2, 4, 9))
        kept, given = batch.kept, batch.given()
        rows = batch.logits.detach()[kept], batch.targets[kept], loss.needs
        beside = {name: value[kept] for name, value in given.items() if name != "step"}
        beside |= {"step": STEP, "sequence_index": kept.nonzero()[:, 0]}
        stats = statistics_from_logits(*rows, **beside)
        held, moves = Held(), 1e-6 * torch.eye(len(stats.log_prob), dtype=torch.float64)

        def at(log_prob):
            with held:
                return loss.token_loss(TokenStats(**{**vars(stats), "log_prob": log_prob, "log_expected_prob": None}))

        losses, weight = token_loss_and_weight(loss, stats)
        torch.testing.assert_close(losses, at(stats.log_prob))
        slope = torch.stack([(at(stats.log_prob + m) - at(stats.log_prob - m)).sum() for m in moves]) / 2e-6
        with torch.no_grad():
            _, in_no_grad = token_loss_and_weight(loss, stats)
        with torch.inference_mode():
            _, in_inference = token_loss_and_weight(loss, statistics_from_logits(*rows, **beside))
        for value in (weight, in_no_grad, in_inference):
            torch.testing.assert_close(value, -slope, rtol=1e-6, atol=1e-8)
            assert not value.requires_grad

    @given(batch=batches(ignored=False))
    @settings(max_examples=15, deadline=None)
    def test_one_hot_targets_equal_index_targets(self, loss, formula, batch):
        if loss is OWN["own, statistic"][0]:
            with pytest.raises(InputError, match="is a function of class indices, and the targets are soft"):
                loss(batch.logits, F.one_hot(batch.targets, batch.logits.shape[-1]))
            return
        if getattr(loss, "clip", ()) is None:  # which shows the digits that are lost near p = 1
            batch = Batch((batch.logits / 4).detach().requires_grad_(), batch.reference / 4, batch.targets)
        one_hot, given = F.one_hot(batch.targets, batch.logits.shape[-1]), batch.given()
        by_index = loss(batch.logits, batch.targets, **given)
        for soft in (one_hot, one_hot.double()):
            by_soft = loss(batch.logits, soft, **given)
            torch.testing.assert_close(by_soft, by_index, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(batch.gradient(by_soft), batch.gradient(by_index), rtol=1e-7, atol=1e-10)

    @given(batch=batches())
    @settings(max_examples=15, deadline=None)
    def test_reductions_ignored_rows_and_untouched_targets(self, loss, formula, batch):
        before = batch.targets.clone()
        values = {reduction: batch.value(loss, reduction) for reduction in ("none", "mean", "sum")}
        assert values["none"].shape == batch.targets.shape
        assert (values["none"][~batch.kept] == 0).all()
        torch.testing.assert_close(values["none"].sum(), values["sum"], rtol=1e-12, atol=1e-12)
        count = max(int(batch.kept.sum()), 1)
        torch.testing.assert_close(values["mean"], values["sum"] / count, rtol=1e-12, atol=1e-12)
        assert (batch.gradient(values["mean"])[~batch.kept] == 0).all()
        assert torch.equal(batch.targets, before)

    def test_ignored_rows_may_hold_nan(self, loss, formula):
        batch = fixed()
        expected = batch.value(loss)
        for logits in (batch.logits.detach(), batch.reference):
            logits[~batch.kept] = math.nan
        value = batch.value(loss)
        gradient = batch.gradient(value)
        assert value == expected
        assert gradient.isfinite().all()
        assert (gradient[~batch.kept] == 0).all()

    def test_all_ignored_is_zero_with_a_gradient(self, loss, formula):
        batch = fixed()
        batch.targets.fill_(-100)
        assert batch.value(loss) == 0
        assert torch.equal(batch.gradient(batch.value(loss)), torch.zeros_like(batch.logits))

    def test_other_ignore_index(self, loss, formula):
        batch, other = fixed(), copy.deepcopy(loss)
        batch.targets[batch.targets == 0] = 1
        other.ignore_index = 0
        found = other(batch.logits, batch.targets.clamp(min=0), **batch.given())
        assert torch.equal(found, batch.value(loss))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_raised_to_float32(self, loss, formula, dtype):
        batch = fixed(dtype=dtype)
        value, given = batch.value(loss), batch.given()
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(batch.logits.float(), batch.targets, **given), rtol=0, atol=0)
        assert loss(batch.logits.double(), batch.targets, **given).dtype == torch.float64

    def test_gradients_at_the_edges_are_finite(self, loss, formula):
        """Rows of zeros as padding of one-hot targets, a banned class, a banned target, all others banned."""
        own = any(loss is each for each, _ in OWN.values())
        soft = F.one_hot(torch.tensor([1, 0]), 8)
        soft[1] = 0
        batch = Batch(torch.randn(2, 8, requires_grad=True), torch.randn(2, 8), torch.tensor([1, 1]))
        assert own or batch.gradient(loss(batch.logits, soft, **batch.given())).isfinite().all()
        if getattr(loss, "label_smoothing", 0) or own:
            return  # the mean over the vocabulary is -inf where a class is banned, as in torch; so may others be
        half_each = torch.tensor([[0.5, 0.5, *[0.0] * 6]])
        edges = ([*range(7), -math.inf], half_each), ([-math.inf, *range(7)], 0), ([3.0, *[-math.inf] * 7], 0)
        for values, target in edges:
            logits = torch.tensor([values], requires_grad=True)
            targets = target if target is half_each else torch.tensor([target])
            given = {"step": STEP, "reference_log_prob": torch.tensor([-1.0]), "reference_logits": logits.detach()}
            value = loss(logits, targets, **given)
            gradient = torch.autograd.grad(value, logits)[0]
            assert gradient[logits.isfinite()].isfinite().all()
            if target is half_each:
                assert value.isfinite()
                assert gradient.isfinite().all()
        assert (gradient == 0).all()  # p = 1: nothing to learn

    def test_survives_copy_and_pickle(self, loss, formula):
        batch = fixed()
        for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert repr(other) == repr(loss)
            assert torch.equal(batch.value(other), batch.value(loss))


# -- on both heads -----------------------------------------------------------------------------------------------------


class Heads:
    """A head over the hidden states of sequences of 7 tokens, beside another model's; some tokens are likely."""

    def __init__(
        self, sequences: int = 5, size: int = 8, vocabulary: int = 50, scale: float = 1.0, **options: Any
    ) -> None:
        softcap, dtype, count = options.pop("softcap", None), options.get("dtype", torch.float64), 7 * sequences
        hidden, weight, bias, targets = problem(count, size, vocabulary, **options)
        likely = full_logits(hidden, weight, bias, scale, softcap).argmax(-1)
        targets[1::5] = likely[1::5]
        self.leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
        self.targets = targets.view(sequences, 7)
        self.options = {"bias": bias, "logit_scale": scale, "logit_softcap": softcap}
        self.reference = reference_head(count, vocabulary, dtype=dtype, softcap=2.0)

    def raised(self) -> Heads:
        """The same in float64."""
        other = copy.copy(self)
        other.leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        other.options = {**self.options, "bias": other.leaves[2] if len(other.leaves) == 3 else None}
        tensors = {name: getattr(self.reference, name).double() for name in ("hidden", "weight", "bias")}
        other.reference = dataclasses.replace(self.reference, **tensors)
        return other

    def batch(self) -> Batch:
        """All logits."""
        by = self.reference
        logits = full_logits(*self.leaves[:2], *self.options.values())
        reference = full_logits(by.hidden, by.weight, by.bias, by.logit_scale, by.logit_softcap)
        shape = (*self.targets.shape, -1)
        return Batch(logits.view(shape), reference.view(shape), self.targets)

    def inputs(self) -> dict[str, Tensor]:
        index = torch.arange(self.targets.numel()) // 7
        return {"sequence_index": index, "reference_log_prob": self.batch().given()["reference_log_prob"].flatten()}

    def fused(self, loss: TokenLoss, **options: Any) -> TokenOutput:
        hidden, weight = self.leaves[:2]
        options = {"reference": self.reference, "token_inputs": self.inputs(), "step": STEP, **self.options, **options}
        chunk_bytes = len(weight) * weight.itemsize * 7
        return linear_token_loss(hidden, weight, self.targets.flatten(), loss, chunk_bytes=chunk_bytes, **options)

    def full(self, loss: TokenLoss) -> TokenOutput:
        batch = self.batch()
        return logits_token_loss(batch.logits, self.targets, loss, **batch.given())


@pytest.mark.parametrize(("loss", "formula"), EVERY.values(), ids=list(EVERY))
class TestOnBothHeads:
    @pytest.mark.parametrize(("bias", "scale", "softcap"), [(True, 1.0, None), (False, -0.3, None), (True, 0.5, 6.0)])
    def test_formula(self, loss, formula, bias, scale, softcap):
        """Of the fused head, of full logits, and of the fused head's differentiable statistics."""
        heads = Heads(bias=bias, scale=scale, softcap=softcap)
        fused, full, given = heads.fused(loss), heads.full(loss), {**heads.inputs(), "step": STEP}
        needs = [need for need in loss.needs if getattr(need, "name", need) not in given]
        targets = heads.targets.flatten()
        stats = linear_token_statistics(
            *heads.leaves[:2], targets, needs, reference=heads.reference, chunk_bytes=4000, **heads.options
        )
        kept = {name: value[targets != -100] if isinstance(value, Tensor) else value for name, value in given.items()}
        for value in (fused.loss, full.loss, loss.token_loss(dataclasses.replace(stats, **kept)).sum()):
            assert_same(value, heads.batch().expected(formula).sum(), heads.leaves, 1e-11)
        for name in ("log_prob", "weight"):
            torch.testing.assert_close(getattr(fused, name), getattr(full, name), rtol=1e-10, atol=1e-13)
        assert torch.equal(fused.correct, full.correct)

    def test_float32_within_1e_5(self, loss, formula):
        heads = Heads(15, 16, 300, spread=0.3, dtype=torch.float32)
        exact = heads.raised()
        value, expected = heads.fused(loss).loss, exact.batch().expected(formula).sum()
        assert relative(value.detach(), expected.detach()) < 1e-5
        for own, theirs in zip(gradients(value, heads.leaves), gradients(expected, exact.leaves), strict=True):
            assert own.dtype == torch.float32
            assert relative(own, theirs) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_no_worse_than_the_plain_head(self, loss, formula, dtype):
        """Plain: logits in half precision, softmax in float32, products in half precision; a mean.

        Of logits as small as these, which hardly are rounded, bfloat16 leaves the roundings of what is kept of them.
        """
        least = 3.4e-3 if dtype == torch.bfloat16 else 0.0
        heads = Heads(30, 32, 500, spread=0.2, dtype=dtype, bias=False)
        exact = heads.raised()
        expected = gradients(exact.batch().expected(formula).sum() / 210, exact.leaves)
        plain = gradients(heads.full(loss).loss / 210, heads.leaves)
        own = gradients(heads.fused(loss, normalizer=210).loss, heads.leaves)
        for ours, theirs, reference in zip(own, plain, expected, strict=True):
            assert ours.dtype == dtype
            assert relative(ours, reference) <= max(1.1 * relative(theirs, reference), least)

    def test_ignored_tokens_are_never_read(self, loss, formula):
        heads = Heads()
        ignored = heads.targets.flatten() == -100
        expected = gradients(heads.fused(loss).loss, heads.leaves)
        with torch.no_grad():
            heads.leaves[0][ignored] = heads.reference.hidden[ignored] = math.nan
        own = gradients(heads.fused(loss).loss, heads.leaves)
        assert (own[0][ignored] == 0).all()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(own, expected, strict=True))

    def test_no_targets_give_zeros_to_everything(self, loss, formula):
        heads = Heads()
        heads.targets = torch.full_like(heads.targets, -100)
        for output in (heads.fused(loss, statistics=["entropy"]), heads.full(loss)):
            assert output.loss.item() == 0
            assert output.correct.dtype == torch.bool
            for gradient in gradients(output.loss, heads.leaves):
                assert torch.equal(gradient, torch.zeros_like(gradient))


# -- in training -------------------------------------------------------------------------------------------------------

ROWS = 16
# Every step is over the same rows, whatever the split: a batch, micro-batches, packed rows (here through full logits),
# packed micro-batches.
SPLITS: dict[str, dict[str, Any]] = {
    "a batch": {"batch_size": ROWS},
    "accumulation": {"batch_size": 4},
    "packing": {"batch_size": ROWS, "packing": "bfd", "max_length": 256, "head": "full"},
    "packing and accumulation": {"batch_size": 1, "packing": "bfd", "max_length": 256},
}
LORA = {"r": 3, "lora_alpha": 12, "target_modules": ["c_attn", "c_fc"], "init_lora_weights": True}


def steps(
    folder: Path | str, name: str, split: str, count: int = 3, devices: int = 1, peft: Any = None, **options: Any
) -> list[Tensor]:
    """Gradient of each of the first steps, every one over all rows."""
    pl.seed_everything(0)
    settings = dict(SPLITS[split])
    module = GradientRecorder(
        f"{folder}/base",
        loss=TRAINED[name][0],
        loading={"dtype": "float64", "head": settings.pop("head", "fused")},
        optimizer={"lr": 0.003},
        schedule={"decay": "constant"},
        peft=peft,
    )
    settings["batch_size"] = max(1, settings["batch_size"] // devices)
    data = InstructionDataModule(
        f"{folder}/scored/train", **data_options(tokenizer=f"{folder}/base", shuffle=False, **settings)
    )
    data.prepare_data()
    data.setup("fit")
    micro_batches = len(data.train_dataloader())
    run = trainer(
        max_steps=count,
        max_epochs=-1,
        devices=devices,
        accumulate_grad_batches=-(-micro_batches // devices),
        gradient_clip_val=1.0,
        **options,
    )
    run.fit(module, datamodule=data)
    assert len(module.gradients) == count
    return module.gradients


def scored(folder: Path, rows: int = ROWS) -> Path:
    """Rows with the log-probs of a base that lies in the folder."""
    arguments = [
        f"--model.model={folder / 'base'}", "--model.loading.dtype=float64", "--data.train.class_path=ArithmeticRows",
        f"--data.train.init_args.num_rows={rows}", "--data.train.init_args.max_digits=7",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", f"--output={folder / 'scored'}",
    ]  # fmt: skip
    assert score(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_base(folder / "base")
    load_tokenizer("asset://arithmetic-base").save_pretrained(folder / "base")
    return scored(folder)


@pytest.fixture(scope="module")
def alone(tiny):
    """Gradients of one process and one batch a step, by name and whether an adapter is trained."""

    @functools.cache
    def gradients(name: str, adapter: bool = False) -> list[Tensor]:
        return steps(tiny, name, "a batch", peft=LORA if adapter else None)

    return gradients


WHERE = [{"name": name, "strategy": "ddp", "split": "accumulation"} for name in TRAINED]
WHERE += [{**where, "strategy": "fsdp2"} for where in WHERE]
WHERE += [{"name": "anchored", "strategy": "fsdp2 of adapters", "split": "accumulation", "peft": LORA}]
WHERE += [{"name": "iw sequence", "strategy": "ddp", "split": "packing and accumulation"}]


@pytest.fixture(scope="module")
def two_processes(tiny):
    """Gradients of each of ``WHERE``."""
    return on_two_processes(steps, [{**where, "folder": str(tiny), "count": 2} for where in WHERE])


def assert_same_steps(own, expected, tolerance=1e-10):
    for step, (one, other) in enumerate(zip(own, expected, strict=True)):
        assert relative(one, other) < tolerance, step
        assert float(other.norm()) > 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TRAINED)
class TestInTraining:
    @pytest.mark.parametrize("split", list(SPLITS)[1:])
    def test_every_split_gives_the_same_steps(self, tiny, alone, name, split):
        assert_same_steps(steps(tiny, name, split), alone(name))

    def test_two_processes_give_the_same_steps(self, two_processes, alone, name):
        """Under DDP and FSDP2."""
        found = [(where, own) for where, own in zip(WHERE, two_processes, strict=True) if where["name"] == name]
        assert {where["strategy"][:5] for where, _ in found} == {"ddp", "fsdp2"}
        for where, own in found:
            assert_same_steps(own, alone(name, "peft" in where)[:2])

    def test_no_other_loss_stood_in(self, alone, name):
        own = alone(name)[1]
        for other in TRAINED:
            assert other == name or relative(own, alone(other)[1]) > 1e-4, other


@pytest.mark.parametrize("name", ["iw sequence", "anchored"])
def test_twenty_steps_of_a_real_model(tmp_path, name):
    """stories260K, packed micro-batches beside one padded batch; its norms go through float32. The other losses differ
    from these in what tests above try."""
    (tmp_path / "base").symlink_to(at_hand("models/stories260K"))
    folder = scored(tmp_path, rows=6)
    plain = steps(folder, name, "a batch", count=20)
    packed = steps(folder, name, "packing and accumulation", count=20)
    assert_same_steps(packed[:1], plain[:1], tolerance=1e-6)
    assert_same_steps(packed, plain, tolerance=1e-2)  # training amplifies float32's last bits
