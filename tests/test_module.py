"""CausalLMModule: loading, the training step, optimizer, checkpoints, generation."""

import copy
import math
import pickle
import time

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaConfig

from conftest import TINY_LLAMA, TINY_QWEN2, at_hand
from dft_lightning import CausalLMModule, CrossEntropyLoss, DFTLoss, FocalLoss, TokenLoss
from dft_lightning.component import from_plain, to_plain
from dft_lightning.data.batches.collating import Collator
from dft_lightning.errors import InputError
from dft_lightning.metrics import WholeText
from dft_lightning.models.generation import GenerationOptions, decode_completions
from dft_lightning.models.loading import load_causal_lm
from dft_lightning.modules.schedules import total_optimizer_steps
from small_runs import TINY_ARITHMETIC, TINY_GPT2, arithmetic_data, trainer


class Surprise(TokenLoss):
    """A user's own loss: three lines."""

    def __init__(self, power: float = 2.0, shift=None):
        super().__init__()
        self.power = power

    def token_loss(self, stats):
        return stats.log_prob.abs() ** self.power


class Weighted(TokenLoss):
    """A loss made of another."""

    def __init__(self, inner: TokenLoss, share: float = 0.5):
        super().__init__()
        self.inner = inner
        self.share = share

    def token_loss(self, stats):
        return self.share * self.inner.token_loss(stats)


def loader(num_rows=6, batch_size=2, vocabulary=90):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(num_rows):
        ids = torch.randint(3, vocabulary, (5 + i,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return DataLoader(rows, batch_size=batch_size, collate_fn=Collator(0))


# -- against transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY_LLAMA, TINY_QWEN2, TINY_GPT2], ids=lambda config: config["model_type"])
def test_loss_is_transformers_own_on_tiny_models(config):
    module = CausalLMModule(config)
    module.configure_model()
    for batch in loader():
        output = module.token_output(batch)
        expected = module.model(**batch).loss
        assert (output.loss / len(output.log_prob)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_training_step_on_a_real_model_is_transformers_own():
    """stories260K, trained: loss to 1e-5, and the whole gradient of a step."""
    folder = str(at_hand("models/stories260K"))
    captured = {}

    class Capture(CausalLMModule):
        def configure_gradient_clipping(self, *args, **kwargs):
            captured["gradient"] = torch.cat([p.grad.flatten().clone() for p in self.parameters()])

        def training_step(self, batch, batch_idx):
            captured["batch"] = batch
            return super().training_step(batch, batch_idx)

    module = Capture(folder)
    run = trainer(log_every_n_steps=1)
    run.fit(module, loader(vocabulary=500, batch_size=6))
    model = load_causal_lm(folder)
    expected = model(**captured["batch"]).loss
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert run.callback_metrics["train/nll"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert (captured["gradient"] - gradient).norm() / gradient.norm() < 1e-5


# -- loading -------------------------------------------------------------------------------------------------------


def test_loading_a_folder_is_the_pretrained_model_in_training_mode(tmp_path):
    made = load_causal_lm(TINY_LLAMA)
    made.save_pretrained(tmp_path)
    loaded = load_causal_lm(str(tmp_path), attn_implementation="eager")
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), loaded.parameters(), strict=True))
    assert all(submodule.training for submodule in loaded.modules())
    assert loaded.config._attn_implementation == "eager"
    assert load_causal_lm(str(tmp_path), dtype="bfloat16").dtype == torch.bfloat16


def test_model_is_built_once():
    module = CausalLMModule(TINY_LLAMA)
    module.configure_model()
    model = module.model
    module.configure_model()
    assert module.model is model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./no/such/folder", "no such folder: ./no/such/folder"),
        ("nobody/nothing-of-the-kind", "cannot load 'nobody/nothing-of-the-kind'"),
        ({"hidden_size": 3}, "a config needs model_type"),
        ({"model_type": "lama"}, "unknown model_type 'lama'"),
        ({"model_type": "llama", "hiden_size": 3}, "LlamaConfig has no hiden_size"),
        ("asset://nope", "no such asset"),
        ({**TINY_LLAMA, "hidden_size": "x"}, "no llama can be made of these values"),
        ({"model_type": "t5"}, "no t5 can be made of these values"),
    ],
)
def test_models_that_cannot_be_loaded_are_named(model, message):
    with pytest.raises(InputError, match=message):
        load_causal_lm(model)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match="is a folder without config.json"):
        load_causal_lm(str(tmp_path))


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        pl.seed_everything(0)
        module = CausalLMModule(TINY_LLAMA, loading={"gradient_checkpointing": checkpointing})
        module.configure_model()
        asked = (getattr(part, "gradient_checkpointing", False) for part in module.model.modules())
        assert any(asked) == checkpointing
        module.token_output(next(iter(loader()))).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_tokenizer_of_another_model_is_refused():
    module = CausalLMModule({**TINY_ARITHMETIC, "vocab_size": 10})
    with pytest.raises(InputError, match=r"token ids up to 18, but the model's embedding has 10 rows"):
        trainer().fit(module, datamodule=arithmetic_data())


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": {"warmup": -1}}, r"schedule\.warmup must not be negative"),
        ({"optimizer": {"lr": float("nan")}}, r"optimizer\.lr must be a number, neither negative"),
        (
            {"loading": {"hed": "full"}},
            "loading: LoadingOptions has no hed; it has dtype, attn_implementation, revision",
        ),
        ({"step": {1: True}}, "step: StepOptions has no 1; it has renormalize, on_non_finite"),
        (
            {"evaluation": GenerationOptions()},
            "evaluation: expected EvaluationOptions or a dict of its fields, got Gen",
        ),
        ({"loss": DFTLoss(reduction="sum")}, "leave ignore_index and reduction of DFTLoss"),
        ({"loss": DFTLoss(ignore_index=0)}, "leave ignore_index and reduction of DFTLoss"),
        ({"evaluation": {"generation": {"temperature": 0.0}}}, "temperature must be more than 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        CausalLMModule(TINY_LLAMA, **options)


def test_a_loss_with_parameters_is_refused():
    class Learnt(Surprise):
        def __init__(self):
            super().__init__()
            self.temperature = torch.nn.Parameter(torch.ones(()))

    with pytest.raises(ValueError, match="has trainable parameters"):
        CausalLMModule(TINY_LLAMA, loss=Learnt())


def test_default_loss_is_not_shared_between_modules():
    assert CausalLMModule(TINY_LLAMA).loss is not CausalLMModule(TINY_LLAMA).loss


# -- optimizer and schedule ----------------------------------------------------------------------------------------


def test_no_weight_decay_on_norms_and_biases():
    module = CausalLMModule(TINY_QWEN2, optimizer={"weight_decay": 0.3})
    module.configure_model()
    decayed, plain = module.build_parameter_groups()
    names = {id(p): name for name, p in module.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in plain["params"])
    assert all(names[id(p)].endswith("weight") and "norm" not in names[id(p)] for p in decayed["params"])
    assert len(names) == len(decayed["params"]) + len(plain["params"])
    assert any(names[id(p)].endswith("bias") for p in plain["params"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_steps": 7}, 7),
        ({"max_steps": -1, "max_epochs": 3}, 9),  # 6 rows of batch 2
        ({"max_steps": -1, "max_epochs": 3, "accumulate_grad_batches": 2}, 6),
        ({"max_steps": 4, "max_epochs": 1}, 3),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 2}, 4),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 0.34}, 2),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 9}, 6),
    ],
)
def test_number_of_steps(options, expected, monkeypatch):
    def forbidden(self):
        raise AssertionError("estimated_stepping_batches drops a resumed loader's state")

    monkeypatch.setattr(pl.Trainer, "estimated_stepping_batches", property(forbidden))
    run = trainer(**options)
    seen = []

    class Watch(CausalLMModule):
        def configure_optimizers(self):
            seen.append(total_optimizer_steps(self.trainer))
            return super().configure_optimizers()

    run.fit(Watch(TINY_LLAMA), loader())
    assert seen == [expected]
    assert run.global_step == expected


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [({0: 4, 1: 1}, 2 + 5 + 5), ({2: 5}, 5 + 5 + 1), ({0: 2, 1: 3, 2: 5}, 3 + 2 + 1)],
)
def test_steps_of_epochs_that_accumulate_differently_are_all_counted(schedule, expected):
    """The cosine ends at 0 with the last of them, and not before."""
    module = CausalLMModule(TINY_LLAMA, optimizer={"lr": 1e-3})
    run = trainer(max_steps=-1, max_epochs=3, callbacks=[pl.callbacks.GradientAccumulationScheduler(schedule)])
    run.fit(module, loader(10))
    assert run.global_step == expected
    assert run.lr_scheduler_configs[0].scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-12)
    halves = run.lr_scheduler_configs[0].scheduler.lr_lambdas[0](expected / 2)
    assert halves == pytest.approx(0.5)


class Accumulate(pl.Callback):
    """A callback that changes accumulation in its own way."""

    def on_train_epoch_start(self, trainer, module):
        trainer.accumulate_grad_batches = 1 + trainer.current_epoch


class Slow(pl.Callback):
    def on_train_batch_start(self, *_):
        time.sleep(0.4)


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= 7


class Growing(pl.LightningDataModule):
    """Two rows more in each epoch."""

    def train_dataloader(self):
        return loader(6 + 2 * self.trainer.current_epoch)


@pytest.mark.parametrize(
    ("options", "data", "epoch", "end"),
    [
        ({"callbacks": [Accumulate()]}, None, "epoch 1 takes 2 optimizer steps, and 3 were counted", "after 6 "),
        ({"reload_dataloaders_every_n_epochs": 1}, Growing, "epoch 1 takes 4 optimizer steps, and 3", "after 12 "),
        ({"callbacks": [Stop()]}, None, None, "after 7 optimizer steps, and 9 were counted"),
        ({"callbacks": [Slow()], "max_time": {"seconds": 1}}, None, None, "optimizer steps, and 9 were counted"),
        ({}, None, None, None),
        ({"limit_train_batches": 2}, None, None, None),
        ({"overfit_batches": 2}, None, None, None),
    ],
)
def test_a_run_of_another_length_than_its_schedule_says_so(options, data, epoch, end, recwarn):
    rows = {"datamodule": data()} if data else {"train_dataloaders": loader()}
    trainer(max_steps=-1, max_epochs=3, **options).fit(CausalLMModule(TINY_LLAMA), **rows)
    said = [str(each.message) for each in recwarn if "model.schedule:" in str(each.message)]
    assert any("model.schedule: epoch" in each for each in said) == (epoch is not None)
    assert any("the run ended" in each for each in said) == (end is not None)
    for text in (epoch, end):
        assert text is None or any(text in each for each in said), said


class Endless(IterableDataset):
    def __iter__(self):
        return iter(loader(batch_size=1))


def test_unknown_number_of_steps_is_said():
    endless = DataLoader(Endless(), batch_size=None)
    with pytest.raises(InputError, match=r"trainer.max_steps is not set and the training data has no length"):
        trainer(max_steps=-1, max_epochs=1).fit(CausalLMModule(TINY_LLAMA), endless)
    trainer(max_steps=2).fit(CausalLMModule(TINY_LLAMA), endless)
    trainer(max_steps=-1, max_epochs=1).fit(CausalLMModule(TINY_LLAMA, schedule={"decay": "constant"}), endless)


def test_learning_rate_follows_the_schedule():
    rates = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append([group["lr"] for group in optimizer.param_groups])

    module = CausalLMModule(TINY_LLAMA, optimizer={"lr": 1.0}, schedule={"warmup": 0.5, "decay": "linear"})
    trainer(max_steps=4, callbacks=[Watch()]).fit(module, loader(8))
    assert rates == [[0.0] * 2, [0.5] * 2, [1.0] * 2, [0.5] * 2]


# -- subclassing ---------------------------------------------------------------------------------------------------


def test_a_fabric_in_place_of_a_trainer_changes_no_loss():
    """Lightning makes a trainer up of it, which has no state and no data."""
    module = CausalLMModule(TINY_GPT2)
    module.configure_model()
    batch = next(iter(loader()))
    expected = module.token_output(batch).loss_sum
    wrapped = Fabric(accelerator="cpu", devices=1).setup(module.eval())
    wrapped.mark_forward_method("token_output")
    assert torch.equal(wrapped.token_output(batch).loss_sum, expected)


def test_three_line_subclass_changes_one_thing():
    class WithSGD(CausalLMModule):
        def build_optimizer(self, groups):
            return torch.optim.SGD(groups, lr=0.1)

    module = WithSGD(TINY_LLAMA)
    trainer().fit(module, loader())
    assert isinstance(module.optimizers(use_pl_optimizer=False), torch.optim.SGD)


def test_subclass_may_build_any_model():
    class Bigram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(97, 97)

        def forward(self, input_ids, attention_mask=None, use_cache=False):
            return type("Output", (), {"logits": self.table(input_ids)})

    class Own(CausalLMModule):
        def build_model(self):
            return Bigram()

    run = trainer()
    run.fit(Own("bigram", loss=DFTLoss(), loading={"head": "full"}), loader())
    assert run.global_step == 1
    with pytest.raises(InputError, match="set model.loading.head: full"):  # a table has no last matrix product
        trainer().fit(Own("bigram", loss=DFTLoss()), loader())


# -- checkpoints ---------------------------------------------------------------------------------------------------


def fit_and_save(module, folder):
    checkpoint = ModelCheckpoint(folder, save_weights_only=False)
    trainer(max_steps=2, enable_checkpointing=True, callbacks=[checkpoint]).fit(module, loader())
    return checkpoint.best_model_path


@pytest.mark.parametrize("loss", [FocalLoss(gamma=1.5), DFTLoss(), CrossEntropyLoss(0.1), Surprise(3.0)], ids=repr)
def test_checkpoint_loads_with_weights_only_and_keeps_the_loss(tmp_path, loss):
    module = CausalLMModule(TINY_LLAMA, loss=loss, evaluation={"generation": GenerationOptions(max_new_tokens=7)})
    path = fit_and_save(module, tmp_path)
    assert torch.load(path, weights_only=True)["hyper_parameters"]["loss"] == to_plain(loss)
    loaded = CausalLMModule.load_from_checkpoint(path, weights_only=True)
    assert repr(loaded.loss) == repr(loss)
    assert loaded.evaluation.generation.max_new_tokens == 7
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters(), strict=True))
    other = CausalLMModule.load_from_checkpoint(path, weights_only=True, loss=CrossEntropyLoss())
    assert repr(other.loss) == "CrossEntropyLoss()"


def test_loss_that_a_checkpoint_cannot_hold_is_never_replaced_in_silence(tmp_path):
    path = fit_and_save(CausalLMModule(TINY_LLAMA, loss=Surprise(2.0, shift=print)), tmp_path)
    with pytest.raises(ValueError, match=r"the options of test_module.Surprise were not saved.*pass the TokenLoss"):
        CausalLMModule.load_from_checkpoint(path, weights_only=True)
    assert isinstance(CausalLMModule.load_from_checkpoint(path, loss=Surprise()).loss, Surprise)


def test_options_over_those_of_a_checkpoint(tmp_path):
    """Of a group, or of the same class, in part: the rest is the checkpoint's."""
    sgd = {"class_path": "SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}
    made = CausalLMModule(
        TINY_LLAMA,
        optimizer=sgd,
        loading={"head": "full"},
        evaluation={
            "generation": {"max_new_tokens": 7},
            "answer_extractor": {"class_path": "dft_lightning.metrics.BoxedAnswer"},
        },
    )
    path = fit_and_save(made, tmp_path)
    given = {"loading": {"dtype": "float64"}, "evaluation": {"generation": {"top_k": 3}}, "optimizer": {"lr": 0.2}}
    loaded = CausalLMModule.load_from_checkpoint(path, **given)
    assert (loaded.loading.head, loaded.loading.dtype) == ("full", "float64")
    assert loaded.evaluation.generation == GenerationOptions(max_new_tokens=7, top_k=3)
    assert type(loaded.evaluation.answer_extractor).__name__ == "BoxedAnswer"
    assert loaded.hparams["optimizer"] == {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.2, "momentum": 0.9}}
    again = CausalLMModule.load_from_checkpoint(path, optimizer={"class_path": "SGD", "init_args": {"lr": 0.3}})
    assert again.hparams["optimizer"]["init_args"] == {"lr": 0.3, "momentum": 0.9}
    other = CausalLMModule.load_from_checkpoint(path, optimizer={"class_path": "RMSprop", "init_args": {"lr": 0.3}})
    assert "momentum" not in other.hparams["optimizer"]["init_args"]
    for name in ("learning_rate", "dtype"):
        with pytest.raises(InputError, match=f"CausalLMModule has no argument {name}"):
            CausalLMModule.load_from_checkpoint(path, **{name: 1})


def test_a_module_can_be_pickled_after_a_fit():
    module = CausalLMModule(TINY_LLAMA, loss=DFTLoss())
    trainer().fit(module, loader())
    again = pickle.loads(pickle.dumps(module))
    assert all(map(torch.equal, module.parameters(), again.parameters()))
    trainer().fit(again, loader())
    trainer().fit(copy.deepcopy(module), loader())


def test_a_class_that_takes_few_arguments_is_loaded(tmp_path):
    class Narrow(CausalLMModule):
        def __init__(self, bonus: float = 0.0):
            super().__init__(TINY_LLAMA, optimizer={"class_path": "SGD", "init_args": {"lr": 0.1}})

    path = fit_and_save(Narrow(2.5), tmp_path)
    assert Narrow.load_from_checkpoint(path).hparams["bonus"] == 2.5
    with pytest.raises(InputError, match="Narrow has no argument loss"):  # Lightning would drop it
        Narrow.load_from_checkpoint(path, loss=DFTLoss())


def test_subclass_arguments_are_in_the_checkpoint(tmp_path):
    class Own(CausalLMModule):
        def __init__(self, bonus: float = 0.0, **kwargs):
            super().__init__(**kwargs)
            self.bonus = bonus

    path = fit_and_save(Own(bonus=2.5, model=TINY_LLAMA, loss=DFTLoss()), tmp_path)
    loaded = Own.load_from_checkpoint(path, weights_only=True)
    assert loaded.bonus == 2.5
    assert isinstance(loaded.loss, DFTLoss)


def test_plain_form_refuses_what_is_no_loss():
    with pytest.raises(TypeError, match="collections.OrderedDict is not a subclass of TokenLoss"):
        from_plain({"class_path": "collections.OrderedDict"}, TokenLoss)
    with pytest.raises(ValueError, match="cannot import 'no.such.Loss'"):
        from_plain({"class_path": "no.such.Loss"}, TokenLoss)
    with pytest.raises(TypeError, match="expected a TokenLoss or a dict"):
        CausalLMModule(TINY_LLAMA, loss="dft_lightning.DFTLoss")


def test_resumed_run_goes_on_where_it_stopped(tmp_path):
    path = fit_and_save(CausalLMModule(TINY_LLAMA, loss=DFTLoss()), tmp_path)
    run = trainer(max_steps=5)
    run.fit(CausalLMModule(TINY_LLAMA, loss=DFTLoss()), loader(), ckpt_path=path, weights_only=True)
    assert run.global_step == 5


# -- generation ----------------------------------------------------------------------------------------------------


def test_completions_end_before_the_stop_token():
    tokenizer = arithmetic_data().build_tokenizer()
    tokens = torch.tensor([[5, 6, 2, 7], [5, 6, 7, 8]])
    assert decode_completions(tokenizer, tokens, [2]) == ["12", "1234"]


def test_greedy_generation_is_the_step_by_step_argmax_and_ignores_the_models_own_options():
    folder = str(at_hand("models/stories260K"))
    module = CausalLMModule(folder)
    module.configure_model()
    # what a checkpoint's generation_config might bring along
    module.model.generation_config.repetition_penalty = 5.0
    module.model.generation_config.do_sample = True
    prompt = module.tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    text = module.generate(prompt, torch.ones_like(prompt), GenerationOptions(max_new_tokens=12))[0]
    ids = prompt
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, module.model.eval()(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert text == module.tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
    assert module.model.generation_config.repetition_penalty == 5.0


def test_left_padding_changes_no_completion():
    module = CausalLMModule(str(at_hand("models/stories260K")))
    module.configure_model()
    texts = ["Once upon a time", "Lily and Tom went to the park. They"]
    ids = [module.tokenizer(text)["input_ids"] for text in texts]
    rows = [{"input_ids": i, "labels": i, "prompt_ids": i, "prompt": "", "answer": "", "index": 0} for i in ids]
    batch = Collator(0, with_prompts=True)(rows)
    options = GenerationOptions(max_new_tokens=10)
    together = module.generate(batch["prompt_input_ids"], batch["prompt_attention_mask"], options)
    alone = [module.generate(torch.tensor([i]), torch.ones(1, len(i)).long(), options)[0] for i in ids]
    assert together == alone
    assert math.prod(len(text) for text in together) > 0


def test_model_without_generate_is_named():
    class Own(CausalLMModule):
        def build_model(self):
            return torch.nn.Linear(1, 1)

    module = Own("asset://arithmetic-base")
    module.configure_model()
    ids = torch.ones(1, 2).long()
    with pytest.raises(TypeError, match=r"Linear has no generate\(\); override CausalLMModule.generate"):
        module.generate(ids, ids, GenerationOptions())


# -- under the trainer's other features ----------------------------------------------------------------------------


def test_validate_then_fit_in_one_process_with_inference_mode():
    run = trainer(inference_mode=True, max_steps=2)
    module = CausalLMModule(TINY_LLAMA)
    run.validate(module, loader(), verbose=False)
    run.fit(module, loader(), loader())
    assert run.global_step == 2


def test_learning_rate_finder_trains_before_every_hook(tmp_path):
    finder = pl.callbacks.LearningRateFinder(num_training_steps=5, update_attr=False)
    run = trainer(callbacks=[finder], max_steps=2, enable_checkpointing=True, default_root_dir=tmp_path)
    module = CausalLMModule(TINY_LLAMA, schedule={"decay": "constant"})
    module.learning_rate = 1e-3
    run.fit(module, loader(40))
    assert run.global_step == 2


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_rotary_frequencies_keep_their_digits(precision):
    module = CausalLMModule(TINY_LLAMA)
    trainer(precision=precision).fit(module, loader())
    rotary = module.model.model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32
    torch.testing.assert_close(rotary, load_causal_lm(TINY_LLAMA).model.rotary_emb.inv_freq, rtol=0, atol=0)
    assert module.model.lm_head.weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)


def test_numpy_options_and_losses_within_losses_survive_a_checkpoint(tmp_path):
    loss = Weighted(FocalLoss(gamma=np.float64(1.5)), share=np.float32(0.25))
    module = CausalLMModule(TINY_LLAMA, loss=loss, optimizer={"lr": np.logspace(-4, -3, 2)[0]})
    loaded = CausalLMModule.load_from_checkpoint(fit_and_save(module, tmp_path), weights_only=True)
    assert isinstance(loaded.loss.inner, FocalLoss)
    assert (loaded.loss.inner.gamma, loaded.loss.share) == (1.5, 0.25)
    assert type(loaded.hparams["optimizer"]["init_args"]["lr"]) is float


def test_rope_theta_of_older_configs_is_taken():
    assert load_causal_lm({**TINY_LLAMA, "rope_theta": 5e5}).config.rope_parameters["rope_theta"] == 5e5


def test_batches_without_prompts_cannot_be_tested():
    """Where answers are to be scored; see test_own_metrics for what becomes of them otherwise."""
    module = CausalLMModule(TINY_LLAMA, evaluation={"answer_extractor": WholeText()})
    with pytest.raises(InputError, match=r"these batches lack prompt_input_ids, .*: use InstructionDataModule"):
        trainer().test(module, loader(), verbose=False)


def test_a_transformers_config_starts_from_scratch(tmp_path):
    module = CausalLMModule(LlamaConfig(**{k: v for k, v in TINY_LLAMA.items() if k != "model_type"}))
    module.configure_model()
    assert module.model.config.hidden_size == 16
    loaded = CausalLMModule.load_from_checkpoint(fit_and_save(module, tmp_path), weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters(), strict=True))
