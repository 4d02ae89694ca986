"""The model card of an exported folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from dft_lightning.export.checkpoint import TrainedCheckpoint
from dft_lightning.version import __version__

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(trained: TrainedCheckpoint, parameters: int, dtype: str, adapter_of: str | None = None) -> str:
    """Markdown with the hub's front matter: what was trained from what, on what, how, and what was measured.

    Args:
        trained: the checkpoint.
        parameters: how many the model has.
        dtype: of the exported tensors.
        adapter_of: name or folder of the base, where an adapter alone is exported.
    """
    hyper, record = trained.hyper_parameters, trained.record
    loss = _short(hyper.get("loss"))
    base, base_named = record["base"], _named(record["base"], record.get("given", False))
    front: dict[str, Any] = {
        "library_name": "transformers" if adapter_of is None else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["dft-lightning", loss],
    }
    if isinstance(base, str) and _HUB_NAME.fullmatch(base) and not record["base_is_local"]:
        front["base_model"] = base
    metrics = {name: value for name, value in sorted(record["metrics"].items()) if "/" in name}
    settings = {
        "model": {name: value for name, value in hyper.items() if not name.startswith("_")},  # Lightning's own notes
        "data": {name: value for name, value in record["data"].items() if not name.startswith("_")},
        "trainer": record["trainer"],
    }
    sections = [
        f"---\n{_yaml(front)}---",
        f"# {_title(base)}, fine-tuned with {loss}",
        f"{_what(record, adapter_of)} with {parameters:,} parameters ({dtype.removeprefix('torch.')}), trained from "
        f"{base_named} for {trained.global_step:,} optimizer steps with the token loss `{loss}` by dft_lightning "
        f"{__version__}.",
        "## Use\n\n```python\nfrom transformers import pipeline\n\n"
        + ("" if adapter_of is None else "# peft must be installed, and the base within reach\n")
        + 'generate = pipeline("text-generation", "path/to/this/folder")\n'
        'print(generate([{"role": "user", "content": "..."}], max_new_tokens=256))\n```',
        _table(metrics),
        f"## Training\n\n{_fenced(_yaml(settings), 'yaml')}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _short(component: Any) -> str:
    """A component's class by name."""
    path = component.get("class_path", "") if isinstance(component, dict) else ""
    return _inline(str(path).rpartition(".")[2]) or "CrossEntropyLoss"


def _inline(text: str) -> str:
    """A name that a checkpoint gives, without what Markdown and HTML would take for theirs."""
    return " ".join(re.sub(r"[`<>\[\]|]", "", text).split())


def _fenced(text: str, language: str) -> str:
    """A block of code that nothing in it ends."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 0)
    return f"{fence}{language}\n{text}{fence}"


def _what(record: dict[str, Any], adapter_of: str | None) -> str:
    kind = str(record["model_class"]).rpartition(".")[2]
    if adapter_of is not None:
        return f"A LoRA adapter for {kind}, `{_inline(adapter_of)}`,"
    return kind if record["adapter"] is None else f"{kind}, with a LoRA adapter merged into it,"


def _title(base: Any) -> str:
    return _inline(Path(base).name) if isinstance(base, str) else "A language model"


def _named(base: Any, given: bool) -> str:
    return f"`{_inline(base)}`" if isinstance(base, str) else "a model in memory" if given else "random weights"


def _table(metrics: dict[str, float]) -> str:
    if not metrics:
        return ""
    lines = [f"| {_inline(name)} | {value:.5g} |" for name, value in metrics.items()]
    return "\n".join(["## Metrics\n\nAs last logged before this checkpoint:\n", "| | |", "|---|---|", *lines])


def _yaml(values: Any) -> str:
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120))
