"""``DFTLoss`` as a drop-in criterion in a plain PyTorch loop. ``python examples/plain_pytorch.py``"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dft_lightning import DFTLoss


def train(steps: int = 20) -> list[float]:
    """Fit a tiny model to one batch; returns the loss of each step."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    criterion = DFTLoss()

    input_ids = torch.randint(0, 64, (4, 16))
    labels = input_ids.clone()
    labels[:, :8] = -100  # the prompt is not learnt

    losses = []
    for _ in range(steps):
        logits = model(input_ids).logits
        loss = criterion(logits[:, :-1], labels[:, 1:])  # position t predicts token t + 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for step, value in enumerate(train()):
        print(f"step {step}: DFT loss {value:.4f}")
