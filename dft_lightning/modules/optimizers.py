"""Any optimizer of torch's kind by class path: its options, its parameter groups, and two of this package's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import AdamW, Optimizer

from dft_lightning.errors import InputError, check_one_of, one_line
from dft_lightning.foreign.torch import name_without_wrappers
from dft_lightning.models.quantization import import_bitsandbytes
from dft_lightning.modules.factories import Values, class_of, factory_values, options_of, parameters_of, tried

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
DEFAULT_OPTIMIZER = partial(AdamW, lr=5e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)


# -- options -------------------------------------------------------------------------------------------------------


def optimizer_values(given: Any) -> Values:
    """An optimizer's class path and options in plain form, checked.

    Args:
        given: an optimizer class, a ``functools.partial`` of one, a dict with ``class_path`` (dotted, or the name of a
            class of this module or of ``torch.optim``) and ``init_args``, or a dict of options of AdamW. A dict for
            AdamW keeps the options of :data:`DEFAULT_OPTIMIZER` that it does not give; a class or partial, torch's.

    Raises:
        ValueError: there is no such class or option, ``lr`` is not given, an option is out of range, or the class does
            not fit the training step.

    Example:
        >>> optimizer_values({"class_path": "SGD", "init_args": {"lr": 0.1}})
        {'class_path': 'torch.optim.SGD', 'init_args': {'lr': 0.1}}
    """
    values = factory_values(given, Optimizer, "optimizer", DEFAULT_OPTIMIZER, NAMES, _check_class)
    cls = class_of(values)
    _check_numbers(values["init_args"], parameters_of(cls))
    # A checkpoint of AdamW8bit is looked at without bitsandbytes, too; the options are those of AdamW.
    trial = {**values, "class_path": "torch.optim.AdamW"} if cls is AdamW8bit else values
    tried(trial, "optimizer", [{"params": [nn.Parameter(torch.zeros(1, 1))], "muon": True}])
    return values


def _check_class(cls: type[Optimizer]) -> None:
    name = cls.__name__
    closure = list(inspect.signature(cls.step).parameters.values())[1:2]
    if closure and closure[0].default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer: {name} reruns its closure in a step, and a step's gradient is gathered over micro-batches "
            "and ranks but once: use another"
        )
    if issubclass(cls, torch.optim.SparseAdam):
        raise ValueError(f"optimizer: {name} takes sparse gradients alone, and these are dense: use AdamW")
    if issubclass(cls, torch.optim.Muon):
        raise ValueError(
            f"optimizer: {cls.__module__}.{name} takes matrices alone: use Muon ({__name__}.Muon), which gives the "
            "rest to AdamW"
        )
    if "lr" not in parameters_of(cls):
        raise ValueError(f"optimizer: {name} has no option lr, which the schedule changes")


def _check_numbers(options: dict[str, Any], defaults: dict[str, inspect.Parameter]) -> None:
    """What constructors take or do not name: some look at neither infinite numbers nor how many betas there are."""
    if "lr" not in options:
        raise ValueError("optimizer.lr: required, but not given")
    for name in ("lr", "eps", "weight_decay"):
        value = options.get(name, 0)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (0 <= value < math.inf if is_number else name == "eps"):  # which is a pair of Adafactor
            raise ValueError(f"optimizer.{name} must be a number, neither negative nor infinite, got {value!r}")
    betas, default = options.get("betas"), getattr(defaults.get("betas"), "default", None)
    if isinstance(betas, list) and isinstance(default, tuple) and len(betas) != len(default):
        raise ValueError(f"optimizer.betas must be {len(default)} numbers, got {betas}")


def check_sharding(values: Values, trainer: pl.Trainer | None) -> None:
    """Raise ``InputError`` where an optimizer would be wrong on the parts of parameters that a strategy gives it."""
    strategy = None if trainer is None else trainer.strategy
    cls = class_of(values)
    name = cls.__name__
    if not isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)):
        return
    if cls is AdamW8bit or any(each.__module__.startswith("bitsandbytes.") for each in cls.__mro__):
        raise InputError(f"model.optimizer: {name} does not train shards: use AdamW, or DDP")
    bases = {each.__name__ for each in cls.__mro__}
    if "Adafactor" in bases:  # its factors of a sharded matrix are sums that torch does not keep in place
        raise InputError(f"model.optimizer: {name} does not train shards: use AdamW or Muon, or DDP")
    if not isinstance(strategy, FSDPStrategy):
        return
    if "Muon" in bases:
        raise InputError(
            f"model.optimizer: {name} goes by the shapes of matrices, and FSDPStrategy (FSDP1) flattens them: use "
            "ModelParallelStrategy (FSDP2) or DDP, or AdamW"
        )
    if not values["class_path"].startswith("torch.optim."):
        rank_zero_warn(
            f"model.optimizer: FSDPStrategy (FSDP1) gives {values['class_path']} flat parts of matrices: it is right "
            "only if it treats each value by itself"
        )


# -- parameter groups ----------------------------------------------------------------------------------------------


def matrix_names(module: nn.Module) -> frozenset[str]:
    """Names of the parameters of two dimensions or more, whatever wraps the module's parts."""
    return frozenset(name_without_wrappers(name) for name, p in module.named_parameters() if p.ndim >= 2)


def parameter_groups(
    module: nn.Module, values: Values, matrices: Collection[str], ends: Iterable[nn.Module | None] = ()
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters: matrices with the optimizer's weight decay; norms and biases without.

    An optimizer without an option ``weight_decay`` gets one group. For :class:`Muon` each group says in ``muon``
    whether it is of hidden matrices: parameters of two dimensions, both more than 1, outside of ``ends`` and of every
    ``nn.Embedding``.

    Args:
        module: has the parameters.
        values: of :func:`optimizer_values`.
        matrices: names of those that FSDP1 may have flattened since; others show that they are.
        ends: the model's input embedding and output layer.
    """
    cls = class_of(values)
    decay = parameters_of(cls).get("weight_decay")
    tables = [*ends, *(each for each in module.modules() if isinstance(each, nn.Embedding))]
    of_tables = {id(parameter) for table in tables if table is not None for parameter in table.parameters()}
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for key in ((True, True), (True, False), (False, False)):
        group: dict[str, Any] = groups.setdefault(key if cls is Muon else (key[0] or decay is None, False), {})
        group["params"] = []
        if decay is not None:
            group["weight_decay"] = values["init_args"].get("weight_decay", decay.default) if key[0] else 0.0
        if cls is Muon:
            group["muon"] = key[1]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 or name_without_wrappers(name) in matrices
            wide = parameter.ndim == 2 and min(parameter.shape) > 1
            hidden = cls is Muon and wide and id(parameter) not in of_tables
            groups[is_matrix or decay is None, hidden]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


# -- building ------------------------------------------------------------------------------------------------------


def build_optimizer(
    values: Values, groups: list[dict[str, Any]], *, device: torch.device, scales_gradients: bool
) -> Optimizer:
    """The optimizer of values of :func:`optimizer_values`, for parameter groups on a device.

    AdamW is fused on devices that have it so, unless ``fused``, ``foreach`` or ``differentiable`` is given.

    Raises:
        InputError: the class refuses the options or groups, or would unscale the gradients that a scaler scales.
    """
    cls, options = class_of(values), options_of(values)
    # Under 16-mixed a fused optimizer unscales inside step(), out of reach of the rescale's log and of clipping.
    if scales_gradients and options.get("fused"):
        raise InputError(
            "model.optimizer.fused: a fused optimizer unscales fp16's gradients inside its step, after they were to be "
            "clipped: leave it out, or use bf16-mixed"
        )
    said = options.get("fused") is not None or options.get("foreach") or options.get("differentiable")
    if cls is AdamW and not said:
        options["fused"] = not scales_gradients and device.type in ("cpu", "cuda", "xpu")
    try:
        return cast(Optimizer, cls(groups, **options))
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"model.optimizer: {one_line(error)}") from error


def describe(optimizer: Optimizer) -> str | None:
    """One line that says which of the parameters :class:`Muon` gives to AdamW; ``None`` for other optimizers."""
    if not isinstance(optimizer, Muon):
        return None
    parts = []
    for muon, noun, name in ((True, "hidden matrices", "Muon"), (False, "other tensors", "AdamW")):
        own = [p for group in optimizer.param_groups if group["muon"] is muon for p in group["params"]]
        parts.append(f"{len(own):,} {noun} ({sum(p.numel() for p in own):,} values) by {name}")
    return f"Muon: {', '.join(parts)}"


# -- this package's own --------------------------------------------------------------------------------------------


class Muon(Optimizer):
    """``torch.optim.Muon`` for hidden matrices and AdamW for all else, as one optimizer.

    Muon orthogonalises the momentum of a matrix, which has no meaning for a vector and does not suit a table of rows.
    So it takes parameters of exactly two dimensions, both more than 1; embeddings (the model's input embedding and
    every ``nn.Embedding``), the output layer, vectors and tensors of more dimensions (experts kept in one tensor) go
    to AdamW. The run says how many there are of either kind. Under FSDP2 Muon's products, in bfloat16, are summed in
    another order, and nothing else changes.

    Both follow one ``lr``, schedule and ``weight_decay``: with the default ``adjust_lr_fn`` an update of Muon's is as
    large as AdamW's are.

    Args:
        params: groups that say in ``muon`` whether they are of hidden matrices, as :func:`parameter_groups` makes them.
        lr: peak learning rate, of both.
        weight_decay: decoupled, of both, on matrices only.
        momentum: of Muon, in ``[0, 1)``.
        nesterov: of Muon.
        ns_steps: Newton-Schulz iterations of Muon, from 1 to 99.
        adjust_lr_fn: what Muon multiplies ``lr`` by for a matrix ``[A, B]``: ``"match_rms_adamw"`` by
            ``0.2 * sqrt(max(A, B))``, ``"original"`` by ``sqrt(max(1, A / B))``.
        betas: of AdamW.
        eps: of AdamW.

    Raises:
        ValueError: an option is out of range, or a group does not say whose it is.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> groups = [{"params": [layer.weight], "muon": True}, {"params": [layer.bias], "muon": False}]
        >>> describe(Muon(groups, lr=1e-3))
        'Muon: 1 hidden matrices (6 values) by Muon, 1 other tensors (3 values) by AdamW'
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        for name, share in (("momentum", momentum), *(("betas", beta) for beta in betas)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {share}")
        if not isinstance(ns_steps, int) or not 1 <= ns_steps < 100:
            raise ValueError(f"ns_steps must be a whole number from 1 to 99, got {ns_steps}")
        check_one_of("adjust_lr_fn", adjust_lr_fn, ("match_rms_adamw", "original"))
        both = {"lr": lr, "weight_decay": weight_decay}
        own = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        self._options: dict[bool, dict[str, Any]] = {
            True: {**both, **own},
            False: {**both, "betas": tuple(betas), "eps": eps},
        }
        super().__init__(params, {})
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not isinstance(param_group.get("muon"), bool):
            raise ValueError("each group of Muon has to say in muon: True or False whether it is of hidden matrices")
        super().add_param_group({**self._options[param_group["muon"]], **param_group})
        if hasattr(self, "_parts"):
            self._share()

    def _share(self) -> None:
        """Make the two optimizers anew, which work on this one's very groups and states."""
        self._parts: list[Optimizer] = []
        kinds: dict[bool, Callable[[Any], Optimizer]] = {True: torch.optim.Muon, False: AdamW}
        for muon, kind in kinds.items():
            if groups := [group for group in self.param_groups if group["muon"] is muon]:
                part = kind(groups)
                part.state = self.state
                self._parts.append(part)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()  # a copy's or a checkpoint's groups and states are other objects

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both. Returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


class AdamW8bit(Optimizer):
    """bitsandbytes' AdamW, whose states take a byte each; tensors of less than 4096 elements keep theirs in float32.

    What is made is an object of bitsandbytes' class.

    Args:
        params: parameter groups.
        lr: peak learning rate.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of AdamW, on matrices only.

    Raises:
        InputError: bitsandbytes is missing or not for the parameters' device.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        bitsandbytes, groups = import_bitsandbytes("model.optimizer: AdamW8bit"), list(params)
        device = next(p.device for group in groups for p in (group["params"] if isinstance(group, dict) else [group]))
        if device.type not in ("cpu", "cuda", "xpu"):
            raise InputError(f"model.optimizer: bitsandbytes has no AdamW8bit for {device.type}: use AdamW")
        # Not its subclass, so that the options are known where bitsandbytes is missing.
        self.__class__ = bitsandbytes.optim.AdamW8bit
        bitsandbytes.optim.AdamW8bit.__init__(self, groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


NAMES = {**vars(torch.optim), "Muon": Muon, "AdamW8bit": AdamW8bit}
