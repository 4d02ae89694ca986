"""What the command's parser makes of an optimizer, a schedule and a loss, in configs and by flags."""

from __future__ import annotations

import re

import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from torch.optim import Optimizer

from dft_lightning.checkpoints.trust import check_classes, importing_only
from dft_lightning.cli.errors import shorten
from dft_lightning.errors import InputError
from dft_lightning.fit.checkpoint_options import SavedOptions, defaults_of
from dft_lightning.fit.parser import Parser
from dft_lightning.losses import CrossEntropyLoss, TokenLoss
from dft_lightning.modules.optimizers import DEFAULT_OPTIMIZER, OptimizerCallable, optimizer_values
from dft_lightning.modules.schedules import ScheduleCallable, WarmupSchedule, schedule_values


class Small:
    """Has the three parameters.

    Args:
        optimizer: what steps.
        schedule: what changes its rate.
        loss: the objective.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable = DEFAULT_OPTIMIZER,
        schedule: ScheduleCallable = WarmupSchedule,
        loss: TokenLoss = CrossEntropyLoss(),  # noqa: B008
    ) -> None:
        self.optimizer, self.schedule, self.loss = optimizer_values(optimizer), schedule_values(schedule), loss


def made_parser(kind=Parser):
    parser = kind(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Small, "model")
    return parser


@pytest.fixture
def parsed(tmp_path):
    """The class's instance, of configs and flags; each is also dumped and parsed again."""

    def parse(*parts):
        parser, args = made_parser(), []
        for i, part in enumerate(parts):
            if isinstance(part, dict):
                file = tmp_path / f"{i}.yaml"
                file.write_text(yaml.safe_dump({"model": part}))
                part = f"--config={file}"
            args.append(part)
        config = parser.parse_args(args)
        assert parser.parse_object(yaml.safe_load(parser.dump(config))).model == config.model
        return parser.instantiate(config).model

    return parse


def steps(made, path, **options):
    """Whether an optimizer has these options and no other class's: the rest are the class's own defaults."""
    values = made.optimizer
    assert values["class_path"] == path
    own = {name: values["init_args"].get(name) for name in options}
    assert own == options
    return values["init_args"]


ADAMW, SGD = "torch.optim.AdamW", "torch.optim.SGD"
DEFAULTS = {"lr": 5e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01}
PLAIN_SGD = {"class_path": "SGD", "init_args": {"lr": 0.1, "momentum": 0.5}}


@pytest.mark.parametrize(
    ("parts", "path", "options"),
    [
        ([], ADAMW, DEFAULTS),
        (["--model.optimizer.lr=1e-4"], ADAMW, {**DEFAULTS, "lr": 1e-4}),
        ([{"optimizer": {"lr": 1e-4}}], ADAMW, {**DEFAULTS, "lr": 1e-4}),
        (["--model.optimizer=AdamW", "--model.optimizer.eps=1"], ADAMW, {**DEFAULTS, "eps": 1.0}),
        ([{"optimizer": {"class_path": ADAMW, "init_args": {"weight_decay": 0}}}], ADAMW,
         {**DEFAULTS, "weight_decay": 0.0}),
        # A class that is named has nothing of the one before it.
        (["--model.optimizer=SGD", "--model.optimizer.lr=0.1"], SGD, {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.0}),
        ([{"optimizer": PLAIN_SGD}], SGD, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.0}),
        ([{"optimizer": {"lr": 1e-4, "weight_decay": 0.3}}, {"optimizer": PLAIN_SGD}], SGD,
         {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.0}),
        ([{"optimizer": PLAIN_SGD}, "--model.optimizer=RMSprop", "--model.optimizer.lr=0.2"], "torch.optim.RMSprop",
         {"lr": 0.2, "momentum": 0.0}),
        (["--model.optimizer.lr=1e-4", "--model.optimizer=SGD", "--model.optimizer.lr=0.1"], SGD, {"lr": 0.1}),
        # The same class keeps what it had.
        ([{"optimizer": PLAIN_SGD}, {"optimizer": {"class_path": SGD, "init_args": {"lr": 0.2}}}], SGD,
         {"lr": 0.2, "momentum": 0.5}),
        ([{"optimizer": PLAIN_SGD}, "--model.optimizer.lr=0.2"], SGD, {"lr": 0.2, "momentum": 0.5}),
        # AdamW has this package's defaults wherever it is named.
        ([{"optimizer": PLAIN_SGD}, "--model.optimizer=AdamW"], ADAMW, DEFAULTS),
        ([{"optimizer": PLAIN_SGD}, {"optimizer": {"class_path": ADAMW, "init_args": {"lr": 1e-4}}}], ADAMW,
         {**DEFAULTS, "lr": 1e-4}),
        # Of several classes of a name, this package's; then torch's.
        (["--model.optimizer=Muon", "--model.optimizer.lr=0.1"], "dft_lightning.modules.optimizers.Muon", {"lr": 0.1}),
        (["--model.optimizer=AdamW8bit", "--model.optimizer.lr=0.1"], "dft_lightning.modules.optimizers.AdamW8bit",
         {"lr": 0.1, "betas": [0.9, 0.95]}),
        (["--model.optimizer=Adafactor", "--model.optimizer.lr=0.1"], "torch.optim.Adafactor", {"eps": [None, 1e-3]}),
    ],
)  # fmt: skip
def test_optimizers(parsed, parts, path, options):
    pytest.importorskip("bitsandbytes")  # which has an AdamW, too
    steps(parsed(*parts), path, **options)


def test_a_loss_takes_none_of_another_over(parsed):
    focal = {"loss": {"class_path": "FocalLoss", "init_args": {"alpha": 0.5}}}
    assert parsed(focal, "--model.loss=FocalLoss").loss.alpha == 0.5
    chord = {"loss": {"class_path": "EAFTLoss", "init_args": {"alpha": 0.25}}}
    assert parsed(chord, "--model.loss=FocalLoss").loss.alpha == 1.0


@pytest.mark.parametrize(
    ("flags", "path", "options"),
    [
        (["--model.schedule.warmup=3"], "dft_lightning.modules.schedules.WarmupSchedule", {"warmup": 3}),
        (["--model.schedule.warmup=1.0"], "dft_lightning.modules.schedules.WarmupSchedule", {"warmup": 1.0}),
        (["--model.schedule=StepLR", "--model.schedule.step_size=3"], "torch.optim.lr_scheduler.StepLR",
         {"step_size": 3, "gamma": 0.1}),
    ],
)  # fmt: skip
def test_schedules(parsed, flags, path, options):
    values = parsed(*flags).schedule
    assert values["class_path"] == path
    found = {name: values["init_args"][name] for name in options}
    assert found == options
    assert [type(each) for each in found.values()] == [type(each) for each in options.values()]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["--model.optimizer=SGD"], "model.optimizer.lr: required, but not given"),
        ([{"optimizer": {"class_path": "SGD", "init_args": {"momentum": 0.5}}}],
         "model.optimizer.lr: required, but not given"),
        (["--model.optimizer.lr=1", "--model.optimizer=Muon"], "model.optimizer.lr: required, but not given"),
        (["--model.optimizer=SGDD"], "model.optimizer: unknown class 'SGDD'; did you mean SGD?"),
        (["--model.optimizer=Sophia"], "known: ASGD, Adadelta, Adafactor, Adagrad, Adam, AdamW, AdamW8bit, Adamax"),
        (["--model.optimizer=torch.optim.SGDD"], "model.optimizer: cannot import 'torch.optim.SGDD': module 'torch"),
        (["--model.optimizer=nowhere.X"], "model.optimizer: cannot import 'nowhere.X': No module named 'nowhere'"),
        (["--model.optimizer=torch.nn.Linear"], "model.optimizer: torch.nn.Linear is not a subclass of Optimizer"),
        (["--model.optimizer.lrr=1"], "model.optimizer.lrr: AdamW has no option 'lrr'; did you mean lr? It has lr, be"),
        (["--model.optimizer=SGD", "--model.optimizer.betas=[0.9,0.9]"],
         "model.optimizer.betas: SGD has no option 'betas'; it has lr, momentum"),
        (["--model.optimizer.lr=fast"], "model.optimizer.lr: expected float"),
        (["--model.optimizer.eps=small"], "model.optimizer.eps: expected float. Got value: small"),
        (["--model.optimizer=null"], "model.optimizer: expected a class: its path, or class_path and init_args; got"),
        (["--model.optimizer=[1]"], "model.optimizer: expected a class: its path, or class_path and init_args; got"),
        (["--model.schedule=StepLR"], "model.schedule.step_size: required, but not given"),
        (["--model.schedule=CosineLR"], "model.schedule: unknown class 'CosineLR'; did you mean"),
        (["--model.schedule.decay=square"], "model.schedule.decay: expected one of 'cosine', 'linear', 'constant'."),
        (["--model.schedule.warm=3"], "model.schedule.warm: WarmupSchedule has no option 'warm'; did you mean warmup?"),
        (["--model.loss=DFTLoss", "--model.loss.reduction=sum"],
         "model.loss.reduction: DFTLoss has no option 'reduction'; it has none"),
        (["--model.loss=FocalLoss", "--model.loss.ignore_index=0"],
         "model.loss.ignore_index: FocalLoss has no option 'ignore_index'; it has gamma, alpha, detach_weight"),
    ],
)  # fmt: skip
def test_messages(parsed, parts, message):
    with pytest.raises(ArgumentError) as caught:
        parsed(*parts)
    found = shorten(str(caught.value), made_parser())
    assert message in found
    assert "Callable" not in found
    assert "Namespace" not in found


def test_help_leaves_out_what_is_not_taken(capsys):
    with pytest.raises(SystemExit):
        made_parser().parse_args(["--model.loss.help=FocalLoss"])
    shown = capsys.readouterr().out
    assert "gamma" in shown
    assert not re.search("ignore_index|reduction", shown)


def test_a_parser_of_another_program_is_as_it_was():
    options = {"weight_decay": 0.5}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=Optimizer)
    parser.add_subclass_arguments(Optimizer, "other", required=False, skip={"params"})
    given = ["--other=torch.optim.AdamW", "--other.weight_decay=0.5", "--other=torch.optim.SGD"]
    assert dict(parser.parse_args(given, defaults=False).other.init_args) == options
    with pytest.raises(Exception, match="Multiple subclasses with name Muon"):
        parser.parse_args(["--other=Muon"])


def test_what_a_checkpoint_names():
    """Its optimizer and schedule are taken as its loss is, and the loss without its options for direct calls."""
    saved = {
        "optimizer": {"class_path": SGD, "init_args": {"lr": 0.1}},
        "schedule": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 3}},
        "loss": {"class_path": "dft_lightning.FocalLoss", "init_args": {"gamma": 3.0, "ignore_index": -100}},
    }
    parser = made_parser()
    own = parser.parse_args([])
    taken, refused, paths = defaults_of(SavedOptions(saved), own, parser)
    assert refused == {}
    parser.set_defaults(taken)
    with importing_only(paths):
        config = parser.parse_args([])
    made = parser.instantiate(config).model
    assert (made.loss.gamma, made.loss.ignore_index) == (3.0, -100)
    assert made.optimizer["init_args"]["lr"] == 0.1
    assert made.schedule["init_args"]["step_size"] == 3
    assert taken["model.loss"]["init_args"].keys() == {"gamma", "alpha", "detach_weight"}
    with pytest.raises(InputError, match=r"model\.optimizer: torch\.nn\.Linear is not imported"):
        check_classes({"optimizer": {"class_path": "torch.nn.Linear"}}, "model", "")
