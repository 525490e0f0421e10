"""Where weights come from: a safetensors checkpoint on disk, or random numbers of the right shapes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch

from hsrpc.errors import CheckpointError
from hsrpc.model.config_file import read_config
from hsrpc.model.family import Family
from hsrpc.model.safetensors_file import SafetensorsFile
from hsrpc.model.tensor import TensorSpec

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_OTHER_CONFIG = "use the config.json of this checkpoint, or fetch it again"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")

_RANDOM_BLOCK = 4_194_301
"""A prime: rows of a tensor filled with repeats of one block never coincide."""


class WeightSource(Protocol):
    """Anything that can fill packed tensors; safe to call from several threads at once."""

    def read(self, tensor: TensorSpec, out: torch.Tensor) -> None:
        """Fills `out`, contiguous and of the tensor's shape, in its own element type and on its own device."""


def has_weights(directory: Path) -> bool:
    """Whether a `Checkpoint` can be made of the directory; a plan needs none."""
    return (directory / WEIGHTS_FILE).exists() or (directory / INDEX_FILE).exists()


class Checkpoint:
    """The safetensors files of a model directory.

    Raises:
        CheckpointError: on construction, when the directory has none, or a file is missing, truncated or corrupt.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        single = directory / WEIGHTS_FILE
        if single.exists():
            file = SafetensorsFile(single)
            self._files = dict.fromkeys(file.entries, file)
        elif (directory / INDEX_FILE).exists():
            self._files = _open_shards(directory)
        else:
            raise _no_weights(directory)

    def check_model(self, family: Family) -> None:
        """Checks from the headers that all tensors of a model can be read; that each of its layers is there, first.

        Raises:
            CheckpointError: the configuration has other layers than the files, or as `check`.
        """
        missing = [layer for layer in range(family.num_layers) if not self._has_layer(family, layer)]
        found = family.num_layers - len(missing)
        if missing and missing[0] == found > 0:
            expected = f"{found}, since {self.directory} has weights of the first {found} layers alone"
            raise family.spec.config.refuse("num_hidden_layers", expected, _OTHER_CONFIG)
        if missing and found:
            expected = f"weights of {family.num_layers} layers, as num_hidden_layers in config.json says"
            more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            found_layers = f"{found} layers, without layer {missing[0]}{more}"
            raise CheckpointError(f"{self.directory}: expected {expected}, found {found_layers}; {_OTHER_CONFIG}")
        self.check(family.all_tensors())

    def _has_layer(self, family: Family, layer: int) -> bool:
        """Whether any tensor of the layer is there."""
        return any(self._name(source) for tensor in family.layer_tensors(layer) for source in tensor.sources)

    def check(self, tensors: Iterable[TensorSpec]) -> None:
        """Checks from the headers that all `tensors` can be read.

        Raises:
            CheckpointError: a tensor is missing, or its shape or element type is wrong.
        """
        for tensor in tensors:
            for _ in self._locate(tensor):
                pass

    def read(self, tensor: TensorSpec, out: torch.Tensor) -> None:
        """Fills `out`, contiguous and of the tensor's shape, with its sources one after the other.

        Raises:
            CheckpointError: as `check`, or a file has become shorter since.
        """
        located = list(self._locate(tensor))
        flat, start = _flat(tensor, out), 0
        for file, name, count in located:
            file.read(name, flat[start : start + count])
            start += count
        if tensor.order is not None:
            index = tensor.order.index().to(out.device)
            pieces = flat.view(len(index), -1)
            pieces.copy_(pieces[index])

    def _locate(self, tensor: TensorSpec) -> Iterator[tuple[SafetensorsFile, str, int]]:
        """File, name in it and number of elements of each source."""
        for source, shape in zip(tensor.sources, tensor.source_shapes, strict=True):
            name = self._find(source)
            file = self._files[name]
            file.check_dtype(name)
            found = file.entries[name].shape
            if found != shape:
                raise file.refuse(f"shape {list(shape)}", list(found), "use the config.json of this checkpoint", name)
            yield file, name, math.prod(shape)

    def _find(self, source: str) -> str:
        name = self._name(source)
        if name is None:
            found = f"{len(self._files)} tensors without it"
            raise CheckpointError(f"{self.directory}: expected tensor {source}, found {found}; {_OTHER_CONFIG}")
        return name

    def _name(self, source: str) -> str | None:
        """The tensor's name here, or None: checkpoints of bare models leave out the prefix `model.`."""
        return next((name for name in (source, source.removeprefix("model.")) if name in self._files), None)


def _open_shards(directory: Path) -> dict[str, SafetensorsFile]:
    index = read_config(directory / INDEX_FILE)
    section = index.section("weight_map")
    if section is None:
        raise index.refuse("weight_map", "an object of tensor and file names", "fetch the file again")
    shards: dict[str, SafetensorsFile] = {}
    files: dict[str, SafetensorsFile] = {}
    for tensor, shard in section.values.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise section.refuse(tensor, "a .safetensors file of the same directory", "fetch the file again")
        if shard not in shards:
            shards[shard] = SafetensorsFile(directory / shard)
        if tensor not in shards[shard].entries:
            raise shards[shard].refuse("the tensor that the index places here", "none of that name", tensor=tensor)
        files[tensor] = shards[shard]
    return files


def _no_weights(directory: Path) -> CheckpointError:
    if not directory.is_dir():
        return CheckpointError(f"{directory}: expected a directory, found none; give the model's directory")
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickled:
        remedy = f"run `hsrpc convert {directory} DIRECTORY` and serve DIRECTORY"
        return CheckpointError(f"{directory}: expected {WEIGHTS_FILE}, found {', '.join(pickled[:3])}; {remedy}")
    remedy = "fetch the model's weights in that format"
    return CheckpointError(f"{directory}: expected {WEIGHTS_FILE} or {INDEX_FILE}, found neither; {remedy}")


class RandomWeights:
    """Weights drawn afresh: the same for the same seed and tensor, whatever the device, rounded to the element type.

    Matrices are normal with variance 1 / columns, so that values neither vanish nor overflow in float16.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def read(self, tensor: TensorSpec, out: torch.Tensor) -> None:
        """Fills `out`, contiguous and of the tensor's shape; large tensors repeat a block, which costs one copy."""
        flat = _flat(tensor, out)
        mean, deviation = _distribution(tensor)
        drawn = torch.empty(min(len(flat), _RANDOM_BLOCK)).normal_(mean, deviation, generator=self._generator(tensor))
        block = drawn.to(out.device, out.dtype)
        for start in range(0, len(flat), len(block)):
            piece = flat[start : start + len(block)]
            piece.copy_(block[: len(piece)])

    def _generator(self, tensor: TensorSpec) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}:{':'.join(tensor.sources)}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _distribution(tensor: TensorSpec) -> tuple[float, float]:
    """Mean and standard deviation."""
    is_matrix = len(tensor.shape) > 1 and not tensor.mean
    return tensor.mean, float(tensor.shape[-1] ** -0.5) if is_matrix else 0.02


def _flat(tensor: TensorSpec, out: torch.Tensor) -> torch.Tensor:
    """`out` as one dimension, after checking that it can take the tensor."""
    if tuple(out.shape) != tensor.shape or not out.is_contiguous():
        raise ValueError(f"{tensor.name}: out must be contiguous and {list(tensor.shape)}, found {list(out.shape)}")
    return out.view(-1)
