"""Models of each architecture, written as llama.cpp does, come back as they were: weights, settings and logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from hsrpc.config import DType
from hsrpc.model.convert import convert_checkpoint
from hsrpc.model.families.decoder import Decoder
from hsrpc.model.families.registry import create_family
from hsrpc.model.spec import load_spec
from tests.engine.reference import spread_norms
from tests.model.gguf.writer import write_gguf

SIZES = {
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "bos_token_id": 0,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERT_KEYS = {"expert_count": 4, "expert_used_count": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
}
WINDOW, WINDOW_KEYS = {"sliding_window": 8}, {"attention.sliding_window": 8}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    **EXPERTS,
}
LATENT_KEYS = {
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": 16,
    "attention.kv_lora_rank": 32,
    "attention.key_length": 36,
    "attention.value_length": 32,
    "attention.key_length_mla": 12,
    "attention.value_length_mla": 8,
    "rope.dimension_count": 4,
    "expert_shared_count": 1,
    "leading_dense_block_count": 1,
    "expert_group_count": 2,
    "expert_group_used_count": 1,
    "expert_weights_scale": 2.5,
    "rope.scaling.yarn_log_multiplier": 0.0707,
    **EXPERT_KEYS,
    **YARN_KEYS,
}
GRANITE = {"embedding_multiplier": 1.5, "attention_multiplier": 0.5, "residual_multiplier": 0.75, "logits_scaling": 2.0}
GRANITE_KEYS = {"embedding_scale": 1.5, "attention.scale": 0.5, "residual_scale": 0.75, "logit_scale": 2.0}
CASES: dict[str, tuple[str, str, dict[str, object], dict[str, object]]] = {
    "llama": ("llama", "llama", {}, {}),
    "llama-biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, {}),
    "llama-linear": (
        "llama",
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
        {"rope.scaling.factor": 2.0},
    ),
    "llama-yarn": ("llama", "llama", {"rope_parameters": YARN}, YARN_KEYS),
    "mistral-nemo": ("llama", "mistral", {"head_dim": 16, "sliding_window": None}, {}),
    "mixtral": ("llama", "mixtral", {"num_local_experts": 4, "sliding_window": None}, EXPERT_KEYS),
    "ministral3": (
        "mistral3",
        "ministral3",
        {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.25}},
        YARN_KEYS | {"attention.temperature_scale": 0.25, "rope.scaling.yarn_log_multiplier": 1.0},
    ),
    "mistral-small": ("mistral3", "mistral", {"sliding_window": None}, {}),
    "qwen2": ("qwen2", "qwen2", {"tie_word_embeddings": True}, {}),
    "qwen2-moe": (
        "qwen2moe",
        "qwen2_moe",
        EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 24, "norm_topk_prob": False},
        EXPERT_KEYS,
    ),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 16}, {}),
    "qwen3-moe": ("qwen3moe", "qwen3_moe", EXPERTS | {"num_experts": 4, "norm_topk_prob": True}, EXPERT_KEYS),
    "olmoe": ("olmoe", "olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, EXPERT_KEYS),
    "olmo2": ("olmo2", "olmo2", {}, {}),
    "olmo3": (
        "olmo2",
        "olmo3",
        WINDOW | {"layer_types": ["full_attention", "sliding_attention"]},
        WINDOW_KEYS | {"attention.sliding_window_pattern": [False, True]},
    ),
    "smollm3": ("smollm3", "smollm3", {"num_hidden_layers": 4}, {}),
    "exaone4": (
        "exaone4",
        "exaone4",
        WINDOW | {"sliding_window_pattern": 2},
        WINDOW_KEYS | {"attention.sliding_window_pattern": 2},
    ),
    "exaone4-full": ("exaone4", "exaone4", {"sliding_window": None, "layer_types": 2 * ["full_attention"]}, {}),
    "phi3": ("phi3", "phi3", WINDOW, WINDOW_KEYS),
    "gemma": ("gemma", "gemma", {"head_dim": 16}, {"attention.key_length": 16}),
    "gemma2": (
        "gemma2",
        "gemma2",
        WINDOW
        | {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 4.0},
        WINDOW_KEYS | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 4.0},
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        WINDOW
        | {
            "num_hidden_layers": 6,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            },
        },
        WINDOW_KEYS | {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base_swa": 5e3},
    ),
    "granite": ("granite", "granite", GRANITE, GRANITE_KEYS),
    "granite-moe": (
        "granitemoe",
        "granitemoe",
        GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 2},
        GRANITE_KEYS | EXPERT_KEYS,
    ),
    "granite-moe-shared": (
        "granitemoe",
        "granitemoeshared",
        GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
        GRANITE_KEYS | EXPERT_KEYS,
    ),
    "command-r": ("command-r", "cohere", {"use_qk_norm": True, "logit_scale": 0.5}, {"logit_scale": 0.5}),
    "cohere2": (
        "cohere2",
        "cohere2",
        WINDOW | {"num_hidden_layers": 4, "logit_scale": 0.5},
        WINDOW_KEYS | {"logit_scale": 0.5},
    ),
    "starcoder2": ("starcoder2", "starcoder2", {"sliding_window": None}, {}),
    "stablelm": (
        "stablelm",
        "stablelm",
        {
            "use_qkv_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
        {"rope.dimension_count": 4},
    ),
    "stablelm-parallel": (
        "stablelm",
        "stablelm",
        {
            "use_parallel_residual": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
        {"rope.dimension_count": 4},
    ),
    "gpt-neox": (
        "gptneox",
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope.dimension_count": 4, "use_parallel_residual": True, "attention.head_count_kv": 4},
    ),
    "gpt-oss": (
        "gpt-oss",
        "gpt_oss",
        WINDOW
        | {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": YARN | {"truncate": False},
        },
        WINDOW_KEYS | EXPERT_KEYS | YARN_KEYS,
    ),
    "glm4-moe": (
        "glm4moe",
        "glm4_moe",
        EXPERTS
        | {
            "head_dim": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "use_qk_norm": True,
            "first_k_dense_replace": 1,
            "attention_bias": True,
        },
        EXPERT_KEYS
        | {
            "rope.dimension_count": 8,
            "expert_shared_count": 1,
            "leading_dense_block_count": 1,
            "expert_weights_norm": True,
            "expert_weights_scale": 1.0,
        },
    ),
    "seed-oss": ("seed_oss", "seed_oss", {"head_dim": 16}, {}),
    "deepseek-v2": (
        "deepseek2",
        "deepseek_v2",
        LATENT | {"topk_method": "group_limited_greedy", "norm_topk_prob": False},
        LATENT_KEYS,
    ),
    "deepseek-v3": ("deepseek2", "deepseek_v3", LATENT, LATENT_KEYS | {"expert_weights_norm": True}),
}
"""Architecture, `model_type`, settings, and keys of the file that are beside the common ones."""


def make_model(kind: str, settings: dict[str, object]) -> PreTrainedModel:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(SIZES | settings))).eval()
    spread_norms(model)
    for name, tensor in model.state_dict().items():
        if "sinks" in name or "e_score" in name:
            tensor.normal_()
    return model


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.arange(3, 39)[None]).logits


def settings_of(directory: Path) -> object:
    """What hsrpc reads of a config.json."""
    family = create_family(load_spec(directory, torch.float32))
    assert isinstance(family, Decoder)
    return family.settings


@pytest.mark.parametrize("name", CASES)
def test_model_comes_back(name, tmp_path):
    """To the bit, for transformers and for hsrpc; norms of Gemma but for rounding: the file has them more by one."""
    architecture, kind, settings, keys = CASES[name]
    model = make_model(kind, settings)
    model.config.save_pretrained(tmp_path)
    write_gguf(tmp_path / "a.gguf", model, architecture, keys)
    convert_checkpoint(tmp_path / "a.gguf", tmp_path / "out", dtype=DType.FLOAT32, progress=False)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    state, is_gemma = found.state_dict(), architecture.startswith("gemma")
    for tensor, values in model.state_dict().items():
        tolerance = 1e-6 if is_gemma and "norm" in tensor else 0
        torch.testing.assert_close(state[tensor], values, rtol=0, atol=tolerance, msg=tensor)
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-5 if is_gemma else 0)
    assert settings_of(tmp_path / "out") == settings_of(tmp_path)


LLAMA_3 = {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": 4 * [1.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}
ROTATIONS: dict[str, tuple[str, dict[str, object], dict[str, object], str]] = {
    "llama 3.1": ("llama", LLAMA_3 | {"factor": 8.0, "original_max_position_embeddings": 8192}, {}, "llama3"),
    "like it": ("llama", LLAMA_3 | {"factor": 4.0, "original_max_position_embeddings": 32}, {}, "longrope"),
    "phi": (
        "phi3",
        LONG | {"original_max_position_embeddings": 32},
        {"rope.scaling.original_context_length": 32, "attention.sliding_window": 0},
        "longrope",
    ),
}
"""`model_type`, rotation, keys of the file, and what the rotation becomes: its factors are tensors there."""


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_that_are_tensors(tmp_path, name):
    """As published where that is known, and by a list of factors where it is not."""
    kind, rope, keys, expected = ROTATIONS[name]
    of_phi = {"original_max_position_embeddings": 32, "sliding_window": None} if kind == "phi3" else {}
    model = make_model(kind, {"rope_parameters": rope} | of_phi)
    model.config.save_pretrained(tmp_path)
    width = model.config.hidden_size // model.config.num_attention_heads
    unscaled = float(rope["rope_theta"]) ** (-torch.arange(0, width, 2) / width)
    extra = {"rope_freqs.weight": unscaled / model.model.rotary_emb.inv_freq}
    if kind == "phi3":
        extra = {f"rope_factors_{each}.weight": torch.tensor(rope[f"{each}_factor"]) for each in ("short", "long")}
    write_gguf(tmp_path / "a.gguf", model, kind, keys, extra=extra)
    convert_checkpoint(tmp_path / "a.gguf", tmp_path / "out", dtype=DType.FLOAT32, progress=False)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert found.config.rope_parameters["rope_type"] == expected
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-4)
    if name != "like it":
        assert settings_of(tmp_path / "out") == settings_of(tmp_path)
