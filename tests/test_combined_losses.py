"""MixtureLoss and ScheduledLoss: by hand, through the module, and across a checkpoint."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch

from dft_lightning import (
    CausalLMModule,
    CrossEntropyLoss,
    DFTLoss,
    MixtureLoss,
    ScheduledLoss,
    TokenLoss,
    compute_loss_func,
)
from dft_lightning.modules import GenerationOptions
from dft_lightning.ops import linear_token_loss, logits_token_loss
from small_runs import TINY_ARITHMETIC, GradientRecorder, arithmetic_data, trainer

LOGITS = torch.randn(2, 5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([[1, 2, -100, 10, 0], [-100, -100, 3, 3, 7]])


def test_share_of_the_end():
    loss = ScheduledLoss(CrossEntropyLoss(), DFTLoss(), begin_step=10, end_step=30)
    assert [loss.share_of_end(step) for step in (0, 10, 15, 29, 30, 999)] == [0.0, 0.0, 0.25, 0.95, 1.0, 1.0]
    loss = ScheduledLoss(CrossEntropyLoss(), DFTLoss(), begin_step=7, end_step=7)
    assert [loss.share_of_end(step) for step in (0, 6, 7, 8)] == [0.0, 0.0, 1.0, 1.0]


def test_an_infinite_part_of_weight_zero_spoils_nothing():
    class Infinite(TokenLoss):
        def token_loss(self, stats):
            return stats.log_prob / 0

    assert MixtureLoss([CrossEntropyLoss(), Infinite()], [1.0, 0.0])(LOGITS, TARGETS).isfinite()
    assert ScheduledLoss(CrossEntropyLoss(), Infinite(), end_step=5)(LOGITS, TARGETS, step=0).isfinite()


def test_a_schedule_without_a_step_is_refused_everywhere():
    schedule = ScheduledLoss(CrossEntropyLoss(), DFTLoss(), end_step=5)
    for loss in (schedule, MixtureLoss([DFTLoss(), schedule])):
        with pytest.raises(ValueError, match="follows a schedule: give the optimizer step"):
            loss(LOGITS, TARGETS)
        with pytest.raises(ValueError, match="follows a schedule"):
            logits_token_loss(LOGITS, TARGETS, loss)
        with pytest.raises(ValueError, match="follows a schedule"):
            linear_token_loss(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([1]), loss)
        with pytest.raises(ValueError, match="tells compute_loss_func no step"):
            compute_loss_func(loss)


class NeedsEntropy(TokenLoss):
    needs = ("entropy",)
    pointwise = False

    def token_loss(self, stats):
        return stats.entropy - stats.log_prob


def test_parts_decide_what_is_needed_and_how():
    assert MixtureLoss([DFTLoss()]).pointwise
    mixed = MixtureLoss([DFTLoss(), NeedsEntropy(), NeedsEntropy()])
    assert not mixed.pointwise
    assert [need.name for need in mixed.needs] == ["entropy"]


class NeedsTopK(CrossEntropyLoss):
    def __init__(self, k):
        super().__init__()
        self.k = k

    @property
    def needs(self):
        from dft_lightning import Statistic

        return (Statistic("top_k_entropy", k=self.k),)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MixtureLoss([]), ValueError, "at least one loss"),
        (lambda: MixtureLoss([DFTLoss()], [1.0, 2.0]), ValueError, "one number for each of 1 losses"),
        (lambda: MixtureLoss([DFTLoss()], [-1.0]), ValueError, "not negative"),
        (lambda: MixtureLoss([DFTLoss()], [float("nan")]), ValueError, "finite"),
        (lambda: MixtureLoss([DFTLoss()], [0.0]), ValueError, "not all 0"),
        (lambda: MixtureLoss([torch.nn.ReLU()]), TypeError, "made of token losses, got ReLU"),
        (lambda: MixtureLoss([DFTLoss(reduction="sum")]), ValueError, "of MixtureLoss, not of the DFTLoss"),
        (lambda: MixtureLoss([NeedsTopK(5), NeedsTopK(6)]), ValueError, "they must agree"),
        (lambda: ScheduledLoss(DFTLoss(), DFTLoss(), end_step=1, begin_step=2), ValueError, "begin_step <= end_step"),
        (lambda: ScheduledLoss(DFTLoss(), DFTLoss(), end_step=-1), ValueError, "begin_step <= end_step"),
    ],
)
def test_bad_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_training_follows_the_schedule():
    """Before the change the gradients are those of the first loss, after it those of the second."""

    def gradients(loss):
        pl.seed_everything(0)
        still = {"lr": 0.0}  # the weights stay: only the loss changes
        module = GradientRecorder(TINY_ARITHMETIC, loss=loss, loading={"dtype": "float64"}, optimizer=still)
        data = arithmetic_data(16, batch_size=16, shuffle=False)
        trainer(max_steps=4, max_epochs=-1, precision="64-true").fit(module, datamodule=data)
        return module.gradients

    ce, dft = gradients(CrossEntropyLoss())[0], gradients(DFTLoss())[0]
    found = gradients(ScheduledLoss(CrossEntropyLoss(), DFTLoss(), begin_step=1, end_step=3))
    for gradient, share in zip(found, (0.0, 0.0, 0.5, 1.0), strict=True):
        torch.testing.assert_close(gradient, (1 - share) * ce + share * dft, rtol=1e-9, atol=1e-12)


def test_a_checkpoint_knows_how_far_the_schedule_is(tmp_path):
    """A trainer that only tests counts its steps from 0: the objective must still be that of the last step."""
    loss = ScheduledLoss(CrossEntropyLoss(), DFTLoss(), begin_step=0, end_step=4)
    short = GenerationOptions(max_new_tokens=2)
    module = CausalLMModule(TINY_ARITHMETIC, loss=loss, optimizer={"lr": 1e-3}, evaluation={"generation": short})
    rows = {"test": arithmetic_data().sources["train"]}
    fitting = trainer(max_steps=2, max_epochs=-1)
    fitting.fit(module, datamodule=arithmetic_data(batch_size=4))
    path = tmp_path / "half.ckpt"
    fitting.save_checkpoint(path)

    def objective(module, **options):
        data = arithmetic_data(batch_size=4)
        data.sources |= rows
        (values,) = trainer().test(module, datamodule=data, verbose=False, **options)
        return values

    here = objective(module)
    assert here["test/loss"] == pytest.approx((here["test/nll"] + dft_objective(module)) / 2, rel=1e-5)
    loaded = objective(
        CausalLMModule(TINY_ARITHMETIC, loss=loss, evaluation={"generation": short}), ckpt_path=path, weights_only=True
    )
    assert loaded["test/loss"] == here["test/loss"]
    again = CausalLMModule.load_from_checkpoint(path, weights_only=True)
    assert objective(again)["test/loss"] == here["test/loss"]


def dft_objective(module):
    data = arithmetic_data(batch_size=16, shuffle=False)
    data.prepare_data()
    (batch,) = data.train_dataloader()
    with torch.no_grad():
        logits = module.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    targets = batch["labels"][:, 1:]
    log_p = logits.log_softmax(-1)[targets != -100].gather(1, targets[targets != -100][:, None])
    return float(-(log_p.exp() * log_p).mean())
