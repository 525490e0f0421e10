"""Quantised checkpoints of small random models, and what transformers makes of the same weights decoded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from hsrpc import Engine, EngineConfig
from tests.engine.reference import Reference, decoder, save_tokenizer, spread_norms
from tests.engine.support import collect, ids
from tests.engine.support import greedy as greedily
from tests.engine.test_scaled_weights import edit_config, edit_tensors
from tests.model.quantization.packed import Parts

NEW_TOKENS = 12
_SIZES = {
    "vocab_size": 304,
    "hidden_size": 160,
    "num_hidden_layers": 2,
    "intermediate_size": 200,
    "num_key_value_heads": 2,
}
_WEIGHTS = ("proj.weight", "with_mqa.weight", "lm_head.weight", "experts.gate_up_proj", "experts.down_proj")
"""Ends of the names of what may be quantised."""

Quantise = Callable[[str, torch.Tensor], "tuple[Parts, torch.Tensor] | None"]
"""By a weight's name: its tensors, by what stands in place of `weight` or behind the name, and the values that they
mean; None: it is left as it is."""


class Case(NamedTuple):
    """A model, and how it is quantised."""

    kind: str
    settings: Mapping[str, object]
    section: Mapping[str, object]
    quantise: Quantise


class Written(NamedTuple):
    """A model that compressed-tensors quantises and writes itself."""

    weights: QuantizationArgs
    activations: bool = False
    """As W8A8."""
    settings: Mapping[str, object] = {}


class Made(NamedTuple):
    """A checkpoint, and what transformers makes of it, in float32."""

    reference: Reference
    model: PreTrainedModel


def make(case: Case | Written, directory: Path) -> Made:
    """Save a quantised model."""
    torch.manual_seed(5)
    kind = case.kind if isinstance(case, Case) else "llama"
    model = decoder(kind, **_SIZES | case.settings).eval()
    spread_norms(model)
    save_tokenizer(directory)
    model = _quantised(model, case, directory) if isinstance(case, Case) else _written(model, case, directory)
    prompts = [torch.randint(3, 300, (1 + 9 * i,)).tolist() for i in range(4)]
    return Made(Reference(directory, prompts, []), model)


def _quantised(model: PreTrainedModel, case: Case, directory: Path) -> PreTrainedModel:
    model.save_pretrained(directory)
    codes: Parts = {}
    replaced: list[str] = []

    def to_values(tensors: Parts) -> None:
        for weight in [each for each in tensors if each.endswith(_WEIGHTS)]:
            made = case.quantise(weight, tensors[weight])
            if made is not None:
                parts, tensors[weight] = made
                codes.update({weight.removesuffix("weight") + end: part for end, part in parts.items()})
                replaced.append(weight)

    def to_codes(tensors: Parts) -> None:
        for weight in replaced:
            del tensors[weight]
        tensors.update(codes)

    edit_tensors(directory, to_values)
    model = AutoModelForCausalLM.from_pretrained(directory)
    edit_tensors(directory, to_codes)
    edit_config(directory, case.section)
    return model


def _written(model: PreTrainedModel, case: Written, directory: Path) -> PreTrainedModel:
    inputs = QuantizationArgs(num_bits=8, strategy="token", dynamic=True) if case.activations else None
    scheme = QuantizationScheme(targets=["Linear"], weights=case.weights, input_activations=inputs)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            _scale(module, case.weights)
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)
    model = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    for module in model.modules():
        module.quantization_enabled = False  # of its inputs
    return model


def _scale(module: torch.nn.Module, args: QuantizationArgs) -> None:
    """Fill a linear layer's scales and zero points by the smallest and the largest weights."""
    rows, whole = module.weight.detach(), None
    parts = rows.flatten() if args.strategy == "tensor" else rows.unflatten(1, (-1, args.group_size or rows.shape[1]))
    if args.strategy == "tensor_group":
        whole = generate_gparam(rows.min(), rows.max())
        module.weight_global_scale.data.copy_(whole)
    scales, zeros = calculate_qparams(parts.amin(-1), parts.amax(-1), args, whole)
    module.weight_scale.data.copy_(scales)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zeros)


async def check(made: Made, config: EngineConfig) -> None:
    """Hold the engine's tokens to what transformers finds most likely after those before."""
    async with Engine(config) as engine:
        answers = (collect(engine.generate(prompt, greedily(NEW_TOKENS))) for prompt in made.reference.prompts)
        outputs = list(map(ids, await asyncio.gather(*answers)))
    for prompt, output in zip(made.reference.prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = made.model(torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :]
        assert output == logits.argmax(-1).tolist()
