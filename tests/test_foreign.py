"""What is private of other libraries stands in ``dft_lightning/foreign`` alone, and is there in their releases."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from functools import cache
from pathlib import Path

import pytest

import dft_lightning
from dft_lightning.foreign.torch import name_in_state

PACKAGE = Path(dft_lightning.__file__).parent
FILES = {
    ".".join(("dft_lightning", *path.relative_to(PACKAGE).with_suffix("").parts)): path
    for path in PACKAGE.rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py", "triton_kernels.py")
}
ASKED = ("getattr", "hasattr", "setattr")
# Of Python itself: the way to end a process from a handler of signals, and the options of an argparse parser.
OF_PYTHON = {"_exit", "_actions"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(tree):
    """Private names that a file gives to something of its own."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


@cache
def tree_of(module):
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


@cache
def own():
    """Private names of the package."""
    return {name for module in FILES for name in defined(tree_of(module)) if is_private(name)}


def used(tree):
    """Private names in a file that are none of the package's: imported, read off an object, or asked for by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("dft_lightning"):
            for alias in node.names:
                yield from filter(is_private, (*(node.module or "").split("."), alias.name))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield from filter(is_private, alias.name.split("."))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own():
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ASKED:
            asked = [argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)]
            yield from (name for name in map(str, asked) if is_private(name) and name not in own())


@cache
def names_of(base):
    """Private names that a class of another library defines, or that its functions read and write."""
    functions = [value for value in vars(base).values() if inspect.isfunction(value)]
    return frozenset(
        filter(is_private, [*vars(base), *(name for each in functions for name in each.__code__.co_names)])
    )


def inherited(module):
    """Private names of other libraries' classes that subclasses of this package override or use."""
    for node in tree_of(module).body:
        cls = getattr(importlib.import_module(module), node.name) if isinstance(node, ast.ClassDef) else object
        ours = {*defined(node), *(each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute))}
        for base in cls.__mro__[1:]:
            if not base.__module__.startswith(("dft_lightning", "builtins")):
                yield from set(filter(is_private, ours)) & names_of(base)


def private_names(module):
    return {*used(tree_of(module)), *inherited(module)} - OF_PYTHON


@pytest.mark.parametrize("module", [name for name in FILES if ".foreign." not in name])
def test_private_names_are_in_their_rooms(module):
    assert private_names(module) == set()


def of_an_error(node):
    return isinstance(node, ast.Call) and ast.unparse(node) in ("str(error)", "str(exception)", "str(problem)")


def worded(tree):
    """What leans on the words of somebody's message: a text looked for in an error's, a warning told by its text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            looked_for = isinstance(node.left, ast.Constant) and isinstance(node.ops[0], (ast.In, ast.NotIn))
            if looked_for and of_an_error(node.comparators[0]):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            looked_into = [*node.args, node.func.value]
            if node.func.attr == "filterwarnings" and any(each.arg == "message" for each in node.keywords):
                yield ast.unparse(node)
            elif node.func.attr in ("search", "match", "fullmatch", "findall", "startswith", "endswith", "partition"):
                yield from (ast.unparse(node) for each in looked_into if of_an_error(each))


# Python's own words for a JSON file of several objects.
WORDS_OF_PYTHON = {"'Extra data' in str(error)"}


@pytest.mark.parametrize("module", [name for name in FILES if ".foreign." not in name])
def test_words_of_others_are_in_their_rooms(module):
    assert {*worded(tree_of(module))} <= WORDS_OF_PYTHON


# Where each is in the releases that the package is for. ``None``: it is looked for by getattr, and may be missing.
HOMES = {
    "_C": "torch",  # on the way to what torch.compile asks a backward pass
    "_autograd": "torch._C",
    "_get_current_graph_task_keep_graph": "torch._C._autograd",
    "_accelerator_connector": "lightning.pytorch.trainer.trainer.Trainer",
    "_activation_checkpointing_kwargs": "lightning.pytorch.strategies.FSDPStrategy",
    "_apply": "torch.nn.Module",
    "_attn_implementation": "transformers.PretrainedConfig",
    "_broadcast_sigterm_tensor": "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop",
    "_batches_that_stepped": "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop",
    "_common": "jsonargparse",
    "_compile_jinja_template": "transformers.utils.chat_template_utils",
    "_dynamo": "torch",
    "_data_fetcher": "lightning.pytorch.loops.fit_loop._FitLoop",
    "_data_source": "lightning.pytorch.loops.fit_loop._FitLoop",
    "_disable_adapters": "peft.tuners.tuners_utils.BaseTunerLayer",
    "_error": "lightning.pytorch.plugins.io.AsyncCheckpointIO",
    "_ex_iterable": "datasets.IterableDataset",
    "_executor": "lightning.pytorch.plugins.io.AsyncCheckpointIO",
    "_fingerprint": "datasets.Dataset",
    "_foreach_mul_": "torch",
    "_forward_hooks": "torch.nn.Module",
    "_forward_pre_hooks": "torch.nn.Module",
    "_fsdp_param_group": "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState",
    "_fsdp_param_groups": "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState",
    "_get_fsdp_state": "torch.distributed.fsdp._fully_shard._fully_shard",
    "_is_mkldnn_bf16_supported": "torch.ops.mkldnn",
    "_linear_pointwise": "torch.ops.mkldnn",
    "_scaled_dot_product_flash_attention_for_cpu": "torch.ops.aten",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "torch.ops.aten",
    "_keep_in_fp32_modules": "transformers.PreTrainedModel",
    "_keep_in_fp32_modules_strict": "transformers.PreTrainedModel",
    "_keys_to_ignore_on_load_unexpected": "transformers.PreTrainedModel",
    "_logger_connector": "lightning.pytorch.trainer.trainer.Trainer",
    "_module_classes": "torch.distributed.fsdp.wrap.ModuleWrapPolicy",
    "_non_persistent_buffers_set": "torch.nn.Module",
    "_original_object_hash": "transformers.GenerationConfig",
    "_parse_ckpt_path": "lightning.pytorch.cli.LightningCLI",
    "_data_parallel_size": "lightning.pytorch.strategies.ModelParallelStrategy",
    "_tensor_parallel_size": "lightning.pytorch.strategies.ModelParallelStrategy",
    "_distributed_checkpoint_save": "lightning.pytorch.strategies.model_parallel",
    "_save_distributed_checkpoint": "lightning.pytorch.strategies.ModelParallelStrategy",
    "_set_hparams": "lightning.pytorch.core.mixins.HyperparametersMixin",
    "_should_check_val_fx": "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop",
    "_state_dict_type": "lightning.pytorch.strategies.FSDPStrategy",
    "_step_supports_amp_scaling": "torch.amp.GradScaler",
    "_supports_sdpa": "transformers.PreTrainedModel",
    "_typehint": "jsonargparse._typehints",
    "_typehints": "jsonargparse",
    "_update_count": "torchmetrics.Metric",
}


def found(path):
    """A module, or an attribute of one."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", HOMES)
def test_private_names_are_there(name):
    home = found(HOMES[name])
    if inspect.ismodule(home):
        assert hasattr(home, name) or re.search(rf"\b{name}\b", inspect.getsource(home))
    else:
        assert re.search(rf"\b{name}\b", inspect.getsource(home))


def test_the_list_is_whole():
    """A new one is to be weighed: is there no public form? There were 69 in 24 files."""
    names = {name for module in FILES if ".foreign." in module for name in private_names(module)}
    assert names == HOMES.keys()
    assert len(names) <= 49  # torch's public save, in its place, is what async_save calls in its thread


@pytest.mark.parametrize("name", ["_fsdp_wrapped_module.a._checkpoint_wrapped_module.b.w", "a._orig_mod.w", "a.w"])
def test_names_in_a_state_dict_are_torchs_own(name):
    from torch.distributed.fsdp._common_utils import clean_tensor_name

    assert name_in_state(name) == clean_tensor_name(name)


# Parts of messages that doors know, and where they are said. What torch says in C++, and what is put together of parts,
# is tried where it is met: test_cli, test_checkpoints, test_sample.
WORDS = {
    "jsonargparse._typehints": (
        "expects a function or a callable class",
        "Problem with given class_path",
        "Does not validate against any of the Union subtypes",
    ),
    "jsonargparse._core": ("does not accept option", "Unexpected config: ", "are required: ", "' is not accepted"),
    "jsonargparse._util": ("Unexpected import path format", "Expected a dot import path string"),
    "jsonargparse._from_config": ("Problems parsing config",),
    "jsonargparse._common": ("is not allowed, denied by",),
    "jsonargparse._subcommands": ("but it was not provided",),
    "jsonargparse._actions": ("Parser key",),
    "lightning.pytorch.loops.fit_loop": ("`val_check_interval`",),
    "lightning.fabric.strategies.model_parallel": ("The sizes `data_parallel_size",),
    "lightning.pytorch.callbacks.early_stopping": ("Early stopping conditioned on metric",),
    "lightning.pytorch.cli": ("to NOT exist",),
    "lightning.pytorch.trainer.connectors.checkpoint_connector": ("checkpoint contains only the model",),
    "lightning.fabric.loggers.csv_logs": ("exists and is not empty",),
    "lightning.pytorch.trainer.connectors.data_connector": ("does not have many workers",),
    "lightning.pytorch.utilities.data": ("across ranks is zero", "Your `IterableDataset` has `__len__` defined"),
    "lightning.pytorch.trainer.connectors.logger_connector.result": ("It is recommended to use `self.log(",),
    "lightning.pytorch.trainer.connectors.logger_connector.logger_connector": ("litlogger",),
    "peft.tuners.lora.layer": ("ParamWrapper",),
    "peft.tuners.tuners_utils": ("incompatible with Mamba",),
    "torch.distributed.checkpoint.state_dict_loader": ("torch.distributed is disabled",),
    "torch._weights_only_unpickler": ("GLOBAL ",),
    "torch.nn.modules.module": ("loading state_dict",),
    "transformers.dynamic_module_utils": ("trust_remote_code",),
}


@pytest.mark.parametrize(("module", "words"), WORDS.items(), ids=WORDS)
def test_words_are_said(module, words):
    source = inspect.getsource(importlib.import_module(module))
    for text in words:
        assert text in source
