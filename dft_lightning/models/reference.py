"""What a model is compared with: where the run began, another model, or itself as it was some steps before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dft_lightning.distributed.shard_loading import allocate_shards, read_shards
from dft_lightning.distributed.sharding import ShardingOptions, is_sharded, shard
from dft_lightning.errors import InputError
from dft_lightning.foreign.peft import adapter_off
from dft_lightning.losses import TokenLoss
from dft_lightning.losses.statistics import reference_need
from dft_lightning.models.documents import ModelChecks, knowing_documents, model_inputs
from dft_lightning.models.fingerprints import base_fingerprint, first_difference
from dft_lightning.models.head import ends_of, run_without_head
from dft_lightning.models.lora.adapter import base_name, trained_names
from dft_lightning.models.row_checks import evaluating
from dft_lightning.ops import ReferenceHead

T = TypeVar("T")

_REFERENCE, _EARLIER = "dft_lightning_reference", "dft_lightning_earlier"
"""Keys in a checkpoint."""


def needs_reference_model(loss: TokenLoss) -> bool:
    """Whether a loss compares the model's distribution with another model's."""
    return reference_need(loss.needs) is not None


class ReferenceModel:
    """Runs the reference on batches, without gradients and without dropout.

    It is no ``nn.Module``, so that the module that holds it neither trains nor saves it.

    Args:
        model: a frozen model; ``None`` for the trained one with its adapter off.
        files: of its weights, where it was made without.
    """

    def __init__(self, model: nn.Module | None, files: Sequence[Path] = ()) -> None:
        self._model = None if model is None else model.eval().requires_grad_(False)
        self._root = None if model is None else _Root(model)
        self._files = list(files)
        self._checks = ModelChecks()

    def shard(self, mesh: DeviceMesh, options: ShardingOptions, precision: str, device: torch.device) -> None:
        """Cut a model of its own into shards, as the trained one is; nothing is there to do for the base of an adapter.

        Blocks are gathered one at a time. Embedding, head and last norm stay whole from the first batch on.

        Args:
            mesh: see :func:`.shard`.
            options: of the trained model.
            precision: the trainer's.
            device: of the shards.
        """
        if self._root is None or self._model is None:
            return
        shard(self._root, self._model, mesh, options, precision, (), ())
        if self._files:
            allocate_shards(self._root, torch.device("cpu") if options.cpu_offload else device)
            read_shards(self._model, self._files)

    def remember(self, checkpoint: dict[str, Any]) -> None:
        """Write into a checkpoint what tells the reference from others. Of an adapter's base that is there already."""
        if self._model is not None:
            checkpoint[_REFERENCE] = base_fingerprint(self._model)

    def check_remembered(self, checkpoint: dict[str, Any]) -> None:
        """Whether the run that goes on compares with the model that it began with.

        Raises:
            InputError: it is another one.
        """
        if self._model is None or _REFERENCE not in checkpoint:
            return
        saved, own = checkpoint[_REFERENCE], base_fingerprint(self._model)
        if name := first_difference(saved, own) or min(own.keys() - saved.keys(), default=None):
            raise InputError(
                f"--ckpt_path: the checkpoint's run compares with another reference: {name} differs in "
                "model.reference_model (or in model.model, where that is not set): give the one that it began with"
            )

    def check_trained(self, trained: nn.Module) -> None:
        """Whether training leaves the reference as it is.

        Raises:
            InputError: it is the base below an adapter, and something of the base is trained beside it.
        """
        if self._model is not None:
            return
        # A copy that modules_to_save trains leaves its original behind.
        moved = [
            name
            for name in sorted(trained_names(trained))
            if base_name(name) is not None and "modules_to_save" not in name.split(".")
        ]
        if moved:
            raise InputError(
                f"model: {moved[0]} is trained beside the adapter, and the loss compares with the base that it is part "
                "of: freeze it, or name another model as model.reference_model"
            )

    def head(self, trained: nn.Module, batch: dict[str, Any]) -> ReferenceHead:
        """Last hidden states ``[B * T, H]`` and head of the reference for a batch.

        Raises:
            InputError: the reference's head or attention is none that the fused head or packed rows can take.
        """

        def run(model: nn.Module, inputs: dict[str, Any]) -> ReferenceHead:
            head = self._checks.head_of(model)
            hidden, _ = run_without_head(model, head, **inputs)
            options = head.options
            weight = options.pop("weight").detach()
            return ReferenceHead(hidden.detach().reshape(-1, hidden.shape[-1]), weight, **options)

        return self._run(trained, batch, run)

    def logits(self, trained: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Logits ``[B, T, V]`` of the reference for a batch."""

        def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
            return cast(Tensor, model(**inputs).logits.detach())

        return self._run(trained, batch, run)

    def _run(self, trained: nn.Module, batch: dict[str, Any], run: Callable[[nn.Module, dict[str, Any]], T]) -> T:
        def on_batch(model: nn.Module) -> T:
            with evaluating(model), knowing_documents(batch):
                return run(model, model_inputs(model, self._checks.before_batch(model, batch)))

        if self._root is None:
            with self._in_place_of(trained):
                return on_batch(trained)
        self._place_beside(trained)
        return cast(T, self._root(on_batch))

    def _in_place_of(self, trained: nn.Module) -> AbstractContextManager[object]:
        """What makes the trained model the reference, where there is no model of its own."""
        return adapter_off(trained)

    def _place_beside(self, trained: nn.Module) -> None:
        """On the trained model's device, in its dtype: strategies move and cast what they know of."""
        assert self._root is not None
        if is_sharded(self._root):
            like, own = _a_shard(trained).dtype, _a_shard(self._root).dtype
            if own != like:
                self._root._apply(lambda tensor: tensor.to(like) if isinstance(tensor, DTensor) else tensor)  # type: ignore[no-untyped-call]
            return
        first, own_first = next(trained.parameters()), next(self._root.parameters())
        if own_first.device == first.device and own_first.dtype == first.dtype:
            return
        for tensor in (*self._root.parameters(), *self._root.buffers()):
            # Rotary frequencies and the like stay in float32.
            is_cast = tensor.is_floating_point() and isinstance(tensor, nn.Parameter)
            tensor.data = tensor.data.to(first.device, first.dtype if is_cast else tensor.dtype)


class EarlierModel:
    """What is trained of a model, as it was at the last optimizer step that is a multiple of a number.

    Args:
        every: the number.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._step: int | None = None
        self._values: dict[str, Tensor] = {}
        self._loaded = False

    @classmethod
    def of(cls, loss: TokenLoss) -> EarlierModel | None:
        """For a loss that reads such a model's log-probs; ``None`` for others."""
        return None if loss.refresh_every is None else cls(loss.refresh_every)

    def begin(self, model: nn.Module) -> None:
        """Before a run's first step: what an earlier run has left is forgotten, what a checkpoint has is kept."""
        loaded, self._loaded = self._loaded, False
        if loaded and self._values and self._values.keys() != _trained(model).keys():
            rank_zero_warn(
                "--ckpt_path: the checkpoint's run trained other parameters: until its next multiple of refresh_every "
                "the model is compared with its own weights"
            )
            loaded = False
        if not loaded:
            self._step, self._values = None, {}

    def refresh(self, model: nn.Module, step: int) -> None:
        """In training, before a batch: copy what is trained, where the step is the first since a multiple.

        Args:
            model: the trained one.
            step: optimizer steps behind its weights.
        """
        trained = _trained(model)
        if self._step != step - step % self._every:
            self._step, self._values = step - step % self._every, {}
        for name, parameter in trained.items():
            if name not in self._values:  # since then frozen, if not new
                self._values[name] = parameter.detach().clone()

    def in_place_of(self, model: nn.Module) -> AbstractContextManager[None]:
        """The model as it was, without gradients and without dropout; as it is, where nothing was trained yet."""
        return _holding(model, self._values)

    def save(self, checkpoint: dict[str, Any], step: int) -> None:
        """Add it to a checkpoint of weights after ``step`` steps, unless these are the same."""
        if step % self._every and self._step == step - step % self._every:
            checkpoint[_EARLIER] = {"step": self._step, "values": self._values}

    def load(self, checkpoint: dict[str, Any], step: int) -> None:
        """Go on from a checkpoint of weights after ``step`` steps."""
        saved = checkpoint.get(_EARLIER) or {}
        self._step, self._values, self._loaded = saved.get("step"), saved.get("values") or {}, True
        if step % self._every and self._step != step - step % self._every:
            self._step, self._values = None, {}
            rank_zero_warn(
                f"--ckpt_path: the checkpoint, of step {step}, has no model of step {step - step % self._every} to "
                "compare with, as it is of another loss or another refresh_every: until the next one it is compared "
                "with its own weights"
            )


class StartingModel(ReferenceModel):
    """The trained model as it was when this was made, for what is measured along a run: a copy of what is trained.

    Args:
        model: one that is not sharded.
        values: of an earlier one that goes on.

    Attributes:
        values: of what is trained, by name, as they were.
    """

    def __init__(self, model: nn.Module, values: dict[str, Tensor] | None = None) -> None:
        super().__init__(None)
        trained = _trained(model)
        if values is None:
            self.values = {name: parameter.detach().clone() for name, parameter in trained.items()}
        else:
            self.values = {name: value.to(trained[name].device) for name, value in values.items()}

    def _in_place_of(self, trained: nn.Module) -> AbstractContextManager[object]:
        return _holding(trained, self.values)


@contextmanager
def _holding(model: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """A model with other values of some parameters meanwhile, without dropout."""
    known = dict(model.named_parameters())
    others = {name: value.to(known[name].device, known[name].dtype) for name, value in values.items() if name in known}
    own = {name: known[name].data for name in others}
    device = next(model.parameters()).device.type
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    try:
        for name, value in others.items():
            known[name].data = value
        # Casts of these weights are not to be kept for those that come back.
        with evaluating(model), torch.autocast(device, dtype, enabled, cache_enabled=False):
            yield
    finally:
        for name, value in own.items():
            known[name].data = value


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def _a_shard(sharded: nn.Module) -> Tensor:
    """Of a block: what else there is may be gathered, in the dtype of products."""
    return next(parameter for parameter in sharded.parameters() if isinstance(parameter, DTensor))


class _Root(nn.Module):
    """What is gathered around all that is done with a sharded model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.model)


def reference_of(
    model: nn.Module,
    reference_model: str | None,
    peft: dict[str, Any] | None,
    loss: TokenLoss,
    starts_from_checkpoint: bool,
    load: Callable[[str], tuple[nn.Module, list[Path]]],
    files: list[Path],
) -> ReferenceModel:
    """The reference that a run's loss needs.

    Args:
        model: the model as it starts.
        reference_model: name of another model, or ``None``.
        peft: options of an adapter that will be trained, or ``None``.
        loss: what needs it.
        starts_from_checkpoint: whether the start can be made again at any time, when a run is resumed. What a
            ``build_model`` of one's own makes of a checkpoint has to be the same each time.
        load: makes a model of ``reference_model``, and says what files have its weights, if it was made without.
        files: of the model's weights, likewise.

    Raises:
        InputError: there is none to be had, or one of another vocabulary.
    """
    name = type(loss).__name__
    if reference_model is not None:
        reference, of_it = load(reference_model)
        _check_vocabulary(model, reference)
        return _second(reference, of_it)
    if peft is not None:
        if peft.get("bias", "none") != "none":
            raise InputError(
                f"{name} compares with the base below the adapter, and model.peft.bias changes it: set bias: none, or "
                "model.reference_model"
            )
        return ReferenceModel(None)
    if not starts_from_checkpoint:
        raise InputError(
            f"{name} compares with the model that the run starts from, which has to be the same when the run is "
            "resumed: start from a checkpoint (model.model), or name one as model.reference_model"
        )
    return _second(copy.deepcopy(model), files)


def _second(model: nn.Module, files: list[Path]) -> ReferenceModel:
    size = sum(parameter.numel() for parameter in model.parameters())
    rank_zero_info(f"reference model: {size:,} parameters, frozen")
    return ReferenceModel(model, files)


def _check_vocabulary(model: nn.Module, reference: nn.Module) -> None:
    own, other = (ends_of(each)[0] for each in (model, reference))
    if own is None or other is None:
        return  # logits of two sizes are refused when they meet
    own, other = own.weight.shape[0], other.weight.shape[0]
    if own != other:
        raise InputError(
            f"model.reference_model: its vocabulary has {other} tokens and the model's {own}: a divergence needs the "
            "same; take a model of the same family"
        )
