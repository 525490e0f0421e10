"""What config.json says of quantised weights, and what is refused there."""

from __future__ import annotations

import pytest

from hsrpc.errors import CheckpointError
from hsrpc.model.config_file import ConfigFile
from hsrpc.model.quantization.fp8 import Fp8
from hsrpc.model.quantization.reader import AnyOf, Reader
from hsrpc.model.quantization.registry import read_quantization, says_more

_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
_BLOCKS = _WEIGHTS | {"strategy": "block", "block_structure": [128, 128]}


_FLOAT4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "symmetric": True}


def mixed(**algorithms: str) -> dict[str, object]:
    layers = {layer: {"quant_algo": each} for layer, each in algorithms.items()}
    return {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}


def compressed(*weights: object, **settings: object) -> dict[str, object]:
    groups = {f"group_{i}": {"weights": each} for i, each in enumerate(weights)}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups} | settings


def read(quantization: object) -> Reader | None:
    return read_quantization(ConfigFile("config.json", {"quantization_config": quantization}))


@pytest.mark.parametrize(
    ("quantization", "block"),
    [
        ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}, (128, 128)),
        ({"quant_method": "fp8", "activation_scheme": "static"}, None),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, None),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, None),
        ({"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"}, (128, 128)),
        (compressed(_WEIGHTS | {"strategy": "group", "group_size": 32}, format="mxfp8-quantized"), (1, 32)),
        (compressed(_WEIGHTS), None),
        (compressed(_WEIGHTS, _WEIGHTS | {"strategy": "channel"}, sparsity_config={}), None),
        (compressed(_BLOCKS, _BLOCKS), (128, 128)),
    ],
)
def test_what_is_served(quantization: dict[str, object], block: tuple[int, int] | None) -> None:
    """Blocks as the file has them; else the shape of the scales says."""
    reader = read(quantization)
    assert reader in (Fp8(block), AnyOf((Fp8(block),)))


def test_each_algorithm_has_a_reader_once() -> None:
    """Where layers differ in it."""
    reader = read(mixed(a="FP8", b="NVFP4", c="FP8", d="MXFP8"))
    assert isinstance(reader, AnyOf)
    assert len(reader.readers) == 3


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ([8], "quantization_config: expected an object"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt: expected one of e4m3.*'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size: expected two whole numbers"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size: expected two whole numbers"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "quant_algo: expected one of FP8.*'NVFP4_AWQ'"),
        (compressed(_WEIGHTS, format="marlin-24"), "format: expected one of float-quantized.*'marlin-24'"),
        (compressed(), "config_groups: expected an object"),
        (compressed(3), "group_0: weights: expected an object"),
        (compressed(None), "group_0: expected an object that describes weights"),
        (compressed(_WEIGHTS | {"type": "int"}), "type: expected one of float"),
        (compressed(_WEIGHTS | {"num_bits": 4}), "num_bits: expected 8"),
        (compressed(_WEIGHTS | {"symmetric": False}), "symmetric: expected true"),
        (compressed(_WEIGHTS | {"strategy": "token"}), "strategy: expected one of tensor, channel, group, block"),
        (compressed(_WEIGHTS | {"strategy": "group"}), "group_size: expected"),
        (compressed(_FLOAT4 | {"group_size": 32}, format="nvfp4-pack-quantized"), "group_size: expected 16, found 32"),
        (compressed(_WEIGHTS, format="mxfp4-pack-quantized"), "num_bits: expected 4, found 8"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "quantized_layers: expected an object"),
        (mixed(a="FP8", b="W4A16_AWQ"), "quantized_layers: b: quant_algo: expected one of FP8.*'W4A16_AWQ'"),
        ({"quant_method": "bitsandbytes"}, "quant_method: expected one of .*found 'bitsandbytes'; .*awq, gptq"),
        ({"quant_method": "quark"}, "quant_method: expected one of .*found 'quark'; .*fp8 or compressed-tensors"),
        (compressed(_WEIGHTS | {"strategy": "block"}), "block_structure: expected two sizes"),
        (compressed(_WEIGHTS, _BLOCKS), "group_1: weights: strategy: expected blocks of one size"),
        (compressed(_WEIGHTS, transform_config={"config_groups": {}}), "transform_config: expected nothing"),
        (compressed(_WEIGHTS, sparsity_config={"format": "sparse-24"}), "sparsity_config: expected nothing"),
    ],
)
def test_what_is_refused(quantization: object, words: str) -> None:
    """By key and value, with what can be served."""
    with pytest.raises(CheckpointError, match=words) as caught:
        read(quantization)
    assert "serve" in str(caught.value)


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        (None, False),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, False),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, True),
        (compressed(_WEIGHTS), False),
        (compressed(_WEIGHTS, kv_cache_scheme={"num_bits": 8}), True),
        (compressed(_WEIGHTS, config_groups={"a": {"weights": _WEIGHTS, "input_activations": {"num_bits": 8}}}), True),
    ],
)
def test_activations_and_caches(quantization: object, says: bool) -> None:
    """Where they are quantised too, it is said that they are not served so."""
    assert says_more(ConfigFile("config.json", {"quantization_config": quantization})) == says
