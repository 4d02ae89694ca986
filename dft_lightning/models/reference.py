"""The model that a divergence is taken from: a frozen copy of where the run began, or the base below an adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from dft_lightning.errors import InputError
from dft_lightning.foreign.peft import adapter_off
from dft_lightning.losses import TokenLoss
from dft_lightning.losses.statistics import normalise_needs
from dft_lightning.models.documents import ModelChecks, knowing_documents, model_inputs
from dft_lightning.models.fingerprints import base_fingerprint, first_difference
from dft_lightning.models.head import ends_of, run_without_head
from dft_lightning.models.lora.adapter import base_name, trained_names
from dft_lightning.models.row_checks import evaluating
from dft_lightning.ops import ReferenceHead

_REFERENCE = "dft_lightning_reference"
"""Key in a checkpoint."""


def needs_reference_model(loss: TokenLoss) -> bool:
    """Whether a loss compares the model's distribution with another model's."""
    return any(need.name == "reference_kl" for need in normalise_needs(loss.needs))


class ReferenceModel:
    """Runs the reference on batches, without gradients and without dropout.

    It is no ``nn.Module``, so that the module that holds it neither trains nor saves it.

    Args:
        model: a frozen model; ``None`` for the trained one with its adapter off.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = None if model is None else model.eval().requires_grad_(False)
        self._checks = ModelChecks()

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
        with self._running(trained, batch) as (model, inputs):
            head = self._checks.head_of(model)
            hidden, _ = run_without_head(model, head, **inputs)
            options = head.options
            weight = options.pop("weight").detach()
        return ReferenceHead(hidden.detach().reshape(-1, hidden.shape[-1]), weight, **options)

    def logits(self, trained: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Logits ``[B, T, V]`` of the reference for a batch."""
        with self._running(trained, batch) as (model, inputs):
            logits: Tensor = model(**inputs).logits
        return logits.detach()

    @contextmanager
    def _running(self, trained: nn.Module, batch: dict[str, Any]) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
        model = trained if self._model is None else self._placed(trained)
        off = adapter_off(trained) if self._model is None else nullcontext()
        with off, evaluating(model), knowing_documents(batch):
            yield model, model_inputs(model, self._checks.before_batch(model, batch))

    def _placed(self, trained: nn.Module) -> nn.Module:
        """Beside the trained model, in its dtype: strategies move and cast what they know of."""
        assert self._model is not None
        like = next(trained.parameters())
        own = next(self._model.parameters())
        if own.device != like.device or own.dtype != like.dtype:
            for tensor in (*self._model.parameters(), *self._model.buffers()):
                # Rotary frequencies and the like stay in float32.
                cast = tensor.is_floating_point() and isinstance(tensor, nn.Parameter)
                tensor.data = tensor.data.to(like.device, like.dtype if cast else tensor.dtype)
        return self._model


def reference_of(
    model: nn.Module,
    reference_model: str | None,
    peft: dict[str, Any] | None,
    loss: TokenLoss,
    starts_from_checkpoint: bool,
    load: Callable[[str], nn.Module],
) -> ReferenceModel:
    """The reference that a run's loss needs.

    Args:
        model: the model as it starts.
        reference_model: name of another model, or ``None``.
        peft: options of an adapter that will be trained, or ``None``.
        loss: what needs it.
        starts_from_checkpoint: whether the start can be made again at any time, when a run is resumed. What a
            ``build_model`` of one's own makes of a checkpoint has to be the same each time.
        load: makes a model of ``reference_model``.

    Raises:
        InputError: there is none to be had, or one of another vocabulary.
    """
    name = type(loss).__name__
    if reference_model is not None:
        reference = load(reference_model)
        _check_vocabulary(model, reference)
        return _second(reference)
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
    return _second(copy.deepcopy(model))


def _second(model: nn.Module) -> ReferenceModel:
    size = sum(parameter.numel() for parameter in model.parameters())
    rank_zero_info(f"reference model: {size:,} parameters, frozen, on each rank")
    return ReferenceModel(model)


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
