"""The model that a divergence is taken from: a frozen copy of where the run began, or the base below an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dft_lightning.errors import InputError
from dft_lightning.losses import TokenLoss
from dft_lightning.losses.statistics import normalise_needs
from dft_lightning.modules.adapter import adapter_off
from dft_lightning.modules.documents import check_documents, model_inputs
from dft_lightning.modules.head import check_head, find_head, run_without_head
from dft_lightning.ops import ReferenceHead


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
        self._head_checked = self._documents_checked = False

    def head(self, trained: nn.Module, batch: dict[str, Any]) -> ReferenceHead:
        """Last hidden states ``[B * T, H]`` and head of the reference for a batch.

        Raises:
            InputError: the reference's head or attention is none that the fused head or packed rows can take.
        """
        with self._running(trained, batch) as model:
            head = find_head(model)
            if not self._head_checked:
                check_head(model, head)
                self._head_checked = True
            hidden, _ = run_without_head(model, head, **model_inputs(model, batch))
            options = head.options
            weight = options.pop("weight").detach()
        return ReferenceHead(hidden.detach().reshape(-1, hidden.shape[-1]), weight, **options)

    def logits(self, trained: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Logits ``[B, T, V]`` of the reference for a batch."""
        with self._running(trained, batch) as model:
            logits: Tensor = model(**model_inputs(model, batch)).logits
        return logits.detach()

    @contextmanager
    def _running(self, trained: nn.Module, batch: dict[str, Any]) -> Iterator[nn.Module]:
        model = trained if self._model is None else self._placed(trained)
        off = adapter_off(trained) if self._model is None else nullcontext()
        with torch.no_grad(), off, _evaluating(model):
            if "position_ids" in batch and not self._documents_checked:
                check_documents(model, len(batch["position_ids"]))
                self._documents_checked = True
            yield model

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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout meanwhile, and every module's mode as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def reference_of(
    model: nn.Module,
    options: dict[str, Any],
    loss: TokenLoss,
    starts_from_checkpoint: bool,
    load: Callable[[str], nn.Module],
    copy_of_start: Callable[[], nn.Module],
) -> ReferenceModel:
    """The reference that a run's loss needs.

    Args:
        model: the model as it starts.
        options: ``reference_model`` and ``peft`` of the module.
        loss: what needs it.
        starts_from_checkpoint: whether the start can be made again at any time, when a run is resumed. What a
            ``build_model`` of one's own makes of a checkpoint has to be the same each time.
        load: makes a model of ``reference_model``.
        copy_of_start: makes a copy of ``model``.

    Raises:
        InputError: there is none to be had, or one of another vocabulary.
    """
    name = type(loss).__name__
    if options["reference_model"] is not None:
        reference = load(options["reference_model"])
        _check_vocabulary(model, reference)
        return ReferenceModel(reference)
    if options["peft"] is not None:
        if options["peft"].get("bias", "none") != "none":
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
    return ReferenceModel(copy_of_start())


def _check_vocabulary(model: nn.Module, reference: nn.Module) -> None:
    own, other = (find_head(each).layer.weight.shape[0] for each in (model, reference))
    if own != other:
        raise InputError(
            f"model.reference_model: its vocabulary has {other} tokens and the model's {own}: a divergence needs the "
            "same; take a model of the same family"
        )
