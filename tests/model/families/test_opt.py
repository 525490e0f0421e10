"""OPT against transformers, in float32, over packed ragged prompts."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OPTConfig, OPTForCausalLM

from tests.model.conftest import rebuild


def make_model(**settings: object) -> OPTForCausalLM:
    defaults: dict[str, object] = {
        "vocab_size": 64,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "ffn_dim": 40,
        "max_position_embeddings": 16,
        "word_embed_proj_dim": 24,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(**(defaults | settings)))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="pre-norm"),
        pytest.param({"do_layer_norm_before": False, "word_embed_proj_dim": 12}, id="post-norm with projections"),
        pytest.param({"num_attention_heads": 4, "hidden_size": 20, "word_embed_proj_dim": 20}, id="odd head size"),
        pytest.param({"enable_bias": False}, id="no bias"),
        pytest.param({"enable_bias": False, "activation_function": "gelu"}, id="no bias, gelu"),
        pytest.param({"layer_norm_elementwise_affine": False}, id="norms without weights"),
        pytest.param({"_remove_final_layer_norm": True}, id="no final norm"),
        pytest.param({"tie_word_embeddings": False}, id="head of its own"),
    ],
)
def test_logits_equal_those_of_transformers(assert_same_logits, settings):
    """Every variant of the configuration computes what transformers computes."""
    assert_same_logits(make_model(**settings))


def test_bare_decoder_names_are_accepted(assert_same_logits, load_packed, tmp_path):
    """A checkpoint whose names lack the prefix `model.` gives the same logits."""
    packed = assert_same_logits(make_model())
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({name.removeprefix("model."): tensor.clone() for name, tensor in state.items()}, file)
    torch.testing.assert_close(load_packed(tmp_path).logits(([5, 6],)), packed.logits(([5, 6],)))


def test_activation_input_is_the_layer_input_after_post_norm(assert_same_logits):
    """A post-norm layer projects its input as it is: that is what an activation block stores."""
    packed = assert_same_logits(make_model(do_layer_norm_before=False))
    hidden = torch.randn(2, 24)
    rotation = packed.family.rotation(torch.arange(2))
    assert torch.equal(packed.family.project(packed.layers[0], 0, hidden, rotation).activation, hidden)


def test_key_and_value_rows_of_the_fused_weight_are_one_view(assert_same_logits):
    """[W_K W_V] is the tail of the fused weight, contiguous, and gives K and V in one product."""
    packed = assert_same_logits(make_model())
    w, x = packed.layers[0], torch.randn(4, 24)
    tail = w["qkv_weight"][24:]
    assert tail.is_contiguous()
    expected = x @ tail.T + w["qkv_bias"][24:]
    torch.testing.assert_close(rebuild(packed.family, w, 0, x, torch.arange(4)), expected)


def test_logits_are_float32_for_half_precision_weights(assert_same_logits):
    """Half precision weights still give float32 logits."""
    packed = assert_same_logits(make_model())
    fixed = {name: tensor.bfloat16() for name, tensor in packed.fixed.items()}
    assert packed.family.logits(fixed, torch.randn(2, 24).bfloat16()).dtype == torch.float32
