"""The gradient of a step is that of the token mean over the whole step, however it is split."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from dft_lightning import CausalLMModule, CrossEntropyLoss, DFTLoss, FocalLoss
from dft_lightning.data.batches.collating import Collator
from dft_lightning.distributed import TokenNormalizer
from dft_lightning.distributed.ranks import multiply_gradients
from small_runs import (
    CLIP,
    TINY_ARITHMETIC,
    TINY_GPT2,
    GradientRecorder,
    arithmetic_data,
    on_two_processes,
    step_gradient,
    trainer,
)

SPLITS = [(16, 1), (4, 4), (1, 16), (3, 6)]
LOSSES = [CrossEntropyLoss(), DFTLoss(), FocalLoss()]
TOLERANCE = {"float64": 1e-10, "float32": 1e-6}
RENORMALIZED = {"renormalize": True}


def reference_gradient(loss, num_rows=16, renormalize=False):
    """Row by row, without padding: sum of the published formulas over all targets, over their number.

    Renormalised: over the sum of the weights -dL/dl, by the derivatives written out.
    """
    pl.seed_everything(0)
    module = CausalLMModule(TINY_ARITHMETIC, loss=loss, loading={"dtype": "float64"})
    module.configure_model()
    data = arithmetic_data(num_rows, batch_size=1, shuffle=False)
    data.prepare_data()
    total, count = 0.0, 0
    for batch in data.train_dataloader():
        targets = batch["labels"][0, 1:]
        log_probs = module.model(batch["input_ids"]).logits[0, :-1].log_softmax(-1)
        log_p = log_probs[targets != -100, targets[targets != -100]]
        p = log_p.exp()
        weight = {"CrossEntropyLoss": 1, "DFTLoss": p.detach(), "FocalLoss": (1 - p) ** 2}[type(loss).__name__]
        total = total - (weight * log_p).sum()
        slope = {"CrossEntropyLoss": p**0, "DFTLoss": p, "FocalLoss": (1 - p) ** 2 - 2 * (1 - p) * p * log_p}
        count += slope[type(loss).__name__].sum().detach() if renormalize else len(log_p)
    (total / count).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_split_gives_the_same_gradient(loss, dtype):
    gradients = [step_gradient(*split, dtype, type(loss).__name__)[0] for split in SPLITS]
    for split, gradient in zip(SPLITS, gradients, strict=True):
        assert relative(gradient, gradients[0]) < TOLERANCE[dtype], split
    assert relative(gradients[0], reference_gradient(loss)) < {"float64": 1e-10, "float32": 1e-5}[dtype]


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_renormalised_gradients_are_over_the_sum_of_weights(loss, dtype):
    gradients = [step_gradient(*split, dtype, type(loss).__name__, step=RENORMALIZED)[0] for split in SPLITS]
    for split, gradient in zip(SPLITS, gradients, strict=True):
        assert relative(gradient, gradients[0]) < TOLERANCE[dtype], split
    reference = reference_gradient(loss, renormalize=True)
    assert relative(gradients[0], reference) < {"float64": 1e-10, "float32": 1e-5}[dtype]
    if isinstance(loss, CrossEntropyLoss):  # weights of one: nothing changes
        assert torch.equal(gradients[0], step_gradient(*SPLITS[0], dtype, "CrossEntropyLoss")[0])


# Rows, rows of a micro-batch on each of two ranks, micro-batches.
TWO_PROCESS_SPLITS = [(16, 8, 1), (16, 2, 4), (15, 4, 2)]
OBJECTIVES = [("CrossEntropyLoss", {}), ("DFTLoss", {}), ("DFTLoss", RENORMALIZED)]
CASES = [
    {"strategy": strategy, "dtype": dtype, "loss": loss, "step": step}
    | {"num_rows": num_rows, "batch_size": batch_size, "accumulate": accumulate}
    for strategy in ("ddp", "fsdp1", "fsdp2")
    for dtype in TOLERANCE
    for loss, step in OBJECTIVES
    for num_rows, batch_size, accumulate in TWO_PROCESS_SPLITS
    # Lightning has FSDP1 compute in float32. Of the others one split is tried in it, the uneven one.
    if dtype == ("float32" if strategy == "fsdp1" else "float64") or (dtype == "float32" and num_rows == 15)
]
CASES += [
    {"strategy": strategy, "dtype": "float32", "loss": "DFTLoss", "num_rows": 16, "batch_size": 4, "accumulate": 2}
    | {"clip": -1.0}
    for strategy in ("ddp", "fsdp1", "fsdp2")
]


@pytest.fixture(scope="module")
def two_process_gradients():
    return on_two_processes(step_gradient, CASES)


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(map(str, case.values())) for case in CASES])
def test_two_processes_give_the_same_gradient(two_process_gradients, index):
    """Before clipping and after, with an uneven last batch among them, sharded and not."""
    case = dict(CASES[index])
    for name in ("strategy", "batch_size", "accumulate"):
        del case[name]
    expected = step_gradient(case["num_rows"], 1, **case)
    for gradient, alone in zip(two_process_gradients[index], expected, strict=True):
        assert relative(gradient, alone) < TOLERANCE[case["dtype"]]
    if case.get("clip") == -1.0:  # off
        assert torch.equal(expected[1], expected[0])
        return
    assert float(expected[0].norm()) > CLIP
    assert float(expected[1].norm()) == pytest.approx(CLIP, rel=1e-4)  # torch adds 1e-6 to the norm


def test_weights_that_cannot_be_divided_by():
    normalizer = TokenNormalizer(lambda total: None, world_size=1)
    parameter = torch.nn.Parameter(torch.ones(2))
    normalizer.divisor_of(2, torch.device("cpu"))

    def totals_of(weight):
        parameter.grad = torch.ones(2)
        weight = torch.tensor(weight, dtype=torch.float64)
        normalizer.count(2, torch.tensor(True), weight=weight)
        normalizer.rescale([parameter], accumulate_grad_batches=1)
        return normalizer.totals()

    with pytest.raises(RuntimeError, match="sum of the tokens' weights -dL/dl, which is -0.5 in this step"):
        totals_of(-0.5)
    assert totals_of(0.0).divisor == 0  # nothing was learnt from: as with no target at all
    # What is not finite stays visible, and a gradient scaler can skip it.
    assert math.isnan(totals_of(float("nan")).divisor)
    assert parameter.grad.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_divided_in_more_digits_than_they_have(dtype):
    """By a factor that bfloat16 would round by four thousandths."""
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((3, 5), (), (7,))]
    for parameter in [*parameters, torch.nn.Parameter(torch.zeros(2))]:
        parameter.grad = torch.randn_like(parameter)
    whole = [parameter.grad.clone() for parameter in parameters]
    factor = torch.tensor(1.0038, dtype=torch.float64)  # 1 in bfloat16
    multiply_gradients([*parameters, torch.nn.Parameter(torch.zeros(2))], factor)
    for parameter, before in zip(parameters, whole, strict=True):
        exact = (before.double() * float(factor)).to(dtype)
        torch.testing.assert_close(parameter.grad, exact, rtol=2 * torch.finfo(dtype).eps, atol=0)
        if dtype != torch.float32:  # whose factor is rounded to float32, as every product in it
            assert torch.equal(parameter.grad, exact)


def plain_loader(rows, batch_size):
    return DataLoader(rows, batch_size=batch_size, collate_fn=Collator(0))


def row(length, targets):
    ids = torch.randint(1, 90, (length,)).tolist()
    return {"input_ids": ids, "labels": [-100] * (length - targets) + ids[length - targets :]}


def fit(rows, batch_size, accumulate=1, loss=None, **options):
    pl.seed_everything(0)
    module = GradientRecorder(
        TINY_GPT2, loss=loss or DFTLoss(), loading={"dtype": "float64"}, schedule={"decay": "constant"}
    )
    run = trainer(accumulate_grad_batches=accumulate, **{"precision": "64-true", **options})
    run.fit(module, plain_loader(rows, batch_size))
    return module


def test_an_all_ignored_micro_batch_changes_nothing():
    rows = [row(9, 4), row(5, 2)]
    empty = row(7, 0)
    expected = fit(rows, 2).gradients[0]
    for with_empty in ([empty, *rows], [*rows, empty], [rows[0], empty, rows[1]]):
        torch.testing.assert_close(fit(with_empty, 1, 3).gradients[0], expected, rtol=1e-10, atol=1e-14)


def test_a_step_without_any_target_leaves_the_weights_alone():
    rows = [row(9, 4), row(7, 0), row(6, 3)]
    pl.seed_everything(0)
    states = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            states.append(torch.cat([p.detach().flatten().clone() for p in module.parameters()]))

    module = CausalLMModule(
        TINY_GPT2, loss=DFTLoss(), optimizer={"lr": 1e-2, "weight_decay": 0.1}, schedule={"decay": "constant"}
    )
    trainer(max_steps=3, callbacks=[Watch()]).fit(module, plain_loader(rows, 1))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[1], states[2])


def test_a_subclass_with_its_own_training_step_is_left_alone():
    rows = [row(9, 4), row(5, 2)]

    class Own(GradientRecorder):
        def training_step(self, batch, batch_idx):
            logits, targets = self(batch["input_ids"])[:, :-1], batch["labels"][:, 1:]
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    pl.seed_everything(0)
    own = Own(TINY_GPT2, loading={"dtype": "float64"})
    trainer(precision="64-true").fit(own, plain_loader(rows, 2))
    expected = fit(rows, 2, loss=CrossEntropyLoss()).gradients[0]
    torch.testing.assert_close(own.gradients[0], expected, rtol=1e-10, atol=1e-14)


def test_forgetting_super_in_on_before_optimizer_step_is_an_error():
    class Forgetful(CausalLMModule):
        def on_before_optimizer_step(self, optimizer):
            pass

    with pytest.raises(RuntimeError, match=r"overrides on_before_optimizer_step without calling super\(\)"):
        trainer(max_steps=2).fit(Forgetful(TINY_GPT2), plain_loader([row(9, 4), row(5, 2)], 1))


def test_fp16_keeps_its_range():
    """A token sum of 1500 times a loss scale of 2**16 would overflow fp16; no step may be skipped."""
    rows = [row(100, 95) for _ in range(16)]

    class Scales(pl.Callback):
        seen: list[float] = []

        def on_train_batch_end(self, trainer, *args):
            self.seen.append(trainer.precision_plugin.scaler.get_scale())

    pl.seed_everything(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    expected = fit(rows, 16, loss=CrossEntropyLoss(), precision="32-true").gradients[0]
    pl.seed_everything(0)
    module = GradientRecorder(TINY_GPT2, loss=CrossEntropyLoss(), loading={"dtype": "float64"})
    module.configure_model()
    module.float()
    scales = Scales()
    trainer(plugins=[plugin], max_steps=3, callbacks=[scales]).fit(module, plain_loader(rows * 3, 16))
    assert scales.seen == [2.0**16] * 3  # the scaler halves after an overflow
    assert relative(module.gradients[0], expected) < 0.02


def divided_by(normalizer, targets):
    """The divisor of a micro-batch, which is counted."""
    divisor = normalizer.divisor_of(targets, torch.device("cpu"))
    normalizer.count(targets, torch.tensor(True))
    return divisor


def test_divisor_is_a_power_of_two_shared_by_ranks():
    normalizer = TokenNormalizer(lambda count: count.mul_(4), world_size=4)
    assert divided_by(normalizer, 0) == 1.0  # nothing to scale by yet
    assert divided_by(normalizer, 100) == 128.0
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([3.0])
    normalizer.rescale([parameter], accumulate_grad_batches=2)
    # 3 * divisor 128 * 2 micro-batches * 4 ranks / (100 * 4 tokens)
    assert parameter.grad.item() == pytest.approx(3 * 128 * 2 * 4 / 400)
    assert not normalizer.pending


def test_fp16_recovers_its_range_after_an_unusual_first_micro_batch():
    rows = [row(100, 1), *(row(100, 95) for _ in range(15)), *(row(100, 95) for _ in range(48))]
    pl.seed_everything(0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16))
    module = GradientRecorder(TINY_GPT2, loss=CrossEntropyLoss(), schedule={"decay": "constant"})
    trainer(plugins=[plugin], max_steps=8, accumulate_grad_batches=8).fit(module, plain_loader(rows, 1))
    assert all(gradient.isfinite().all() for gradient in module.gradients[2:])
    normalizer = TokenNormalizer(lambda count: None, world_size=1)
    divided_by(normalizer, 1)
    divided_by(normalizer, 255)
    normalizer.rescale([], accumulate_grad_batches=2)
    assert normalizer.totals().targets == 256
    assert divided_by(normalizer, 100) == 128.0  # 128 a micro-batch in the last step
