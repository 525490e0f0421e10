"""The decoder against transformers, in float32, over packed ragged prompts: every family, and what it varies in."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from hsrpc.errors import CheckpointError
from hsrpc.model.attention import Attention, PackedRows
from hsrpc.model.families.readers import DECODERS
from hsrpc.model.spec import load_spec
from tests.model.conftest import rebuild

SIZES: dict[str, object] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
"""With heads of 16, the fastest pair is kept, the next blended, the others slowed."""
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 4}
"""Trained with less than a prompt."""
MSCALE = YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 2.0, "beta_slow": 0.5, "truncate": False}
MINISTRAL3 = YARN | {"llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0}
BY_KIND = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
GPT_OSS = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
GLM = {
    "head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 1.5,
}
FEW = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.6, "logits_scaling": 1.7}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


DENSE: dict[str, object] = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 2,
}
"""Latents, and no experts."""
LATENTS = DENSE | {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.7,
    "topk_method": "group_limited_greedy",
}
DEEPSEEK_YARN = YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}
GLM_LAYERS = {"mlp_layer_types": ["sparse", "dense"]}


def longrope(width: int, **more: object) -> dict[str, object]:
    factors = [1.0 + 0.5 * i for i in range(width // 2)]
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": factors,
        "long_factor": [2 * each for each in factors],
        "original_max_position_embeddings": 4,
    } | more


def make(kind: str, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(SIZES | settings)))


CASES = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 16}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    ("llama", {"rope_parameters": LINEAR}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": MSCALE, "head_dim": 16}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rms_norm_eps": 0.1}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"hidden_act": "relu2"}),
    ("mistral", {"sliding_window": 4}),
    ("mistral", {"sliding_window": None, "head_dim": 12}),
    ("ministral", {"sliding_window": 3, "head_dim": 8}),
    ("ministral", {"sliding_window": 3, "head_dim": 8, "layer_types": ["full_attention", "sliding_attention"]}),
    ("ministral3", {"rope_parameters": MINISTRAL3, "head_dim": 8}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}),
    ("qwen3", {"head_dim": 16}),
    ("qwen3", {"head_dim": 8, "attention_bias": True, "use_sliding_window": True, "max_window_layers": 1}),
    ("qwen3_moe", MOE),
    ("qwen3_moe", MOE | {"norm_topk_prob": True, "num_experts_per_tok": 1, "head_dim": 16}),
    ("qwen3_moe", MOE | {"norm_topk_prob": True, "num_hidden_layers": 3, "mlp_only_layers": [1]}),
    ("qwen3_moe", MOE | {"decoder_sparse_step": 2, "attention_bias": True, "tie_word_embeddings": True}),
    ("qwen3_moe", MOE | {"num_experts": 32, "use_sliding_window": True, "sliding_window": 3}),
    ("qwen2_moe", MOE | {"shared_expert_intermediate_size": 28}),
    ("qwen2_moe", MOE | {"shared_expert_intermediate_size": 28, "use_sliding_window": True, "sliding_window": 3}),
    ("qwen2_moe", MOE | {"norm_topk_prob": True, "qkv_bias": False, "mlp_only_layers": [0]}),
    ("mixtral", FEW),
    ("mixtral", FEW | {"sliding_window": 4, "head_dim": 12, "num_experts_per_tok": 4}),
    ("olmoe", FEW),
    ("olmoe", FEW | {"norm_topk_prob": True, "num_key_value_heads": 4, "attention_bias": True}),
    ("granitemoe", FEW | GRANITE),
    ("granitemoeshared", FEW | GRANITE),
    ("granitemoeshared", FEW | {"shared_intermediate_size": 28}),
    ("olmo2", {"num_key_value_heads": 4}),
    ("olmo2", {"attention_bias": True}),
    ("phi3", {"num_key_value_heads": 4}),
    ("phi3", {"sliding_window": 4}),
    ("phi3", {"rope_parameters": longrope(8), "original_max_position_embeddings": 32}),
    (
        "phi3",
        {"rope_parameters": longrope(6) | {"partial_rotary_factor": 0.75}, "original_max_position_embeddings": 32},
    ),
    ("gemma", {"head_dim": 16}),
    ("gemma", {"head_dim": 8, "hidden_act": "gelu"}),
    ("gemma2", {"head_dim": 16, "sliding_window": 3, "attn_logit_softcapping": 0.7, "final_logit_softcapping": 2.0}),
    ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 40, "attn_logit_softcapping": None, "attention_bias": True}),
    ("gemma2", {"head_dim": 8, "hidden_activation": "gelu", "final_logit_softcapping": None}),
    ("gemma3_text", {"head_dim": 16, "sliding_window": 3, "num_hidden_layers": 6, "query_pre_attn_scalar": 24}),
    (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 3,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": BY_KIND | {"full_attention": LINEAR},
            "final_logit_softcapping": 1.5,
        },
    ),
    ("granite", GRANITE | {"attention_bias": True}),
    ("cohere", {"logit_scale": 0.5}),
    ("cohere", {"logit_scale": 0.5, "use_qk_norm": True, "attention_bias": True}),
    ("starcoder2", {}),
    ("starcoder2", {"use_bias": False, "sliding_window": 4, "tie_word_embeddings": False}),
    ("stablelm", {"hidden_size": 64}),
    ("stablelm", {"hidden_size": 64, "use_parallel_residual": True, "use_qkv_bias": True}),
    ("gpt_neox", {"hidden_size": 64}),
    ("gpt_neox", {"hidden_size": 64, "use_parallel_residual": False, "attention_bias": False}),
    ("seed_oss", {"head_dim": 12}),
    ("seed_oss", {"head_dim": 8, "attention_out_bias": True, "mlp_bias": True, "attention_bias": False}),
    ("olmo3", {"sliding_window": 3, "num_hidden_layers": 4, "rope_parameters": BY_KIND}),
    ("olmo3", {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]}),
    ("smollm3", {"num_hidden_layers": 4}),
    ("smollm3", {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 3, "attention_bias": True}),
    ("smollm3", {"no_rope_layer_interval": 2, "mlp_bias": True, "tie_word_embeddings": False}),
    ("exaone4", {"sliding_window": 3, "sliding_window_pattern": 2}),
    ("exaone4", {"sliding_window": None, "layer_types": ["full_attention", "full_attention"]}),
    ("cohere2", {"sliding_window": 3, "num_hidden_layers": 4, "logit_scale": 0.5}),
    ("cohere2", {"sliding_window": 3, "sliding_window_pattern": 2, "attention_bias": True, "logit_scale": 0.5}),
    ("gpt_oss", GPT_OSS | {"sliding_window": 3, "rope_parameters": MSCALE}),
    ("gpt_oss", GPT_OSS | {"layer_types": ["full_attention", "sliding_attention"], "swiglu_limit": 0.5}),
    ("glm4_moe", GLM),
    ("glm4_moe", GLM | {"use_qk_norm": True, "attention_bias": True, "n_group": 2, "n_routed_experts": 8}),
    ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}}),
    ("deepseek_v2", DENSE),
    ("deepseek_v2", LATENTS | {"q_lora_rank": 10, "rope_parameters": DEEPSEEK_YARN}),
    ("deepseek_v2", LATENTS | {"topk_method": "greedy", "n_group": 1, "v_head_dim": 10}),
    ("deepseek_v3", DENSE | {"q_lora_rank": 10}),
    ("deepseek_v3", DENSE | {"attention_bias": True, "q_lora_rank": 10, "rope_interleave": False}),
    ("deepseek_v3", LATENTS | {"rope_parameters": DEEPSEEK_YARN, "norm_topk_prob": False}),
    ("glm4_moe_lite", LATENTS | {"q_lora_rank": 10, "rms_norm_eps": 0.1} | GLM_LAYERS),
    ("glm4_moe_lite", LATENTS | {"q_lora_rank": 10, "mlp_layer_types": ["dense", "dense"]}),
]


def name_of(value: object) -> str:
    return value if isinstance(value, str) else " ".join(f"{key}={each}"[:40] for key, each in value.items()) or "plain"


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=name_of)
def test_logits_equal_those_of_transformers(assert_same_logits, kind, settings):
    """Every variant of every family computes what transformers computes."""
    assert_same_logits(make(kind, **settings))


def test_every_family_is_compared():
    """A new family has a case above."""
    assert {kind for kind, _ in CASES} == set(DECODERS)


@pytest.mark.parametrize("parameters", [LLAMA3, LINEAR, YARN], ids=["llama3", "linear", "yarn"])
def test_older_rope_keys_mean_the_same(assert_same_logits, load_packed, tmp_path, parameters):
    """`rope_scaling` with `rope_theta` beside it, as older files have them, gives the same logits."""
    packed = assert_same_logits(make("llama", rope_parameters=parameters))
    expected = packed.logits(([5, 6, 7],))
    scaling = dict(edit(tmp_path).pop("rope_parameters"))
    older = edit(tmp_path, rope_parameters=None, rope_theta=scaling.pop("rope_theta"))
    older = edit(tmp_path, rope_scaling=scaling | {"type": scaling.pop("rope_type")})
    assert "rope_parameters" not in older
    again = load_packed(tmp_path)
    assert again.family.settings.ropes == packed.family.settings.ropes
    assert torch.equal(again.logits(([5, 6, 7],)), expected)


OLDER = [
    ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 500}, {"rope_theta": 500.0, "partial_rotary_factor": 0.5}),
    (
        "stablelm",
        {"partial_rotary_factor": 0.5, "rope_theta": 500},
        {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
    ),
    ("stablelm", {}, {"partial_rotary_factor": 0.25}),
]


@pytest.mark.parametrize(("kind", "older", "parameters"), OLDER)
def test_keys_of_the_hub_mean_what_those_of_transformers_mean(
    assert_same_logits, load_packed, tmp_path, kind, older, parameters
):
    """Names that a family had for its rotation, and its default where there is none."""
    rope = {"rope_type": "default", "rope_theta": 10000.0} | parameters
    packed = assert_same_logits(make(kind, hidden_size=64, rope_parameters=rope))
    edit(tmp_path, rope_parameters=None, **older)
    assert load_packed(tmp_path).family.settings == packed.family.settings


OLDER_KINDS = [
    (
        "olmo3",
        {"rope_parameters": BY_KIND | {"full_attention": YARN | {"rope_theta": 300.0}}},
        {"rope_scaling": YARN | {"rope_theta": None}, "rope_theta": 300.0},
    ),
    ("smollm3", {}, {"no_rope_layers": None}),
    ("exaone4", {"sliding_window": 3, "sliding_window_pattern": 3}, {"sliding_window_pattern": "LLG"}),
    ("cohere2", {"sliding_window": 3, "sliding_window_pattern": 2}, {"sliding_window_pattern": 2}),
    ("gemma3_text", {"num_hidden_layers": 6, "head_dim": 8}, {"sliding_window": None}),
    (
        "gemma3_text",
        {"head_dim": 8, "sliding_window_pattern": 3, "rope_parameters": BY_KIND | {"full_attention": LINEAR}},
        {
            "sliding_window_pattern": 3,
            "rope_theta": 10000.0,
            "rope_local_base_freq": 300.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    ),
]
"""What a family's older files say instead of the kind, and the rotation, of each layer."""


@pytest.mark.parametrize(("kind", "settings", "older"), OLDER_KINDS)
def test_older_keys_of_layers_mean_the_same(save_packed, load_packed, tmp_path, kind, settings, older):
    """Patterns, and scalings that hold for some of the layers."""
    packed = save_packed(make(kind, **({"num_hidden_layers": 4} | settings)))
    assert len({*packed.family.settings.ropes}) == 2
    edit(tmp_path, layer_types=None, rope_parameters=None, **older)
    assert load_packed(tmp_path).family.settings == packed.family.settings


def test_half_of_a_head_is_rotated_where_glm_is_silent(save_packed, load_packed, tmp_path):
    """As transformers takes it, whatever says its default."""
    packed = save_packed(make("glm4_moe", **GLM))
    edit(tmp_path, rope_parameters=None, rope_theta=10000.0)
    assert load_packed(tmp_path).family.settings == packed.family.settings


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_longrope_went_by_other_names_in_phi_3(assert_same_logits, load_packed, tmp_path, name):
    """Its first files say `su`, others `yarn`."""
    rope = longrope(8)
    packed = assert_same_logits(make("phi3", rope_parameters=rope, original_max_position_embeddings=32))
    edit(tmp_path, rope_parameters=None, rope_scaling={**rope, "rope_type": None, "type": name})
    assert load_packed(tmp_path).family.settings == packed.family.settings


def edit(directory, **changes):
    """Changes config.json, None removes a key; the values that it then has."""
    file = directory / "config.json"
    config = json.loads(file.read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    file.write_text(json.dumps(kept))
    return kept


def test_keys_depend_on_position_and_values_do_not(assert_same_logits):
    """Rotation turns K with the stored position and leaves V alone."""
    packed = assert_same_logits(make("llama", num_key_value_heads=4))
    x = torch.randn(1, 32)
    first, later = (rebuild(packed.family, packed.layers[0], 0, x, torch.tensor([p])) for p in (0, 9))
    assert not torch.allclose(first[:, :32], later[:, :32])
    assert torch.equal(first[:, 32:], later[:, 32:])


SERVED = [
    ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 6}, 8),
    ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 8}, 8),
    ("phi3", {"rope_parameters": longrope(8), "original_max_position_embeddings": 4}, 8),
    ("phi3", {"rope_parameters": longrope(8), "original_max_position_embeddings": 8}, 8),
    ("llama", {"rope_parameters": YARN, "max_position_embeddings": 4}, 8),
]


@pytest.mark.parametrize(("kind", "settings", "length"), SERVED)
def test_a_prompt_beyond_the_trained_context(save_packed, kind, settings, length):
    """Served up to a prompt's length, the rotation is the one that transformers takes for a prompt of that length."""
    reference = make(kind, **settings)
    prompt = torch.arange(3, 3 + length)
    packed = save_packed(reference, served_context=length)
    with torch.inference_mode():
        found, expected = packed.logits((prompt.tolist(),)), reference(prompt[None]).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_context_grows_with_the_scaling(save_packed):
    """The kinds whose files say what the model was trained with."""
    lengths = {
        kind: save_packed(make("llama", rope_parameters=rope, max_position_embeddings=32)).family.sizes.context_length
        for kind, rope in {"yarn": YARN | {"factor": 16.0}, "dynamic": DYNAMIC, "linear": LINEAR}.items()
    }
    assert lengths == {"yarn": 64, "dynamic": 64, "linear": 32}


REFUSED = [
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping: expected a positive number"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
    ("qwen3_moe", {"mlp_only_layers": ["1"]}, "mlp_only_layers: expected a list of layers"),
    ("ministral", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
    ("ministral", {"layer_types": ["full_attention"]}, "layer_types"),
    ("phi3", {"rope_parameters": longrope(6)}, "short_factor: expected a list of 4 positive numbers"),
    (
        "phi3",
        {"rope_parameters": longrope(8) | {"long_factor": [1.0, -1.0, 1.0, 1.0]}},
        "long_factor: 1: expected a pos",
    ),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.1}}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 2.0}}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": DYNAMIC | {"partial_rotary_factor": 0.25}}, "rope_type"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers: expected 1 or 0 for each of num_hidden_layers=2"),
    ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers"),
    ("exaone4", {"layer_types": None, "sliding_window_pattern": "GL"}, "sliding_window_pattern"),
    (
        "olmo3",
        {"layer_types": 2 * ["full_attention"], "rope_parameters": {"full_attention": YARN | {"factor": -1.0}}},
        "rope_parameters: full_attention: factor: expected a positive number",
    ),
    ("deepseek_v3", DENSE | {"v_head_dim": 11}, "v_head_dim"),
    ("deepseek_v3", DENSE | {"kv_lora_rank": None}, "kv_lora_rank"),
    ("deepseek_v3", DENSE | {"qk_rope_head_dim": 5}, "qk_rope_head_dim: expected an even number"),
    ("glm4_moe_lite", DENSE | {"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
]


@pytest.mark.parametrize(("kind", "changes", "words"), REFUSED)
def test_refusals_name_the_key(tmp_path, kind, changes, words):
    """What the decoder cannot compute is refused by the key that asks for it."""
    CONFIG_MAPPING[kind](**SIZES, architectures=[DECODERS[kind].architecture]).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=words):
        load_spec(tmp_path, None)


def test_kimi_k2_is_deepseek_v3(tmp_path):
    """By the architecture that its files name, and without one by its own `model_type`."""
    make("deepseek_v3", **DENSE).save_pretrained(tmp_path)
    edit(tmp_path, model_type="kimi_k2")
    assert load_spec(tmp_path, None).family == "deepseek_v3"
    edit(tmp_path, architectures=None)
    assert load_spec(tmp_path, None).family == "deepseek_v3"


def test_older_keys_of_deepseek_mean_the_same(assert_same_logits, load_packed, tmp_path):
    """`rope_scaling` beside `rope_theta`, no `head_dim`, and `type` for the kind of rotation."""
    packed = assert_same_logits(make("deepseek_v2", **DENSE, rope_parameters=DEEPSEEK_YARN))
    scaling = dict(edit(tmp_path).pop("rope_parameters"))
    edit(tmp_path, rope_parameters=None, head_dim=None, qk_head_dim=None, rope_theta=scaling.pop("rope_theta"))
    edit(tmp_path, rope_scaling=scaling | {"type": scaling.pop("rope_type")})
    assert load_packed(tmp_path).family.settings == packed.family.settings


def test_rebuilding_latents_needs_no_positions(assert_same_logits):
    """The key that is rotated is stored so."""
    packed = assert_same_logits(make("deepseek_v3", **DENSE))
    x = torch.randn(1, 16)
    first, later = (rebuild(packed.family, packed.layers[0], 0, x, torch.tensor([p])) for p in (0, 9))
    assert torch.equal(first, later)


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3"])
def test_absorbed_attention_is_attention(assert_same_logits, kind):
    """Queries that attend to activations as they are stored give what they give with the K and V of these."""
    packed = assert_same_logits(make(kind, **LATENTS | {"q_lora_rank": 10}))
    family, w, positions = packed.family, packed.layers[0], torch.arange(7)
    x, queries, kv = family.project(w, 0, torch.randn(7, 32), family.rotation(positions))
    one, absorption = PackedRows(positions, positions, (0, 1), (0, 7), 1, 7), family.absorption
    settings = (family.attention_scale, 1, torch.device("cpu"), torch.float32)
    found = Attention(absorption.heads, *settings).packed(absorption.queries(w, 0, queries[-1:]), x, one, None)
    expected = Attention(family.heads, *settings).packed(queries[-1:], kv, one, None)
    torch.testing.assert_close(absorption.values(w, 0, found), expected, atol=1e-5, rtol=1e-5)
