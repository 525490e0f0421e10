"""Weights as NVIDIA's ModelOpt exports them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hsrpc.model.config_file import ConfigFile, read_config
from hsrpc.model.formats.codes import Factor
from hsrpc.model.quantization.float4 import FactorTensor, mxfp4, nvfp4
from hsrpc.model.quantization.fp8 import Fp8
from hsrpc.model.quantization.reader import AnyOf, Reader
from hsrpc.model.quantization.section import KEY, METHOD, REMEDY, one_of

FILE = "hf_quant_config.json"
"""Beside config.json: says what older exports have there alone."""
_MIXED = "MIXED_PRECISION"
_NVFP4, _MXFP4 = nvfp4("weight", FactorTensor("weight_scale_2", Factor.MULTIPLIES)), mxfp4("weight")
_READERS: Mapping[str, Reader] = {
    "FP8": Fp8(None),
    "FP8_PER_CHANNEL_PER_TOKEN": Fp8(None),
    "FP8_PB_WO": Fp8((128, 128)),
    "MXFP8": Fp8((1, 32)),
    "NVFP4": _NVFP4,
    "W4A16_NVFP4": _NVFP4,
    "W4A8_NVFP4_FP8": _NVFP4,
    "MXFP4": _MXFP4,
    "W4A8_MXFP4_FP8": _MXFP4,
}
"""By algorithm. Others scale activations too (`pre_quant_scale`)."""


def read_modelopt(section: ConfigFile) -> Reader:
    """As `quantization_config` says.

    Raises:
        CheckpointError: the algorithm, or that of a layer where they differ, is another.
    """
    if section.values.get("quant_algo") != _MIXED:
        return _reader(section)
    layers = section.section("quantized_layers")
    if layers is None or not layers.values:
        raise section.refuse("quantized_layers", "an object with the algorithm of each layer", REMEDY)
    sections = map(layers.section, layers.values)
    return AnyOf(tuple(dict.fromkeys(_reader(each) for each in sections if each is not None)))


def _reader(section: ConfigFile) -> Reader:
    algorithm = section.values.get("quant_algo")
    upper = {**section.values, "quant_algo": algorithm.upper() if isinstance(algorithm, str) else algorithm}
    return _READERS[one_of(replace(section, values=upper), "quant_algo", tuple(_READERS))]


def with_export(config: ConfigFile, directory: Path) -> ConfigFile:
    """`config`, or with what `FILE` in its directory says of quantised weights, where it says nothing itself.

    Raises:
        CheckpointError: that file is none, or its weights are quantised in a way that is not served.
    """
    path = directory / FILE
    if config.has(KEY) or not path.exists():
        return config
    section = read_config(path).section("quantization")
    if section is None or not section.has("quant_algo"):
        return config
    read_modelopt(section)  # refuses by this file's name
    return replace(config, values={**config.values, KEY: {**section.values, METHOD: "modelopt"}})
