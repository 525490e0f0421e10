"""Which quantised checkpoints are served: a table from the `quant_method` of config.json to what reads its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hsrpc.model.config_file import ConfigFile
from hsrpc.model.quantization.awq import Awq
from hsrpc.model.quantization.compressed_tensors import quantises_more, read_compressed_tensors
from hsrpc.model.quantization.fp8 import Fp8
from hsrpc.model.quantization.gptq import Gptq
from hsrpc.model.quantization.modelopt import read_modelopt
from hsrpc.model.quantization.mxfp4 import Mxfp4
from hsrpc.model.quantization.reader import Reader
from hsrpc.model.quantization.section import KEY, METHOD, REMEDY

METHODS: Mapping[str, Callable[[ConfigFile], Reader]] = {
    "awq": Awq.read,
    "gptq": Gptq.read,
    "fp8": Fp8.read,
    "fbgemm_fp8": Fp8.read,
    "mxfp4": Mxfp4.read,
    "compressed-tensors": read_compressed_tensors,
    "modelopt": read_modelopt,
    "modelopt_fp4": read_modelopt,
}
"""By `quant_method`: makes a reader of the section, or raises CheckpointError by what it has no reader for."""
_WEIGHTS_ALONE = ("awq", "gptq", "mxfp4")
"""Methods by which nothing else is quantised."""
_FOUR = "serve the model's awq, gptq, mxfp4 or compressed-tensors (w4a16) checkpoint, or its unquantized one"
_EIGHT = "serve the model's fp8 or compressed-tensors checkpoint, or its unquantized one"
_FEW_BITS = ("bitsandbytes", "exl2", "exl3", "hqq", "aqlm", "vptq", "higgs", "spqr", "quip", "auto-round")
_NEAREST = dict.fromkeys(_FEW_BITS, _FOUR) | dict.fromkeys(("quark", "eetq", "quanto", "torchao"), _EIGHT)
"""What can be served in place of other methods, where it is known better than `REMEDY` says."""


def read_quantization(config: ConfigFile) -> Reader | None:
    """What reads the quantised weights; None: none is quantised, as far as config.json says.

    Raises:
        CheckpointError: they are quantised in another way than is served.
    """
    if config.values.get(KEY) in (None, {}):
        return None
    section = config.section(KEY)
    assert section is not None
    method = section.values.get(METHOD)
    if not isinstance(method, str) or method not in METHODS:
        remedy = _NEAREST.get(str(method), REMEDY)
        raise section.refuse(METHOD, "one of " + ", ".join(METHODS), remedy)
    return METHODS[method](section)


def says_more(config: ConfigFile) -> bool:
    """Whether config.json says that activations or caches are quantised too, which are served as they are."""
    section = config.section(KEY)
    if section is None or not section.values:
        return False
    method = section.values.get(METHOD)
    return quantises_more(section) if method == "compressed-tensors" else method not in _WEIGHTS_ALONE
