"""Checkpoints of AWQ, GPTQ and compressed-tensors: the tokens of transformers with the same weights decoded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from hsrpc.engine import startup
from hsrpc.errors import CheckpointError
from tests.engine.quantised import Case, Made, Quantise, Written, check, make
from tests.engine.reference import Reference
from tests.engine.support import config_for, roomy, tight
from tests.engine.test_scaled_weights import edit_config
from tests.model.quantization.packed import Parts, awq, compressed, gptq, in_groups, signed

_EXPERTS = {"head_dim": 24, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_TIED = {"head_dim": 40, "tie_word_embeddings": True}


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
    "w4a16": Written(QuantizationArgs(num_bits=4, strategy="group", group_size=40, symmetric=False)),
    "w4a16-symmetric": Written(QuantizationArgs(num_bits=4, strategy="group", group_size=20, symmetric=True)),
    "w8a16": Written(QuantizationArgs(num_bits=8, strategy="channel", symmetric=False)),
    "w8a16-tensor": Written(QuantizationArgs(num_bits=8, strategy="tensor", symmetric=True)),
    "w8a8": Written(QuantizationArgs(num_bits=8, strategy="channel", symmetric=True), activations=True),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Checkpoints by name."""
    return cache(lambda name: make((CASES | WRITTEN)[name], tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("name", [*CASES, *WRITTEN])
async def test_tokens_equal_the_reference(name: str, made: Callable[[str], Made]) -> None:
    """Where weights stream, a few bits of each cross the bus."""
    found = made(name)
    config = roomy(found.reference, cache_policy="activation" if "awq" in name else "kv", activation_share=None)
    await check(found, config)
    planned = startup.make_plan(config)
    sizes = planned.spec.sizes
    assert planned.plan.decode_buffer_bytes > 0
    streamed = sum(layer.bus_bytes for layer in planned.plan.placed)
    values = 4 * sum(layer.num_elements for layer in sizes.layers)
    assert streamed < (0.35 if name != "gptq-dynamic" else 0.6) * values  # there, most is left as it is


@pytest.mark.parametrize("name", ["gptq", "compressed-order"])
async def test_tokens_equal_the_reference_under_tight_budgets(name: str, made: Callable[[str], Made]) -> None:
    """Half of the cache is activations, requests are preempted."""
    await check(made(name), tight(made(name).reference))


@pytest.mark.parametrize("form", ["packed", "decoded"])
async def test_tokens_equal_the_reference_where_weights_stay(form: str, made: Callable[[str], Made]) -> None:
    """Some, as they come or as values."""
    found = made("gptq-experts")
    config = config_for(found.reference, resident_share=0.5, gpu_memory="1GiB", resident_weights=form)
    await check(found, config)


@pytest.mark.parametrize(("name", "says"), [("w4a16", False), ("w8a8", True)])
def test_what_is_not_quantised_is_said(
    name: str, says: bool, made: Callable[[str], Made], caplog: pytest.LogCaptureFixture
) -> None:
    """Where config.json says that activations are."""
    startup.make_plan(roomy(made(name).reference))
    assert any("activations are not quantised" in message for message in caplog.messages) == says


def test_codes_need_a_configuration(made: Callable[[str], Made], tmp_path: Path) -> None:
    """GPTQ's and AWQ's tools have written it to a file of its own, too."""
    for file in made("gptq").reference.directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_config(tmp_path, None)
    with pytest.raises(CheckpointError, match=r"proj\.qweight: expected quantization_config in config\.json"):
        startup.make_plan(roomy(Reference(tmp_path, [], [])))
