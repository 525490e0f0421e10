"""Mixtures of experts against the modules of transformers, and the spellings that checkpoints have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from hsrpc.errors import CheckpointError
from hsrpc.model.checkpoint import Checkpoint
from hsrpc.model.config_file import ConfigFile
from hsrpc.model.experts import CORRECTION, ROUTER, Experts, Routing, Scoring, expert_in
from hsrpc.model.families.expert_readers import deepseek_experts, gpt_oss_experts
from hsrpc.model.families.registry import create_family
from hsrpc.model.layers import Activation
from hsrpc.model.spec import load_spec
from hsrpc.plan.sizes import ExpertSizes
from tests.model.conftest import PROMPTS, read_all, spread

SIZE, NUM_ROWS = 16, 24
SIZES = {"hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
DEEPSEEK = SIZES | {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "hidden_act": "silu"}
GROUPS = {"n_group": 4, "topk_group": 2}
PREFIX = "model.layers.1"


def read(config: object, reader) -> Experts:
    """The experts that a file of transformers' says of layer 1."""
    file = ConfigFile("config.json", config.to_dict())
    experts = reader(file)[1]
    assert experts is not None
    return experts


def deepseek(file: ConfigFile):
    return deepseek_experts(file, Activation.SILU)


def equal_to(module: nn.Module, experts: Experts, directory) -> None:
    """The experts, read from a file with the module's tensors, give what the module gives."""
    generator = torch.Generator().manual_seed(3)
    state = {
        name: torch.randn(tensor.shape, generator=generator) * (0.4 if tensor.dim() > 1 else 0.2)
        for name, tensor in module.state_dict().items()
    }
    module.load_state_dict(state)
    save_file({f"{PREFIX}.mlp.{name}": tensor for name, tensor in state.items()}, directory / "model.safetensors")
    w = read_all(Checkpoint(directory), tuple(experts.tensors(PREFIX, SIZE)), torch.float32)
    x = torch.randn(NUM_ROWS, SIZE, generator=generator)
    with torch.inference_mode():
        expected = module(x[None])
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(experts.of(w, x, experts.routes(w, x)), expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "module", "settings"),
    [
        ("glm4_moe", Glm4MoeMoE, {"n_shared_experts": 2, "routed_scaling_factor": 1.5}),
        ("glm4_moe", Glm4MoeMoE, GROUPS | {"norm_topk_prob": False}),
        ("deepseek_v3", DeepseekV3MoE, GROUPS | {"routed_scaling_factor": 2.5}),
        ("deepseek_v3", DeepseekV3MoE, {"n_group": 1, "topk_group": 1}),
        ("deepseek_v2", DeepseekV2Moe, {"topk_method": "greedy", "routed_scaling_factor": 0.5}),
        ("deepseek_v2", DeepseekV2Moe, GROUPS | {"topk_method": "group_limited_greedy"}),
    ],
)
def test_routing_from_groups_equals_that_of_transformers(kind, module, settings, tmp_path):
    """Sigmoids with a correction, softmax, groups, scale, shared experts as one; all experts stacked in the file."""
    config = CONFIG_MAPPING[kind](**(DEEPSEEK | {"first_k_dense_replace": 1} | settings))
    experts = read(config, deepseek)
    assert deepseek(ConfigFile("config.json", config.to_dict()))[0] is None
    equal_to(module(config), experts, tmp_path)


@pytest.mark.parametrize("limit", [7.0, 0.5])
def test_experts_of_gpt_oss(limit, tmp_path):
    """Biases, a gate that is bounded, and stacked weights in which gate and up alternate."""
    config = CONFIG_MAPPING["gpt_oss"](
        **SIZES, intermediate_size=12, num_local_experts=6, num_experts_per_tok=2, swiglu_limit=limit, head_dim=8
    )
    equal_to(GptOssMLP(config), read(config, gpt_oss_experts), tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_group": 3}, "n_group: expected a divisor of 8 experts"),
        ({"n_group": 8, "topk_group": 4}, "with 2 of them or more in a group, found 8"),
        ({"n_group": 4, "topk_group": 1}, "with 3 of them or more in a group"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: expected at most n_routed_experts=8, found 9"),
        ({"moe_intermediate_size": 2**19}, "moe_intermediate_size: expected at most 349525"),
        ({"n_routed_experts": 2**13}, "n_routed_experts: expected a whole number from 1 to 4096"),
        ({"num_hidden_layers": 1024, "n_routed_experts": 256}, "n_routed_experts=256: expected at most 65536 exp"),
    ],
)
def test_refusals_name_the_key(changes, words):
    """Groups that cannot be, more experts for a token than there are, and far too many."""
    values = DEEPSEEK | {"model_type": "deepseek_v3"} | changes
    with pytest.raises(CheckpointError, match=words):
        deepseek(ConfigFile("config.json", values))


SMALL = SIZES | {"vocab_size": 64, "intermediate_size": 12, "max_position_embeddings": 32, "head_dim": 8}
SPELT = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    "mixtral": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4},
}


@pytest.mark.parametrize("kind", SPELT)
def test_experts_may_be_tensors_of_their_own_or_one(kind, load_packed, tmp_path):
    """Names as on the hub, and as transformers has them in memory, give the same logits."""
    torch.manual_seed(0)
    model = spread(AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(SMALL | SPELT[kind]))))
    names, logits = [], []
    for original in (True, False):
        directory = tmp_path / str(original)
        model.save_pretrained(directory, save_original_format=original)
        names.append(set(load_file(directory / "model.safetensors")))
        logits.append(load_packed(directory).logits(PROMPTS))
    assert names[0] != names[1]
    assert torch.equal(*logits)


def test_a_stack_of_another_shape_is_refused(tmp_path):
    """By its name in the file, and the shape of all experts together."""
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["granitemoe"](**SMALL, num_local_experts=4))
    model.config.num_local_experts = 5
    model.save_pretrained(tmp_path)
    words = r"block_sparse_moe.\w+.layer.weight: expected shape \[5, 16\]"
    family = create_family(load_spec(tmp_path, torch.float32))
    with pytest.raises(CheckpointError, match=words):
        Checkpoint(tmp_path).check_model(family)
    stacked = [tensor for tensor in family.layer_tensors(0) if tensor.name == expert_in(1)]
    with pytest.raises(CheckpointError, match=r"block_sparse_moe.input_linear.weight: expected shape \[5, 24, 16\]"):
        Checkpoint(tmp_path).check(stacked)


def test_ties_are_resolved_as_torch_does():
    """Experts with the same weights: torch.topk of the same values chooses the same."""
    routing = Routing(renormalised=True)
    weight = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(1)).repeat(2, 1)
    x = torch.randn(NUM_ROWS, SIZE, generator=torch.Generator().manual_seed(2))
    routes = routing.of({ROUTER.weight: weight}, x, 3)
    expected = (x @ weight.t()).softmax(-1).topk(3)
    assert torch.equal(routes.chosen, expected.indices)
    torch.testing.assert_close(routes.weights, expected.values / expected.values.sum(-1, keepdim=True))


def test_a_correction_stays_exact():
    """Differences that bfloat16 has not decide which experts are chosen."""
    routing = Routing(scoring=Scoring.SIGMOID, corrected=True, in_float32=True)
    experts = Experts(count=4, k=1, width=8, gate=Activation.SILU, routing=routing)
    [correction] = [tensor for tensor in experts.tensors("", SIZE) if tensor.name == CORRECTION]
    assert correction.dtype(torch.bfloat16) == torch.float32
    corrected = torch.tensor([8.0, 8.001, 8.0, 8.0])
    w = {ROUTER.weight: torch.zeros(4, SIZE, dtype=torch.bfloat16), CORRECTION: corrected}
    routes = routing.of(w, torch.ones(2, SIZE, dtype=torch.bfloat16), 1)
    assert routes.chosen.tolist() == [[1], [1]]
    assert routes.weights.tolist() == [[0.5], [0.5]]


def test_no_rows_and_one_expert():
    """Nothing is nothing; all rows may take the same expert, and the others need no weights."""
    experts = Experts(count=3, k=1, width=8, gate=Activation.SILU)
    w = {name: torch.randn(shape) for name, shape in [("expert_2_in", (16, SIZE)), ("expert_2_out", (SIZE, 8))]}
    w[ROUTER.weight] = torch.tensor([[0.0], [0.0], [1.0]]).expand(3, SIZE)
    x = torch.rand(5, SIZE) + 0.1
    assert experts.of(w, x[:0], experts.routes(w, x[:0])).shape == (0, SIZE)
    probability = (x.sum(-1).exp() / (x.sum(-1).exp() + 2))[:, None]
    expected = Activation.SILU.gated(x @ w["expert_2_in"].t()) @ w["expert_2_out"].t()
    torch.testing.assert_close(experts.of(w, x, experts.routes(w, x)), expected * probability)


def test_experts_that_tokens_touch():
    """On average: k for one token, and nearly all for many."""
    sizes = ExpertSizes(count=128, k=8, names=frozenset(), num_elements=10, device_bytes=20)
    assert sizes.touched(1) == pytest.approx(8)
    assert sizes.touched(0) == 0
    assert sizes.touched(2) == pytest.approx(8 + 8 * 120 / 128)
    assert sizes.touched(256) > 127.9
    assert replace(sizes, k=128).touched(1) == 128
