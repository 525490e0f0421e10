"""Llama and Mistral against transformers, in float32, over packed ragged prompts."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tests.model.conftest import rebuild

SIZES: dict[str, object] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
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


def make_llama(**settings: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | settings)))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="multi-head"),
        pytest.param({"num_key_value_heads": 2}, id="grouped queries"),
        pytest.param({"num_key_value_heads": 1, "head_dim": 16}, id="one K and V head of its own size"),
        pytest.param({"tie_word_embeddings": True}, id="tied head"),
        pytest.param({"rope_parameters": LLAMA3, "head_dim": 16}, id="llama3 rope"),
        pytest.param({"rope_parameters": LINEAR}, id="linear rope"),
        pytest.param({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, id="other rope theta"),
        pytest.param({"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}, id="biases"),
        pytest.param({"rms_norm_eps": 0.1}, id="large epsilon"),
    ],
)
def test_logits_equal_those_of_transformers(assert_same_logits, settings):
    """Every variant of the configuration computes what transformers computes."""
    assert_same_logits(make_llama(**settings))


def test_mistral_slides_its_window(assert_same_logits):
    """A Mistral model with a window shorter than the prompt gives the logits of transformers."""
    torch.manual_seed(0)
    packed = assert_same_logits(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)))
    assert packed.family.sizes.sliding_window == 4


@pytest.mark.parametrize("parameters", [LLAMA3, LINEAR], ids=["llama3", "linear"])
def test_older_rope_keys_mean_the_same(assert_same_logits, load_packed, tmp_path, parameters):
    """`rope_scaling` with `rope_theta` beside it, as older files have them, gives the same logits."""
    packed = assert_same_logits(make_llama(rope_parameters=parameters))
    expected = packed.logits(([5, 6, 7],))
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    scaling = dict(config.pop("rope_parameters"))
    config["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    file.write_text(json.dumps(config | {"rope_scaling": scaling}))
    older = load_packed(tmp_path)
    assert older.family.settings.rope == packed.family.settings.rope
    assert torch.equal(older.logits(([5, 6, 7],)), expected)


def test_keys_depend_on_position_and_values_do_not(assert_same_logits):
    """Rotation turns K with the stored position and leaves V alone."""
    packed = assert_same_logits(make_llama())
    x = torch.randn(1, 32)
    first, later = (rebuild(packed.family, packed.layers[0], x, torch.tensor([p])) for p in (0, 9))
    assert not torch.allclose(first[:, :32], later[:, :32])
    assert torch.equal(first[:, 32:], later[:, 32:])
