"""A term that a subclass adds to the loss counts at its own strength, each micro-batch weighted as its targets are."""

import math

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from dft_lightning import CausalLMModule
from dft_lightning.data.batches.collating import Collator
from own_term_runs import expected, found_steps
from small_runs import TINY_ARITHMETIC, on_two_processes, trainer

EXACT = 1e-6


def check(steps, renormalize=False, tolerance=EXACT):
    assert steps
    for step in steps:
        assert step["ones"] == pytest.approx(1, abs=tolerance)
        assert step["others"] == pytest.approx(expected(step, renormalize), rel=tolerance)
    assert len({batch for step in steps for batch in step["batches"]}) > 1  # or any weighting would do


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("accumulate", "dtype"), [(1, "float64"), (4, "float64"), (3, "float32"), (4, "bfloat16")])
def test_own_strength(accumulate, dtype, renormalize):
    # 15 rows in micro-batches of 2 are 8: with 3 of them a step, the epoch's last step has 2.
    steps = found_steps(
        dtype=dtype, renormalize=renormalize, accumulate_grad_batches=accumulate, max_epochs=1, steps=-1
    )
    assert len(steps) == math.ceil(8 / accumulate)
    check(steps, renormalize, 1e-2 if dtype == "bfloat16" else EXACT)


def test_with_a_gradient_scaler():
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12))
    check(found_steps(dtype="float32", accumulate_grad_batches=4, plugins=[plugin]))


CASES = [
    {"strategy": strategy, "accumulate_grad_batches": accumulate, "renormalize": renormalize}
    for strategy in ("ddp", "fsdp2")
    for accumulate in (1, 4)
    for renormalize in (False, True)
]


@pytest.fixture(scope="module")
def two_processes():
    return on_two_processes(found_steps, CASES)


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(map(str, case.values())) for case in CASES])
def test_two_processes(two_processes, index):
    check(two_processes[index], CASES[index]["renormalize"])


def loader(*labels):
    """A micro-batch for each of some rows' labels."""
    rows = [{"input_ids": [3, *map(abs, row)], "labels": [-100, *row], "weights": None} for row in labels]
    rows = [{**row, "input_ids": [min(i, 19) for i in row["input_ids"]]} for row in rows]
    return DataLoader(rows, batch_size=1, collate_fn=Collator(0))


def test_micro_batches_without_targets_weigh_nothing():
    steps = found_steps(data=loader([7, 8, 9], [-100, -100]), accumulate_grad_batches=2, steps=1)
    assert steps[0]["batches"] == [(3.0, pytest.approx(steps[0]["batches"][0][1]), 7.0), (0.0, 0.0, 5.0)]
    assert steps[0]["ones"] == pytest.approx(1, abs=EXACT)
    assert steps[0]["others"] == pytest.approx(7, rel=EXACT)
    # Where no micro-batch has a target the step is left out, with all that was added.
    assert found_steps(data=loader([-100]), steps=1)[0]["ones"] == 0


class Gradients(CausalLMModule):
    """Keeps the first step's gradient."""

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.gradient = torch.cat([p.grad.flatten() for p in self.parameters()])


ROWS = ([7, 8, 9, 4, 5], [6, 3], [10, 11, 12], [13])


def gradient(cls, rows=ROWS, accumulate=1, **options):
    torch.manual_seed(0)
    module = cls(TINY_ARITHMETIC, loading={"dtype": "float64"}, **options)
    trainer(accumulate_grad_batches=accumulate).fit(module, loader(*rows))
    return module.gradient


def plain(scale, *rows):
    """Of the mean of cross-entropy over these rows' targets, by the model's own logits."""
    torch.manual_seed(0)
    module = CausalLMModule(TINY_ARITHMETIC, loading={"dtype": "float64"})
    module.configure_model()
    batch = Collator(0)([{"input_ids": [3, *row], "labels": [-100, *row], "weights": None} for row in rows])
    logits = module(batch["input_ids"], batch["attention_mask"])[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).mul(scale).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters()])


class Twice(Gradients):
    def training_step(self, batch, batch_idx):
        first, second = ({k: v[i : i + 1] for k, v in batch.items()} for i in (0, 1))
        return super().training_step(first, batch_idx) + 0.5 * super().training_step(second, batch_idx)


def test_super_called_twice():
    """Each mean is what it says; the micro-batch weighs as the targets of both do."""
    torch.manual_seed(0)
    rows = [{"input_ids": [3, *row], "labels": [-100, *row], "weights": None} for row in ROWS]
    module = Twice(TINY_ARITHMETIC, loading={"dtype": "float64"})
    trainer(accumulate_grad_batches=2).fit(module, DataLoader(rows, batch_size=2, collate_fn=Collator(0)))
    means = [plain(1, row) for row in ROWS]
    of_first, of_second = means[0] + 0.5 * means[1], means[2] + 0.5 * means[3]
    reference = (7 * of_first + 4 * of_second) / 11
    torch.testing.assert_close(module.gradient, reference, rtol=1e-9, atol=1e-12)


class Never(Gradients):
    def training_step(self, batch, batch_idx):
        output = self.token_output(batch)
        return output.loss / output.log_prob.numel()


def test_super_never_called():
    """Lightning's own mean over micro-batches."""
    found = gradient(Never, accumulate=4)
    torch.testing.assert_close(found, sum(plain(0.25, row) for row in ROWS), rtol=1e-9, atol=1e-12)


class Sometimes(Gradients):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx % 2 else self.token_output(batch).loss


def test_super_called_for_some_micro_batches():
    with pytest.raises(RuntimeError, match=r"Sometimes.training_step calls super\(\).training_step for some"):
        gradient(Sometimes, accumulate=2)


class Skipping(Gradients):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss


def test_micro_batches_that_return_none_are_not_counted():
    found = gradient(Skipping, accumulate=4)
    torch.testing.assert_close(found, plain(1, ROWS[0], ROWS[2], ROWS[3]), rtol=1e-9, atol=1e-12)


class OwnBackward(Gradients):
    def backward(self, loss, *args, **kwargs):
        loss.backward()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_backward_without_super(accumulate):
    with pytest.raises(RuntimeError, match=r"OwnBackward overrides backward without calling super\(\)"):
        gradient(OwnBackward, accumulate=accumulate)


def test_what_training_step_returns():
    """The mean over the micro-batch's targets, whatever the step's divisor is."""
    seen = []

    class Seen(Gradients):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            output = self.token_output(batch)
            seen.append((float(loss.detach()), float(output.loss.detach()) / output.log_prob.numel()))
            return loss

    gradient(Seen, accumulate=4)
    for returned, mean in seen:
        assert returned == pytest.approx(mean, rel=1e-12)
    assert len(seen) == 4
    torch.testing.assert_close(gradient(Gradients, accumulate=4), plain(1, *ROWS), rtol=1e-9, atol=1e-12)
