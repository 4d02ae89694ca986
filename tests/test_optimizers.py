"""Optimizers by class path: what is taken and refused, groups, and this package's own against torch's."""

from __future__ import annotations

import copy
import math
import pickle
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from dft_lightning.errors import InputError
from dft_lightning.modules.optimizers import (
    DEFAULT_OPTIMIZER,
    AdamW8bit,
    Muon,
    build_optimizer,
    check_sharding,
    describe,
    matrix_names,
    optimizer_values,
    parameter_groups,
)
from small_runs import run_processes
from two_optimizers import CASES, model, steps

ADAMW = {"lr": 5e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01}


class Own(SGD):
    """Hands its options on."""

    def __init__(self, params, strength: float = 1.0, **kwargs) -> None:
        super().__init__(params, **kwargs)


ON_CPU = {"device": torch.device("cpu"), "scales_gradients": False}


class TakesAny(torch.optim.Optimizer):
    """Its options are its own, whatever they are called."""

    def __init__(self, params, lr: float, **options) -> None:
        super().__init__(params, {"lr": lr, **options})


def test_a_class_with_options_of_any_name():
    path = f"{__name__}.TakesAny"
    values = optimizer_values({"class_path": path, "init_args": {"lr": 0.1, "zap": 3}})
    assert values == {"class_path": path, "init_args": {"lr": 0.1, "zap": 3}}
    made = build_optimizer(values, [{"params": [torch.nn.Parameter(torch.ones(2))]}], **ON_CPU)
    assert made.param_groups[0]["zap"] == 3


def test_pairs_are_tuples_as_torch_has_them():
    values = optimizer_values({"betas": [0.8, 0.9]})
    made = build_optimizer(values, [{"params": [torch.nn.Parameter(torch.ones(2))]}], **ON_CPU)
    assert made.param_groups[0]["betas"] == (0.8, 0.9)


class Rerun(SGD):
    def step(self, closure):
        raise NotImplementedError


class Rateless(SGD):
    def __init__(self, params, speed: float = 1.0) -> None:
        super().__init__(params, lr=speed)


# -- options -------------------------------------------------------------------------------------------------------


def made_by_a_parser(function, cls, params, **options):
    return cls(params, **options)


@pytest.mark.parametrize(
    ("given", "path", "options"),
    [
        (DEFAULT_OPTIMIZER, "torch.optim.AdamW", ADAMW),
        ({}, "torch.optim.AdamW", ADAMW),
        ({"lr": 0.1}, "torch.optim.AdamW", {**ADAMW, "lr": 0.1}),
        ({"class_path": "AdamW", "init_args": {"eps": 0}}, "torch.optim.AdamW", {**ADAMW, "eps": 0}),
        ({"class_path": "torch.optim.adamw.AdamW"}, "torch.optim.AdamW", ADAMW),
        (partial(AdamW, lr=0.1), "torch.optim.AdamW",
         {"lr": 0.1, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}),
        (partial(made_by_a_parser, print, SGD, lr=0.1), "torch.optim.SGD", {"lr": 0.1}),
        (partial(partial(SGD, lr=0.1), momentum=0.5), "torch.optim.SGD", {"lr": 0.1, "momentum": 0.5}),
        ({"class_path": "SGD", "init_args": {"lr": 1}}, "torch.optim.SGD", {"lr": 1}),
        ({"class_path": "Adafactor", "init_args": {"lr": 0.1, "eps": (None, 0.1)}}, "torch.optim.Adafactor",
         {"lr": 0.1, "eps": [None, 0.1]}),
        ({"class_path": "Muon", "init_args": {"lr": 0.1}}, "dft_lightning.modules.optimizers.Muon", {"lr": 0.1}),
        ({"class_path": "AdamW8bit", "init_args": {"lr": 0.1}}, "dft_lightning.modules.optimizers.AdamW8bit",
         {"lr": 0.1}),
        ({"class_path": "RMSprop", "init_args": {"lr": 0.1}}, "torch.optim.RMSprop", {"lr": 0.1}),
        (partial(Own, lr=0.1, strength=2), f"{__name__}.Own", {"lr": 0.1, "strength": 2}),
    ],
)  # fmt: skip
def test_forms(given, path, options):
    values = optimizer_values(given)
    assert values == {"class_path": path, "init_args": options}
    assert optimizer_values(values) == values


def named(name, **options):
    return {"class_path": name, "init_args": {"lr": 0.1, **options}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (SGD, "optimizer.lr: required, but not given"),
        ({"class_path": "SGD"}, "optimizer.lr: required, but not given"),
        ({"class_path": "Muon", "init_args": {"momentum": 0.5}}, "optimizer.lr: required, but not given"),
        (named("Adamw"), "optimizer: unknown class 'Adamw'; did you mean Adam"),
        (named("torch.optim.AdamX"), "optimizer: unknown class 'torch.optim.AdamX'"),
        (named("no_such_module.X"), "optimizer: cannot import 'no_such_module.X': No module named"),
        (named("lr_scheduler"), "optimizer: torch.optim.lr_scheduler is not a subclass of Optimizer"),
        (named("torch.nn.Linear"), "optimizer: Linear is not a subclass of Optimizer"),
        (partial(SGD, [], lr=0.1), "optimizer: give a functools.partial of a class and of options by name alone"),
        (AdamW([nn.Parameter(torch.zeros(1))]), "optimizer must be a class, a functools.partial of one or a dict"),
        ({"class_path": "SGD", "lr": 0.1}, "optimizer: beside class_path there is init_args alone, got lr"),
        ({"class_path": "SGD", "init_args": 0.1}, "optimizer: init_args must be a dict of options, got 0.1"),
        (named("SGD", momentun=0.9), "optimizer.momentun: SGD has no option 'momentun'; did you mean momentum?"),
        (named("SGD", betas=[0.9, 0.9]), "optimizer.betas: SGD has no option 'betas'; it has lr, momentum, damp"),
        (named("Optimizer"), "optimizer: Optimizer has no option lr, which the schedule changes"),
        ({"class_path": "LBFGS", "init_args": {"lr": 0.1}}, "optimizer: LBFGS reruns its closure in a step"),
        (partial(Rerun, lr=0.1), "optimizer: Rerun reruns its closure in a step"),
        (named("SparseAdam"), "optimizer: SparseAdam takes sparse gradients alone"),
        (named("torch.optim.Muon"), "optimizer: torch.optim.Muon takes matrices alone: use Muon (dft_lightning.modul"),
        (Rateless, "optimizer: Rateless has no option lr, which the schedule changes"),
        ({"lr": -1}, "optimizer.lr must be a number, neither negative nor infinite, got -1"),
        ({"lr": math.nan}, "optimizer.lr must be a number, neither negative nor infinite, got nan"),
        (named("SGD", lr=math.inf), "optimizer.lr must be a number, neither negative nor infinite, got inf"),
        ({"eps": math.inf}, "optimizer.eps must be a number, neither negative nor infinite, got inf"),
        ({"lr": None}, "optimizer.lr must be a number, neither negative nor infinite, got None"),
        ({"lr": True}, "optimizer.lr must be a number, neither negative nor infinite, got True"),
        ({"lr": torch.tensor(0.1)}, "optimizer.lr: no config and no checkpoint can hold it: torch.Tensor"),
        ({"weight_decay": "no"}, "optimizer.weight_decay must be a number, neither negative nor infinite, got 'no'"),
        (named("AdamW8bit", eps=-1e-8), "optimizer.eps must be a number, neither negative nor infinite, got -1e-08"),
        ({"betas": (2.0, 3.0)}, "optimizer: Invalid beta parameter at index 0: 2.0"),
        (named("AdamW8bit", betas=[0.9, 1.0]), "optimizer: Invalid beta parameter at index 1: 1.0"),
        (named("Muon", betas=[0.9, 1.0]), "optimizer.betas must lie in [0, 1), got 1.0"),
        ({"betas": (0.9, 0.9, 0.9)}, "optimizer.betas must be 2 numbers, got [0.9, 0.9, 0.9]"),
        (named("SGD", momentum=-1), "optimizer: Invalid momentum value: -1"),
        (named("SGD", momentum="x"), "optimizer: "),
        (named("Muon", momentum=1.0), "optimizer.momentum must lie in [0, 1), got 1.0"),
        (named("Muon", ns_steps=100), "optimizer.ns_steps must be a whole number from 1 to 99, got 100"),
        (named("Muon", adjust_lr_fn="x"), "optimizer.adjust_lr_fn must be one of match_rms_adamw, original, got 'x'"),
    ],
)  # fmt: skip
def test_refusals(given, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        optimizer_values(given)
    assert "\n" not in str(caught.value)


def test_a_class_that_no_checkpoint_finds():
    class Local(SGD):
        pass

    with pytest.raises(ValueError, match="optimizer: Local is made inside a function"):
        optimizer_values(partial(Local, lr=0.1))


@pytest.mark.parametrize(
    ("name", "strategy", "message"),
    [
        ("Muon", FSDPStrategy, r"Muon goes by the shapes of matrices, and FSDPStrategy \(FSDP1\) flattens them"),
        ("Adafactor", FSDPStrategy, "Adafactor does not train shards"),
        ("Adafactor", ModelParallelStrategy, "Adafactor does not train shards"),
        ("AdamW8bit", FSDPStrategy, "AdamW8bit does not train shards"),
        ("AdamW8bit", ModelParallelStrategy, "AdamW8bit does not train shards"),
        ("bitsandbytes.optim.Lion8bit", ModelParallelStrategy, "Lion8bit does not train shards"),
        ("transformers.Adafactor", ModelParallelStrategy, "Adafactor does not train shards"),
    ],
)
def test_what_strategies_that_shard_refuse(name, strategy, message):
    values = optimizer_values(named(name, **({"relative_step": False} if name == "transformers.Adafactor" else {})))
    check_sharding(values, None)
    check_sharding(values, SimpleNamespace(strategy=object()))
    with pytest.raises(InputError, match=f"model.optimizer: {message}"):
        check_sharding(values, SimpleNamespace(strategy=strategy.__new__(strategy)))


def test_what_strategies_that_shard_take(recwarn):
    for name in ("AdamW", "SGD"):
        for strategy in (FSDPStrategy, ModelParallelStrategy):
            check_sharding(optimizer_values(named(name)), SimpleNamespace(strategy=strategy.__new__(strategy)))
    muon = SimpleNamespace(strategy=ModelParallelStrategy.__new__(ModelParallelStrategy))
    check_sharding(optimizer_values(named("Muon")), muon)
    assert not [each for each in recwarn if "model.optimizer" in str(each.message)]
    with pytest.warns(UserWarning, match=r"gives test_optimizers\.Own flat parts of matrices"):
        check_sharding(
            optimizer_values(partial(Own, lr=0.1)), SimpleNamespace(strategy=FSDPStrategy.__new__(FSDPStrategy))
        )


# -- groups and building -------------------------------------------------------------------------------------------


class Small(nn.Module):
    """An embedding, hidden layers, a norm, experts in one tensor, a row of one and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.norm = nn.Embedding(5, 4), nn.Linear(4, 6), nn.LayerNorm(6)
        self.experts, self.gate, self.head = nn.Parameter(torch.zeros(2, 3, 4)), nn.Linear(4, 1), nn.Linear(4, 5)
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
        self.also_hidden = nn.Parameter(torch.randn(3, 4))


def groups_of(values, **options):
    module = Small()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = parameter_groups(module, optimizer_values(values), options.get("matrices", ()), [None, module.head])
    return [
        ({names[id(p)] for p in group["params"]}, {k: v for k, v in group.items() if k != "params"}) for group in groups
    ]


VECTORS = {"hidden.bias", "norm.weight", "norm.bias", "gate.bias", "head.bias"}
WIDE = {"hidden.weight", "also_hidden"}
OTHERS = {"table.weight", "experts", "gate.weight", "head.weight"}


def test_groups():
    decayed, spared = {"weight_decay": 0.01}, {"weight_decay": 0.0}
    assert groups_of({}) == [(WIDE | OTHERS, decayed), (VECTORS, spared)]
    assert groups_of(named("SGD"))[0][1] == {"weight_decay": 0}
    assert groups_of(named("SGD", weight_decay=0.5))[0][1] == {"weight_decay": 0.5}
    assert groups_of(named("Rprop")) == [(WIDE | OTHERS | VECTORS, {})]
    assert groups_of(named("Muon", weight_decay=0.2)) == [
        (WIDE, {"weight_decay": 0.2, "muon": True}),
        (OTHERS, {"weight_decay": 0.2, "muon": False}),
        (VECTORS, {"weight_decay": 0.0, "muon": False}),
    ]
    # FSDP1 flattens matrices; their names were taken before.
    assert groups_of({}, matrices={"norm.weight"})[1][0] == VECTORS - {"norm.weight"}
    assert matrix_names(nn.ModuleDict({"_orig_mod": nn.Linear(2, 2)})) == {"weight"}


@pytest.mark.parametrize(
    ("given", "device", "scales", "fused"),
    [
        ({}, "cpu", False, True),
        ({}, "cpu", True, False),
        ({}, "mps", False, False),
        ({"fused": None}, "cpu", False, True),
        ({"fused": False}, "cpu", False, False),
        ({"fused": True}, "cpu", False, True),
        ({"foreach": True}, "cpu", False, None),
        (named("SGD"), "cpu", False, None),
    ],
)
def test_fused(given, device, scales, fused):
    values = optimizer_values(given)
    groups = parameter_groups(Small(), values, ())
    made = build_optimizer(values, groups, device=torch.device(device), scales_gradients=scales)
    assert [group["fused"] for group in made.param_groups] == [fused] * 2


@pytest.mark.parametrize("given", [{"fused": True}, named("SGD", fused=True)])
def test_a_fused_optimizer_under_a_gradient_scaler(given):
    values = optimizer_values(given)
    with pytest.raises(InputError, match=r"model\.optimizer\.fused: a fused optimizer unscales"):
        build_optimizer(
            values, parameter_groups(Small(), values, ()), device=torch.device("cpu"), scales_gradients=True
        )


def test_eight_bits():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    values = optimizer_values(named("AdamW8bit", betas=[0.8, 0.9]))
    options = {"device": torch.device("cpu"), "scales_gradients": False}
    made = build_optimizer(values, parameter_groups(Small(), values, ()), **options)
    assert type(made) is bitsandbytes.optim.AdamW8bit
    kept = [(group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"]) for group in made.param_groups]
    assert kept == [(0.1, (0.8, 0.9), 1e-8, 0.01), (0.1, (0.8, 0.9), 1e-8, 0.0)]
    assert tuple(AdamW8bit([nn.Parameter(torch.zeros(2))], lr=0.5).param_groups[0]["betas"]) == (0.9, 0.95)
    with pytest.raises(InputError, match=r"model\.optimizer: bitsandbytes has no AdamW8bit for meta: use AdamW"):
        AdamW8bit([nn.Parameter(torch.zeros(2, device="meta"))], lr=0.1)


def test_eight_bits_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    values = optimizer_values(named("AdamW8bit"))  # a checkpoint of such a run can be looked at
    with pytest.raises(InputError, match=r"model\.optimizer: AdamW8bit needs the bitsandbytes extra"):
        build_optimizer(
            values, parameter_groups(Small(), values, ()), device=torch.device("cpu"), scales_gradients=False
        )


# -- Muon ----------------------------------------------------------------------------------------------------------

MUON = named("Muon", weight_decay=0.1, momentum=0.9, nesterov=False, ns_steps=4, betas=[0.8, 0.99], eps=1e-6)


def ours(module, given=MUON):
    values = optimizer_values(given)
    groups = parameter_groups(module, values, (), [module.head])
    return build_optimizer(values, groups, device=torch.device("cpu"), scales_gradients=False)


def taken(module, optimizers, schedules, first, last):
    """Steps with drawn gradients and a schedule; the parameters after each."""
    seen = []
    for step in range(first, last):
        draws = torch.Generator().manual_seed(step)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=draws)
        for each in (*optimizers, *schedules):
            each.step()
        seen.append([p.detach().clone() for p in module.parameters()])
    return seen


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True)
    )


def drawn():
    torch.manual_seed(0)
    return Small()


def scheduled(*optimizers):
    return [CosineAnnealingLR(each, T_max=7) for each in optimizers]


def whole_run():
    module = drawn()
    optimizer = ours(module)
    return taken(module, [optimizer], scheduled(optimizer), 0, 6)


def test_muon_is_torchs_muon_and_adamw():
    module = drawn()
    by_name = dict(module.named_parameters())
    both = {"lr": 0.1, "weight_decay": 0.1}
    own = {"momentum": 0.9, "nesterov": False, "ns_steps": 4, "adjust_lr_fn": "match_rms_adamw"}
    groups = [{"params": [by_name[name] for name in sorted(OTHERS)]}]
    groups.append({"params": [by_name[name] for name in sorted(VECTORS)], "weight_decay": 0.0})
    apart = [
        torch.optim.Muon([by_name[name] for name in sorted(WIDE)], **both, **own),
        AdamW(groups, **both, betas=(0.8, 0.99), eps=1e-6),
    ]
    expected = taken(module, apart, scheduled(*apart), 0, 6)
    assert same(whole_run(), expected)
    assert not torch.equal(expected[0][0], expected[5][0])


def test_muon_goes_on_to_the_bit():
    expected = whole_run()
    module = drawn()
    optimizer = ours(module)
    schedule = scheduled(optimizer)[0]
    taken(module, [optimizer], [schedule], 0, 3)
    states = pickle.loads(pickle.dumps([x.state_dict() for x in (module, optimizer, schedule)]))
    again = drawn()
    restored = ours(again)
    its_schedule = scheduled(restored)[0]
    for each, state in zip((again, restored, its_schedule), states, strict=True):
        each.load_state_dict(state)
    assert same(taken(again, [restored], [its_schedule], 3, 6), expected[3:])
    # Lightning moves states by assigning new dicts to the optimizer's own.
    for parameter, state in restored.state.items():
        restored.state[parameter] = {name: value.clone() for name, value in state.items()}
    its_schedule.step()
    assert taken(again, [restored], [], 7, 8)[0] is not None
    assert all(part.state is restored.state for part in restored._parts)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_muon_copied(copied):
    expected = whole_run()
    module = drawn()
    optimizer = ours(module)
    schedule = scheduled(optimizer)[0]
    taken(module, [optimizer], [schedule], 0, 3)
    state = schedule.state_dict()
    module, optimizer = copied((module, optimizer))
    schedule = scheduled(optimizer)[0]
    schedule.load_state_dict(state)
    for group in optimizer.param_groups:
        group["lr"] = schedule.get_last_lr()[0]
    assert same(taken(module, [optimizer], [schedule], 3, 6), expected[3:])


def newton_schulz(matrix, iterations):
    """Orthogonalisation by the polynomial of Jordan et al. (2024), in float64."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def test_an_update_of_muon_is_as_large_as_the_rate_says():
    module = drawn()
    before = module.hidden.weight.detach().clone()
    optimizer = ours(module, named("Muon", weight_decay=0.0))
    taken(module, [optimizer], [], 0, 1)
    expected = 0.1 * 0.2 * math.sqrt(6) * newton_schulz(module.hidden.weight.grad, 5)
    moved = (before - module.hidden.weight.detach()).double()
    assert (moved - expected).norm() / expected.norm() < 0.02  # bfloat16
    assert moved.square().mean().sqrt() == pytest.approx(0.1 * 0.2, rel=0.3)


def test_groups_of_muon_say_whose_they_are():
    optimizer = ours(drawn())
    assert describe(optimizer) == ("Muon: 2 hidden matrices (36 values) by Muon, 9 other tensors (92 values) by AdamW")
    assert describe(AdamW([nn.Parameter(torch.zeros(1))])) is None
    with pytest.raises(ValueError, match="each group of Muon has to say in muon: True or False"):
        Muon([nn.Parameter(torch.zeros(2, 2))], lr=0.1)
    added = nn.Parameter(torch.ones(2, 2))
    optimizer = pickle.loads(pickle.dumps(optimizer))
    optimizer.add_param_group({"params": [added], "muon": True})
    added.grad = torch.randn(2, 2)
    optimizer.step()
    assert optimizer.param_groups[-1]["momentum"] == 0.9
    assert not torch.equal(added, torch.ones(2, 2))
    assert optimizer.step(lambda: 3) == 3
    values = optimizer_values(MUON)
    with pytest.raises(InputError, match=r"model\.optimizer: each group of Muon has to say"):
        build_optimizer(values, [{"params": [added]}], device=torch.device("cpu"), scales_gradients=False)


# -- shards --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    path = tmp_path_factory.mktemp("two") / "out.pt"
    run_processes("two_optimizers.py", str(path), timeout=100)
    return torch.load(path)


@pytest.mark.parametrize("name", CASES)
def test_shards_are_stepped_as_the_whole_is(name, sharded):
    one, two = steps(model(), optimizer_values(CASES[name])), sharded[name]
    if "Adafactor" in name:  # which check_sharding refuses
        assert str(two).startswith("RuntimeError")
        return
    before = {name: p.detach() for name, p in model().named_parameters()}
    for whole, parts, last, last_parts in zip(one, two, [before, *one], [before, *two], strict=False):
        for key in before:
            if name == "Muon" and key in ("1.weight", "2.weight", "3.weight"):  # whose products are in bfloat16
                moved, moved_parts = whole[key] - last[key], parts[key] - last_parts[key]
                assert (moved_parts - moved).norm() < 0.05 * moved.norm()
            else:
                assert torch.equal(whole[key], parts[key])
                assert not torch.equal(whole[key], last[key])
