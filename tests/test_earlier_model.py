"""``ProximalLoss(refresh_every=n)``: compared with the model itself as it was some steps before."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from dft_lightning import CausalLMModule, CrossEntropyLoss, DFTLoss, FromReference, MixtureLoss, ProximalLoss
from dft_lightning.errors import InputError
from dft_lightning.models.reference import EarlierModel
from small_runs import FSDP1OnCPU, arithmetic_data, on_two_processes, save_base, trainer

EVERY, STEPS, ROWS = 3, 7, 8
OPTIONS = {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}, "schedule": {"decay": "constant"}}
LORA = {"r": 3, "lora_alpha": 12, "target_modules": ["c_attn", "c_fc"], "init_lora_weights": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def module_of(base, loss=None, head="fused", peft=None):
    pl.seed_everything(0)
    loss = loss or ProximalLoss(epsilon=0.1, refresh_every=EVERY)
    return CausalLMModule(str(base), loss=loss, loading={"dtype": "float64", "head": head}, peft=peft, **OPTIONS)


def run(base, steps=STEPS, batch_size=ROWS, head="fused", peft=None, folder=None, ckpt_path=None, **options):
    """Weights after some steps, every one over all rows."""
    module = module_of(base, head=head, peft=peft)
    data = arithmetic_data(ROWS, batch_size=batch_size, shuffle=False)
    saved = {"enable_checkpointing": True, "default_root_dir": folder} if folder else {}
    fit = trainer(max_steps=steps, max_epochs=-1, **saved, **options)
    fit.fit(module, datamodule=data, ckpt_path=ckpt_path)
    if folder:
        fit.save_checkpoint(Path(folder, "last.ckpt"))
    return torch.cat([each.detach().flatten() for each in module.parameters() if each.requires_grad])


def by_hand(base, steps=STEPS):
    """The same steps in plain torch, with a copy of the model that is made every few of them."""
    module = module_of(base)
    module.configure_model()
    model, capped = module.model, []
    data = arithmetic_data(ROWS, batch_size=ROWS, shuffle=False)
    data.prepare_data()
    data.setup("fit")
    (batch,) = data.train_dataloader()
    labels = batch["labels"][:, 1:]
    kept = labels != -100

    def log_prob(of):
        logits = of(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return logits.log_softmax(-1)[kept].gather(-1, labels[kept][:, None])[:, 0]

    for step in range(steps):
        if step % EVERY == 0:
            old = copy.deepcopy(model)
        with torch.no_grad():
            before = log_prob(old)
        ratio = (log_prob(model) - before).exp()
        capped.append(int((ratio > 1.1).sum()))
        loss = -torch.minimum(ratio, ratio.clip(0.9, 1.1)).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.5 * gradient
    assert capped[0] == capped[EVERY] == 0
    assert max(capped) > 0
    return torch.cat([each.detach().flatten() for each in model.parameters()])


def assert_same(own, expected):
    assert float((own - expected).norm() / expected.norm()) < 1e-12


@pytest.fixture(scope="module")
def expected(base):
    return by_hand(base)


@pytest.mark.parametrize("head", ["fused", "full"])
def test_steps_are_those_by_hand(base, expected, head):
    assert_same(run(base, head=head), expected)


def test_every_split_gives_the_same_steps(base, expected):
    assert_same(run(base, batch_size=2, accumulate_grad_batches=4), expected)


def weights_of(folder, strategy, devices):
    return run(folder, batch_size=ROWS // 2, strategy=strategy, devices=devices)


def test_two_processes_give_the_same_steps(base, expected):
    (found,) = on_two_processes(weights_of, [{"folder": str(base), "strategy": "ddp"}])
    assert_same(found, expected)


def test_it_is_not_a_fixed_reference(base, expected):
    """Nor one that is renewed at every step, which is cross-entropy."""
    for every in (1, 100):
        module = module_of(base, ProximalLoss(epsilon=0.1, refresh_every=every))
        trainer(max_steps=STEPS, max_epochs=-1).fit(module, arithmetic_data(ROWS, batch_size=ROWS, shuffle=False))
        found = torch.cat([each.detach().flatten() for each in module.parameters()])
        assert float((found - expected).norm() / expected.norm()) > 1e-5
        if every == 1:
            other = module_of(base, CrossEntropyLoss())
            trainer(max_steps=STEPS, max_epochs=-1).fit(other, arithmetic_data(ROWS, batch_size=ROWS, shuffle=False))
            assert_same(found, torch.cat([each.detach().flatten() for each in other.parameters()]))


@pytest.mark.parametrize("peft", [None, LORA])
@pytest.mark.parametrize("stop", [2, 3, 5])
def test_an_interrupted_run_goes_on_bit_for_bit(base, tmp_path, stop, peft):
    """Within an interval, where the checkpoint has the weights of its beginning, and at its end."""
    whole = run(base, peft=peft)
    run(base, steps=stop, peft=peft, folder=tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert ("dft_lightning_earlier" in saved) == (stop % EVERY > 0)
    assert torch.equal(run(base, peft=peft, ckpt_path=tmp_path / "last.ckpt"), whole)


def test_a_checkpoint_of_another_interval_says_what_it_is_compared_with(base, tmp_path):
    run(base, steps=5, folder=tmp_path)
    module = module_of(base, ProximalLoss(refresh_every=4))
    with pytest.warns(UserWarning, match="of step 5, has no model of step 4 to compare with"):
        trainer(max_steps=6, max_epochs=-1).fit(
            module, arithmetic_data(ROWS, batch_size=ROWS), ckpt_path=tmp_path / "last.ckpt"
        )


def losses_of(module):
    """Of the steps of a fit."""
    return [float(loss) for loss in module.seen]


class Noted(CausalLMModule):
    """Keeps the loss of each step."""

    def on_train_start(self):
        super().on_train_start()
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen.append(loss.detach())
        return loss


def noted(base, **options):
    pl.seed_everything(0)
    loss = ProximalLoss(epsilon=0.1, refresh_every=EVERY)
    return Noted(str(base), loss=loss, loading={"dtype": "float64"}, **{**OPTIONS, **options})


def test_a_second_fit_begins_anew(base):
    """Within an interval of the first: at its first step the ratio is 1."""
    module = noted(base)
    for _ in range(2):
        trainer(max_steps=2, max_epochs=-1).fit(module, arithmetic_data(ROWS, batch_size=ROWS, shuffle=False))
        assert module.seen[0].item() == pytest.approx(-1.0, abs=1e-12)
        assert abs(module.seen[1].item() + 1) > 1e-3


class Validated(pl.Callback):
    """Other weights during validation, as averages are."""

    def on_validation_start(self, trainer, module):
        self.own = [each.detach().clone() for each in module.parameters()]
        with torch.no_grad():
            for each in module.parameters():
                each.mul_(0.5)

    def on_validation_end(self, trainer, module):
        with torch.no_grad():
            for each, own in zip(module.parameters(), self.own, strict=True):
                each.copy_(own)


def test_validation_changes_nothing(base):
    """At a multiple, before the next step: what it sees is not what is trained on."""
    found = []
    for validates in (False, True):
        module, data = noted(base), arithmetic_data(ROWS, batch_size=ROWS, shuffle=False)
        options = {}
        if validates:
            data.sources["validation"] = data.sources["train"]
            options = {"callbacks": [Validated()], "check_val_every_n_epoch": 1}
        trainer(max_steps=STEPS, max_epochs=-1, **options).fit(module, datamodule=data)
        found.append(losses_of(module))
    assert found[0] == found[1]


def test_validate_compares_with_the_model_of_the_checkpoint(base, tmp_path):
    """As the fit did at that step."""
    module, data = noted(base), arithmetic_data(ROWS, batch_size=ROWS, shuffle=False)
    data.sources["validation"] = data.sources["train"]
    fit = trainer(max_steps=5, max_epochs=-1, enable_checkpointing=True, default_root_dir=tmp_path)
    fit.fit(module, datamodule=data)
    expected = float(fit.callback_metrics["val/loss"])
    fit.save_checkpoint(tmp_path / "last.ckpt")
    fresh, again = noted(base), trainer()
    data = arithmetic_data(ROWS, batch_size=ROWS, shuffle=False)
    data.sources["validation"] = data.sources["train"]
    again.validate(fresh, datamodule=data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert float(again.callback_metrics["val/loss"]) == pytest.approx(expected, rel=1e-12)
    assert abs(expected + 1) > 1e-3


def test_what_is_frozen_or_set_free_within_an_interval():
    """What is frozen since still counts as it was; what was frozen until now is as it was then."""
    model, earlier = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), EarlierModel(4)
    model[1].requires_grad_(False)
    start = [each.detach().clone() for each in model.parameters()]
    earlier.refresh(model, 0)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    model.requires_grad_(True)
    model[0].requires_grad_(False)
    earlier.refresh(model, 1)
    with torch.no_grad():
        model[1].weight.add_(1.0)
    earlier.refresh(model, 2)
    with earlier.in_place_of(model):
        assert all(torch.equal(own, before) for own, before in zip(model.parameters(), start, strict=True))
    assert torch.equal(model[1].weight, start[2] + 1)


def test_a_checkpoint_of_other_parameters_says_so(base, tmp_path):
    """Of another run's adapter, say: what it has is not what is trained."""
    earlier, model = EarlierModel(4), torch.nn.Linear(2, 2)
    earlier.load({"dft_lightning_earlier": {"step": 4, "values": {"other": torch.ones(2)}}}, 5)
    with pytest.warns(UserWarning, match="the checkpoint's run trained other parameters"):
        earlier.begin(model)
    with earlier.in_place_of(model):
        assert torch.equal(model.weight, model.weight)


def test_a_loop_of_ones_own_has_no_steps(base):
    module = module_of(base)
    module.configure_model()
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100, 2, 3]])}
    with pytest.raises(
        InputError, match="ProximalLoss with refresh_every follows the steps of a trainer, and there is"
    ):
        module.token_output(batch)


def test_weights_come_back_and_no_cast_of_them_stays():
    """Under autocast, which keeps what it has cast; dropout is off meanwhile, and an error leaves all as it was."""
    torch.manual_seed(0)
    model, earlier = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)), EarlierModel(2)
    x = torch.randn(8, 4)
    earlier.refresh(model, 0)
    with earlier.in_place_of(model):
        before = model(x)
    assert torch.equal(before, model[0](x))
    with torch.no_grad():
        model[0].weight.add_(1.0)
    own = model[0].weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        with earlier.in_place_of(model):
            assert torch.equal(model(x), torch.nn.functional.linear(x, own - 1.0, model[0].bias))
            assert not model.training
        after = model[0](x)
        assert torch.equal(after, torch.nn.functional.linear(x, own, model[0].bias))
    assert model.training
    with pytest.raises(ZeroDivisionError), earlier.in_place_of(model):
        raise ZeroDivisionError
    assert torch.equal(model[0].weight, own)
    earlier.refresh(model, 2)
    with earlier.in_place_of(model):
        assert torch.equal(model[0].weight, own)


def test_what_shards_a_model_is_refused(base):
    for strategy in (ModelParallelStrategy(1, 1), FSDP1OnCPU()):
        fit = trainer(max_steps=1, strategy=strategy)
        try:
            with pytest.raises(InputError, match="ProximalLoss: refresh_every keeps a copy of what is trained"):
                fit.fit(module_of(base), arithmetic_data(ROWS, batch_size=ROWS))
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def test_of_parts():
    """What a mixture's parts read has one place; parts that read none say nothing."""
    assert MixtureLoss([DFTLoss(), ProximalLoss(refresh_every=4)]).refresh_every == 4
    assert not MixtureLoss([DFTLoss(), ProximalLoss(refresh_every=4)]).reads_rows
    assert FromReference(DFTLoss()).refresh_every is None
    assert FromReference(DFTLoss()).reads_rows
    with pytest.raises(ValueError, match="MixtureLoss: its losses want reference log-probs of different models"):
        MixtureLoss([ProximalLoss(), ProximalLoss(refresh_every=4)])
    for wrong in (0, 2.5, "3"):
        with pytest.raises(ValueError, match=f"refresh_every is a number of optimizer steps.* got {wrong!r}"):
            ProximalLoss(refresh_every=wrong)
