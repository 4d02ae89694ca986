"""``DFTLoss`` in ``transformers.Trainer``, which needs ``accelerate``. ``python examples/transformers_trainer.py``"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dft_lightning import DFTLoss, compute_loss_func


def train(output_dir: str, max_steps: int = 4) -> float:
    """Train a tiny model on random rows; returns the mean training loss."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    rows = []
    for _ in range(16):
        input_ids = torch.randint(0, 64, (16,))
        labels = input_ids.clone()
        labels[:8] = -100  # the prompt is not learnt
        rows.append({"input_ids": input_ids, "labels": labels})
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(output_dir=output_dir, max_steps=max_steps, report_to=[], use_cpu=True),
        train_dataset=rows,
        compute_loss_func=compute_loss_func(DFTLoss()),
    )
    return trainer.train().training_loss


if __name__ == "__main__":
    print(f"training loss {train('runs/transformers_trainer'):.4f}")
