"""Run by test_sharding, on two processes unless it says one.

usage: sharded_runs.py FOLDER PART...    (each part has a folder of its own in FOLDER, and leaves a file there)
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dft_lightning import AnchoredLoss, CausalLMModule, DFTLoss, HuggingFaceExport, TokenLoss
from dft_lightning.callbacks.export import export_live
from dft_lightning.data.batches.collating import Collator
from dft_lightning.distributed import gather_lists
from dft_lightning.distributed.strategies import check_precision, on_first_rank
from dft_lightning.errors import InputError
from dft_lightning.modules import GenerationOptions
from dft_lightning.ops import release_scratch
from small_runs import (
    TINY_ARITHMETIC,
    FSDP1OnCPU,
    GradientRecorder,
    adapter_strategy,
    arithmetic_data,
    graphs_of,
    strategy_of,
    trainer,
    whole,
)

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from activations import peak_memory
from memory_table import estimate_memory

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
BLOCK = "transformers.models.gpt2.modeling_gpt2.GPT2Block"


class WholeSequence(TokenLoss):
    """Takes the recomputing path of the head."""

    pointwise = False
    needs = ("sequence_index", "entropy")

    def token_loss(self, stats: Any) -> torch.Tensor:
        sums = torch.zeros(32, dtype=stats.log_prob.dtype).index_add(0, stats.sequence_index, stats.log_prob)
        return -(sums / 90)[stats.sequence_index].exp() * stats.log_prob - 0.1 * stats.entropy


class LossRecorder(GradientRecorder):
    """Keeps the summed loss of each micro-batch as well."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.losses: list[float] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.losses.append(float(outputs["loss"]) * int((batch["labels"][:, 1:] != -100).sum()))


def three_steps(
    folder: str | Path,
    batch_size: int,
    sharding: dict[str, Any] | None = None,
    peft: dict[str, Any] | None = None,
    own: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Summed losses and gradients of the first three steps from a checkpoint; ``own`` options are the module's."""
    pl.seed_everything(0)
    given = {"loss": DFTLoss(), "loading": {"dtype": "float64"}, "sharding": sharding or {}, "peft": peft}
    given |= {"optimizer": {"lr": 0.01}, "schedule": {"decay": "constant"}}
    module = LossRecorder(str(folder), **{**given, **(own or {})})
    run = trainer(max_steps=3, max_epochs=3, gradient_clip_val=0.005, **options)
    run.fit(module, datamodule=arithmetic_data(12, batch_size=batch_size, shuffle=False))
    return module


# What one step is tried with: options of the module, and the same where nothing is sharded.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tied": ({}, {}),
    "untied": ({"model": {**TINY_ARITHMETIC, "tie_word_embeddings": False}},) * 2,
    "recomputing head": ({"loss": WholeSequence()},) * 2,
    "recomputing head, untied": ({"loss": WholeSequence(), "model": {**TINY_ARITHMETIC, "tie_word_embeddings": False}},)
    * 2,
    "full head": ({"loading": {"dtype": "float64", "head": "full"}},) * 2,
    "gradient checkpointing": ({"loading": {"dtype": "float64", "gradient_checkpointing": "full"}}, {}),
    "selective": ({"loading": {"dtype": "float64", "gradient_checkpointing": "selective"}}, {}),
    "activations offloaded": ({"loading": {"dtype": "float64", "gradient_checkpointing": "offload"}}, {}),
    "compiled": ({"loading": {"dtype": "float64", "gradient_checkpointing": "selective", "compile": True}}, {}),
    "blocks by class path": ({"sharding": {"blocks": [BLOCK]}}, {}),
    "weights kept after forward": ({"sharding": {"reshard_after_forward": False}}, {}),
    "every micro-batch reduced": ({"sharding": {"sync_micro_batches": True}}, {}),
    "built beforehand": ({"beforehand": "configure_model"}, {}),
    "a model of one's own": ({"beforehand": "build_model"}, {}),
    # Of classes without any gradient there are none: it takes its own way to the same.
    "gradient threshold": ({"step": {"gradient_threshold": 1e-300}}, {}),
    "offloaded": ({"sharding": {"cpu_offload": True}}, {}),
}


def one_step(batch_size: int, accumulate: int, options: dict[str, Any], trainer_options: dict[str, Any]) -> Any:
    pl.seed_everything(0)
    options = dict(options)
    beforehand = options.pop("beforehand", None)
    options = {"model": TINY_ARITHMETIC, "loss": DFTLoss(), "loading": {"dtype": "float64"}, **options}
    module = GradientRecorder(**options)
    if beforehand == "configure_model":
        module.configure_model()
    elif beforehand == "build_model":  # as a subclass may in its __init__
        module.model = module.build_model()
    run = trainer(accumulate_grad_batches=accumulate, **trainer_options)
    with graphs_of() if module.loading.compile else contextlib.nullcontext([]) as graphs:
        run.fit(module, datamodule=arithmetic_data(16, batch_size=batch_size, shuffle=False))
    assert bool(graphs) == module.loading.compile
    decayed = [sum(whole(p).numel() for p in group["params"]) for group in run.optimizers[0].param_groups]
    counts = torch.tensor(decayed)
    if isinstance(run.model, FullyShardedDataParallel):  # a rank's parts
        torch.distributed.all_reduce(counts)
    return module.gradients[0], counts.tolist()


def two(**options: Any) -> dict[str, Any]:
    return {"devices": 2, "strategy": strategy_of("fsdp2"), **options}


def save(value: Any, path: Path) -> None:
    if torch.distributed.get_rank() == 0:
        torch.save(value, path)


def checkpoints(folder: Path) -> None:
    """Three steps from each checkpoint below ``folder``, loaded in either way."""
    found = {}
    for path in sorted(folder.glob("*-vocabulary-*")):
        for load in ("shards", "whole"):
            module = three_steps(path, 2, {"load": load}, **two())
            losses = torch.tensor(module.losses)
            torch.distributed.all_reduce(losses)
            found[path.name, load] = losses, module.gradients
    save(found, folder / "out.pt")


LORA = {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "up_proj"]}  # rows that two ranks do not share evenly


def lora(folder: Path) -> None:
    """Three steps of an adapter, its checkpoint and where that goes on."""
    base, found = folder / "base", {}
    for name, options in {
        "ddp": {"strategy": "ddp"},
        "shards": {"strategy": adapter_strategy(), "sharding": {"load": "shards"}},
        "whole": {"strategy": adapter_strategy(), "sharding": {"load": "whole"}},
    }.items():
        found[name] = three_steps(base, 2, peft=LORA, devices=2, **options).gradients
    options = {"peft": LORA, "loss": DFTLoss(), "optimizer": {"lr": 0.01}}
    module, data = CausalLMModule(str(base), **options), arithmetic_data(16, batch_size=4, shuffle=False)
    each_epoch = pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1)
    callbacks = [each_epoch, HuggingFaceExport(str(folder / "merged"), merge=True)]
    four = {"devices": 2, "max_steps": 4, "precision": "bf16-mixed", "enable_checkpointing": True}
    trainer(strategy=adapter_strategy(), callbacks=callbacks, **four).fit(module, datamodule=data)
    found["after"] = {name: whole(value) for name, value in module.state_dict().items()}
    again = CausalLMModule(str(base), **options)
    resumed = trainer(strategy=adapter_strategy(), callbacks=[each_epoch], **four)
    resumed.fit(again, datamodule=data, ckpt_path=folder / "epoch=0.ckpt", weights_only=True)
    found["resumed"] = {name: whole(value) for name, value in again.state_dict().items()}
    other = CausalLMModule(str(folder / "other"), **options)
    try:
        trainer(strategy=adapter_strategy(), **four).fit(other, datamodule=data, ckpt_path=folder / "epoch=0.ckpt")
    except InputError as error:
        found["refused"] = gather_lists([str(error)], 2)
    half = CausalLMModule(str(base), loading={"dtype": "bfloat16"}, **options)
    trainer(devices=2, strategy=adapter_strategy(), precision="bf16-mixed").fit(half, datamodule=data)
    found["dtypes"] = {name: p.dtype for name, p in half.named_parameters()}
    save(found, folder / "out.pt")


def variants(folder: Path) -> None:
    gradients = {}
    for strategy in ("ddp", "fsdp1", "fsdp2"):
        for name, (options, _) in VARIANTS.items():
            if strategy == "fsdp2" or ("sharding" not in options and name not in ("compiled", "selective")):
                run = {"devices": 2, "strategy": strategy_of(strategy)}
                gradients[strategy, name] = one_step(2, 4, options, run)
    save(gradients, folder / "out.pt")


class Watch(pl.Callback):
    """What a sharded run holds, and in which dtypes."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        parameters = dict(module.named_parameters())
        assert all(isinstance(p, DTensor) for p in parameters.values())
        self.seen["shards"] = {name: list(p.to_local().shape) for name, p in parameters.items()}
        layer = module.model.transformer.h[0].mlp.c_fc
        layer.register_forward_hook(lambda m, args, out: self.seen.update(block=str(m.weight.dtype)))

    def on_train_end(self, trainer: Any, module: Any) -> None:
        state = trainer.optimizers[0].state.values()
        self.seen["parameters"] = sorted({str(p.dtype) for p in module.parameters()})
        self.seen["state"] = sorted({str(s["exp_avg"].dtype) for s in state})


class Collectives(TorchDispatchMode):
    """Names of the collectives that run meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.namespace == "c10d":
            self.names.append(operation._opname)
        return operation(*args, **(kwargs or {}))


class Generate(pl.Callback):
    """Completes prompts along ``fit``, for longer on one rank than on the other."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        longest = GenerationOptions(max_new_tokens=3 + 5 * trainer.global_rank)
        prompts = torch.tensor([[3, 4, 5], [6, 7, 8]])
        module._completions.stop_token_ids = lambda *_: [19]
        with Collectives() as collectives:
            texts = module.generate(prompts, torch.ones_like(prompts), longest)
        self.lengths = [len(text) for text in texts]
        self.collectives = sorted(collectives.names)
        # Called directly as well, and on one rank's share of the memory as before.
        tokens = module.generate_tokens(prompts, torch.ones_like(prompts), longest)
        with patch("dft_lightning.distributed.strategies._fits", lambda *_: False):
            apart = module.generate_tokens(prompts, torch.ones_like(prompts), longest)
        assert torch.equal(tokens, apart)


def generation(folder: Path) -> None:
    lengths = {}
    for strategy in ("fsdp1", "fsdp2"):
        pl.seed_everything(0)
        module = CausalLMModule(TINY_ARITHMETIC, loss=DFTLoss())
        callback = Generate()
        export = HuggingFaceExport(str(folder / f"exported-{strategy}"))
        run = trainer(devices=2, strategy=strategy_of(strategy), callbacks=[callback, export])
        run.fit(module, datamodule=arithmetic_data(4, batch_size=2))
        lengths[strategy] = gather_lists(callback.lengths, 2)
        lengths[f"{strategy} collectives"] = callback.collectives
    save(lengths, folder / "out.pt")


class StopAfter(pl.Callback):
    """Ends ``fit`` in the middle of a step's micro-batches."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = batch_idx == 1


def again(folder: Path) -> None:
    """What an earlier call of the same module leaves behind: gradients of a step that never came, gathered weights."""
    out: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp2"):
        data = arithmetic_data(16, batch_size=2, shuffle=False)
        pl.seed_everything(0)
        module = GradientRecorder(TINY_ARITHMETIC, loss=DFTLoss(), loading={"dtype": "float64"})
        options = {"devices": 2, "accumulate_grad_batches": 4}
        run = trainer(**options, strategy=strategy_of(strategy), callbacks=[StopAfter()], min_epochs=0, max_steps=9)
        run.fit(module, datamodule=data)
        assert run.global_step == 0
        trainer(**options, strategy=strategy_of(strategy)).fit(module, datamodule=data)
        out[strategy, "gradient"] = module.gradients[0]

        for validated in (True, False):
            pl.seed_everything(0)
            module = CausalLMModule(
                TINY_ARITHMETIC, loss=DFTLoss(), loading={"dtype": "float64"}, optimizer={"lr": 0.01}
            )
            data.sources["validation"] = data.sources["train"]
            if validated:
                trainer(devices=2, strategy=strategy_of(strategy)).validate(module, datamodule=data, verbose=False)
            trainer(devices=2, strategy=strategy_of(strategy), max_steps=2).fit(module, datamodule=data)
            out[strategy, validated] = torch.cat([whole(p.detach()).flatten() for p in module.parameters()])
    save(out, folder / "out.pt")


def buffers(folder: Path) -> None:
    """Rotary frequencies after a step in bfloat16, and before."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    found = {}
    for name in ("fsdp1", "fsdp2"):
        strategy = FSDP1OnCPU(auto_wrap_policy={LlamaDecoderLayer}) if name == "fsdp1" else strategy_of(name)
        for precision in ("bf16-mixed", "bf16-true"):
            module = CausalLMModule({**LLAMA, "vocab_size": 20}, loss=DFTLoss())
            run = trainer(devices=2, strategy=strategy, precision=precision)
            run.fit(module, datamodule=arithmetic_data(4, batch_size=2))
            found[name, precision] = module.model.model.rotary_emb.inv_freq
            strategy = FSDP1OnCPU(auto_wrap_policy={LlamaDecoderLayer}) if name == "fsdp1" else strategy_of(name)
    save(found, folder / "out.pt")


def seeded_run(**options: Any) -> torch.Tensor:
    """Weights after four steps with dropout, shuffling and accumulation."""
    pl.seed_everything(3)
    module = CausalLMModule({**TINY_ARITHMETIC, "resid_pdrop": 0.3}, loss=DFTLoss(), optimizer={"lr": 1e-2})
    run = trainer(max_steps=4, accumulate_grad_batches=2, **options)
    run.fit(module, datamodule=arithmetic_data(32, batch_size=2))
    return torch.cat([whole(p.detach()).flatten() for p in module.parameters()])


def behaviour(folder: Path) -> None:
    """Precision, the same run twice, checkpoints."""
    out: dict[str, Any] = {}
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        pl.seed_everything(0)
        watch = Watch()
        module = GradientRecorder(TINY_ARITHMETIC, loss=DFTLoss())
        trainer(**two(precision=precision, callbacks=[watch])).fit(module, datamodule=arithmetic_data(16, batch_size=8))
        out[precision] = {**watch.seen, "gradient": module.gradients[0]}

    for name in ("ddp", "fsdp2"):
        out[f"twice {name}"] = [seeded_run(devices=2, strategy=strategy_of(name)) for _ in range(2)]

    for distributed in (True, False):
        path = folder / f"distributed-{distributed}.ckpt"
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=distributed)
        pl.seed_everything(3)
        module = CausalLMModule(TINY_ARITHMETIC, loss=DFTLoss(), optimizer={"lr": 1e-2})
        export = HuggingFaceExport(str(folder / f"exported-{distributed}"))
        run = trainer(devices=2, strategy=strategy, max_steps=2, callbacks=[export])
        data = arithmetic_data(8, batch_size=4)
        data.sources["validation"] = data.sources["train"]
        run.fit(module, datamodule=data)
        run.save_checkpoint(path)
        values = []
        for ckpt_path in (None, path):
            fresh = module if ckpt_path is None else CausalLMModule(TINY_ARITHMETIC, loss=DFTLoss())
            again = trainer(devices=2, strategy=ModelParallelStrategy(2, 1))
            values += again.validate(fresh, datamodule=data, ckpt_path=ckpt_path, weights_only=True, verbose=False)
        out[f"checkpoint {distributed}"] = values
    save(out, folder / "out.pt")


class RateRecorder(CausalLMModule):
    """Keeps the learning rate of each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rates: list[float] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        self.rates.append(optimizer.param_groups[0]["lr"])


OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "same": {},
    "other": {"lr": 0.002, "betas": (0.8, 0.9), "weight_decay": 0.5},
}


def options(folder: Path) -> None:
    """Learning rates and the optimizer's options of a whole run, and of two that go on from its middle."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    out: dict[str, Any] = {}
    data = arithmetic_data(16, batch_size=4)
    for name in ("ddp", "fsdp1", "shards", "file"):
        path = folder / f"{name}-step=2.ckpt"
        every = pl.callbacks.ModelCheckpoint(folder, name + "-{step}", every_n_train_steps=2, save_top_k=-1)
        for run, given in OPTIONS.items():
            strategy = strategy_of(name) if name == "ddp" else ModelParallelStrategy(2, 1, name == "shards")
            if name == "fsdp1":  # whose whole state dict torch cannot gather on the CPU
                strategy = FSDP1OnCPU(auto_wrap_policy={GPT2Block}, state_dict_type="sharded")
            saved = {"callbacks": [every], "enable_checkpointing": True} if run == "whole" else {}
            module = RateRecorder(TINY_ARITHMETIC, optimizer={"lr": 0.01, **given})
            fit = trainer(devices=2, strategy=strategy, max_steps=4, **saved)
            fit.fit(module, datamodule=data, ckpt_path=None if run == "whole" else path, weights_only=True)
            groups = [{k: v for k, v in g.items() if k != "params"} for g in fit.optimizers[0].param_groups]
            out[name, run] = module.rates, groups, fit.lr_scheduler_configs[0].scheduler.base_lrs
    save(out, folder / "out.pt")


def loading(folder: Path) -> None:
    """Memory of a rank while a checkpoint is loaded, and what it keeps."""

    class Profiled(CausalLMModule):
        def configure_model(self) -> None:
            with peak_memory(folder / f"trace-{torch.distributed.get_rank()}.json") as self.peak:
                super().configure_model()
            self.kept = sum(p.to_local().nbytes for p in self.parameters())

    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # the account is of this thread
    found = {}
    for load in ("shards", "whole"):
        # Another dtype than the checkpoint's: what is mapped from a file is in nobody's account.
        module = Profiled(str(folder / "model"), loading={"dtype": "float64"}, sharding={"load": load})
        data = arithmetic_data(2, batch_size=1)
        data.sources["validation"] = data.sources["train"]
        trainer(**two(limit_val_batches=1)).validate(module, datamodule=data, verbose=False)
        found[load] = {"peak": module.peak[0], "kept": module.kept}
    save(found, folder / "out.pt")


def exporting(folder: Path) -> None:
    """What rank 0 holds at most while a sharded model is exported; and a write that takes longer than others wait."""

    class Watched(pl.Callback):
        def on_fit_end(self, trainer: Any, module: Any) -> None:
            largest = max(p.numel() * p.element_size() for p in module.parameters())
            total = sum(p.numel() * p.element_size() for p in module.parameters())
            with peak_memory(folder / f"trace-{torch.distributed.get_rank()}.json") as peak:
                export_live(trainer, module, folder / "model", "")
            self.found = {"peak": peak[0], "largest": largest, "total": total}
            with patch("dft_lightning.distributed.strategies._NOW_AND_THEN", 0.5):
                on_first_rank(trainer, lambda: time.sleep(6), long=True)
            try:
                on_first_rank(trainer, lambda: open(folder / "nothing").close(), "key: ", long=True)
            except InputError as error:
                self.found["message"] = str(error)

    watched = Watched()
    module = CausalLMModule({**LLAMA, **LOADED_MODEL})
    patience = ModelParallelStrategy(2, 1, timeout=datetime.timedelta(seconds=4))
    trainer(devices=2, strategy=patience, callbacks=[watched]).fit(module, datamodule=arithmetic_data(4, batch_size=2))
    assert gather_lists([watched.found["message"]], 2)[0] == watched.found["message"]
    state = {name: whole(p.detach()) for name, p in module.model.named_parameters()}
    save({**watched.found, "state": state}, folder / "out.pt")


LOADED_MODEL = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8, "num_key_value_heads": 2}
LOADED_MODEL |= {"vocab_size": 512, "tie_word_embeddings": True}


def training_memory(
    trace: Path, ranks: int, sizes: dict[str, int], tokens: int, checkpointing: bool | str
) -> list[int]:
    """Bytes that two steps of two micro-batches took at most, and what the estimate says."""
    options = two() if ranks == 2 else {}
    module = CausalLMModule(
        {**LLAMA, **sizes, "tie_word_embeddings": False, "max_position_embeddings": tokens},
        loss=DFTLoss(),
        loading={"gradient_checkpointing": checkpointing},
        sharding={"sync_micro_batches": True} if ranks == 2 else {},
    )
    ids = torch.arange(tokens // 2) % sizes["vocab_size"]
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()}] * (8 * ranks)
    run = trainer(max_steps=2, accumulate_grad_batches=2, precision="bf16-mixed", **options)
    release_scratch()  # what an earlier test left would not be allocated again
    with peak_memory(trace) as found:
        run.fit(module, torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=Collator(0)))
    estimate = estimate_memory(module.model, tokens=tokens, ranks=ranks, gradient_checkpointing=checkpointing)
    return [*found, estimate.total]


_SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 2048}
_WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 5, "vocab_size": 4096}
_SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 4}
MEMORY_CASES = [
    (_SMALL, 1024, "full"),
    ({**_WIDE, "num_attention_heads": 4, "num_key_value_heads": 2}, 1024, False),
]
ALONE = [(_SMALL, 1024, "every_2"), (_SMALL, 1024, "selective")]


def training(folder: Path) -> None:
    trace = folder / f"trace-{os.environ.get('LOCAL_RANK', 0)}.json"
    save([training_memory(trace, 2, *case) for case in MEMORY_CASES], folder / "out.pt")


def refusals(folder: Path) -> None:
    """One process: the message of each thing that is refused."""
    one = {"devices": 1}

    def message(module: Any, **options: Any) -> str:
        defaults = {**one, "strategy": ModelParallelStrategy(1, 1), **options}
        try:
            if "precision" in options:
                check_precision(defaults["strategy"], options["precision"])
            data = arithmetic_data(4, batch_size=2)
            data.sources["validation"] = data.sources["train"]
            run = trainer(**defaults)
            if options.get("inference_mode"):
                run.validate(module, datamodule=data, verbose=False)
            else:
                run.fit(module, datamodule=data)
        except InputError as error:
            return str(error)
        return "nothing was refused"

    def make(model: Any = TINY_ARITHMETIC, **options: Any) -> CausalLMModule:
        return CausalLMModule(model, **options)

    class Bare(CausalLMModule):
        def build_model(self) -> torch.nn.Module:
            return torch.nn.Linear(2, 2)

    found = {
        "tied twice": message(make(str(folder / "twice"))),
        "no strategy": message(make(sharding={"cpu_offload": True}), strategy="auto"),
        "another class": message(make(sharding={"blocks": ["transformers.LlamaConfig"]})),
        "no such path": message(make(sharding={"blocks": ["transformers.Nothing"]})),
        "no such block": message(make(sharding={"blocks": ["torch.nn.Conv2d"]})),
        "no list": message(Bare(TINY_ARITHMETIC)),
        "several dtypes": message(make_mixed()),
        "fsdp1 class": message(make(), strategy=FSDP1OnCPU(auto_wrap_policy={torch.nn.Conv2d})),
        "fp16": message(make(), precision="16-mixed"),
        "a second model": message(make(loss=AnchoredLoss()), strategy=FSDP1OnCPU()),
        "flat parameters": message(make(), strategy=FSDP1OnCPU(use_orig_params=False)),
        "another layout": message(make(str(folder / "renamed"))),
        "no safetensors": message(make(str(folder / "bin"))),
        "another shape": message(make(str(folder / "shape"))),
    }
    wrapped = make()
    found["wrapped once"] = message(wrapped, strategy=strategy_of("fsdp1"))
    found["wrapped twice"] = message(wrapped, strategy=strategy_of("fsdp1"))
    import lightning.pytorch.loops.utilities as loops

    loops._distributed_is_initialized = lambda: False  # as on NCCL, where Lightning has inference mode
    found["inference mode"] = message(make(), inference_mode=True)
    (folder / "out.json").write_text(json.dumps(found))


def make_mixed() -> CausalLMModule:
    class Mixed(CausalLMModule):
        def build_model(self) -> torch.nn.Module:
            model = super().build_model()
            model.transformer.ln_f.to(torch.bfloat16)
            return model

    return Mixed(TINY_ARITHMETIC)


if __name__ == "__main__":
    for part in sys.argv[2:]:
        globals()[part](Path(sys.argv[1]) / part)
