"""A checkpoint's options and a run's: which count, what is printed, and what becomes of optimizer and schedule."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
import yaml
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR

from conftest import TINY_LLAMA
from dft_lightning import CausalLMModule
from dft_lightning.data import InstructionDataModule
from dft_lightning.errors import InputError
from dft_lightning.fit.checkpoint_options import SavedOptions, differing, read_options
from dft_lightning.fit.command import DFTLightningCLI, cli_options, main
from dft_lightning.losses import DFTLoss, FocalLoss
from dft_lightning.modules.resume.restored import KEY
from small_runs import TINY_ARITHMETIC, arithmetic_data, trainer

HEADING = "options, beside those of "


class Tagged(CausalLMModule):
    """With an option of its own, and the learning rate of each step."""

    def __init__(self, model: dict | str, tag: int = 1, **kwargs) -> None:
        super().__init__(model, **kwargs)
        self.save_hyperparameters("tag")
        self.rates: list[float] = []

    def on_before_optimizer_step(self, optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Runs a command with a config that gives what must be given, in a folder of this file."""
    folder = tmp_path_factory.mktemp("resumed")
    rows = {"class_path": "ArithmeticRows", "init_args": {"num_rows": 12, "min_digits": 1, "max_digits": 2}}
    shown = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    shown["logger"] = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder)}}
    values = {
        "model": {"model": {**TINY_LLAMA, "vocab_size": 20}},
        "data": {"train": rows, "validation": rows, "test": rows, "text": {"tokenizer": "asset://arithmetic-base"}},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 6, "default_root_dir": str(folder), **shown},
    }
    values["data"]["batch_size"] = 3
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    known = DFTLightningCLI.subcommands()

    def run(name, *args):
        with pytest.MonkeyPatch.context() as patch:  # the parsers of the other commands take longer than what is run
            patch.setattr(DFTLightningCLI, "subcommands", staticmethod(lambda: {name: known[name]}))
            return main([name, "--config", str(config), *map(str, args)], module_class=Tagged)

    return run


WARMUP = "dft_lightning.modules.schedules.WarmupSchedule"
GIVEN = {
    "loss": "FocalLoss",
    "loss.gamma": 3.0,
    "optimizer.lr": 0.001,
    "schedule.warmup": 2,
    "evaluation.generation.max_new_tokens": 4,
    "evaluation.generation.top_k": 3,
    "tag": 7,
}


def flags(**values):
    return [part for name, value in values.items() for part in (f"--model.{name}", value)]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """A run of six steps by flags, and its checkpoint after three."""
    folder = tmp_path_factory.mktemp("whole")
    every = {"class_path": "ModelCheckpoint"}
    every["init_args"] = {"dirpath": str(folder), "every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}"}
    overlay = folder / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": [every]}}))
    cli = command("fit", "--config", overlay, *flags(**GIVEN))
    return cli, folder / "step=3.ckpt"


def printed(caplog):
    """The lines below the heading, which is there at most once."""
    messages = [record.getMessage() for record in caplog.records if HEADING in record.getMessage()]
    assert len(messages) <= 1
    return [line.strip() for line in messages[0].splitlines()[1:]] if messages else []


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO)
    return caplog


# -- the command ---------------------------------------------------------------------------------------------------


def test_options_not_given_are_the_checkpoints(command, whole, log):
    before, path = whole
    cli = command("fit", "--ckpt_path", path)
    assert isinstance(cli.model.loss, FocalLoss)
    assert (cli.model.loss.gamma, cli.model.hparams.tag, cli.model.evaluation.generation.top_k) == (3.0, 7, 3)
    assert cli.model.hparams == before.model.hparams
    assert cli.model.rates == before.model.rates[3:]
    assert printed(log) == [
        "model.tag: 7, as the checkpoint's run had it (not given; it would be 1)",
        "model.loss: FocalLoss(gamma=3.0), as the checkpoint's run had it (not given; it would be CrossEntropyLoss)",
        "model.optimizer.lr: 0.001, as the checkpoint's run had it (not given; it would be 5e-05)",
        "model.schedule.warmup: 2, as the checkpoint's run had it (not given; it would be 0)",
        "model.evaluation.generation.max_new_tokens: 4, as the checkpoint's run had it (not given; it would be 256)",
        "model.evaluation.generation.top_k: 3, as the checkpoint's run had it (not given; it would be 0)",
    ]
    saved = yaml.safe_load(cli.parser.dump(cli.config))["fit"]["model"]  # what a run's config.yaml is written from
    assert saved["loss"]["init_args"]["gamma"] == 3.0
    assert saved["tag"] == 7


def test_options_given_count_and_so_do_those_of_the_data(command, whole, log):
    _, path = whole
    given = {"optimizer.lr": 0.0004, "optimizer.betas": "[0.8, 0.9]", "optimizer.weight_decay": 0.5}
    given |= {"loss": "FocalLoss", "tag": 1}
    cli = command(
        "fit", "--ckpt_path", path, "--data.batch_size", 4, *flags(**given), "--model.evaluation.generation.top_k", 5
    )
    assert (cli.model.loss.gamma, cli.model.hparams.tag) == (3.0, 1)
    assert (cli.model.evaluation.generation.max_new_tokens, cli.model.evaluation.generation.top_k) == (4, 5)
    taken = ["model.loss.gamma", "model.schedule.warmup", "model.evaluation.generation.max_new_tokens"]
    lines = printed(log)
    assert [line.partition(":")[0] for line in lines[:3]] == taken
    assert sorted(lines[3:]) == [
        "data.batch_size: 4 (the checkpoint's run had 3)",
        "model.evaluation.generation.top_k: 5 (the checkpoint's run had 3)",
        "model.optimizer.betas: [0.8, 0.9] (the checkpoint's run had [0.9, 0.95])",
        "model.optimizer.lr: 0.0004 (the checkpoint's run had 0.001)",
        "model.optimizer.weight_decay: 0.5 (the checkpoint's run had 0.01)",
        "model.tag: 1 (the checkpoint's run had 7)",
    ]
    # Two steps of warm-up, then a cosine over four, by hand.
    assert cli.model.rates == pytest.approx([0.0004 * (1 + math.cos(math.pi * t / 4)) / 2 for t in (1, 2, 3)])
    decayed, spared = cli.trainer.optimizers[0].param_groups
    assert (tuple(decayed["betas"]), decayed["weight_decay"], spared["weight_decay"]) == ((0.8, 0.9), 0.5, 0.0)
    assert (decayed["initial_lr"], cli.trainer.lr_scheduler_configs[0].scheduler.base_lrs) == (0.0004, [0.0004] * 2)


def test_nothing_is_printed_where_nothing_differs(command, whole, log):
    before, path = whole
    cli = command("fit", "--ckpt_path", path, *flags(**GIVEN))
    assert printed(log) == []
    assert cli.model.rates == before.model.rates[3:]


def test_options_given_as_a_dict(whole, log):
    cli, path = whole
    given = {name: cli.config["fit"][name].as_dict() for name in ("model", "data", "trainer")}
    given["model"] = {"model": given["model"]["model"], "tag": 2}
    given["trainer"] |= {"callbacks": None, "logger": False, "default_root_dir": str(path.parent / "dict")}
    args = {"subcommand": "validate", "validate": {**given, "ckpt_path": str(path)}}
    again = DFTLightningCLI(Tagged, InstructionDataModule, **cli_options(), args=args)
    assert (again.model.hparams.tag, again.model.loss.gamma) == (2, 3.0)
    assert "model.tag: 2 (the checkpoint's run had 7)" in printed(log)
    assert len(printed(log)) == 6


def test_another_optimizer_and_schedule_go_on(command, tmp_path, log):
    """Named by flags, and named by the checkpoint alone."""
    named = {"optimizer": "SGD", "optimizer.lr": 0.1, "optimizer.momentum": 0.9, "schedule": "StepLR"}
    named |= {"schedule.step_size": 2}
    path = tmp_path / "a.ckpt"
    whole = command("fit", *flags(**named))
    weights = [parameter.clone() for parameter in whole.model.parameters()]
    command("fit", *flags(**named), "--trainer.max_steps", 3).trainer.save_checkpoint(path)
    alone = {"optimizer.lr": 0.1}  # without its class, which is not the default's
    for given in (named, alone, {}):
        log.clear()
        cli = command("fit", "--ckpt_path", path, *flags(**given))
        assert type(cli.trainer.optimizers[0]) is torch.optim.SGD
        assert type(cli.trainer.lr_scheduler_configs[0].scheduler) is StepLR
        assert all(map(torch.equal, weights, cli.model.parameters()))
        lines = [line.partition(",")[0] for line in printed(log)]
        assert given is not named or lines == []
    assert lines[:2] == [
        "model.optimizer: torch.optim.SGD(lr=0.1",
        "model.schedule: torch.optim.lr_scheduler.StepLR(step_size=2)",
    ]


@pytest.mark.parametrize("name", ["validate", "test", "predict"])
def test_other_commands(command, whole, log, name):
    cli = command(name, "--ckpt_path", whole[1], "--model.loss", "DFTLoss", "--model.tag", 8)
    assert isinstance(cli.model.loss, DFTLoss)
    assert cli.model.evaluation.generation.max_new_tokens == 4
    assert "model.loss: DFTLoss (the checkpoint's run had FocalLoss(gamma=3.0))" in printed(log)
    assert "model.tag: 8 (the checkpoint's run had 7)" in printed(log)


@pytest.fixture
def changed(whole, tmp_path):
    """Writes the checkpoint again with other hyper-parameters; returns its path."""

    def write(**values):
        content = torch.load(whole[1], weights_only=True)
        content["hyper_parameters"] |= values
        torch.save(content, tmp_path / "changed.ckpt")
        return tmp_path / "changed.ckpt"

    return write


def test_options_of_another_version_and_those_that_no_checkpoint_gives(command, whole, changed, log):
    path = changed(
        gone=[1, 2],
        evaluation="no group",
        sharding={**whole[0].model.hparams["sharding"], "load": "whole"},
        loading={**whole[0].model.hparams["loading"], "trust_remote_code": True},
    )
    cli = command("validate", "--ckpt_path", path, *flags(**GIVEN))
    assert not cli.model.loading.trust_remote_code
    assert "(the checkpoint's run had no group)" in (lines := sorted(printed(log))).pop(0)
    assert lines == [
        "model.gone: no such option here (the checkpoint's run had [1, 2])",
        "model.loading.trust_remote_code: false (the checkpoint's run had true)",
        "model.sharding.load: shards (the checkpoint's run had whole)",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": {"class_path": "mine.Loss", "init_args": "not saved: a tensor"}},
         "model.loss: not given, and the checkpoint holds only that its run had mine.Loss, whose options were not"),
        ({"loss": {"class_path": "no_such_module.Loss", "init_args": {}}},
         "model.loss: no_such_module.Loss is not imported because a file names it: give it (--model.loss no_such_mod"),
        ({"loading": {"dtype": "float31"}}, "model.loading.dtype: expected one of 'auto', 'float32'"),
        # It is not the flags alone that contradict each other: what they meet is named as well.
        ({"schedule": {"class_path": WARMUP, "init_args": {"decay": "linear", "minimum": 2.0}}},
         "model.schedule.minimum: 2.0, as the checkpoint's run had it"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_named(command, changed, capfd, values, message):
    with pytest.raises(SystemExit):
        command("validate", "--ckpt_path", changed(**values), "--model.schedule.warmup", 1)
    assert message in capfd.readouterr().err


def test_a_config_that_can_be_read_but_once(command, whole, tmp_path, capfd):
    import os
    import threading

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=lambda: pipe.write_text("model: {tag: 3}"), daemon=True).start()
    with pytest.raises(SystemExit):
        command("validate", "--config", pipe, "--ckpt_path", whole[1])
    assert f"--config: {pipe} can be read but once" in capfd.readouterr().err


# -- reading and comparing -----------------------------------------------------------------------------------------


def test_options_of_a_folder_of_shards(tmp_path):
    assert read_options(None) == read_options("hpc") == read_options(tmp_path) == SavedOptions()
    content = {"hyper_parameters": {"tag": 7, "_note": 1}, "datamodule_hyper_parameters": {"batch_size": 3}}
    torch.save(content, tmp_path / "meta.pt")
    assert read_options(tmp_path) == SavedOptions({"tag": 7}, {"batch_size": 3})
    (tmp_path / "meta.pt").write_bytes(b"")
    with pytest.raises(InputError, match="is cut short or no checkpoint"):
        read_options(tmp_path)


def test_equal_values_in_other_forms():
    short, full = "dft_lightning.FocalLoss", "dft_lightning.losses.focal.FocalLoss"
    own = {"betas": (0.9, 1), "loss": {"class_path": short, "init_args": {"gamma": 2}}, "answer_extractor": DFTLoss()}
    saved = {
        "betas": [0.9, 1.0],
        "loss": {"class_path": full},
        "answer_extractor": {"class_path": "dft_lightning.DFTLoss"},
    }
    assert differing("model", own, json.loads(json.dumps(saved))) == []
    saved["loss"]["init_args"] = {"alpha": 0.5}
    assert differing("model", own, saved) == ["model.loss.alpha: 1.0 (the checkpoint's run had 0.5)"]


# -- optimizer and schedule ----------------------------------------------------------------------------------------


def rate_at(step, peak, total):
    return peak * (1 + math.cos(math.pi * step / total)) / 2


class Scheduled(Tagged):
    """With the schedule of a function of optimizer and options."""

    make = staticmethod(lambda optimizer, options: None)

    def build_scheduler(self, optimizer):
        return self.make(optimizer, self.hparams)

    def configure_optimizers(self):
        found = super().configure_optimizers()
        if isinstance(found, dict) and isinstance(found["lr_scheduler"]["scheduler"], ReduceLROnPlateau):
            found["lr_scheduler"] |= {"monitor": "train/loss", "strict": False}
        return found


def fit(kind, path=None, steps=3, save=None, **options):
    module = kind(TINY_ARITHMETIC, **{"optimizer": {"lr": 0.001}, **options})
    run = trainer(max_steps=steps, log_every_n_steps=1)
    run.fit(module, datamodule=arithmetic_data(batch_size=4), ckpt_path=path, weights_only=True)
    if save is not None:
        run.save_checkpoint(save)
    return module


SCHEDULES = {
    "none": lambda optimizer, options: None,
    "lambda": lambda optimizer, options: LambdaLR(optimizer, lambda step: 0.9**step),
    "cosine": lambda optimizer, options: CosineAnnealingLR(optimizer, T_max=10 * options["tag"]),
    "one cycle": lambda optimizer, options: OneCycleLR(
        optimizer, options["optimizer"]["init_args"]["lr"], total_steps=9
    ),
    "sequence": lambda optimizer, options: SequentialLR(
        optimizer, [StepLR(optimizer, 1, gamma=0.5), StepLR(optimizer, 1, gamma=0.9)], milestones=[2]
    ),
    "plateau": lambda optimizer, options: ReduceLROnPlateau(optimizer, patience=0, threshold=1e9, threshold_mode="abs"),
}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("none", None),
        ("lambda", None),
        ("cosine", r"model\.schedule\.T_max: 20 here, and the checkpoint's run had 10"),
        ("one cycle", r"model\.schedule\.max_lr: 0\.0003 here, and the checkpoint's run had 0\.001"),
        ("sequence", r"model\.optimizer\.lr: 0\.0003 here, and the checkpoint's run had 0\.001"),
        ("plateau", r"model\.optimizer\.lr: 0\.0003 here, and the checkpoint's run had 0\.001"),
    ],
)
def test_a_schedule_goes_on_by_this_runs_options(name, key, tmp_path):
    """Bit for bit as an uninterrupted run where nothing changed; with another peak and length as one that had them, or
    refused by name."""
    kind = type("Kind", (Scheduled,), {"make": staticmethod(SCHEDULES[name])})
    fit(kind, save=tmp_path / "a.ckpt")
    same = fit(kind, steps=5)
    assert fit(kind, tmp_path / "a.ckpt", steps=5).rates == same.rates[3:]
    other = {"optimizer": {"lr": 0.0003}, "tag": 2}
    if key is not None:
        with pytest.raises(InputError, match=key):
            fit(kind, tmp_path / "a.ckpt", steps=5, **other)
        return
    expected = fit(kind, steps=5, **other).rates[3:]
    assert expected != same.rates[3:]
    assert fit(kind, tmp_path / "a.ckpt", steps=5, **other).rates == expected


@pytest.mark.parametrize(
    ("option", "had", "has"), [("div_factor", 25.0, 20.0), ("final_div_factor", 1e4, 1e3), ("pct_start", 0.3, 0.4)]
)
def test_an_option_of_a_named_schedule_is_refused_by_its_name(tmp_path, option, had, has):
    named = {"class_path": "OneCycleLR", "init_args": {"max_lr": 0.01, "total_steps": 9}}
    fit(Tagged, save=tmp_path / "a.ckpt", schedule=named)
    same = fit(Tagged, steps=5, schedule=named)
    assert fit(Tagged, tmp_path / "a.ckpt", steps=5, schedule=named).rates == same.rates[3:]
    other = {**named, "init_args": {**named["init_args"], option: has}}
    with pytest.raises(InputError, match=rf"model\.schedule\.{option}: {has} here, and the checkpoint's run had {had}"):
        fit(Tagged, tmp_path / "a.ckpt", steps=5, schedule=other)


def test_a_run_that_begins_with_a_checkpoints_weights_takes_another_optimizer(tmp_path):
    fit(Tagged, save=tmp_path / "a.ckpt")
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    module = Tagged.load_from_checkpoint(tmp_path / "a.ckpt", optimizer=sgd)
    trainer(max_steps=1).fit(module, datamodule=arithmetic_data(batch_size=4))
    assert module.rates == [0.1]


def test_a_longer_run_has_its_own_schedule(tmp_path):
    fit(Tagged, steps=3, save=tmp_path / "a.ckpt")
    resumed = fit(Tagged, tmp_path / "a.ckpt", steps=8)
    assert resumed.rates == pytest.approx([rate_at(step, 0.001, 8) for step in range(3, 8)])


class Counting(Tagged):
    """An optimizer whose groups also hold what training makes of them."""

    def build_optimizer(self, groups):
        optimizer = super().build_optimizer(groups)
        for group in optimizer.param_groups:
            group |= {"count": 0, "momentum": (self.hparams["tag"], 0.5)}
        return optimizer

    def on_before_optimizer_step(self, optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        for group in optimizer.param_groups:
            group["count"] += 1
            group.setdefault("seen", "at a step")


def test_state_in_groups_is_kept_and_options_are_this_runs(tmp_path):
    fit(Counting, save=tmp_path / "a.ckpt")
    module = fit(Counting, tmp_path / "a.ckpt", steps=5, tag=2, optimizer={"weight_decay": 0.3, "eps": 1e-5})
    for group, decay in zip(module.optimizers().param_groups, (0.3, 0.0), strict=True):
        assert (group["count"], group["seen"], group["momentum"]) == (5, "at a step", (2, 0.5))
        assert (group["weight_decay"], group["eps"], tuple(group["betas"])) == (decay, 1e-5, (0.9, 0.95))


def test_a_checkpoint_that_does_not_say_what_its_options_were(tmp_path):
    fit(Counting, save=tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del content[KEY]
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="the checkpoint does not say what its run's optimizer options were"):
        module = fit(Counting, tmp_path / "a.ckpt", steps=5, optimizer={"weight_decay": 0.3, "lr": 0.0002})
    assert [group["weight_decay"] for group in module.optimizers().param_groups] == [0.01, 0.0]
    assert [group["count"] for group in module.optimizers().param_groups] == [5, 5]


def test_a_hook_without_super_is_told(tmp_path):
    kind = type("Silent", (Tagged,), {"on_fit_start": lambda self: None})
    fit(Tagged, save=tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="Silent overrides on_fit_start without calling super"):
        fit(kind, tmp_path / "a.ckpt", steps=4)
