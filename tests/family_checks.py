"""What is tried of a model type: each against the model's own logits, one unpadded row after the other."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dft_lightning import CausalLMModule, DFTLoss
from dft_lightning.data.batches.collating import Collator
from dft_lightning.errors import InputError
from dft_lightning.export.adapter import merged_model
from dft_lightning.export.checkpoint import open_checkpoint
from dft_lightning.models.generation import GenerationOptions, generate
from family_configs import VOCABULARY, tiny_config

# Float32 alone moves a step's gradient by 1e-7 to 1e-5 of these models, whose large weights enlarge what is rounded.
# A token that is seen or not, or counted or not, moves it by 1e-2 and more.
TOLERANCE = 1e-4
LENGTHS = (23, 6, 17, 2, 11, 29, 9, 13, 3, 19, 8, 21)
DOCUMENTS = (19, 6, 23, 2, 11)
SHORT_DOCUMENTS = (7, 2, 6, 5, 7)
_LARGE = 0.2
_STEPS, _ACCUMULATED, _ROWS = 3, 2, 2
_RATE, _EPS = 5e-3, 1e-3


class Wrong(Exception):
    """Something is trained or generated that should not be."""


class Family:
    """A tiny model of a type, in a folder, with weights so large that tokens act on each other.

    Args:
        name: the type, perhaps with what its config has beyond the defaults.
        folder: for the model.
    """

    def __init__(self, name: str, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.folder = folder
        self.note = self.head_note = ""
        self.loading: dict[str, Any] = {}
        config = tiny_config(name)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        enlarge(model)
        self.special = special_ids(config)
        pad = getattr(text_config(config), "pad_token_id", None)
        self.pad = pad if isinstance(pad, int) else 0
        self.takes_use_cache = "use_cache" in inspect.signature(model.forward).parameters
        model.save_pretrained(folder)
        if type(model.config) is not type(config):  # of a part, where checkpoints have the whole
            config.save_pretrained(folder)
        logits = self.logits(self.own_model(), self.rows([7])[0]["input_ids"])  # it runs, and comes back from there
        if not logits.isfinite().all():
            raise ValueError("its logits are not finite at large random weights")

    def own_model(self) -> nn.Module:
        """As transformers loads it, in training mode."""
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return model.train()

    def module(self, peft: dict[str, Any] | None = None, **loading: Any) -> CausalLMModule:
        torch.manual_seed(0)
        return CausalLMModule(
            str(self.folder),
            loss=DFTLoss(),
            optimizer={"lr": _RATE, "eps": _EPS, "weight_decay": 0.0},
            schedule={"decay": "constant"},
            loading={**self.loading, **loading},
            peft=peft,
        )

    def logits(self, model: nn.Module, ids: list[int]) -> Tensor:
        """``[T, V]`` of one row without padding."""
        given = {"use_cache": False} if self.takes_use_cache else {}
        logits: Tensor = model(input_ids=torch.tensor([ids]), **given).logits[0]
        return logits

    def rows(self, lengths: Iterable[int]) -> list[dict[str, Any]]:
        """Random rows; a third of each is no target."""
        generator = torch.Generator().manual_seed(5)
        tokens = [token for token in range(VOCABULARY - 2) if token not in self.special]
        made = []
        for length in lengths:
            # No token twice: some attentions take the highest of scores that hang on the token alone.
            ids = [tokens[i] for i in torch.randperm(len(tokens), generator=generator)[:length].tolist()]
            made.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :], "weights": None})
        return made


def text_config(config: Any) -> Any:
    try:
        return config.get_text_config(decoder=True)
    except ValueError:
        return config


def special_ids(config: Any) -> set[int]:
    """Tokens that mean more to a model than their embedding: padding, images ..."""
    found = {0, 1, 2}
    for each in (config, text_config(config)):
        for name, value in vars(each).items():
            if name.endswith(("_token_id", "_token_index")):
                found |= {token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)}
    return found


@torch.no_grad()
def enlarge(model: nn.Module) -> None:
    """Give a fresh model matrices of deviation 0.2, and vectors that are not all 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            parameter.copy_(torch.where(parameter.isfinite(), parameter, 0.0) + 0.1 * noise)
            continue
        deviation = parameter.float().std().item()
        if not math.isfinite(deviation) or not 1e-6 < deviation < 10:  # constant, or memory that nobody has set
            parameter.copy_(_LARGE * noise)
        else:
            parameter.mul_(max(_LARGE / deviation, 1.0)).add_(0.01 * noise)  # no row of 0, as the padding's


# -- the reference -----------------------------------------------------------------------------------------------------


def gradient(family: Family, model: nn.Module, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Of DFT's mean over the targets of these rows, each run alone."""
    model.zero_grad()
    targets = [[place for place in range(1, len(row["labels"])) if row["labels"][place] != -100] for row in rows]
    count = sum(map(len, targets))
    for row, places in zip(rows, targets, strict=True):
        if places:
            log_probs = family.logits(model, row["input_ids"]).double().log_softmax(-1)
            chosen = torch.stack([log_probs[place - 1, row["labels"][place]] for place in places])
            (-(chosen.detach().exp() * chosen).sum() / count).backward()
    return gradients_of(model)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative, over all tensors together."""
    if found.keys() != expected.keys():
        raise Wrong(f"other parameters: {sorted(found.keys() ^ expected.keys())[:3]}")
    if not all(tensor.isfinite().all() for tensor in found.values()):
        raise Wrong("not finite")
    difference = sum((found[name].double() - expected[name].double()).square().sum().item() for name in expected)
    size = sum(tensor.double().square().sum().item() for tensor in expected.values())
    if not size > 0 or not math.isfinite(size):
        raise ValueError(f"the reference's own gradient has a square sum of {size}")
    return math.sqrt(difference / size)


@torch.no_grad()
def sees_the_future(family: Family, model: nn.Module) -> bool:
    ids = family.rows([12])[0]["input_ids"]
    model.eval()
    before, after = (family.logits(model, [*ids[:-1], last])[:-1] for last in (ids[-1], ids[0]))
    model.train()
    return bool((before - after).abs().max() > 1e-3 * before.abs().max())


# -- the cells ---------------------------------------------------------------------------------------------------------


def check_padded(family: Family) -> float:
    """Three steps of a trainer, of two micro-batches of two ragged rows each: the weights at their end."""
    rows = family.rows(LENGTHS)
    model = family.own_model()
    future = sees_the_future(family, model)
    module = _fitted(family, rows)
    if future:
        raise Wrong("is trained with the future in sight")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.95), eps=_EPS, weight_decay=0.0)
    size = _ACCUMULATED * _ROWS
    for step in range(_STEPS):
        gradient(family, model, rows[step * size : (step + 1) * size])
        optimizer.step()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    assert module.model is not None
    found = {name: p.detach() - before[name] for name, p in module.model.named_parameters()}
    return distance(found, moved)


def _fitted(family: Family, rows: list[dict[str, Any]], steps: int = _STEPS, **options: Any) -> CausalLMModule:
    module = family.module(**options)
    loader: Any = DataLoader(rows, batch_size=_ROWS, collate_fn=Collator(family.pad))  # type: ignore[arg-type]
    _trainer(max_steps=steps, accumulate_grad_batches=_ACCUMULATED).fit(module, loader)
    return module


def _trainer(**options: Any) -> pl.Trainer:
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **silent, **options)  # type: ignore[arg-type]


def check_packed(family: Family) -> float:
    """Two rows of several documents."""
    documents = family.rows(DOCUMENTS)
    batch = Collator(family.pad)([{"documents": documents[:3]}, {"documents": documents[3:]}])
    return _against_alone(family, documents, batch)


def check_padding_free(family: Family) -> float:
    """One row of all documents, with the model's own attention."""
    documents = family.rows(DOCUMENTS)
    return _against_alone(family, documents, Collator(family.pad, padding_free=True)(documents))


def check_documents(family: Family) -> float:
    """The same with ``attn_implementation: documents``; no longer than a window where longer ones are refused."""
    try:
        return _documents(family, DOCUMENTS)
    except InputError as error:
        if not re.search(r"longer than .*(window|chunk)", str(error)):
            raise
    family.note = "documents no longer than the window"
    return _documents(family, SHORT_DOCUMENTS)


def _documents(family: Family, lengths: Iterable[int]) -> float:
    documents = family.rows(lengths)
    batch = Collator(family.pad, padding_free=True)(documents)
    return _against_alone(family, documents, batch, attn_implementation="documents")


def check_checkpointing(family: Family) -> float:
    """The gradient with activations recomputed, which are recomputed indeed."""
    rows = family.rows(DOCUMENTS)
    batch = Collator(family.pad)(rows)
    module = family.module(gradient_checkpointing=True)
    _step(module, batch)
    with _counted() as recomputed:
        found = _step(module, batch)
    plain = family.module()
    _step(plain, batch)
    with _counted() as once:
        _step(plain, batch)
    if not recomputed[0] > once[0]:
        raise Wrong("nothing is recomputed")
    return distance(found, gradient(family, family.own_model(), rows))


class _counted:
    """How often the modules of a model are run."""

    def __enter__(self) -> list[int]:
        self.calls = [0]
        self.handle = nn.modules.module.register_module_forward_pre_hook(self.count)
        return self.calls

    def count(self, module: nn.Module, inputs: Any) -> None:
        self.calls[0] += 1

    def __exit__(self, *args: Any) -> None:
        self.handle.remove()


def _against_alone(family: Family, rows: list[dict[str, Any]], batch: dict[str, Any], **options: Any) -> float:
    found = _step(family.module(**options), batch)
    return distance(found, gradient(family, family.own_model(), rows))


def _step(module: CausalLMModule, batch: dict[str, Any]) -> dict[str, Tensor]:
    module.configure_model()
    assert module.model is not None
    module.train()
    module.zero_grad()
    output = module.token_output(batch)
    (output.loss / output.log_prob.numel()).backward()
    return gradients_of(module.model)


def check_lora(family: Family) -> float:
    """Two steps of an adapter on all linear layers; its gradient; and what export merges is what was trained."""
    rows = family.rows(LENGTHS[:8])
    module = _fitted(family, rows, steps=2, peft={"r": 4, "lora_alpha": 8, "target_modules": "all-linear"})
    model = module.model
    assert model is not None
    moved = [name for name, p in model.named_parameters() if "lora_B" in name and p.abs().max() > 0]
    if not moved:
        raise Wrong("the adapter is not trained")
    batch = Collator(family.pad)(rows[:5])
    of_gradient = distance(_step(module, batch), gradient(family, model, rows[:5]))
    path = family.folder.parent / "adapter.ckpt"
    module.trainer.save_checkpoint(path)
    merged = merged_model(open_checkpoint(path), None, None, trust_remote_code=False)
    ids = rows[0]["input_ids"]
    with torch.no_grad():
        adapted, of_merged = (family.logits(each.eval(), ids) for each in (model, merged))
        base = family.logits(family.own_model().eval(), ids)
    if not (adapted - base).abs().max() > 1e-3 * base.abs().max():
        raise Wrong("the adapter changes nothing")
    return max(of_gradient, ((adapted - of_merged).abs().max() / adapted.abs().max()).item())


def check_generation(family: Family) -> float:
    """A ragged batch, padded on the left, against the likeliest tokens of each prompt alone, without a cache."""
    prompts = [row["input_ids"] for row in family.rows((11, 4, 7))]
    new, longest = 6, max(map(len, prompts))
    ids = torch.tensor([[family.pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    module = family.module()
    module.configure_model()
    assert module.model is not None
    options = GenerationOptions(max_new_tokens=new)

    def generated(ids: Tensor, mask: Tensor) -> list[list[int]]:
        assert module.model is not None
        tokens = generate(module.model, ids, mask, options, stop_token_ids=[], pad_token_id=family.pad)
        return list(tokens.tolist())

    model = family.own_model().eval()
    for prompt, tokens in zip(prompts, generated(ids, mask), strict=True):
        place = _first_difference(family, model, prompt, tokens, new)
        if place is not None:
            (alone,) = generated(torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.int64))
            with_cache = _first_difference(family, model, prompt, alone, new) is not None
            raise Wrong(
                f"token {place + 1} after a prompt of {len(prompt)} is not the likeliest of the row alone"
                + (", and a row that is alone goes wrong as well" if with_cache else "")
            )
    return 0.0


@torch.no_grad()
def _first_difference(family: Family, model: nn.Module, prompt: list[int], tokens: list[int], new: int) -> int | None:
    if len(tokens) != new:
        return len(tokens)
    for place, token in enumerate(tokens):
        last = family.logits(model, [*prompt, *tokens[:place]])[-1]
        if last.max() - last[token] > 1e-4 * last.abs().max():  # not a draw
            return place
    return None


CELLS: dict[str, Callable[[Family], float]] = {
    "padded": check_padded,
    "packed": check_packed,
    "padding-free": check_padding_free,
    "documents": check_documents,
    "checkpointing": check_checkpointing,
    "LoRA": check_lora,
    "generation": check_generation,
}
