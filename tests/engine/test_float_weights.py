"""Checkpoints of float4 codes, and of float8 in unusual ways: the tokens of transformers with what they mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from hsrpc.engine import startup
from hsrpc.errors import CheckpointError
from hsrpc.model.families.registry import create_family
from hsrpc.model.formats.codes import Code
from hsrpc.model.formats.plain import Plain
from hsrpc.model.formats.scaled import Scaled
from tests.engine.quantised import Case, Made, Written, check, make
from tests.engine.reference import Reference
from tests.engine.support import config_for, roomy, tight
from tests.engine.test_scaled_weights import edit_config, edit_tensors, in_blocks
from tests.model.quantization.packed import Parts

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
_FLOAT4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def float4(numbers: torch.Tensor) -> torch.Tensor:
    """Bytes of the codes whose meanings are nearest to numbers [..., n]."""
    codes = (numbers[..., None] - _FLOAT4).abs().argmin(-1).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4


def meanings(packed: torch.Tensor) -> torch.Tensor:
    return _FLOAT4[torch.stack((packed & 15, packed >> 4), -1).flatten(-2).int()]


def by_mxfp4(name: str, weight: torch.Tensor) -> tuple[Parts, torch.Tensor] | None:
    """Experts of gpt-oss: [E, rows, groups, 16] of weights that lie there as [E, columns, rows]."""
    if "experts" not in name:
        return None
    groups = weight.transpose(1, 2).unflatten(2, (-1, 32))
    exponents = (groups.abs().amax(-1) / 6).log2().ceil()
    blocks, scales = float4(groups / 2 ** exponents[..., None]), (exponents + 127).to(torch.uint8)
    return {"_blocks": blocks, "_scales": scales}, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)


def by_nvfp4(name: str, weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """ModelOpt's: a float8 for 16 columns, and a number for all of these."""
    groups = weight.unflatten(1, (-1, 16))
    whole = weight.abs().max() / (6 * 448)
    scales = (groups.abs().amax(-1) / 6 / whole).to(E4M3)
    each = (scales.float() * whole)[..., None]
    codes = float4(groups / each)
    parts = {"weight": codes.flatten(1), "weight_scale": scales, "weight_scale_2": whole.clone()}
    return parts, (meanings(codes) * each).flatten(1)


def by_mixture(name: str, weight: torch.Tensor) -> tuple[Parts, torch.Tensor] | None:
    """A mixture of ModelOpt's algorithms: fp8 with one scale in attention, none in the first layer's MLP."""
    if "self_attn" in name:
        codes, scales, values = in_blocks(weight, *weight.shape)
        return {"weight": codes, "weight_scale": scales[0, 0].clone()}, values
    return None if "layers.0" in name else by_nvfp4(name, weight)


def by_powers(name: str, weight: torch.Tensor) -> tuple[Parts, torch.Tensor] | None:
    """DeepSeek's blocks of 128 x 128, with powers of two for scales, a byte each."""
    if "kv_b_proj" in name and "layers.1" in name:
        return None
    codes, scales, _ = in_blocks(weight, 128, 128)
    powers = (scales.log2().ceil() + 127).to(torch.uint8).view(E8M0)
    spread = powers.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[: len(weight), : weight.shape[1]]
    codes = (weight / spread).to(E4M3)
    return {"weight": codes, "weight_scale_inv": powers}, codes.float() * spread


def by_rows(name: str, weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    codes, scales, values = in_blocks(weight, 1, weight.shape[1])
    return {"weight": codes, "weight_scale": scales}, values


def modelopt(algorithm: str, **more: object) -> dict[str, object]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, **more}


_GPT_OSS = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "head_dim": 32,
    "num_local_experts": 4,
    "intermediate_size": 96,
    "sliding_window": 24,
}
_LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
_MIXED = modelopt("MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4"}})
CASES = {
    "mxfp4": Case("gpt_oss", _GPT_OSS, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, by_mxfp4),
    "nvfp4": Case("qwen3", {"head_dim": 40, "intermediate_size": 208}, modelopt("NVFP4"), by_nvfp4),
    "mixture": Case("llama", {"intermediate_size": 208, "attention_bias": True}, _MIXED, by_mixture),
    "powers": Case("deepseek_v3", _LATENT, {"quant_method": "fp8", "weight_block_size": [128, 128]}, by_powers),
    "rows": Case("llama", {"tie_word_embeddings": True}, {"quant_method": "fbgemm_fp8"}, by_rows),
}
_SIZES = {"intermediate_size": 224}


def preset(name: str) -> QuantizationArgs:
    weights = preset_name_to_scheme(name, ["Linear"]).weights
    assert weights is not None
    return weights


WRITTEN = {name: Written(preset(name), settings=_SIZES) for name in ("NVFP4A16", "MXFP4A16", "MXFP8A16")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Checkpoints by name."""
    return cache(lambda name: make((CASES | WRITTEN)[name], tmp_path_factory.mktemp(name)))


SHARES = {
    **dict.fromkeys(CASES | WRITTEN, 0.15),
    **{"mxfp4": 0.36, "mixture": 0.44, "powers": 0.32, "rows": 0.26, "MXFP8A16": 0.27},
}
"""Most of the bytes of the layers' weights in float32 that cross the bus, by what is left as it is."""


@pytest.mark.parametrize("name", [*CASES, *WRITTEN])
async def test_tokens_equal_the_reference(name: str, made: Callable[[str], Made]) -> None:
    """Where weights stream, a few bits of each cross the bus."""
    found = made(name)
    config = roomy(found.reference, cache_policy="activation" if name == "powers" else "kv", activation_share=None)
    await check(found, config)
    planned = startup.make_plan(config)
    streamed = sum(layer.bus_bytes for layer in planned.plan.placed)
    assert streamed < SHARES[name] * 4 * sum(layer.num_elements for layer in planned.spec.sizes.layers)


@pytest.mark.parametrize("name", ["mxfp4", "NVFP4A16"])
async def test_tokens_equal_the_reference_under_tight_budgets(name: str, made: Callable[[str], Made]) -> None:
    """Half of the cache is activations, requests are preempted."""
    await check(made(name), tight(made(name).reference))


@pytest.mark.parametrize("kept", ["decoded", "packed"])
async def test_tokens_equal_the_reference_where_weights_stay(kept: str, made: Callable[[str], Made]) -> None:
    """Some: decoded when they are loaded, or in every step."""
    config = config_for(made("mxfp4").reference, resident_share=0.5, resident_weights=kept, gpu_memory="1GiB")
    await check(made("mxfp4"), config)


def test_rows_in_another_order_keep_their_codes(made: Callable[[str], Made]) -> None:
    """Heads that rotate neighbours, and K and V apart: fewer rows share a scale where blocks are cut."""
    planned = startup.make_plan(roomy(made("powers").reference))
    family, formats = create_family(planned.spec), planned.spec.formats.weight
    blocks = {}
    for tensor in family.layer_tensors(0):
        form = formats(tensor)
        if tensor.order is not None and isinstance(form, Scaled):
            [matrix] = form.sources
            assert (matrix.code, matrix.scale) == (Code.E4M3, E8M0)
            blocks[tensor.name] = matrix.block[0]
    assert blocks == {"queries_weight": 128, "kv_latent_weight": 56, "kv_weight": 32}
    kv = next(tensor for tensor in family.layer_tensors(1) if tensor.name == "kv_weight")
    assert isinstance(formats(kv), Plain)


@pytest.fixture
def copied(made: Callable[[str], Made], tmp_path: Path) -> Callable[[str], Reference]:
    """Checkpoints by name, to be damaged."""

    def copy(name: str) -> Reference:
        for file in made(name).reference.directory.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return Reference(tmp_path, [], [])

    return copy


_EXPERTS = "model.layers.1.mlp.experts.down_proj"
_Q = "model.layers.1.self_attn.q_proj"
DAMAGE: dict[str, tuple[str, Callable[[Parts], object], str]] = {
    "missing": ("mxfp4", lambda tensors: tensors.pop(f"{_EXPERTS}_scales"), rf"expected tensor {_EXPERTS}_scales"),
    "truncated": (
        "mxfp4",
        lambda tensors: tensors.update({f"{_EXPERTS}_scales": tensors[f"{_EXPERTS}_scales"][..., :2].clone()}),
        rf"{_EXPERTS}_scales: expected shape \[160, 3\] of U8, found shape \[160, 2\] of U8",
    ),
    "misshapen": (
        "mxfp4",
        lambda tensors: tensors.update({f"{_EXPERTS}_blocks": tensors[f"{_EXPERTS}_blocks"].flatten(2)}),
        rf"{_EXPERTS}_blocks: expected shape \[160, 3, 16\] of U8, found shape \[160, 48\] of U8",
    ),
    "experts": (
        "mxfp4",
        lambda tensors: tensors.update({f"{_EXPERTS}_scales": tensors[f"{_EXPERTS}_scales"][:3].clone()}),
        rf"{_EXPERTS}_scales: expected a shape that begins with 4, one for each expert, found shape \[3, 160, 3\]",
    ),
    "number": ("nvfp4", lambda tensors: tensors.pop(f"{_Q}.weight_scale_2"), rf"expected tensor {_Q}.weight_scale_2"),
    "type": (
        "nvfp4",
        lambda tensors: tensors.update({f"{_Q}.weight_scale": tensors[f"{_Q}.weight_scale"].float()}),
        rf"{_Q}.weight_scale: expected shape \[160, 10\] of F8_E4M3, found shape \[160, 10\] of F32",
    ),
    "codes": (
        "NVFP4A16",
        lambda tensors: tensors.update({f"{_Q}.weight_packed": tensors[f"{_Q}.weight_packed"][:, 1:].clone()}),
        rf"{_Q}.weight_packed: expected shape \[160, 80\] of U8, found shape \[160, 79\] of U8",
    ),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_what_does_not_fit_is_refused(kind: str, copied: Callable[[str], Reference]) -> None:
    """By name, before any weight is read."""
    name, damage, message = DAMAGE[kind]
    found = copied(name)
    edit_tensors(found.directory, damage)
    with pytest.raises(CheckpointError, match=message):
        startup.make_plan(roomy(found))


def test_modelopt_has_a_file_of_its_own(copied: Callable[[str], Reference]) -> None:
    """What it says of weights holds where config.json says nothing, and is refused by its name."""
    found = copied("nvfp4")
    wanted = startup.make_plan(roomy(found)).plan.placed
    edit_config(found.directory, None)
    file = found.directory / "hf_quant_config.json"
    file.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}))
    assert startup.make_plan(roomy(found)).plan.placed == wanted
    file.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4_AWQ"}}))
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: quantization: quant_algo: expected one of FP8"):
        startup.make_plan(roomy(found))
