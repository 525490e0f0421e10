"""Weights as NVIDIA's ModelOpt exports them."""

from __future__ import annotations

from hsrpc.model.config_file import ConfigFile
from hsrpc.model.quantization.fp8 import Fp8
from hsrpc.model.quantization.reader import Reader
from hsrpc.model.quantization.section import one_of

_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")


def read_modelopt(section: ConfigFile) -> Reader:
    """As `quantization_config` says.

    Raises:
        CheckpointError: the algorithm is another.
    """
    one_of(section, "quant_algo", _ALGORITHMS)
    return Fp8(None)
