"""Classes of one's own that leave something out: a statistic that is not named, a method that is not written."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from conftest import TINY_LLAMA
from dft_lightning import CausalLMModule, InstructionDataModule
from dft_lightning.data import RowForm, RowSource
from dft_lightning.errors import InputError
from dft_lightning.losses import (
    CrossEntropyLoss,
    EAFTLoss,
    FocalLoss,
    MixtureLoss,
    ScheduledLoss,
    ThresholdLoss,
    TokenLoss,
)
from dft_lightning.losses.base import unreduced
from dft_lightning.losses.statistics import TokenStats
from dft_lightning.metrics import AnswerExtractor, ExactMatch, HashAnswer
from dft_lightning.modules.batch_loss import check_batch
from dft_lightning.ops import linear_token_loss, logits_token_loss
from small_runs import trainer

READ = {
    "mean_log_prob": r'write needs = \("mean_log_prob",\)',
    "entropy": r'write needs = \("entropy",\)',
    "top_k_entropy": r'write needs = \(Statistic\("top_k_entropy", k=...\),\)',
    "sum_squared_prob": r'write needs = \("sum_squared_prob",\)',
    "reference_log_prob": r'write needs = \("reference_log_prob",\)',
    "reference_kl": r'write needs = \("reference_kl",\)',
    "sequence_index": r'write needs = \("sequence_index",\)',
    "step": "write uses_step = True",
}


class Reads(TokenLoss):
    def __init__(self, name="entropy", pointwise=True, **kwargs):
        super().__init__(**kwargs)
        self.name, self.pointwise = name, pointwise

    def token_loss(self, stats):
        return -stats.log_prob * getattr(stats, self.name)


def fused(loss, **options):
    hidden, targets = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 0])
    return linear_token_loss(hidden, torch.randn(5, 4), targets, loss, **options).loss


def full(loss, **options):
    return logits_token_loss(torch.randn(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]]), loss, **options).loss


def criterion(loss, **options):
    return loss(torch.randn(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]]), **options)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("call", [fused, full, criterion])
@pytest.mark.parametrize("pointwise", [True, False])
def test_reading_what_is_not_named_says_so(call, name, pointwise):
    with pytest.raises(InputError, match=rf"^Reads reads stats\.{name} and does not .*{READ[name]}"):
        call(Reads(name, pointwise), step=3)


@pytest.mark.parametrize("call", [fused, full])
def test_what_somebody_else_asks_for_is_not_the_loss_s(call):
    """In validation the entropy is there, and in training it would not be."""
    with pytest.raises(InputError, match=r"^Reads reads stats\.entropy"):
        call(Reads("entropy"), statistics=["entropy"])


@pytest.mark.parametrize("call", [fused, full, criterion])
@pytest.mark.parametrize(
    "make",
    [
        lambda part: MixtureLoss([CrossEntropyLoss(), part]),
        lambda part: ScheduledLoss(part, CrossEntropyLoss(), end_step=10),
        lambda part: ScheduledLoss(CrossEntropyLoss(), part, end_step=2),
        lambda part: ScheduledLoss(CrossEntropyLoss(), part, end_step=10),
        lambda part: ThresholdLoss(base=part),
        lambda part: MixtureLoss([EAFTLoss(top_k=None), part]),  # which names the entropy
    ],
)
def test_a_part_reads_what_it_names_itself(call, make):
    with pytest.raises(InputError, match=r"^Reads reads stats\.entropy"):
        call(make(Reads("entropy")), step=5)
    with pytest.raises(InputError, match=r"^Reads reads stats\.step"):
        call(make(Reads("step")), step=5)


def test_a_loss_within_another_that_names_less():
    class Around(TokenLoss):
        def token_loss(self, stats):
            return MixtureLoss([EAFTLoss()]).token_loss(stats)

    with pytest.raises(InputError, match=r"^EAFTLoss reads stats\.top_k_entropy, which it is not given: what calls"):
        criterion(Around())


def test_statistics_can_be_replaced_copied_and_shown():
    class Bounded(TokenLoss):
        needs = ("entropy",)

        def token_loss(self, stats):
            raised = dataclasses.replace(stats, log_prob=stats.log_prob.clamp(min=-1))
            assert (raised.entropy is stats.entropy, raised.vocab_size) == (True, 5)
            for same in (raised, copy.copy(stats), pickle.loads(pickle.dumps(dataclasses.replace(stats)))):
                assert repr(same).startswith("GivenStats(log_prob=tensor(")
                assert {each.name for each in dataclasses.fields(same)} >= {"entropy", "vocab_size"}
                with pytest.raises(InputError, match=r"^Bounded reads stats\.sum_squared_prob"):
                    _ = same.sum_squared_prob
            with pytest.raises(AttributeError):
                _ = stats.entropi
            return -raised.log_prob

    logits, targets = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    expected = -logits.log_softmax(-1)[range(4), targets].clamp(min=-1).mean()
    torch.testing.assert_close(Bounded()(logits, targets), expected)


def test_statistics_made_by_hand_are_none_where_nothing_is_known():
    stats = TokenStats(log_prob=torch.zeros(2))
    assert (stats.entropy, stats.step) == (None, 0)
    assert stats.log_expected_prob is stats.log_prob
    with pytest.raises(InputError, match=r"^Reads reads stats\.entropy"):
        unreduced(Reads(), stats)


def test_a_compiled_criterion_reads_what_it_names():
    class Own(TokenLoss):
        needs = ("entropy",)

        def token_loss(self, stats):
            return -stats.log_prob * stats.entropy

    logits, targets = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(torch.compile(Own(), backend="eager")(logits, targets), Own()(logits, targets))


# -- refused when it is made ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "method"),
    [(TokenLoss, "token_loss"), (AnswerExtractor, "extract"), (RowSource, "rows"), (RowForm, "read")],
)
def test_a_class_without_its_method_is_not_made(base, method):
    misspelt = type("Own", (base,), {f"{method}s": lambda self, given: given})
    with pytest.raises(InputError, match=rf"^Own must define {method}\(self.*\), and has {method}s$"):
        misspelt()
    with pytest.raises(InputError, match=rf"^Own must define {method}\(self[^)]*\)$"):
        type("Own", (type("Between", (base,), {}),), {})()
    type("Own", (type("Between", (base,), {method: lambda self, given=None: given}),), {})()


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (("entropi",), "model.loss: Own: unknown statistic 'entropi'; did you mean entropy"),
        (("top_k_entropy",), "model.loss: Own: .*top_k_entropy takes k"),
        (("step",), "model.loss: Own: .*uses_step = True"),
        (5, "model.loss: Own: needs must be names of statistics, got 5"),
        (lambda self: ("entropy",), "model.loss: Own: needs must be names of statistics.*put @property above it"),
    ],
)
def test_needs_that_there_are_not_are_refused_when_the_module_is_made(needs, message):
    own = type("Own", (TokenLoss,), {"needs": needs, "token_loss": lambda self, stats: stats.log_prob})
    with pytest.raises(InputError, match=message):
        CausalLMModule(TINY_LLAMA, loss=own())


def test_a_loss_that_returns_nothing_says_so():
    with pytest.raises(InputError, match=r"^Own\.token_loss must return a tensor \[n\], got NoneType"):
        criterion(type("Own", (TokenLoss,), {"token_loss": lambda self, stats: None})())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda self: None, r"^Own\.rows must yield a number and a row each time, got NoneType$"),
        (
            lambda self: iter([{"prompt": "1", "completion": "2"}]),
            r"number and a row each time \(yield 1, row\)",
        ),
        (lambda self: iter([(1, {"prompt": "1"}, 3)]), "a number and a row each time"),
    ],
)
def test_a_source_that_yields_something_else_says_so(rows, message):
    source = type("Own", (RowSource,), {"rows": rows})()
    with pytest.raises(InputError, match=message):
        InstructionDataModule(source, text={"tokenizer": "asset://arithmetic-base"}).setup()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("build_model", "build_model must return the language model, got NoneType"),
        ("build_parameter_groups", "build_parameter_groups must return a list of groups, got NoneType"),
        ("build_optimizer", "build_optimizer must return an optimizer, got NoneType"),
    ],
)
def test_a_hook_that_returns_nothing_says_so(method, message):
    own = type("Own", (CausalLMModule,), {method: lambda self, *args: None})
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(InputError, match=message):
        trainer(max_steps=1).fit(own(TINY_LLAMA), DataLoader([batch], batch_size=None))


# -- names and classes in Python -----------------------------------------------------------------------------------


def test_classes_of_the_package_go_by_their_names():
    tiny = {"model_type": "gpt2"}
    module = CausalLMModule(tiny, loss="FocalLoss", evaluation={"answer_extractor": {"class_path": "HashAnswer"}})
    assert (type(module.loss), type(module.evaluation.answer_extractor)) == (FocalLoss, HashAnswer)
    again = CausalLMModule(tiny, loss={"class_path": "FocalLoss", "init_args": {"gamma": 3.0}})
    assert again.loss.gamma == 3.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "DFTLos"}, r"unknown TokenLoss 'DFTLos'; did you mean DFTLoss\?"),
        ({"loss": FocalLoss}, r"FocalLoss is a class: give FocalLoss\(\.\.\.\), an object of it"),
        ({"evaluation": {"answer_extractor": HashAnswer}}, r"HashAnswer is a class: give HashAnswer\(\.\.\.\)"),
        ({"evaluation": {"metrics": [HashAnswer()]}}, r"evaluation\.metrics: expected a dict of names and metrics"),
    ],
)
def test_what_is_no_object_says_so_and_nothing_else(options, message, recwarn):
    with pytest.raises((TypeError, ValueError), match=message):
        CausalLMModule({"model_type": "gpt2"}, **options)
    assert not [each for each in recwarn if "checkpoints will not hold" in str(each.message)]


def test_a_misspelt_statistic_is_named_with_the_one_that_is_meant():
    class Reads(TokenLoss):
        def token_loss(self, stats):
            return stats.logprob

    with pytest.raises(InputError, match=r"Reads reads stats\.logprob: .*; did you mean log_prob\?"):
        Reads()(torch.zeros(2, 3), torch.tensor([0, 1]))

    class Asks(TokenLoss):
        def token_loss(self, stats):
            assert not hasattr(stats, "targets")
            return -stats.log_prob

    assert Asks()(torch.zeros(2, 3), torch.tensor([0, 1])).isfinite()


class Fails(AnswerExtractor):
    def extract(self, text):
        return text.split("####")[1]


def test_an_extractor_that_fails_names_the_text():
    metric = ExactMatch(Fails())
    with pytest.raises(InputError, match=r"Fails\(\) fails on the text 'no mark': IndexError: list index out of range"):
        metric.score("no mark", "#### 7")
    with pytest.raises(InputError, match=r"test row 2: Fails\(\) fails on the answer 'no mark'"):
        metric.check(["#### 7", "no mark"], "test")


def test_rows_to_predict_are_called_so():
    data = InstructionDataModule(predict=["2+3="], text={"tokenizer": "asset://arithmetic-base"})
    with pytest.raises(InputError, match=r"data\.predict: 1 of 1 rows are bad"):
        data.setup("predict")


def test_a_mask_of_floats_is_refused():
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(InputError, match=r"attention_mask is torch\.float32, and is to be torch\.int64 or torch\.bool"):
        check_batch({"input_ids": ids, "labels": ids, "attention_mask": torch.ones(1, 3)})


def test_answers_that_nothing_matches_are_counted():
    with pytest.raises(InputError, match=r"^test row 2: HashAnswer\(\) finds nothing .* \(2 of 4 rows\)$"):
        ExactMatch(HashAnswer()).check(["#### 1", "two", "#### 3", "four"], "test")
    with pytest.raises(InputError, match=r"^test row 1 has no final assistant turn to score against$"):
        ExactMatch(HashAnswer()).check([None, "#### 3"], "test")


def test_a_model_of_which_nothing_is_trained_says_so():
    class Frozen(CausalLMModule):
        def build_parameter_groups(self):
            self.model.requires_grad_(False)
            return super().build_parameter_groups()

    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(InputError, match="no parameter of the model requires a gradient"):
        trainer(max_steps=1).fit(Frozen(TINY_LLAMA), DataLoader([{"input_ids": ids, "labels": ids}], batch_size=None))


class WithOption(CausalLMModule):
    def __init__(self, *args, square: float = 0.5, **kwargs):
        super().__init__(*args, **kwargs)


def test_a_checkpoint_of_a_subclass_that_is_loaded_by_another_class_says_so(tmp_path):
    ids = torch.ones(1, 3, dtype=torch.int64)
    run = trainer(max_steps=1)
    run.fit(WithOption(TINY_LLAMA, square=0.3), DataLoader([{"input_ids": ids, "labels": ids}], batch_size=None))
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="CausalLMModule has no square, which the checkpoint's run had"):
        CausalLMModule.load_from_checkpoint(tmp_path / "a.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert WithOption.load_from_checkpoint(tmp_path / "a.ckpt").hparams["square"] == 0.3
