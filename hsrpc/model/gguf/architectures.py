"""From the metadata of a GGUF file to config.json: one reader for each `general.architecture`. A new one is a reader
and a line of the table at the end.

Keys and what llama.cpp takes for granted: its `gguf` package, conversion scripts and model files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from hsrpc.model.families.readers import DECODERS
from hsrpc.model.gguf.header import ARCHITECTURE, Header, Values

_REMEDY = "convert a model of one of these architectures, or fetch this one's safetensors"


def _llama(header: Header) -> Values:
    """Mixtral and Mistral as well: files say neither, and have no window."""
    if header.get("expert_count"):
        return {"model_type": "mixtral", **_experts(header, "num_local_experts"), "sliding_window": None}
    return {"model_type": "llama", **_biases(header), "mlp_bias": header.has("ffn_gate.bias")}


def _mistral3(header: Header) -> Values:
    beta = header.get("attention.temperature_scale")
    if beta is None:
        return _llama(header)
    scaling = _scaling(header) or {}
    more = {"mscale": 1.0, "mscale_all_dim": header.get("rope.scaling.yarn_log_multiplier", 1.0)}
    return {"model_type": "ministral3", "rope_scaling": {**scaling, **more, "llama_4_scaling_beta": beta}}


def _qwen2(header: Header) -> Values:
    return {"model_type": "qwen2"}


def _qwen2_moe(header: Header) -> Values:
    return {
        "model_type": "qwen2_moe",
        **_experts(header, "num_experts", "moe_intermediate_size"),
        "shared_expert_intermediate_size": header.width("ffn_down_shexp.weight"),
        "norm_topk_prob": False,
        "qkv_bias": header.has("attn_q.bias"),
    }


def _qwen3(header: Header) -> Values:
    return {"model_type": "qwen3", **_biases(header)}


def _qwen3_moe(header: Header) -> Values:
    return {
        "model_type": "qwen3_moe",
        **_biases(header),
        **_experts(header, "num_experts", "moe_intermediate_size"),
        "norm_topk_prob": True,
    }


def _olmoe(header: Header) -> Values:
    return {
        "model_type": "olmoe",
        **_biases(header),
        **_experts(header, "num_experts"),
        **header.values(clip_qkv="attention.clamp_kqv"),
        "norm_topk_prob": False,
    }


def _olmo2(header: Header) -> Values:
    if not header.get("attention.sliding_window"):
        return {"model_type": "olmo2", **_biases(header)}
    return {"model_type": "olmo3", **_biases(header), **_sliding(header, 4)}


def _smollm3(header: Header) -> Values:
    turned = [int((layer + 1) % 4 != 0) for layer in range(header.num_layers)]
    return {"model_type": "smollm3", **_biases(header), "no_rope_layers": turned}


def _exaone4(header: Header) -> Values:
    return {"model_type": "exaone4", **_sliding(header, 4)}


def _phi3(header: Header) -> Values:
    """Factors of LongRoPE are tensors; the trained context is a key of its own."""
    trained = header.get("rope.scaling.original_context_length", header.get("context_length"))
    values = {
        "model_type": "phi3",
        "sliding_window": header.get("attention.sliding_window") or None,
        "original_max_position_embeddings": trained,
        "partial_rotary_factor": _turned(header),
    }
    if "rope_factors_long.weight" not in header.tensors:
        return values
    factors = {key: header.floats(f"rope_factors_{key}.weight") for key in ("short", "long")}
    scaling = {"type": "longrope", **{f"{key}_factor": listed for key, listed in factors.items()}}
    return {**values, "rope_scaling": {**scaling, **header.values(attention_factor="rope.scaling.attn_factor")}}


def _gemma(header: Header) -> Values:
    return {"model_type": "gemma", "hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(header: Header) -> Values:
    """The largest model scales its queries by the width of a head as it would be without one of its own."""
    return {
        **_gemma(header),
        "model_type": "gemma2",
        **_sliding(header, 2, 4096),
        "query_pre_attn_scalar": _query_scalar(header, largest=46),
        "attn_logit_softcapping": header.get("attn_logit_softcapping"),
        "final_logit_softcapping": header.get("final_logit_softcapping"),
    }


def _gemma3(header: Header) -> Values:
    return {
        **_gemma2(header),
        "model_type": "gemma3_text",
        **_sliding(header, 6),
        "query_pre_attn_scalar": _query_scalar(header, largest=62),
        "rope_local_base_freq": header.number("rope.freq_base_swa", 10_000.0),
    }


def _granite(header: Header) -> Values:
    multipliers = header.values(
        attention_multiplier="attention.scale",
        embedding_multiplier="embedding_scale",
        residual_multiplier="residual_scale",
        logits_scaling="logit_scale",
    )
    return {"model_type": "granite", **_biases(header), **multipliers}


def _granite_moe(header: Header) -> Values:
    granite = {**_granite(header), **_experts(header, "num_local_experts"), "model_type": "granitemoe"}
    if not (shared := header.width("ffn_down_shexp.weight")):
        return granite
    return {**granite, "model_type": "granitemoeshared", "shared_intermediate_size": shared}


def _command_r(header: Header) -> Values:
    return {
        "model_type": "cohere",
        **_biases(header),
        **header.values(logit_scale="logit_scale"),
        "use_qk_norm": header.has("attn_q_norm.weight"),
    }


def _cohere2(header: Header) -> Values:
    return {
        "model_type": "cohere2",
        **_biases(header),
        **header.values(logit_scale="logit_scale"),
        **_sliding(header, 4),
    }


def _starcoder2(header: Header) -> Values:
    """No file says a window."""
    epsilon = header.values(norm_epsilon="attention.layer_norm_epsilon")
    return {"model_type": "starcoder2", **epsilon, "use_bias": header.has("attn_q.bias"), "sliding_window": None}


def _stablelm(header: Header) -> Values:
    return {
        "model_type": "stablelm",
        "partial_rotary_factor": _turned(header),
        "use_qkv_bias": header.has("attn_q.bias"),
        "use_parallel_residual": not header.has("ffn_norm.weight"),
        "qk_layernorm": header.has("attn_q_norm.weight"),
    }


def _gpt_neox(header: Header) -> Values:
    return {
        "model_type": "gpt_neox",
        "rotary_pct": _turned(header),
        "rotary_emb_base": header.number("rope.freq_base", 10_000.0),
        "use_parallel_residual": header.get("use_parallel_residual", True),
        "attention_bias": header.has("attn_qkv.bias"),
        "hidden_act": "gelu",
        "tie_word_embeddings": False,
    }


def _gpt_oss(header: Header) -> Values:
    """Its rotation is scaled as published: between whole pairs as well, which files do not say."""
    scaling = _scaling(header)
    return {
        "model_type": "gpt_oss",
        **_experts(header, "num_local_experts", "intermediate_size"),
        **_sliding(header, 2, 128),
        "attention_bias": header.has("attn_q.bias"),
        **_if_scaled(scaling and {**scaling, "truncate": False}),
    }


def _glm4_moe(header: Header) -> Values:
    return {
        "model_type": "glm4_moe",
        **_deepseek_experts(header),
        "attention_bias": header.has("attn_q.bias"),
        "use_qk_norm": header.has("attn_q_norm.weight"),
        "partial_rotary_factor": _turned(header),
    }


def _seed_oss(header: Header) -> Values:
    biases = {"attention_bias": header.has("attn_q.bias"), "attention_out_bias": header.has("attn_output.bias")}
    return {"model_type": "seed_oss", **biases}


def _deepseek2(header: Header) -> Values:
    """DeepSeek-V2; and V3, Kimi and GLM-4.7-Flash, which choose their experts with a correction. Where newer files have
    the widths of the latent, and those of keys and values under other names, older ones have these."""
    keys, rotated = header.get("attention.key_length_mla", header.get("attention.key_length")), _rope_dim(header)
    scaling = _scaling(header)
    if scaling is not None and header.get("rope.scaling.yarn_log_multiplier"):
        scale = round(10 * header.number("rope.scaling.yarn_log_multiplier", 0.1), 6)
        scaling |= dict.fromkeys(("mscale", "mscale_all_dim"), scale)
    corrected = header.has("exp_probs_b.bias")
    return {
        "model_type": "deepseek_v3" if corrected else "deepseek_v2",
        **_deepseek_experts(header),
        "num_key_value_heads": header.get("attention.head_count"),
        "q_lora_rank": header.get("attention.q_lora_rank") if header.has("attn_q_a.weight") else None,
        "kv_lora_rank": header.get("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": keys - rotated if isinstance(keys, int) else None,
        "v_head_dim": header.get("attention.value_length_mla", header.get("attention.value_length")),
        "head_dim": rotated,
        **_if_scaled(scaling),
    }


def _deepseek_experts(header: Header) -> Values:
    groups = header.get("expert_group_count") or 1
    return {
        **_experts(header, "n_routed_experts", "moe_intermediate_size"),
        "n_shared_experts": header.get("expert_shared_count", 0),
        "first_k_dense_replace": header.get("leading_dense_block_count", 0),
        "routed_scaling_factor": header.get("expert_weights_scale") or 1.0,
        "norm_topk_prob": header.get("expert_weights_norm", False),
        "n_group": groups,
        "topk_group": header.get("expert_group_used_count") or 1,
        "topk_method": "greedy" if groups == 1 else "group_limited_greedy",
    }


def _experts(header: Header, count: str, width: str = "intermediate_size") -> Values:
    """Keys of the number of experts, of those of a token, and of their width, which older files say by shapes alone."""
    own = header.width("ffn_down_exps.weight") or header.width("ffn_down.0.weight")
    sizes: Values = {width: own} if own else {}
    return {**header.values(**{count: "expert_count", "num_experts_per_tok": "expert_used_count"}), **sizes}


def _biases(header: Header) -> Values:
    return {"attention_bias": header.has("attn_q.bias")}


def _sliding(header: Header, period: int, usual: int | None = None) -> Values:
    """A window, and the layers that have it; without one all see everything."""
    if not (window := header.get("attention.sliding_window", usual)):
        return {"sliding_window": None, "layer_types": ["full_attention"] * header.num_layers}
    return {"sliding_window": window, "layer_types": header.layer_types(period)}


def _query_scalar(header: Header, largest: int) -> object:
    size, heads = header.get("embedding_length"), header.get("attention.head_count")
    if header.num_layers == largest and isinstance(size, int) and isinstance(heads, int) and heads:
        return size // heads
    return _head_dim(header)


def _rope_dim(header: Header) -> int:
    """Dimensions of a head that are rotated."""
    value = header.get("rope.dimension_count")
    return value if isinstance(value, int) and value > 0 else _head_dim(header)


def _turned(header: Header) -> float:
    """Share of a head that is rotated."""
    return _rope_dim(header) / _head_dim(header)


def _head_dim(header: Header) -> int:
    """As the tensor of the queries has it, or else the file's keys."""
    heads = header.metadata.integer(f"{header.architecture}.attention.head_count", maximum=1 << 20)
    if (queries := header.first("attn_q.weight")) is not None and len(queries.shape) == 2:
        return queries.shape[0] // heads
    size = header.get("attention.key_length", header.get("embedding_length", 0))
    whole = size if isinstance(size, int) else 0
    return whole if header.get("attention.key_length") else whole // heads


def _scaling(header: Header) -> Values | None:
    return header.rope_scaling(header.number("rope.freq_base", 10_000.0), _rope_dim(header))


def _if_scaled(scaling: Values | None) -> Values:
    return {} if scaling is None else {"rope_scaling": scaling}


class Architecture(NamedTuple):
    """A `general.architecture`."""

    read: Callable[[Header], Values]
    neighbours: bool = False
    """Rows of queries and keys are in the order of a rotation of neighbours, where Hugging Face's rotates halves."""
    offset: float = 0.0
    """Added to the weights of norms."""
    turn_ends: bool = True
    """What ends a turn ends the output: not where a turn has several parts."""


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, neighbours=True),
    "mistral3": Architecture(_mistral3, neighbours=True),
    "qwen2": Architecture(_qwen2),
    "qwen2moe": Architecture(_qwen2_moe),
    "qwen3": Architecture(_qwen3),
    "qwen3moe": Architecture(_qwen3_moe),
    "olmoe": Architecture(_olmoe),
    "olmo2": Architecture(_olmo2),
    "smollm3": Architecture(_smollm3, neighbours=True),
    "exaone4": Architecture(_exaone4),
    "phi3": Architecture(_phi3),
    "gemma": Architecture(_gemma, offset=1.0),
    "gemma2": Architecture(_gemma2, offset=1.0),
    "gemma3": Architecture(_gemma3, offset=1.0),
    "granite": Architecture(_granite, neighbours=True),
    "granitemoe": Architecture(_granite_moe, neighbours=True),
    "command-r": Architecture(_command_r),
    "cohere2": Architecture(_cohere2),
    "starcoder2": Architecture(_starcoder2),
    "stablelm": Architecture(_stablelm),
    "gptneox": Architecture(_gpt_neox),
    "gpt-oss": Architecture(_gpt_oss, turn_ends=False),
    "glm4moe": Architecture(_glm4_moe),
    "seed_oss": Architecture(_seed_oss),
    "deepseek2": Architecture(_deepseek2),
}


def architecture_of(header: Header) -> Architecture:
    """The file's architecture.

    Raises:
        CheckpointError: it is none that can be converted.
    """
    if header.architecture not in ARCHITECTURES:
        raise header.metadata.refuse(ARCHITECTURE, "one of " + ", ".join(ARCHITECTURES), _REMEDY)
    return ARCHITECTURES[header.architecture]


def read_config(header: Header) -> Values:
    """The model's config.json, but for the element type of its weights.

    Raises:
        CheckpointError: the architecture is none that can be converted, or a key or tensor that it needs is missing.
    """
    read = architecture_of(header).read
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise header.missing("token_embd.weight")
    common = header.values(
        hidden_size="embedding_length",
        intermediate_size="feed_forward_length",
        num_attention_heads="attention.head_count",
        num_key_value_heads="attention.head_count_kv",
        max_position_embeddings="context_length",
        rms_norm_eps="attention.layer_norm_rms_epsilon",
        layer_norm_eps="attention.layer_norm_epsilon",
    )
    values: Values = {
        "vocab_size": embedding.shape[0],
        "num_hidden_layers": header.num_layers,
        "head_dim": _head_dim(header),
        "rope_theta": header.number("rope.freq_base", 10_000.0),
        **_if_scaled(_scaling(header)),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **common,
        **_ids(header),
        **read(header),
    }
    kind = DECODERS[str(values["model_type"])]
    return {"architectures": [kind.architecture], **values}


def _ids(header: Header) -> Values:
    """Null where the file has none: transformers would take those of some other model."""
    tokens = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: header.metadata.values.get(f"tokenizer.ggml.{key}_token_id") for name, key in tokens.items()}
