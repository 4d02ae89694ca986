"""How much memory a GPU needs to train a model, worked out before one is rented."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from dft_lightning.distributed.sharding import find_blocks
from dft_lightning.ops.call import DEFAULT_CHUNK_BYTES

_FLOAT32, _BFLOAT16 = 4, 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each GPU when most is in use: in the backward pass of a step's second micro-batch or a later one.

    Attributes:
        parameters: float32 weights, or this rank's shards of them with the blocks that are gathered in bfloat16.
        gradients: float32, likewise, and what of them is not yet summed over ranks.
        optimizer: AdamW's two moments in float32, likewise.
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
        return self.parameters + self.gradients + self.optimizer + self.activations + self.head


def estimate_memory(
    model: nn.Module,
    *,
    tokens: int,
    ranks: int = 1,
    gradient_checkpointing: bool = True,
    sync_micro_batches: bool = True,
) -> MemoryEstimate:
    """Memory per GPU under ``bf16-mixed`` with AdamW: unsharded on one rank, by FSDP2 on several.

    For transformers models built as Llama is (attention with projections, norms in float32, a gated MLP); fragments,
    the CUDA context and NCCL's buffers, a few GiB, come on top.

    Args:
        model: the model; on the meta device it takes no memory to ask.
        tokens: of a micro-batch, padding included.
        ranks: GPUs that share the model.
        gradient_checkpointing: whether blocks are computed again in backward.
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
        # Gradients before they are summed, in bfloat16, and the buffer that they are summed from.
        unreduced = (block + rest) * (_BFLOAT16 + _FLOAT32) if sync_micro_batches else total * _FLOAT32
    at_work = tokens * _block_bytes_per_token(config, between)
    kept = len(blocks) * (tokens * config.hidden_size * between if gradient_checkpointing else at_work)
    chunk = min(DEFAULT_CHUNK_BYTES, tokens * config.vocab_size * _BFLOAT16)
    head_gradients = config.vocab_size * config.hidden_size * _FLOAT32 + tokens * config.hidden_size * _FLOAT32
    return MemoryEstimate(
        parameters=total * _FLOAT32 // ranks + gathered,
        gradients=total * _FLOAT32 // ranks + unreduced,
        optimizer=2 * total * _FLOAT32 // ranks,
        activations=kept + (at_work if gradient_checkpointing else 0),
        head=chunk + head_gradients,
    )


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
