"""Published configurations of well-known models, for runs with random weights."""

from __future__ import annotations


def _opt(hidden_size: int, layers: int, heads: int, **more: object) -> dict[str, object]:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "torch_dtype": "float16",
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden_size,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": hidden_size,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    } | more


def _llama(hidden_size: int, layers: int, heads: int, ffn_size: int, context: int, **more: object) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn_size,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32000,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | more


_LLAMA_3_8B: dict[str, object] = {
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_MISTRAL_7B: dict[str, object] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
}

SHAPES: dict[str, dict[str, object]] = {
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "llama-2-7b": _llama(4096, 32, 32, 11008, 4096),
    "llama-2-13b": _llama(5120, 40, 40, 13824, 4096),
    "llama-3-8b": _llama(4096, 32, 32, 14336, 8192, **_LLAMA_3_8B),
    "mistral-7b": _llama(4096, 32, 32, 14336, 32768, **_MISTRAL_7B),
}
"""Name to config.json values."""
