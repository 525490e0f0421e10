"""Published configurations of well-known models, for runs with random weights."""

from __future__ import annotations

from difflib import get_close_matches
from functools import partial
from typing import Any

RANDOM_PREFIX = "random:"
"""`random:opt-6.7b`, or `random:` and the path of a config.json: random weights and no tokenizer, for measurements."""
_LIKENESS = 0.7
"""From which a name is taken for a misspelt one of a shape."""


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


def _decoder(
    model_type: str,
    architecture: str,
    *,
    hidden: int,
    layers: int,
    heads: tuple[int, int],
    ffn: int,
    vocab: int,
    context: int,
    **more: object,
) -> dict[str, object]:
    """`heads` are those of the queries, and those of K and V."""
    grouped = {} if heads[0] == heads[1] else {"num_key_value_heads": heads[1]}
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "intermediate_size": ffn,
        "max_position_embeddings": context,
        "vocab_size": vocab,
        **grouped,
        **more,
    }


_llama = partial(_decoder, "llama", "LlamaForCausalLM", rms_norm_eps=1e-5)
_mistral = partial(_decoder, "mistral", "MistralForCausalLM", rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
_qwen2 = partial(_decoder, "qwen2", "Qwen2ForCausalLM", rms_norm_eps=1e-6, rope_theta=1e6, eos_token_id=151645)
_qwen3 = partial(
    _decoder,
    "qwen3",
    "Qwen3ForCausalLM",
    vocab=151936,
    context=40960,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    bos_token_id=151643,
    eos_token_id=151645,
)
_olmo2 = partial(
    _decoder,
    "olmo2",
    "Olmo2ForCausalLM",
    vocab=100352,
    context=4096,
    rms_norm_eps=1e-6,
    rope_theta=500000.0,
    eos_token_id=100257,
    pad_token_id=100277,
)
_phi3 = partial(_decoder, "phi3", "Phi3ForCausalLM", rms_norm_eps=1e-5)
_gemma = partial(
    _decoder,
    "gemma",
    "GemmaForCausalLM",
    vocab=256000,
    context=8192,
    head_dim=256,
    rms_norm_eps=1e-6,
    bos_token_id=2,
    eos_token_id=1,
    pad_token_id=0,
)
_LLAMA_2: dict[str, Any] = {"vocab": 32000, "context": 4096, "dtype": "float16", "bos_token_id": 1, "eos_token_id": 2}
_LLAMA_3: dict[str, Any] = {"vocab": 128256, "rope_theta": 500000.0, "bos_token_id": 128000, "eos_token_id": 128001}
_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA_31: dict[str, Any] = _LLAMA_3 | {"context": 131072, "rope_scaling": _LLAMA_3_ROPE}


def _deepseek(model_type: str, architecture: str, *, experts: tuple[int, int, int], **more: Any) -> dict[str, object]:
    """`experts`: how many, how many a token takes, and the width of each."""
    count, k, width = experts
    latents: dict[str, Any] = {
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "first_k_dense_replace": 1,
        "n_routed_experts": count,
        "num_experts_per_tok": k,
        "moe_intermediate_size": width,
        "n_shared_experts": 1,
    }
    return _decoder(model_type, architecture, **latents | more)


_V2_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
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
    "llama-2-7b": _llama(hidden=4096, layers=32, heads=(32, 32), ffn=11008, **_LLAMA_2),
    "llama-2-13b": _llama(hidden=5120, layers=40, heads=(40, 40), ffn=13824, **_LLAMA_2),
    "llama-3-8b": _llama(hidden=4096, layers=32, heads=(32, 8), ffn=14336, context=8192, **_LLAMA_3),
    "llama-3.1-8b": _llama(hidden=4096, layers=32, heads=(32, 8), ffn=14336, **_LLAMA_31),
    "llama-3.3-70b": _llama(hidden=8192, layers=80, heads=(64, 8), ffn=28672, **_LLAMA_31),
    "mistral-7b": _mistral(
        hidden=4096, layers=32, heads=(32, 8), ffn=14336, vocab=32000, context=32768, sliding_window=4096
    ),
    "mistral-small-24b": _mistral(
        hidden=5120,
        layers=40,
        heads=(32, 8),
        ffn=32768,
        vocab=131072,
        context=32768,
        head_dim=128,
        rope_theta=1e8,
    ),
    "qwen2.5-7b": _qwen2(hidden=3584, layers=28, heads=(28, 4), ffn=18944, vocab=152064, context=32768),
    "qwen2.5-72b": _qwen2(hidden=8192, layers=80, heads=(64, 8), ffn=29568, vocab=152064, context=32768),
    "qwen3-0.6b": _qwen3(hidden=1024, layers=28, heads=(16, 8), ffn=3072, tie_word_embeddings=True),
    "qwen3-8b": _qwen3(hidden=4096, layers=36, heads=(32, 8), ffn=12288),
    "qwen3-14b": _qwen3(hidden=5120, layers=40, heads=(40, 8), ffn=17408),
    "qwen3-32b": _qwen3(hidden=5120, layers=64, heads=(64, 8), ffn=25600),
    "olmo-2-7b": _olmo2(hidden=4096, layers=32, heads=(32, 32), ffn=11008),
    "olmo-2-13b": _olmo2(hidden=5120, layers=40, heads=(40, 40), ffn=13824),
    "phi-3-mini": _phi3(
        hidden=3072,
        layers=32,
        heads=(32, 32),
        ffn=8192,
        vocab=32064,
        context=4096,
        sliding_window=2047,
        bos_token_id=1,
        eos_token_id=32000,
    ),
    "phi-4": _phi3(
        hidden=5120,
        layers=40,
        heads=(40, 10),
        ffn=17920,
        vocab=100352,
        context=16384,
        rope_theta=250000.0,
        bos_token_id=100257,
        eos_token_id=100265,
    ),
    "gemma-2b": _gemma(hidden=2048, layers=18, heads=(8, 1), ffn=16384),
    "gemma-7b": _gemma(hidden=3072, layers=28, heads=(16, 16), ffn=24576),
    "granite-3.3-8b": _decoder(
        "granite",
        "GraniteForCausalLM",
        hidden=4096,
        layers=40,
        heads=(32, 8),
        ffn=12800,
        vocab=49159,
        context=131072,
        rms_norm_eps=1e-5,
        rope_theta=1e7,
        tie_word_embeddings=True,
        embedding_multiplier=12.0,
        attention_multiplier=0.0078125,
        residual_multiplier=0.22,
        logits_scaling=16.0,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "command-r": _decoder(
        "cohere",
        "CohereForCausalLM",
        hidden=8192,
        layers=40,
        heads=(64, 64),
        ffn=22528,
        vocab=256000,
        context=131072,
        dtype="float16",
        layer_norm_eps=1e-5,
        rope_theta=8e6,
        logit_scale=0.0625,
        bos_token_id=5,
        eos_token_id=255001,
    ),
    "starcoder2-15b": _decoder(
        "starcoder2",
        "Starcoder2ForCausalLM",
        hidden=6144,
        layers=40,
        heads=(48, 4),
        ffn=24576,
        vocab=49152,
        context=16384,
        norm_epsilon=1e-5,
        rope_theta=100000.0,
        sliding_window=4096,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "stablelm-3b": _decoder(
        "stablelm",
        "StableLmForCausalLM",
        hidden=2560,
        layers=32,
        heads=(32, 32),
        ffn=6912,
        vocab=50304,
        context=4096,
        layer_norm_eps=1e-5,
        partial_rotary_factor=0.25,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "deepseek-v2-lite": _deepseek(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        hidden=2048,
        layers=27,
        heads=(16, 16),
        ffn=10944,
        vocab=102400,
        context=163840,
        experts=(64, 6, 1408),
        n_shared_experts=2,
        topk_method="greedy",
        routed_scaling_factor=1.0,
        norm_topk_prob=False,
        rope_scaling=_V2_YARN,
        bos_token_id=100000,
        eos_token_id=100001,
    ),
    "deepseek-v2": _deepseek(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        hidden=5120,
        layers=60,
        heads=(128, 128),
        ffn=12288,
        vocab=102400,
        context=163840,
        experts=(160, 6, 1536),
        q_lora_rank=1536,
        n_shared_experts=2,
        topk_method="group_limited_greedy",
        n_group=8,
        topk_group=3,
        routed_scaling_factor=16.0,
        norm_topk_prob=False,
        rope_scaling=_V2_YARN,
        bos_token_id=100000,
        eos_token_id=100001,
    ),
    "deepseek-v3": _deepseek(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        hidden=7168,
        layers=61,
        heads=(128, 128),
        ffn=18432,
        vocab=129280,
        context=163840,
        experts=(256, 8, 2048),
        first_k_dense_replace=3,
        q_lora_rank=1536,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        rope_scaling=_V2_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        bos_token_id=0,
        eos_token_id=1,
    ),
    "kimi-k2": _deepseek(
        "kimi_k2",
        "DeepseekV3ForCausalLM",
        hidden=7168,
        layers=61,
        heads=(64, 64),
        ffn=18432,
        vocab=163840,
        context=131072,
        experts=(384, 8, 2048),
        q_lora_rank=1536,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.827,
        rope_theta=50000.0,
        rope_scaling=_V2_YARN | {"factor": 32, "beta_fast": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
        bos_token_id=163584,
        eos_token_id=163585,
    ),
    "glm-4.7-flash": _deepseek(
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        hidden=2048,
        layers=47,
        heads=(20, 20),
        ffn=10240,
        vocab=154880,
        context=202752,
        experts=(64, 4, 1536),
        q_lora_rank=768,
        qk_nope_head_dim=192,
        v_head_dim=256,
        routed_scaling_factor=1.8,
        rope_theta=1_000_000.0,
        bos_token_id=0,
        eos_token_id=[154820, 154827, 154829],
    ),
    "pythia-12b": _decoder(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        hidden=5120,
        layers=36,
        heads=(40, 40),
        ffn=20480,
        vocab=50688,
        context=2048,
        dtype="float16",
        rotary_pct=0.25,
        bos_token_id=0,
        eos_token_id=0,
    ),
}
"""Name to config.json values."""


def random_models(name: str) -> list[str]:
    """Models of random weights that a model called `name` may stand for: its shape, else those called nearly so."""
    shape = name.lower()
    found = [shape] if shape in SHAPES else get_close_matches(shape, SHAPES, cutoff=_LIKENESS)
    return [RANDOM_PREFIX + each for each in found]
