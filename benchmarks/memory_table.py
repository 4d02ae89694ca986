"""How much memory a GPU needs to train a model, worked out before one is rented: the tables of docs/sharding.md.

usage: python benchmarks/memory_table.py [MODEL ...]

The models are the paper's five, or those that are named: folders, or names on the hub.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import nn

from dft_lightning.distributed.shard_loading import parameters_on_meta
from dft_lightning.distributed.sharding import find_blocks
from dft_lightning.models.head import ends_apart
from dft_lightning.ops.chunks import CUDA_CHUNK_ROWS, DEFAULT_CHUNK_BYTES

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
CHOICES = (False, "every_4", "every_2", "selective", "full", "offload")  # of gradient checkpointing


def empty_model(name: str) -> nn.Module:
    """A model without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if name in MODELS:
        model_type, *sizes, vocabulary, tied = MODELS[name]
        values = dict(zip(_KEYS, sizes, strict=True))
        config = AutoConfig.for_model(model_type, **values, vocab_size=vocabulary, tie_word_embeddings=tied)
    else:
        config = AutoConfig.from_pretrained(name)
    with parameters_on_meta():
        return AutoModelForCausalLM.from_config(config)


_FLOAT32, _BFLOAT16 = 4, 2


class MemoryEstimate(NamedTuple):
    """Bytes on each GPU when most is in use: in the backward pass of a step's second micro-batch or a later one.

    Attributes:
        parameters: float32 weights, or this rank's shards of them with the blocks that are gathered in bfloat16.
        gradients: float32 gradients or shards of them, and what of them is not yet summed over ranks.
        optimizer: AdamW's two moments in float32, or this rank's shards of them.
        activations: what forward keeps for backward, and the block at work.
        head: the fused head's logits and gradients.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self)


def estimate_memory(
    model: nn.Module,
    *,
    tokens: int,
    ranks: int = 1,
    gradient_checkpointing: bool | str = "full",
    sync_micro_batches: bool = True,
) -> MemoryEstimate:
    """Memory per GPU under ``bf16-mixed`` with AdamW: unsharded on one rank, by FSDP2 on several.

    For transformers models built as Llama is (attention with projections, norms in float32, a gated MLP); fragments,
    the CUDA context and NCCL's buffers, a few GiB, come on top.

    Args:
        model: the model; on the meta device it takes no memory to ask.
        tokens: of a micro-batch, padding included.
        ranks: GPUs that share the model.
        gradient_checkpointing: as in :class:`~dft_lightning.modules.LoadingOptions`.
        sync_micro_batches: as in :class:`~dft_lightning.distributed.ShardingOptions`; ``False`` and several
            micro-batches a step keep a whole float32 gradient on each rank.
    """
    config: Any = model.config
    blocks = find_blocks(model)
    total = _numel(model)
    sizes = [_numel(each) for each in blocks]
    block, rest = max(sizes), total - sum(sizes)
    if ranks == 1:
        between, gathered, unreduced = _FLOAT32, total * _BFLOAT16, 0  # autocast keeps a copy of what it has cast
    else:
        # The block at work, and the next one with the buffer that it is gathered in.
        between, gathered = _BFLOAT16, (rest + 3 * block) * _BFLOAT16
        # Gradients before they are summed, in bfloat16, and the buffer that they are summed from. A head that is not
        # tied is summed before the blocks and the embedding are.
        waiting = block + rest - sum(_numel(end) for end in ends_apart(model)[1:])
        unreduced = waiting * (_BFLOAT16 + _FLOAT32) if sync_micro_batches else total * _FLOAT32
    at_work = tokens * _block_bytes_per_token(config, between)
    inputs, products = tokens * config.hidden_size * between, tokens * _product_bytes_per_token(config)
    # As many tokens as a chunk has where memory is not short.
    logits, chunks = tokens * config.vocab_size * _BFLOAT16, max(1, tokens // CUDA_CHUNK_ROWS)
    chunk = min(logits, max(DEFAULT_CHUNK_BYTES, logits // chunks))
    head_gradients = config.vocab_size * config.hidden_size * _FLOAT32 + tokens * config.hidden_size * _FLOAT32
    return MemoryEstimate(
        parameters=total * _FLOAT32 // ranks + gathered,
        gradients=total * _FLOAT32 // ranks + unreduced,
        optimizer=2 * total * _FLOAT32 // ranks,
        activations=_activations(gradient_checkpointing, len(blocks), inputs, products, at_work),
        head=chunk + head_gradients,
    )


def _activations(choice: bool | str, blocks: int, inputs: int, products: int, at_work: int) -> int:
    """What all blocks keep, and the one whose activations are there again."""
    if choice is False:
        return blocks * at_work
    again = -(-blocks // int(str(choice).removeprefix("every_"))) if str(choice).startswith("every_") else blocks
    kept = {"offload": 0, "selective": inputs + products}.get(str(choice), inputs)
    return again * kept + (blocks - again) * at_work + at_work


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _block_bytes_per_token(config: Any, between: int) -> int:
    """What one block keeps for its backward, per token; ``between`` are the bytes of an activation between blocks."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_attention_heads * head_dim
    # Each norm: its input in float32, the normed values as it was given them, and its output in bfloat16.
    norms = 2 * config.hidden_size * (_FLOAT32 + between + _BFLOAT16)
    # Queries, keys and values (repeated for the heads that share them), and the output before its projection.
    projections = 4 * attention * _BFLOAT16
    # Gate and up projection, the gate's activation and the product.
    mlp = 4 * config.intermediate_size * _BFLOAT16
    return int(norms + projections + mlp)


def _product_bytes_per_token(config: Any) -> int:
    """The outputs of a block's products and of its attention, per token."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention, shared = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    return int((2 * attention + 2 * shared + 2 * config.hidden_size + 2 * config.intermediate_size) * _BFLOAT16)


def table(models: list[str]) -> str:
    """A row for each model and number of GPUs, in GiB per GPU."""
    lines = [
        "| model | GPUs | parameters | gradients | optimizer | activations | head | sum | reduced once a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in models:
        model = empty_model(name)
        for gpus in GPUS:
            parts = estimate_memory(model, tokens=TOKENS, ranks=gpus)
            whole = estimate_memory(model, tokens=TOKENS, ranks=gpus, sync_micro_batches=False)
            cells = [*parts, parts.total, whole.total]
            lines.append(f"| {name} | {gpus} | " + " | ".join(f"{cell / 2**30:.1f}" for cell in cells) + " |")
    return "\n".join(lines)


def activations_table(models: list[str]) -> str:
    """A row for each model: GiB of activations on one of several GPUs under each choice of gradient checkpointing."""
    lines = ["| model | " + " | ".join(str(choice or "none") for choice in CHOICES) + " |", "|---" * 7 + "|"]
    for name in models:
        model = empty_model(name)
        parts = [estimate_memory(model, tokens=TOKENS, ranks=8, gradient_checkpointing=choice) for choice in CHOICES]
        lines.append(f"| {name} | " + " | ".join(f"{part.activations / 2**30:.1f}" for part in parts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    models = sys.argv[1:] or list(MODELS)
    print(table(models), activations_table(models), sep="\n\n")
