"""transformers, where a model says something of itself under a private name alone, or an error by its words."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from torch import Tensor
from transformers import GenerationConfig, masking_utils
from transformers.utils import chat_template_utils, logging


def no_bars_in_files() -> None:
    """No bars of loading and saving where the output is no terminal: each of their steps would be a line."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def names_let_be(model: object) -> list[str]:
    """Patterns of tensors that a checkpoint may have and the model has no place for."""
    return list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())


def kept_in_float32(model: object, in_float16: bool) -> set[str]:
    """Names of modules that are to stay in float32 in a model of half precision; of float16 there are more."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return names | set(getattr(model, "_keep_in_fp32_modules", None) or ()) if in_float16 else names


def supports_sdpa(model: object) -> bool:
    """Whether a model's attention can be computed by torch's ``scaled_dot_product_attention``."""
    return bool(getattr(model, "_supports_sdpa", False))


def attention_of(model: object) -> str:
    """The name of a model's attention implementation, of which the config's public name is what was asked for."""
    return str(getattr(getattr(model, "config", None), "_attn_implementation", "of its own"))


@contextlib.contextmanager
def told_of_documents(several: bool) -> Iterator[None]:
    """Whether rows are of several documents. transformers' masks would read it off ``position_ids`` in each forward,
    and wait for the device: a function of the module that makes masks, which takes no such argument."""
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _document_index if several else _no_documents
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


def _document_index(position_ids: Tensor) -> Tensor:
    return (position_ids.diff(prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def _no_documents(position_ids: Tensor) -> None:
    return None


def let_pass(config: GenerationConfig) -> None:
    """Have a generation config saved as it is. Some published ones, with sampling options without ``do_sample``, say,
    would not pass as new ones, and a new one is what it counts as by its hash alone."""
    config._original_object_hash = hash(config)


def wants_code(error: Exception) -> bool:
    """Whether a model or tokenizer was not loaded for want of trust in code that it brings along."""
    return "trust_remote_code" in str(error)


@contextlib.contextmanager
def template_clock(chat_template: str, strftime: Callable[[str], str]) -> Iterator[None]:
    """Have ``strftime_now`` of a chat template tell another day. It is a global of the environment in which
    transformers compiles the template; a variable of that name would have to be plain data, and no function."""
    functions = chat_template_utils._compile_jinja_template(chat_template).environment.globals
    before = functions["strftime_now"]
    functions["strftime_now"] = strftime
    try:
        yield
    finally:
        functions["strftime_now"] = before
