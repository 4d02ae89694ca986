"""torch, where what is needed has no public form, and where its errors are told apart by their words alone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim import Optimizer


class Moving(nn.Module):
    """A module that has a say in how its tensors are moved and cast.

    ``to``, ``cuda``, ``half`` and the rest all come to ``_apply``, and none of them has a hook.
    """

    def moving(self, fn: Callable[[Tensor], Tensor]) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """What is to move a tensor in place of ``fn``, for as long as tensors are moved."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with self.moving(fn) as move:
            return super()._apply(move, recurse)  # type: ignore[no-untyped-call]


def multiply(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors in place by a scalar of their dtype and device, by few kernels. Of those that take lists at
    once, ``torch`` has none that is public."""
    if tensors:
        torch._foreach_mul_(tensors, factor)


def keeps_graph() -> bool:
    """Whether the backward pass that this is called in retains its graph, so that another may follow.

    ``torch.compile`` asks the same before it gives the memory of saved tensors to something else.
    """
    return torch._C._autograd._get_current_graph_task_keep_graph()


def non_persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """A module's own buffers that its state dict leaves out; to ask the state dict may be a collective."""
    return [
        (name, value) for name in module._non_persistent_buffers_set if (value := getattr(module, name)) is not None
    ]


def unscales_itself(optimizer: Optimizer) -> bool:
    """Whether an optimizer takes gradients that are still scaled, as fused ones do. ``GradScaler`` asks the same."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def is_hooked(layer: nn.Module) -> bool:
    """Whether hooks are on a module's forward, which can be added and removed, but not asked for; FSDP2's own aside."""
    own = int(isinstance(layer, FSDPModule))  # one before and one after
    return len(layer._forward_hooks) > own or len(layer._forward_pre_hooks) > own


def arguments_of(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What an operator of torch is called with, by the names of its schema, without defaults that are not given."""
    return {**dict(zip((each.name for each in operation._schema.arguments), args, strict=False)), **kwargs}


def written_to(operation: Any, given: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator of torch changes in place, of what it is called with by name."""
    changed = (each.name for each in operation._schema.arguments if each.alias_info and each.alias_info.is_write)
    return [given[name] for name in changed if isinstance(given.get(name), Tensor)]


def is_of_a_parameter(tensor: Tensor) -> bool:
    """Whether a tensor that backward needs is a parameter, a view of one, or what autocast has made of one."""
    base = tensor if tensor._base is None else tensor._base
    if type(base.grad_fn).__name__ == "ToCopyBackward0":
        base = getattr(base.grad_fn.next_functions[0][0], "variable", base)  # type: ignore[union-attr]
    return isinstance(base, nn.Parameter)


def split_no_graphs() -> None:
    """Have torch.compile leave graphs whole under DDP, which it would cut by DDP's buckets, into five of a large block:
    gradients of one block are there soon enough."""
    torch._dynamo.config.optimize_ddp = False


# -- kernels of the CPU that have no other door ------------------------------------------------------------------------


@lru_cache(maxsize=1)
def has_sigmoid_of_product() -> bool:
    """Whether :func:`sigmoid_of_product` takes bfloat16 on this machine."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _sigmoid_is_of_unrounded_sums()


def _sigmoid_is_of_unrounded_sums() -> bool:
    """Tried: on some processors oneDNN applies what comes after a product to what it has written."""
    steps = torch.linspace(0.9, 1.1, 64)
    a, b = torch.eye(64).mul(8).add(0.25).bfloat16(), torch.outer(steps, steps.flip(0)).mul(1.5).bfloat16()
    bias = torch.full((64,), -60.0)
    expected = (a.double() @ b.double().t() + bias.double()).exp()
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        found = sigmoid_of_product(a, b, bias).double()
    return bool(((found - expected).abs() <= expected * 2.0**-7).all())


def sigmoid_of_product(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """``sigmoid(a @ b.T + bias)`` by oneDNN, which rounds to the dtype of ``a`` and ``b`` at the end alone.

    ``bias`` may be float32 beside bfloat16.
    """
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "sigmoid", [], "")
    return result


def attention_with_normalizer(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """``scaled_dot_product_attention`` on the CPU, causal without a mask, and each token's ``logsumexp``, which its
    backward needs and nothing public returns."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, normalizer = kernel(query, key, value, 0.0, mask is None, attn_mask=mask, scale=scale)
    return output, normalizer


def attention_backward(*given: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attention_with_normalizer`, by the output's, what it was given, and what it returned."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    result: tuple[Tensor, Tensor, Tensor] = kernel(*given, 0.0, mask is None, attn_mask=mask, scale=scale)
    return result


# -- shards ------------------------------------------------------------------------------------------------------------


def discard_unreduced_gradients(module: FSDPModule) -> None:
    """Forget the gradients of a module's own parameters that FSDP2 has not reduced yet: ``zero_grad`` does not reach
    them, and there is no call that does."""
    state: Any = module._get_fsdp_state()
    for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
        for parameter in group.fsdp_params if group is not None else ():
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "unsharded_param"):
                parameter.unsharded_param.grad = None


def name_in_state(name: str) -> str:
    """A tensor's name in a state dict, which has nothing of what FSDP1 and activation checkpointing put into it."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def name_without_wrappers(name: str) -> str:
    """A tensor's name without what ``torch.compile`` puts into it, either, which a state dict keeps."""
    return name_in_state(name).replace("_orig_mod.", "")


def wrapped_classes(policy: ModuleWrapPolicy) -> tuple[type, ...]:
    """The classes of a policy, which it takes and does not show."""
    return tuple(policy._module_classes)


# -- messages ----------------------------------------------------------------------------------------------------------


def is_of_writing(error: BaseException) -> bool:
    """Whether ``torch.save`` could not write: its writer swallows the system's error."""
    return "inline_container" in str(error) or "PytorchStreamWriter" in str(error)


def unpickling_problem(error: Exception) -> tuple[str | None, str | None]:
    """The class that a file names and ``weights_only`` refuses, and the reason without torch's advice to read it all
    the same; each ``None`` where the message has none."""
    named = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error))
    reason = re.search(r"WeightsUnpickler error: *(.+)", str(error))
    return named and named[1], reason and reason[1]


@contextmanager
def called_by_torchdata() -> Iterator[None]:
    """Without the warning of a function that torch deprecates and torchdata's loader calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        yield


@contextmanager
def loading_alone() -> Iterator[None]:
    """Without the warning that a distributed checkpoint is loaded by one process, as is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
