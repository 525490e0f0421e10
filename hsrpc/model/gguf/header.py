"""What a GGUF file says of its model, by the names of llama.cpp's keys and tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from hsrpc.errors import CheckpointError
from hsrpc.model.bounds import MAX_LAYERS
from hsrpc.model.config_file import ConfigFile, shortened
from hsrpc.model.gguf.file import GgufFile, GgufTensor, decode
from hsrpc.model.rope import Llama3, Scaling, Unscaled

Values = dict[str, object]
"""Part of a config.json."""
ARCHITECTURE = "general.architecture"
_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all models say whose rotation is scaled as Llama 3.1's; the file has its result alone."""


class Header:
    """Metadata and tensors of a file, whose keys begin with the name of its architecture."""

    def __init__(self, file: GgufFile) -> None:
        self.path = file.path
        self.tensors: Mapping[str, GgufTensor] = file.tensors
        self.metadata: ConfigFile = file.metadata
        self.architecture = str(file.metadata.values.get(ARCHITECTURE))

    def get(self, key: str, default: object = None) -> object:
        """The value of `key`; of a list with an element for each layer, the one that all are."""
        value = self.metadata.values.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            return value[0]
        return value

    def values(self, **keys: str) -> Values:
        """The values of keys that the file has, by their names in config.json."""
        found = {name: self.get(key) for name, key in keys.items()}
        return {name: value for name, value in found.items() if value is not None}

    def number(self, key: str, default: float) -> float:
        return self.metadata.number(f"{self.architecture}.{key}", default)

    @property
    def num_layers(self) -> int:
        """Without those that predict further tokens."""
        key = f"{self.architecture}.block_count"
        further = self.metadata.count(f"{self.architecture}.nextn_predict_layers", 0, maximum=MAX_LAYERS)
        layers = self.metadata.integer(key, maximum=MAX_LAYERS) - further
        if layers < 1:
            raise self.metadata.refuse(key, f"more than nextn_predict_layers={further}")
        return layers

    def first(self, name: str) -> GgufTensor | None:
        """The tensor of that name in the first layer that has one."""
        names = (f"blk.{layer}.{name}" for layer in range(self.num_layers))
        return next((self.tensors[each] for each in names if each in self.tensors), None)

    def has(self, name: str) -> bool:
        """Whether a layer has a tensor of that name."""
        return self.first(name) is not None

    def width(self, name: str) -> int | None:
        """Elements of a row of that tensor of a layer."""
        tensor = self.first(name)
        return None if tensor is None else tensor.shape[-1]

    def missing(self, name: str) -> CheckpointError:
        """What is said where the tensor `name` is needed."""
        return CheckpointError(f"{self.path}: expected tensor {shortened(name)}, found none; fetch the file again")

    def floats(self, name: str) -> list[float]:
        """The values of a small tensor."""
        if name not in self.tensors:
            raise self.missing(name)
        tensor = self.tensors[name]
        return [float(str(value)) for value in decode(tensor.rows, tensor.type).ravel()]

    def layer_types(self, period: int) -> list[str]:
        """Which layers slide: as the file lists them, or all but every nth, `period` where the file is silent."""
        pattern = self.metadata.values.get(f"{self.architecture}.attention.sliding_window_pattern", period)
        layers = range(self.num_layers)
        if isinstance(pattern, int):
            slides: Iterable[object] = [not pattern or (layer + 1) % pattern != 0 for layer in layers]
        else:
            slides = pattern if isinstance(pattern, list) else ()
        return ["sliding_attention" if each else "full_attention" for each in slides][: len(layers)]

    def rope_scaling(self, theta: float, width: int) -> Values | None:
        """How the rotation of `width` dimensions by the base `theta` is scaled; None: it is not."""
        if "rope_freqs.weight" in self.tensors:
            return _scaling(self.floats("rope_freqs.weight"), theta, width, self.get("context_length"))
        kind = self.get("rope.scaling.type", "linear")
        factor = self.get("rope.scaling.factor", self.get("rope.scale_linear"))
        if kind == "none" or factor in (None, 0, 1):
            return None
        keys = {
            "original_max_position_embeddings": "rope.scaling.original_context_length",
            "attention_factor": "rope.scaling.yarn_attn_factor",
            "beta_fast": "rope.scaling.yarn_beta_fast",
            "beta_slow": "rope.scaling.yarn_beta_slow",
        }
        return {"rope_type": kind, "factor": factor, **(self.values(**keys) if kind == "yarn" else {})}


def _scaling(factors: list[float], theta: float, width: int, context: object) -> Values | None:
    """What slows each pair of dimensions by its factor: as Llama 3.1 does, or else as LongRoPE, which lists them."""
    if all(factor == 1 for factor in factors):
        return None
    found = torch.tensor(factors)
    if len(factors) == width // 2:
        llama = Llama3(factor=max(factors), trained=8192)
        if torch.allclose(_slowed(Unscaled(), theta, width) / found, _slowed(llama, theta, width), rtol=1e-4, atol=0):
            return {"rope_type": "llama3", "factor": max(factors), **_LLAMA_3}
    listed = {"short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
    return {"rope_type": "longrope", **listed, "original_max_position_embeddings": context}


def _slowed(scaling: Scaling, theta: float, width: int) -> torch.Tensor:
    return scaling.frequencies(theta, width, 0)
