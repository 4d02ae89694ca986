"""Small runs of transformers.Trainer, alone and on two processes."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dft_lightning import DFTLoss, compute_loss_func
from dft_lightning.integrations import FusedLossMixin

LLAMA = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


class Fused(FusedLossMixin, Trainer):
    """What a user writes."""


def model_of(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> LlamaForCausalLM:
    """A Llama of random weights whose targets are not all alike."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{"initializer_range": 0.5, **LLAMA, **options})).to(dtype)


def rows(number: int = 12) -> list[dict[str, Any]]:
    """Prompts that are not learnt, and answers of several lengths, padded to one length; half the model's likeliest."""
    generator = torch.Generator().manual_seed(1)
    found, model = [], model_of()
    for i in range(number):
        ids, labels = torch.randint(0, 61, (12,), generator=generator), torch.full((12,), -100)
        end = 5 + (3 * i) % 8
        for at in range(4, 12, 2):
            with torch.no_grad():
                ids[at] = model(input_ids=ids[None, :at]).logits[0, -1].argmax()
        labels[3:end] = ids[3:end]
        found.append({"input_ids": ids, "labels": labels, "attention_mask": (torch.arange(12) < end).long()})
    return found


def arguments(folder: Any, **options: Any) -> TrainingArguments:
    """Without output, on the CPU."""
    own = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant"}
    own |= {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "optim": "sgd"}
    return TrainingArguments(str(folder), **{**own, "logging_steps": 1, **options})


def trained(trainer: Trainer) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """Weights, and what was logged."""
    trainer.train()
    parameters = [each.detach().flatten().cpu() for each in trainer.model.parameters() if each.requires_grad]
    return torch.cat(parameters), list(trainer.state.log_history)


def fused_and_by_logits(folder: Any, loss: Any = None, train: Any = None, **options: Any) -> list[Any]:
    """The same run with the mixin, and with the trainer's own logits."""
    loss, train = loss or DFTLoss(), train or rows()
    own = Fused(model_of(), arguments(folder, **options), train_dataset=train, token_loss=loss)
    theirs = Trainer(
        model_of(), arguments(folder, **options), train_dataset=train, compute_loss_func=compute_loss_func(loss)
    )
    return [trained(own), trained(theirs)]


if __name__ == "__main__":  # on two processes
    folder, out = sys.argv[1:]
    found = Fused(
        model_of(),
        arguments(folder, gradient_accumulation_steps=2, per_device_train_batch_size=1, ddp_backend="gloo"),
        train_dataset=rows(),
        eval_dataset=rows(7),
        token_loss=DFTLoss(),
    )
    weights, logged = trained(found)
    evaluated = found.evaluate()
    if torch.distributed.get_rank() == 0:
        torch.save((weights, logged, evaluated), out)
    torch.distributed.destroy_process_group()
