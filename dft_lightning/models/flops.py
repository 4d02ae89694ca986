"""How many floating-point operations a model's training takes, by its matrices: what utilisation is measured by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dft_lightning.models.head import ends_of
from dft_lightning.models.layout import BatchLayout
from dft_lightning.models.row_checks import text_config


@dataclass(frozen=True)
class ModelFlops:
    """Operations of forward and backward, as "6 N D" counts them, and those of attention.

    A matrix of ``N`` values takes ``2 N`` operations a token in forward, as many for the gradient of its input, and as
    many for its own where it is trained. The head takes them for targets alone, and of experts those count that a token
    is sent to. Recomputing, the optimizer and everything that is no matrix product does not count.

    Source: Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B; here attention is causal, so that a token takes the
    products with the tokens before it.

    Attributes:
        of_token: operations of a token, attention left out.
        of_target: those of the head for a target.
        attention: of each layer with attention its width (heads times their size), its kind as in ``layer_types``, and
            its window or chunk, 0 for none.
    """

    of_token: float
    of_target: float
    attention: tuple[tuple[int, str, int], ...]

    @classmethod
    def of(cls, model: nn.Module) -> ModelFlops:
        """Of a model that is whole: not yet in shards or flattened."""
        _, head = ends_of(model)
        weight = getattr(head, "weight", None)
        looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        config = text_config(model)
        share = _share_of_experts(config)
        body = sum(
            _operations(parameter) * (share if ".experts." in f".{name}." else 1.0)
            for name, parameter in model.named_parameters()
            if parameter.ndim >= 2 and parameter is not weight and id(parameter) not in looked_up
            if not name.endswith("bias")  # of experts: one for each
        )
        return cls(body, 0.0 if weight is None else _operations(weight), _attention(config))

    def of_batch(self, layout: BatchLayout) -> float:
        """Operations of a micro-batch."""
        lengths = layout.documents if layout.documents is not None else [layout.shape[1]] * layout.shape[0]
        kinds = {(kind, span) for _, kind, span in self.attention}
        pairs = {(kind, span): sum(_pairs(length, kind, span) for length in lengths) for kind, span in kinds}
        attention = sum(12.0 * width * pairs[kind, span] for width, kind, span in self.attention)
        return self.of_token * layout.num_tokens + self.of_target * layout.num_targets + attention


def _operations(parameter: Tensor) -> float:
    state = getattr(parameter, "quant_state", None)  # of a base in 4 bits, the shape that it stands for
    size = parameter.numel() if state is None else int(state.shape.numel())
    return (6.0 if parameter.requires_grad else 4.0) * size


def _share_of_experts(config: Any) -> float:
    """Of the values of all experts, those that a token meets."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    numbers = [number for name in names if isinstance(number := getattr(config, name, None), int) and number > 0]
    taken = getattr(config, "num_experts_per_tok", None)
    return taken / numbers[0] if numbers and isinstance(taken, int) else 1.0


def _attention(config: Any) -> tuple[tuple[int, str, int], ...]:
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None)
    if size is None and isinstance(heads, int) and isinstance(width := getattr(config, "hidden_size", None), int):
        size = width // heads
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(size, int)):
        return ()
    spans = {"full_attention": 0}
    spans["sliding_attention"] = getattr(config, "sliding_window", None) or 0
    spans["chunked_attention"] = getattr(config, "attention_chunk_size", None) or 0
    plain = "sliding_attention" if spans["sliding_attention"] else "full_attention"
    kinds = getattr(config, "layer_types", None) or [plain] * layers
    # What is no attention (linear, recurrent) is counted by its matrices alone.
    return tuple((heads * size, kind, spans[kind]) for kind in kinds if kind in spans)


def _pairs(length: int, kind: str, span: int) -> int:
    """Pairs of a token and one that it attends to, itself among them: in all, in its window or in its chunk."""
    if not 0 < span < length:
        return length * (length + 1) // 2
    if kind == "sliding_attention":
        return span * (span + 1) // 2 + (length - span) * span
    whole, rest = divmod(length, span)
    return whole * span * (span + 1) // 2 + rest * (rest + 1) // 2
