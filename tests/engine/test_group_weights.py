"""Checkpoints of AWQ, GPTQ and compressed-tensors: the tokens of transformers with the same weights decoded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from hsrpc import Engine, EngineConfig
from hsrpc.engine import startup
from tests.engine.reference import Reference, decoder, save_tokenizer, spread_norms
from tests.engine.support import collect, config_for, ids, roomy, tight
from tests.engine.support import greedy as greedily
from tests.engine.test_scaled_weights import edit_config, edit_tensors
from tests.model.quantization.packed import Parts, awq, compressed, gptq, in_groups, signed

NEW_TOKENS = 12
_SIZES = {
    "vocab_size": 304,
    "hidden_size": 160,
    "num_hidden_layers": 2,
    "intermediate_size": 200,
    "num_key_value_heads": 2,
}
_EXPERTS = {"head_dim": 24, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_TIED = {"head_dim": 40, "tie_word_embeddings": True}

Quantise = Callable[[str, torch.Tensor], "tuple[Parts, torch.Tensor] | None"]
"""By a weight's name: its tensors and the values that they mean; None: it is left as it is."""


def by_awq(name: str, weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    made = in_groups(weight, 4, 40, symmetric=False)
    return awq(made), made.values


def by_gptq(bits: int, size: int, version: int = 1, **settings: bool) -> Quantise:
    def quantise(name: str, weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        made = in_groups(weight, bits, size, **settings)
        return gptq(made, bits, version=version), made.values

    return quantise


def by_rule(name: str, weight: torch.Tensor) -> tuple[Parts, torch.Tensor] | None:
    """Some modules in other bits and groups, some left out."""
    if "down_proj" in name or "k_proj" in name:
        return None
    return by_gptq(*((8, 32) if "layers.1" in name else (4, 64)), symmetric=False)(name, weight)


def by_compressed(name: str, weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    made = in_groups(weight, 4, 40, symmetric=False, act_order=True)
    return compressed(made, 4), made.values


def by_bytes(name: str, weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    made = in_groups(weight, 8, -1, symmetric=True)
    return signed(made), made.values


def gptq_config(bits: int, size: int, **settings: object) -> dict[str, object]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size} | settings


def compressed_config(form: str, **weights: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": {"type": "int"} | weights}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 40, "zero_point": True, "version": "gemm"}
_BY_RULE = {r"+:.*\.1\..*": {"bits": 8, "group_size": 32}, r"-:.*down_proj": {}, r"-:.*k_proj": {}}


class Case(NamedTuple):
    """A model, and how it is quantised."""

    kind: str
    settings: Mapping[str, object]
    section: Mapping[str, object]
    quantise: Quantise


CASES = {
    "awq": Case("llama", {"attention_bias": True}, _AWQ, by_awq),
    "awq-experts": Case("qwen3_moe", _EXPERTS, _AWQ, by_awq),
    "gptq": Case("qwen3", _TIED, gptq_config(4, 128, sym=True), by_gptq(4, 128, symmetric=True)),
    "gptq-experts": Case(
        "qwen3_moe",
        _EXPERTS,
        gptq_config(4, 32, desc_act=True, sym=False),
        by_gptq(4, 32, symmetric=False, act_order=True),
    ),
    "gptq-order": Case(
        "cohere",
        {"logit_scale": 0.5},
        gptq_config(8, 36, desc_act=True, sym=False, checkpoint_format="gptq_v2"),
        by_gptq(8, 36, version=2, symmetric=False, act_order=True),
    ),
    "gptq-rows": Case("llama", {}, gptq_config(4, -1, desc_act=True, sym=True), by_gptq(4, -1, symmetric=True)),
    "gptq-dynamic": Case("llama", {}, gptq_config(4, 64, sym=False, dynamic=_BY_RULE), by_rule),
    "compressed-order": Case(
        "qwen3_moe",
        _EXPERTS,
        compressed_config("pack-quantized", num_bits=4, strategy="group", group_size=40, actorder="group"),
        by_compressed,
    ),
    "bytes": Case(
        "cohere", {"logit_scale": 0.5}, compressed_config("int-quantized", num_bits=8, strategy="channel"), by_bytes
    ),
}
WRITTEN = {
    "w4a16": {"num_bits": 4, "strategy": "group", "group_size": 40, "symmetric": False},
    "w4a16-symmetric": {"num_bits": 4, "strategy": "group", "group_size": 20, "symmetric": True},
    "w8a16": {"num_bits": 8, "strategy": "channel", "symmetric": False},
    "w8a16-tensor": {"num_bits": 8, "strategy": "tensor", "symmetric": True},
    "w8a8": {"num_bits": 8, "strategy": "channel", "symmetric": True},
}
"""Written by compressed-tensors itself: arguments of the weights."""


class Made(NamedTuple):
    """A checkpoint, and what transformers makes of it, in float32."""

    reference: Reference
    model: PreTrainedModel


def make(name: str, directory: Path) -> Made:
    torch.manual_seed(5)
    case = CASES.get(name, Case("llama", {}, {}, by_awq))
    model = decoder(case.kind, **_SIZES | case.settings).eval()
    spread_norms(model)
    save_tokenizer(directory)
    if name in WRITTEN:
        compress_model(model, directory, WRITTEN[name], activations=name == "w8a8")
        values = CompressedTensorsConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=values)
        for module in model.modules():
            module.quantization_enabled = False  # of its inputs
    else:
        model.save_pretrained(directory)
        codes: Parts = {}

        def to_values(tensors: Parts) -> None:
            for weight in [each for each in tensors if each.endswith(("proj.weight", "lm_head.weight"))]:
                made = case.quantise(weight, tensors[weight])
                if made is not None:
                    parts, tensors[weight] = made
                    codes.update({weight.removesuffix("weight") + end: part for end, part in parts.items()})

        edit_tensors(directory, to_values)
        model = AutoModelForCausalLM.from_pretrained(directory)
        ends = {name.rpartition(".")[0] + ".weight" for name in codes}
        edit_tensors(directory, lambda tensors: [tensors.pop(end, None) for end in ends] and tensors.update(codes))
        edit_config(directory, case.section)
    prompts = [torch.randint(3, 300, (1 + 9 * i,)).tolist() for i in range(4)]
    return Made(Reference(directory, prompts, []), model)


def compress_model(
    model: PreTrainedModel, directory: Path, weights: Mapping[str, object], *, activations: bool = False
) -> None:
    """Quantise a model's linear layers and save it, all by compressed-tensors; with `activations` as W8A8."""
    args = QuantizationArgs(**weights)
    inputs = QuantizationArgs(num_bits=8, strategy="token", dynamic=True) if activations else None
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            rows = module.weight.detach()
            parts = (
                rows.flatten()
                if args.strategy == "tensor"
                else rows.unflatten(1, (-1, args.group_size or rows.shape[1]))
            )
            scales, zeros = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
            module.weight_scale.data.copy_(scales)
            module.weight_zero_point.data.copy_(zeros)
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Checkpoints by name."""
    return cache(lambda name: make(name, tmp_path_factory.mktemp(name)))


async def check(made: Made, config: EngineConfig) -> None:
    """Hold the engine's tokens to what transformers finds most likely after those before."""
    async with Engine(config) as engine:
        answers = (collect(engine.generate(prompt, greedily(NEW_TOKENS))) for prompt in made.reference.prompts)
        outputs = list(map(ids, await asyncio.gather(*answers)))
    for prompt, output in zip(made.reference.prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = made.model(torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :]
        assert output == logits.argmax(-1).tolist()


@pytest.mark.parametrize("name", [*CASES, *WRITTEN])
async def test_tokens_equal_the_reference(name: str, made: Callable[[str], Made]) -> None:
    """Where weights stream, a few bits of each cross the bus."""
    found = made(name)
    config = roomy(found.reference, cache_policy="activation" if "awq" in name else "kv", activation_share=None)
    await check(found, config)
    planned = startup.make_plan(config)
    sizes = planned.spec.sizes
    assert planned.plan.decode_buffer_bytes > 0
    streamed = sum(layer.bus_bytes for layer in planned.plan.streamed)
    values = 4 * sum(layer.num_elements for layer in sizes.layers)
    assert streamed < (0.35 if name != "gptq-dynamic" else 0.6) * values  # there, most is left as it is


@pytest.mark.parametrize("name", ["gptq", "compressed-order"])
async def test_tokens_equal_the_reference_under_tight_budgets(name: str, made: Callable[[str], Made]) -> None:
    """Half of the cache is activations, requests are preempted."""
    await check(made(name), tight(made(name).reference))


async def test_tokens_equal_the_reference_where_weights_stay(made: Callable[[str], Made]) -> None:
    """Some."""
    await check(made("gptq-experts"), config_for(made("gptq-experts").reference, resident_share=0.5, gpu_memory="1GiB"))
