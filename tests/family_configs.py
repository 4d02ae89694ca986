"""A tiny config of every causal model type that the installed transformers has.

Most are made by the names of the attributes that a config class has; what that leaves wrong is in a table by type.
"""

from __future__ import annotations

import functools
import math
from typing import Any

VOCABULARY = 97
WINDOW = 7
CHUNK = 8

_LAYERS = 2
_SIZES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (VOCABULARY, ("vocab_size", "vocab_size_per_layer_input", "output_vocab_size")),
    (
        32,
        (
            *("hidden_size", "d_model", "n_embd", "dim_model", "embedding_size", "embedding_dim", "emb_dim"),
            *("word_embed_proj_dim", "attention_hidden_size", "lru_width", "cross_attention_hidden_size"),
            *("input_embedding_size", "output_embedding_size", "projection_dim", "block_ff_dim"),
        ),
    ),
    (
        48,
        (
            *("intermediate_size", "ffn_dim", "d_inner", "dff", "dim_ff", "encoder_ffn_dim", "decoder_ffn_dim"),
            *("ffn_hidden_size", "n_inner", "feed_forward_size", "dense_intermediate_size", "intermediate_size_mlp"),
            *("prefix_dense_intermediate_size", "shared_intermediate_size", "shared_experts_intermediate_size"),
        ),
    ),
    (
        16,
        (
            *("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"),
            *("moe_shared_expert_intermediate_size", "moe_latent_size", "router_hidden_size"),
            *("index_n_heads", "indexer_n_heads"),  # few would leave scores of exactly 0, and a draw among them
        ),
    ),
    (
        4,
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "encoder_attention_heads"),
            *("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"),
            *("swa_num_attention_heads", "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
            *("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads", "index_topk"),
            *("mamba_num_heads", "n_mamba_heads", "num_mem_heads"),
            *("mamba_d_conv", "conv_kernel", "linear_conv_kernel_dim", "short_conv_kernel_size"),
            *("time_step_rank", "mamba_dt_rank", "laurel_rank", "gated_norm_rank", "hc_lowrank", "adapter_rank"),
            *("qk_rope_head_dim", "hidden_size_per_layer_input", "chunk_size", "mamba_chunk_size", "rotary_dim"),
            *("num_query_groups",),
        ),
    ),
    (
        8,
        (
            *("head_dim", "swa_head_dim", "dim_head", "d_head", "attention_head_dim", "kv_channels", "v_head_dim"),
            *("qk_nope_head_dim", "q_lora_rank", "kv_lora_rank", "o_lora_rank", "index_head_dim", "indexer_head_dim"),
            *(
                "linear_key_head_dim",
                "linear_value_head_dim",
                "linear_head_dim",
                "attention_head_size",
                "mamba_n_heads",
            ),
            *("mamba_d_state", "state_size", "ssm_state_size", "mamba_head_dim", "mamba_d_head", "global_head_dim"),
        ),
    ),
    (12, ("qk_head_dim",)),
    (
        2,
        (
            *("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "indexer_kv_heads"),
            *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k", "mamba_ngroups"),
            *("num_global_key_value_heads", "n_groups", "mamba_n_groups"),
        ),
    ),
    (
        1,
        (
            *("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"),
            *("first_k_dense_replace", "num_dense_layers", "max_window_layers", "decoder_sparse_step"),
            *("moe_layer_start_index", "num_kv_shared_layers", "num_nextn_predict_layers", "moe_layer_interval"),
        ),
    ),
    (
        64,
        (
            *("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "max_source_positions"),
            *("max_seq_len", "context_length", "model_max_length"),
        ),
    ),
    (
        WINDOW,
        (
            *("sliding_window", "sliding_window_size", "window_size", "attention_window_size", "local_attention"),
            *("keep_window_size", "local_attention_window_len"),
        ),
    ),
    (CHUNK, ("attention_chunk_size",)),
)
_SIZE_OF = {name: size for size, names in _SIZES for name in names}
_SWITCHES = {"use_sliding_window": True, "use_mamba_kernels": False}
_LAYER_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
    *("num_decoder_layers", "num_encoder_layers", "num_blocks"),
)
_LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")


# Types whose tokens see what comes after them as their config comes, and what makes decoders of them.
_DECODER = {"is_decoder": True}
_ENCODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
SEE_THE_FUTURE = {**dict.fromkeys(_ENCODERS, _DECODER), "xlm": {"causal": True}, "xlnet": {"attn_type": "uni"}}


def as_decoder(model_type: str) -> str:
    """The name of a type with what makes a decoder of it."""
    ((key, value),) = SEE_THE_FUTURE[model_type].items()
    return f"{model_type} ({key}: {str(value).lower()})"


def tiny_config(name: str) -> Any:
    """A tiny config of a type, or of a type :func:`as_decoder`."""
    from transformers import AutoConfig

    model_type = name.partition(" ")[0]
    special = _OF_TYPE.get(model_type, {})
    values = _merged(_values(_default_config(model_type), special), special)
    return AutoConfig.for_model(model_type, **values, **(SEE_THE_FUTURE[model_type] if model_type != name else {}))


@functools.cache
def _default_config(model_type: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **_NEEDED.get(model_type, {}))


def _merged(made: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    found = dict(made)
    for name, value in special.items():
        if isinstance(value, dict) and isinstance(found.get(name), dict) and name.endswith("_config"):
            found[name] = _merged(found[name], value)
        else:
            found[name] = value
    return found


def _values(config: Any, special: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    given = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    layers = _layers(given, special)
    for name, value in given.items():
        if hasattr(value, "to_dict"):
            inner = _values(value, special.get(name, {}))
            found[name] = {"model_type": value.model_type, **inner} if value.model_type else inner
        elif name in _LAYER_COUNTS:
            found[name] = layers
        elif name in _LAYER_KINDS and value:
            kinds = list(special.get(name) or dict.fromkeys(value))
            found[name] = [kinds[i % len(kinds)] for i in range(layers)]
        elif name in _SIZE_OF and isinstance(value, int) and not isinstance(value, bool):
            found[name] = _SIZE_OF[name] if value else value
        elif name in _SWITCHES:
            found[name] = _SWITCHES[name]
        elif ("drop" in name or "jitter" in name) and isinstance(value, float):
            found[name] = 0.0
        elif name.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
            found[name] = {"pad": 0, "bos": 1, "eos": 2}.get(name.removesuffix("_token_id"), VOCABULARY - 1)
    if given.get("kv_lora_rank"):
        found["num_key_value_heads"] = found["num_attention_heads"]  # of one latent vector
    if given.get("qk_rope_head_dim") and given.get("head_dim") == given["qk_rope_head_dim"]:
        found["head_dim"] = found["qk_rope_head_dim"]
    if given.get("use_sliding_window") is not None and "layer_types" in given:
        found["sliding_window"] = WINDOW
        found["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    return found


def _layers(given: dict[str, Any], special: dict[str, Any]) -> int:
    """As many as there are kinds of layers, of each sort of kind."""
    for name in _LAYER_COUNTS:
        if name in special:
            return int(special[name])
    kinds = [special.get(name) or list(dict.fromkeys(given.get(name) or ())) for name in _LAYER_KINDS]
    return (
        math.lcm(*(max(len(each), 1) for each in kinds), _LAYERS) if max(map(len, kinds)) <= 2 else max(map(len, kinds))
    )


_NO_PER_LAYER_INPUT = {
    "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
}
# What a type's default config cannot be made without.
_NEEDED: dict[str, dict[str, Any]] = {"gemma4_assistant": _NO_PER_LAYER_INPUT}

_BLT_PART = {"num_key_value_heads": 4}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ZAMBA = {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4}
_DOTS3 = {
    "layer_types": ["indexed_attention", "sliding_attention"],
    "head_dim": 16,
    "per_layer_config": {
        1: {
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "head_dim": 12,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "qk_rope_head_dim": 4,
        }
    },
}
_QWEN4_EXP = {
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 50,
    "heads_per_ngram": 2,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
    "eos_token_id": 2,
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
_INKLING2 = {"unpadded_vocab_size": VOCABULARY - 2, "n_layers_per_attn_res_block": 1}
_OF_TYPE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_config": {**_BLT_PART, "hidden_size_global": 64},
        "decoder_config": {**_BLT_PART, "hidden_size_global": 64},
        "global_config": {**_BLT_PART, "hidden_size": 64, "head_dim": 16},
        "patcher_config": _BLT_PART,
        "encoder_hash_byte_group_vocab": 50,
    },
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    | {"layer_types": ["full_attention", "sliding_attention"]},
    "dots3_note": {"text_config": _DOTS3, "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32}}
    | {"audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32}},
    "dots3_note_text": _DOTS3,
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma4_assistant": {"text_config": {"num_kv_shared_layers": 2}},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 2}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling2_loop_text": _INKLING2,
    "inkling2_text": _INKLING2,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "minicpm3": {"scale_emb": 1, "dim_model_base": 16},
    "ministral": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QWEN4_EXP},
    "qwen4_exp_text": _QWEN4_EXP,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 1,
        "lsh_attn_chunk_length": 1,
        "hash_seed": 0,
        "num_buckets": 4,
        "is_decoder": True,
    },
    "roc_bert": {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY}
    | {"pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_ZAMBA, "num_hidden_layers": 4, "n_mamba_heads": 2},
    "zamba2": _ZAMBA,
    "zaya": {"num_experts_per_tok": 1},
}
