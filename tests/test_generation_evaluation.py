"""GenerationEvaluation, the shipped base model, and the extractors it scores by."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader

from dft_lightning import CausalLMModule, DFTLoss, GenerationEvaluation, InstructionDataModule
from dft_lightning.assets import resolve
from dft_lightning.data import ArithmeticRows
from dft_lightning.errors import InputError
from dft_lightning.metrics import (
    BoxedAnswer,
    ExactMatch,
    ExpressionValue,
    HashAnswer,
    LastNumber,
    MathAnswer,
    WholeText,
)
from dft_lightning.modules import GenerationOptions
from small_runs import TINY_ARITHMETIC, data_options, trainer


def data(num_rows=32, **options):
    rows = {"train": ArithmeticRows(num_rows, seed=1), "validation": ArithmeticRows(24, part="held_out", seed=2)}
    return InstructionDataModule(batch_size=8, **data_options(tokenizer="asset://arithmetic-base", **rows, **options))


def fit(callbacks, model=TINY_ARITHMETIC, max_steps=4, **options):
    pl.seed_everything(0)
    module = CausalLMModule(
        model, loss=DFTLoss(), optimizer={"lr": 1e-3}, evaluation={"generation": GenerationOptions(max_new_tokens=80)}
    )
    trainer(max_steps=max_steps, callbacks=callbacks, limit_val_batches=0, **options).fit(module, datamodule=data())
    return module


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_when_it_evaluates():
    callback = GenerationEvaluation(every_n_steps=2, limit=3)
    fit([callback], max_steps=5)
    assert [step for step, _ in callback.history] == [0, 2, 4, 5]
    assert all(set(values) == {"greedy", "sampled"} for _, values in callback.history)
    callback = GenerationEvaluation(num_samples=4, limit=2, at_end=False)
    fit([callback], max_steps=1)
    (_, values), *_ = callback.history
    assert list(values) == ["greedy", "sampled", "pass_at_2", "pass_at_4"]
    callback = GenerationEvaluation(at_start=False, at_end=False, num_samples=0, limit=3)
    fit([callback])
    assert callback.history == []


def test_training_is_the_same_with_and_without_it():
    """Sampling draws random numbers, and evaluation switches dropout off: neither may leak into training."""
    dropout = {**TINY_ARITHMETIC, "resid_pdrop": 0.2}
    plain = fit([], model=dropout)
    evaluated = fit([GenerationEvaluation(every_n_steps=1, num_samples=2, limit=4)], model=dropout)
    assert torch.equal(weights(plain), weights(evaluated))
    no_dropout = fit([])
    assert not torch.equal(weights(plain), weights(no_dropout))


def test_scores_are_those_of_the_completions():
    """Against a loop written here: generate for each held-out problem, compare the last number."""
    callback = GenerationEvaluation(num_samples=3, at_end=False)
    module = fit([callback], model="asset://arithmetic-base", max_steps=1)
    fresh = CausalLMModule("asset://arithmetic-base")
    fresh.configure_model()
    model, tokenizer = fresh.model.eval(), module.tokenizer
    right = 0
    for _, row in ArithmeticRows(24, part="held_out", seed=2).rows():
        ids = tokenizer("^" + row["prompt"], return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            while ids.shape[1] < 120 and ids[0, -1] != tokenizer.eos_token_id:
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        a, b = row["prompt"].rstrip("=").split("+")
        right += tokenizer.decode(ids[0]).rstrip("$").split("|")[-1] == str(int(a) + int(b))
    values = callback.history[0][1]
    assert values["greedy"] == right / 24
    assert (values["sampled"] * 72) == pytest.approx(round(values["sampled"] * 72))


def test_values_can_be_monitored():
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append("generation/greedy" in trainer.callback_metrics)

    fit([GenerationEvaluation(every_n_steps=2, num_samples=0, limit=2), Watch()])
    assert seen[1:] == [True] * 3


def test_it_needs_validation_rows_and_says_so_before_training():
    module = CausalLMModule("asset://arithmetic-base")
    without = InstructionDataModule(ArithmeticRows(4), text={"tokenizer": "asset://arithmetic-base"})
    with pytest.raises(InputError, match=r"needs validation rows: set data.validation"):
        trainer(callbacks=[GenerationEvaluation()]).fit(module, datamodule=without)
    with pytest.raises(InputError, match=r"fit with datamodule="):
        trainer(callbacks=[GenerationEvaluation()]).fit(module, DataLoader([1]))


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"every_n_steps": 0}, {"num_samples": -1}, {"limit": 0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GenerationEvaluation(**options)


# -- the shipped base ----------------------------------------------------------------------------------------------


def test_base_is_small_and_half_knows_the_skill():
    folder = resolve("asset://arithmetic-base")
    with safe_open(f"{folder}/model.safetensors", "pt") as weights_file:
        sizes = [weights_file.get_tensor(name).numel() for name in weights_file.keys()]  # noqa: SIM118
    assert 250_000 < sum(sizes) < 375_000  # float32: at most 1.5 MB
    problems = ArithmeticRows(400, part="held_out", seed=77)
    module = CausalLMModule("asset://arithmetic-base", evaluation={"generation": GenerationOptions(max_new_tokens=80)})
    rows = InstructionDataModule(test=problems, eval_batch_size=200, text={"tokenizer": "asset://arithmetic-base"})
    (values,) = trainer().test(module, datamodule=rows, verbose=False)
    assert 0.65 <= values["test/exact_match"] <= 0.85


@pytest.mark.parametrize(
    ("name", "digits", "least", "most"),
    [("competent", (3, 5), 0.95, 1.0), ("three-digits", (1, 3), 0.9, 1.0), ("three-digits", (4, 5), 0.0, 0.05)],
)
def test_the_other_bases_know_what_their_names_say(name, digits, least, most):
    problems = ArithmeticRows(100, min_digits=digits[0], max_digits=digits[1], part="held_out", seed=78)
    module = CausalLMModule(
        f"asset://arithmetic-{name}", evaluation={"generation": GenerationOptions(max_new_tokens=80)}
    )
    rows = InstructionDataModule(test=problems, eval_batch_size=100, text={"tokenizer": "asset://arithmetic-base"})
    (values,) = trainer().test(module, datamodule=rows, verbose=False)
    assert least <= values["test/exact_match"] <= most


# -- extractors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extractor", "text", "answer"),
    [
        (HashAnswer(), "so 3 * 4 = 12\n#### 12", "12"),
        (HashAnswer(), "#### 1,234.50 ", "1234.5"),
        (HashAnswer(), "#### $5\nmore", "5"),
        (HashAnswer(), "#### -0", "0"),
        (HashAnswer(), "#### 1\n#### 2", "2"),
        (HashAnswer(), "no answer 12", None),
        (HashAnswer(), "####", None),
        (BoxedAnswer(), r"\boxed{42}", "42"),
        (BoxedAnswer(), r"first \boxed{1}, then \boxed{ 2.0 }", "2"),
        (BoxedAnswer(), r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (BoxedAnswer(), r"\boxed{x + y}", "x+y"),
        (BoxedAnswer(), r"\boxed{unclosed", None),
        (BoxedAnswer(), "42", None),
        (LastNumber(), "7+5+0=2c1,4+8+1=3c1|132", "132"),
        (LastNumber(), "about 1,200 or -3.50.", "-3.5"),
        (LastNumber(), "1000000000000000000000000000001", "1000000000000000000000000000001"),
        (LastNumber(), "so 12-5", "5"),
        (LastNumber(), "x = -5", "-5"),
        (LastNumber(), "007.50", "7.5"),
        (LastNumber(), ".50", "0.5"),
        (LastNumber(), "none", None),
        (WholeText(), "  yes \n", "yes"),
        (ExpressionValue(), "( 290.0 / 2.0 )", "145"),
        (ExpressionValue(), "There are 2 groups: 290/2.", "145"),
        (ExpressionValue(), "((1,200 - 10.05) * 2)", "2379.9"),
        (ExpressionValue(), "-3 - -4", "1"),
        (ExpressionValue(), "007 + 1", "8"),
        (ExpressionValue(), "0.5 * 0.05", "0.025"),
        (ExpressionValue(), "1 / 3", "1/3"),
        (ExpressionValue(), "1 / 8", "0.125"),
        (ExpressionValue(), "-1 / 8", "-0.125"),
        (ExpressionValue(), "10 - 10.0", "0"),
        (ExpressionValue(), "2 + 2\n3 * 3 of them", "9"),
        (ExpressionValue(), "the answer is 42", "42"),
        (ExpressionValue(), "none", None),
        (ExpressionValue(), "3 + ", None),
        (ExpressionValue(), "(3 + 4", None),
        (ExpressionValue(), "1 / 0", None),
        (ExpressionValue(), "2 ** 3", None),
        (ExpressionValue(), "7 // 2", None),
        (ExpressionValue(), "1.2.3 + 4", None),
        (ExpressionValue(), "(" * 150 + "1" + "+1)" * 150, None),
        (ExpressionValue(), "1 + " * 100 + "1", None),
    ],
)
def test_extractors(extractor, text, answer):
    assert extractor.extract(text) == answer


def test_exact_match_by_hand():
    metric = ExactMatch(HashAnswer())
    metric.update(["#### 3", "#### 4", "nothing", "#### 1,000"], ["#### 3", "#### 5", "#### 6", "#### 1000.0"])
    assert metric.compute().item() == 0.5
    with pytest.raises(InputError, match=r"HashAnswer\(\) finds nothing in the answer 'five'"):
        metric.update(["#### 5"], ["five"])


def test_each_fit_has_its_own_history():
    callback = GenerationEvaluation(num_samples=0, limit=2)
    for _ in range(2):
        fit([callback], max_steps=1)
        assert [step for step, _ in callback.history] == [0, 1]


def test_references_that_cannot_be_scored_end_the_run_before_training():
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, *args):
            seen.append(1)

    module = CausalLMModule("asset://arithmetic-base", evaluation={"answer_extractor": HashAnswer()})
    with pytest.raises(InputError, match=r"HashAnswer\(\) finds nothing in the answer"):
        trainer(callbacks=[GenerationEvaluation(at_start=False), Watch()]).fit(module, datamodule=data())
    assert seen == []


def test_math_answers_are_compared_by_value():
    """math-verify is independent of everything here; what it calls equal is listed by hand."""
    answer = MathAnswer()
    equal = [
        (r"so $x = \boxed{0.5}$", r"\boxed{\frac{1}{2}}"),
        (r"\boxed{y + x}", r"\boxed{x+y}"),
        (r"the answer is $\boxed{12}$.", r"\boxed{12}"),
    ]
    for text, own in equal:
        assert answer.matches(text, own), text
        assert not BoxedAnswer().matches(text, own) or "12" in own
    assert not answer.matches(r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}")
    assert not answer.matches("no idea", r"\boxed{1}")
    metric = ExactMatch(answer)
    metric.update([r"\boxed{\frac{2}{4}}", r"\boxed{2}"], [r"\boxed{0.5}"] * 2)
    assert metric.compute().item() == 0.5
    with pytest.raises(InputError, match=r"finds nothing in the answer 'none'"):
        metric.update([r"\boxed{1}"], ["none"])


def test_math_answer_names_its_extra(monkeypatch):
    monkeypatch.setattr("dft_lightning.metrics.answers.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'dft-lightning\[math\]'"):
        MathAnswer()
