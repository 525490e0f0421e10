"""Checkpoints of float8 codes with scales: the tokens that transformers gives with the same weights decoded."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hsrpc import Engine, EngineConfig
from hsrpc.config import ResidentWeights, WeightCoding
from hsrpc.engine import startup
from hsrpc.engine.startup import ChoosePlan
from hsrpc.errors import CheckpointError, ConfigError
from hsrpc.model.checkpoint import Checkpoint
from hsrpc.model.convert import convert_checkpoint
from hsrpc.model.families.registry import create_family
from hsrpc.model.formats import scaled as scaled_format
from hsrpc.model.formats.plain import Plain
from hsrpc.model.formats.scaled import Scaled, ScaledPacking
from hsrpc.model.quantization.fp8 import Fp8
from hsrpc.model.tensor import Stacked, TensorSpec
from hsrpc.plan.memory_use import HostUse
from hsrpc.plan.placement import ResidentChoices, WeightChoice, all_stay
from hsrpc.plan.plan import Plan
from hsrpc.plan.planner import Planner
from hsrpc.plan.roofline import StepRecord
from tests.engine.reference import Reference, decoder, greedy, save_tokenizer, spread_norms
from tests.engine.support import collect, config_for, idle, ids, roomy
from tests.engine.support import greedy as greedily

BLOCK = 128
LARGEST = 448.0
"""Largest of the codes."""
PLAIN = ("layers.1.mlp.down_proj", "layers.2.self_attn.k_proj")
"""Left as they are: a tensor by itself, and one of three that are fused."""
_SIZES = {"hidden_size": 160, "num_hidden_layers": 3, "intermediate_size": 200, "num_key_value_heads": 2}
_SCALED_BY = {
    "block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
    "channel": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
            }
        },
    },
    "tensor": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
}


class Model(NamedTuple):
    """What is quantised."""

    kind: str
    by: str
    """What shares a scale."""
    settings: Mapping[str, object]


MODELS = {
    "qwen3": Model("qwen3", "block", {"head_dim": 48, "tie_word_embeddings": True}),
    "llama": Model("llama", "block", {"attention_bias": True}),
    "llama-channel": Model("llama", "channel", {}),
    "llama-tensor": Model("llama", "tensor", {}),
    "qwen3-moe": Model(
        "qwen3_moe", "block", {"head_dim": 48, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 136}
    ),
    "cohere": Model("cohere", "block", {"logit_scale": 0.5}),
}
"""Rows of Cohere's heads get another order, so that some of its tensors are decoded when they are loaded."""


def in_blocks(weight: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and values of a matrix, by the definition: block by block."""
    codes, values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scales = torch.empty(-(-len(weight) // rows), -(-weight.shape[1] // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = weight[part].abs().max() / LARGEST
            codes[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
            values[part] = codes[part].float() * scales[i, j]
    return codes, scales, values


def quantise(weight: torch.Tensor, by: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a checkpoint by what stands behind the weight's name, and the values that they mean."""
    shape = {"block": (BLOCK, BLOCK), "channel": (1, weight.shape[1]), "tensor": tuple(weight.shape)}[by]
    codes, scales, values = in_blocks(weight, *shape)
    if by == "block":
        return {"": codes, "_scale_inv": scales}, values
    return {"": codes, "_scale": scales if by == "channel" else scales[0, 0].clone()}, values


def make_model(name: str, directory: Path) -> Reference:
    """A checkpoint with codes, and the tokens that transformers gives with what they mean."""
    torch.manual_seed(5)
    model = decoder(MODELS[name].kind, **_SIZES, **MODELS[name].settings).eval()
    spread_norms(model)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    codes: dict[str, torch.Tensor] = {}

    def to_values(tensors: dict[str, torch.Tensor]) -> None:
        for weight in filter(is_quantised, tensors):
            parts, tensors[weight] = quantise(tensors[weight], MODELS[name].by)
            codes.update({f"{weight}{suffix}": part for suffix, part in parts.items()})
            codes[weight.replace("weight", "input_scale")] = torch.tensor(1.0)

    edit_tensors(directory, to_values)
    model = AutoModelForCausalLM.from_pretrained(directory)
    edit_tensors(directory, lambda tensors: tensors.update(codes))
    edit_config(directory, _SCALED_BY[MODELS[name].by])
    prompts: list[list[int]] = []
    outputs: list[list[int]] = []
    while len(prompts) < 4:
        prompt = torch.randint(3, 300, (1 + 9 * len(prompts),)).tolist()
        output, margin = greedy(model, prompt)
        if margin > 2e-3:
            prompts.append(prompt)
            outputs.append(output)
    return Reference(directory, prompts, outputs)


def is_quantised(name: str) -> bool:
    """Whether the tensor is a matrix of a layer, or the head, and not among those that are left as they are."""
    return name.endswith(("proj.weight", "lm_head.weight")) and not any(each in name for each in PLAIN)


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Let `edit` change the tensors of a checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, quantization: object) -> None:
    """Write what config.json says of the weights."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Models by name."""
    return cache(lambda name: make_model(name, tmp_path_factory.mktemp(name)))


@pytest.fixture
def copied(scaled: Callable[[str], Reference], tmp_path: Path) -> Reference:
    """A model to be damaged."""
    made = scaled("qwen3")
    for file in made.directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return Reference(tmp_path, made.prompts, made.outputs)


async def check(made: Reference, config: EngineConfig, choose_plan: ChoosePlan = Planner.plan) -> tuple[Plan, float]:
    """Hold tokens to the reference's; the plan, and the weight bytes that crossed the bus in a step."""
    weights: list[int] = []

    def observe(step: StepRecord) -> None:
        weights.append(step.weight_bytes)

    async with Engine(config, choose_plan=choose_plan, observe=observe) as engine:
        requests = (collect(engine.generate(prompt, greedily(64))) for prompt in made.prompts)
        assert [ids(each) for each in await asyncio.gather(*requests)] == made.outputs
        await idle(engine)
        return engine.plan, median(weights)


@pytest.mark.parametrize("policy", ["kv", "activation"])
@pytest.mark.parametrize("name", list(MODELS))
async def test_tokens_equal_the_reference_where_weights_stream(
    name: str, policy: str, scaled: Callable[[str], Reference]
) -> None:
    """A byte of each weight crosses the bus, and few beside."""
    made = scaled(name)
    plan, streamed = await check(made, roomy(made, cache_policy=policy, activation_share=None))
    assert plan.decode_buffer_bytes > 0
    assert streamed == sum(each.bus_bytes for each in plan.placed)
    sizes = startup.make_plan(roomy(made)).spec.sizes
    values = 4 * sum(layer.num_elements for layer in sizes.layers)
    assert streamed < (0.42 if name != "cohere" else 0.6) * values  # some are plain


@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("residence", [ResidentWeights.DECODED, ResidentWeights.PACKED])
@pytest.mark.parametrize("name", ["qwen3", "llama-channel", "qwen3-moe"])
async def test_tokens_equal_the_reference_where_weights_stay(
    name: str, residence: ResidentWeights, share: float, scaled: Callable[[str], Reference]
) -> None:
    """Those are decoded when they are loaded, or packed: then in every step, with those that stream."""
    made = scaled(name)
    config = config_for(made, resident_share=share, resident_weights=residence, gpu_memory="1GiB")
    plan, streamed = await check(made, config)
    keeps = residence is ResidentWeights.PACKED
    assert (streamed > 0) == (share < 1)
    assert any(stays.packed for stays in plan.resident) == keeps
    assert (plan.decode_buffer_bytes > 0) == (share < 1 or keeps)
    stays, all_bytes = (
        sum(getattr(each, field) for each in plan.placed) for field in ("resident_bytes", "ready_bytes")
    )
    assert (stays < 0.4 * all_bytes) == keeps


async def test_some_that_stay_are_ready_and_others_packed(scaled: Callable[[str], Reference]) -> None:
    """As where a little less fits than all of them decoded."""
    made = scaled("llama")

    def half_of_them(planner: Planner) -> Plan:
        planner._choices = ResidentChoices.of(planner.sizes, [WeightChoice(all_stay(planner.sizes, 0.5))])
        return planner.plan()

    plan, streamed = await check(made, config_for(made, gpu_memory="1GiB"), half_of_them)
    assert streamed == 0
    assert all("qkv_weight" in stays.names for stays in plan.resident)
    assert len({"qkv_weight" in stays.packed for stays in plan.resident}) == 2


async def test_few_rows_are_multiplied_by_codes_as_they_lie(
    scaled: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of steps that decode, by weights that stay; prompts are multiplied by decoded ones."""
    made, rows, multiply = scaled("llama"), list[int](), scaled_format._decode_and_multiply

    def count(packing: ScaledPacking, data: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows.append(len(x))
        return multiply(packing, data, x, bias)

    monkeypatch.setattr(scaled_format, "_decode_and_multiply", count)
    settings = {"resident_share": 1.0, "resident_weights": "packed", "cache_policy": "kv", "activation_share": None}
    plan, _ = await check(made, config_for(made, gpu_memory="1GiB", **settings))
    per_step = sum(len(stays.packed) for stays in plan.resident)
    assert rows.count(len(made.prompts)) >= 30 * per_step
    assert max(rows) <= scaled_format.FEW_ROWS


@pytest.mark.parametrize("share", [0.0, 1.0])
async def test_on_a_device_that_orders_accesses(
    share: float, scaled: Callable[[str], Reference], ordered: list[object]
) -> None:
    """The buffer that weights are decoded to is used by one layer after the other; others are read where they came."""
    made, kv = scaled("qwen3"), {"cache_policy": "kv", "activation_share": None}
    await check(made, config_for(made, resident_share=share, resident_weights="packed", gpu_memory="1GiB", **kv))
    assert ordered


def test_formats_come_from_the_headers(scaled: Callable[[str], Reference]) -> None:
    """Whatever config.json says is left out; host memory is planned for codes."""
    planned = startup.make_plan(roomy(scaled("qwen3")))
    family, weight = create_family(planned.spec), planned.spec.formats.weight
    formats = {tensor.sources[-1]: weight(tensor) for tensor in family.layer_tensors(1) if len(tensor.shape) > 1}
    assert isinstance(formats.pop(f"model.{PLAIN[0]}.weight"), Plain)
    assert len(formats) == 3
    assert all(isinstance(each, Scaled) for each in formats.values())
    [qkv] = [each for source, each in formats.items() if source.endswith("v_proj.weight")]
    assert [source.grid for source in qkv.sources] == [(2, 2), (1, 2), (1, 2)]
    streamed = planned.plan.host_bytes[HostUse.STREAMED_WEIGHTS]
    assert streamed == sum(each.host_bytes for each in planned.plan.placed)


def test_formats_where_rows_get_another_order(scaled: Callable[[str], Reference]) -> None:
    """Fewer of them share a scale where their blocks are cut: here four, of 40 in a head and 128 in a block."""
    planned = startup.make_plan(roomy(scaled("cohere")))
    for tensor in create_family(planned.spec).layer_tensors(0):
        form = planned.spec.formats.weight(tensor)
        assert isinstance(form, Scaled) == (len(tensor.shape) > 1)
        if tensor.order is not None and isinstance(form, Scaled):
            assert [source.block for source in form.sources] == [(4, BLOCK), (80, BLOCK), (80, BLOCK)]


def test_what_is_ignored_is_said_once(scaled: Callable[[str], Reference], caplog: pytest.LogCaptureFixture) -> None:
    """Scales of activations."""
    with caplog.at_level(logging.WARNING):
        startup.make_plan(roomy(scaled("llama-tensor")))
    assert ["activations are not quantised" in message for message in caplog.messages] == [True]


def test_coding_without_loss_is_refused(scaled: Callable[[str], Reference]) -> None:
    """There is nothing left to code."""
    config = roomy(scaled("qwen3"), weight_coding=WeightCoding.LOSSLESS, dtype="bfloat16")
    with pytest.raises(ConfigError, match="weight_coding='lossless': the weights are quantised already; use"):
        startup.make_plan(config)


@pytest.mark.parametrize("share", [0.0, 0.85, 1.0])
@pytest.mark.parametrize("residence", [ResidentWeights.DECODED, ResidentWeights.PACKED])
async def test_quantised_experts_come_on_demand(
    residence: ResidentWeights, share: float, scaled: Callable[[str], Reference]
) -> None:
    """Packed in their slots, some or all of them; the other weights stream, or stay either way."""
    made = scaled("qwen3-moe")
    settings = {"experts": "demand", "resident_share": share, "resident_weights": residence}
    plan, streamed = await check(made, config_for(made, gpu_memory="1GiB", **settings))
    assert plan.demand is not None
    assert plan.demand.is_coded
    assert 0.25 * plan.demand.ready_bytes < plan.demand.expert_bytes < 0.32 * plan.demand.ready_bytes
    assert (plan.demand.slots == 4) == (share == 1)
    assert (any(plan.streamed_bytes), plan.demand.slots > 0) == (share == 0, share > 0)
    assert plan.decode_buffer_bytes >= plan.demand.decoded_bytes > 0
    assert (streamed > 0) == (share < 1)  # experts among them


_Q = "model.layers.2.self_attn.q_proj.weight"
DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (
        lambda tensors: tensors.pop(f"{_Q}_scale_inv"),
        f"{_Q}: expected scales beside it, {_Q}_scale_inv or {_Q}_scale, found",
    ),
    "truncated": (
        lambda tensors: tensors.update({f"{_Q}_scale_inv": tensors[f"{_Q}_scale_inv"][:1].clone()}),
        rf"{_Q}_scale_inv: expected shape \[2, 2\].* of F32.* found shape \[1, 2\] of F32",
    ),
    "one": (
        lambda tensors: tensors.update({f"{_Q}_scale_inv": torch.tensor(1.0)}),
        rf"{_Q}_scale_inv: expected shape \[2, 2\].* found shape \[\] of F32",
    ),
    "type": (
        lambda tensors: tensors.update({f"{_Q}_scale_inv": torch.ones(2, 2, dtype=torch.int64)}),
        f"{_Q}_scale_inv: expected shape .* of F32 or .*found shape .* of I64",
    ),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_scales_that_do_not_fit_are_refused(kind: str, copied: Reference) -> None:
    """By name, before any weight is read."""
    damage, message = DAMAGE[kind]
    edit_tensors(copied.directory, damage)
    with pytest.raises(CheckpointError, match=message):
        startup.make_plan(roomy(copied))


def test_scales_beyond_float16_are_refused(copied: Reference) -> None:
    """Weights would be infinite; bfloat16 has them."""
    edit_tensors(copied.directory, lambda tensors: tensors[f"{_Q}_scale_inv"].mul_(1e6))
    checkpoint, tensor = Checkpoint(copied.directory, Fp8((BLOCK, BLOCK))), TensorSpec("q", (192, 160), (_Q,))
    with pytest.raises(CheckpointError, match=rf"{_Q}_scale_inv: expected scales of at most 146.2.*--dtype bfloat16"):
        checkpoint.read(tensor, torch.empty(192, 160, dtype=torch.float16))
    checkpoint.read(tensor, torch.empty(192, 160, dtype=torch.bfloat16))


def test_codes_of_all_experts_in_one_tensor(tmp_path: Path) -> None:
    """As their scales, with a matrix for each; of another number, they are refused."""
    codes, scales, values = zip(*(in_blocks(torch.randn(6, 8), 4, 4) for _ in range(3)), strict=True)
    stacked = {"all": torch.stack(codes), "all_scale_inv": torch.stack(scales)}
    save_file(stacked, tmp_path / "model.safetensors")
    tensors = [TensorSpec("w", (6, 8), ("one.weight",), stacked=Stacked("all", index, 3)) for index in range(3)]
    out = torch.empty(3, 6, 8)
    for tensor, part in zip(tensors, out, strict=True):
        Checkpoint(tmp_path, Fp8((4, 4))).read(tensor, part)
    assert torch.equal(out, torch.stack(values))
    save_file(stacked | {"all_scale_inv": torch.ones(2, 2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"all_scale_inv: expected a shape that begins with 3, one for each"):
        Checkpoint(tmp_path, Fp8((4, 4))).check(tensors)


def test_pickled_codes_are_converted(copied: Reference, tmp_path: Path) -> None:
    """To codes."""
    file = copied.directory / "model.safetensors"
    torch.save(load_file(file), copied.directory / "pytorch_model.bin")
    convert_checkpoint(copied.directory, tmp_path / "converted", progress=False)
    assert load_file(tmp_path / "converted" / "model.safetensors")[_Q].dtype == torch.float8_e4m3fn


def test_codes_need_a_configuration(copied: Reference) -> None:
    """What scales mean is said nowhere else."""
    edit_config(copied.directory, None)
    with pytest.raises(CheckpointError, match=r"weight: expected quantization_config in config.json"):
        startup.make_plan(roomy(copied))


def test_a_plan_needs_the_headers(copied: Reference) -> None:
    """They say what is quantised; random weights of the same configuration are plain."""
    (copied.directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config: expected weights beside it"):
        startup.make_plan(roomy(copied))
    config = roomy(Reference(Path(f"random:{copied.directory}"), [], []))
    planned = startup.make_plan(config)
    tensors = create_family(planned.spec).layer_tensors(0)
    assert all(isinstance(planned.spec.formats.weight(tensor), Plain) for tensor in tensors)


async def test_random_weights_of_a_format(copied: Reference) -> None:
    """Their codes cross the bus, and the model answers."""
    config = roomy(Reference(Path(f"random:{copied.directory}:w4a16"), [], []))
    async with Engine(config) as engine:
        assert len(ids(await collect(engine.generate([5, 6], greedily(8))))) == 8
        assert engine.spec.name.endswith(":w4a16")
        assert engine.plan.decode_buffer_bytes > 0
