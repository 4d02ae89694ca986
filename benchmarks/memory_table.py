"""The memory table of docs/sharding.md: the paper's five models on 1, 8 and 64 GPUs, as Markdown.

usage: python benchmarks/memory_table.py
"""

from __future__ import annotations

from dft_lightning.distributed.memory import estimate_memory
from dft_lightning.distributed.shard_loading import parameters_on_meta

# What their config.json on the hub says of their size.
MODELS = {
    "Qwen2.5-Math-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "LLaMA-3.2-3B": ("llama", 3072, 8192, 28, 24, 8, 128256, True),
    "DeepSeekMath-7B": ("llama", 4096, 11008, 30, 32, 32, 102400, False),
    "Qwen2.5-Math-7B": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "LLaMA-3.1-8B": ("llama", 4096, 14336, 32, 32, 8, 128256, False),
}
_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
GPUS = (1, 8, 64)
TOKENS = 4 * 2048


def empty_model(name: str):
    """One of ``MODELS`` without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, *sizes, vocabulary, tied = MODELS[name]
    values = dict(zip(_KEYS, sizes, strict=True))
    config = AutoConfig.for_model(model_type, **values, vocab_size=vocabulary, tie_word_embeddings=tied)
    with parameters_on_meta():
        return AutoModelForCausalLM.from_config(config)


def table() -> str:
    """A row for each model and number of GPUs, in GiB per GPU."""
    lines = [
        "| model | GPUs | parameters | gradients | optimizer | activations | head | sum | reduced once a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        model = empty_model(name)
        for gpus in GPUS:
            parts = estimate_memory(model, tokens=TOKENS, ranks=gpus)
            whole = estimate_memory(model, tokens=TOKENS, ranks=gpus, sync_micro_batches=False)
            cells = [*vars(parts).values(), parts.total, whole.total]
            lines.append(f"| {name} | {gpus} | " + " | ".join(f"{cell / 2**30:.1f}" for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
