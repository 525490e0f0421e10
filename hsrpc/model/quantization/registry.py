"""Which quantised checkpoints are served: a table from the `quant_method` of config.json to what reads its weights."""

from __future__ import annotations

from collections.abc import Callable

from hsrpc.model.config_file import ConfigFile
from hsrpc.model.quantization.compressed_tensors import read_compressed_tensors
from hsrpc.model.quantization.fp8 import Fp8
from hsrpc.model.quantization.modelopt import read_modelopt
from hsrpc.model.quantization.reader import Reader
from hsrpc.model.quantization.section import one_of

KEY = "quantization_config"
METHODS: dict[str, Callable[[ConfigFile], Reader]] = {
    "fp8": Fp8.read,
    "fbgemm_fp8": Fp8.read,
    "compressed-tensors": read_compressed_tensors,
    "modelopt": read_modelopt,
}
"""By `quant_method`: makes a reader of the section, or raises CheckpointError by what it has no reader for."""


def read_quantization(config: ConfigFile) -> Reader | None:
    """What reads the quantised weights; None: none is quantised, as far as config.json says.

    Raises:
        CheckpointError: they are quantised in another way than is served.
    """
    if config.values.get(KEY) in (None, {}):
        return None
    section = config.section(KEY)
    assert section is not None
    return METHODS[one_of(section, "quant_method", tuple(METHODS))](section)
