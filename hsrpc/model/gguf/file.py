"""Reads a GGUF file, or all shards of one, by the package `gguf`: metadata, and tensors mapped from disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.gguf_reader import ReaderField, ReaderTensor
from gguf.quants import dequantize

from hsrpc.errors import CheckpointError
from hsrpc.model.config_file import ConfigFile, shortened
from hsrpc.model.shards import check_complete, numbered_set

_DAMAGE = (ValueError, LookupError, OverflowError, MemoryError, TypeError, OSError)
"""What the reader raises on a file that is none, or is cut, or damaged."""
_REFETCH = "fetch the file again"


class GgufTensor(NamedTuple):
    """A tensor of the file."""

    path: Path
    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    """The dimension whose elements are neighbours comes last, as in torch."""
    rows: npt.NDArray[np.generic]
    """[rows, bytes or elements of a row], mapped from disk: all but the last dimension together. Of a vector each
    element is a row."""

    def refuse(self, expected: str, found: object, remedy: str = _REFETCH) -> CheckpointError:
        return CheckpointError(f"{self.path}: {shortened(self.name)}: expected {expected}, found {found}; {remedy}")


class GgufFile:
    """The metadata and the tensors of a file, and of all others of its set where it is one of several shards.

    Raises:
        CheckpointError: on construction, it is cut or damaged, a shard is missing, or a tensor is of a type that the
            package `gguf` cannot decode.
    """

    def __init__(self, path: Path) -> None:
        self.paths = [path.parent / name for name in numbered_set(path.name)]
        check_complete(path.parent, {each.name for each in self.paths if each.is_file()})
        self.path = self.paths[0]
        shards = [_open(each) for each in self.paths]
        self.metadata = ConfigFile(str(self.path), shards[0].metadata)
        self.tensors = _by_name(tensor for shard in shards for tensor in shard.tensors)
        self._check_count()
        _check_types(self.tensors.values())

    def _check_count(self) -> None:
        """Check that the shards have as many tensors as the first says."""
        expected = self.metadata.values.get("split.tensors.count", len(self.tensors))
        if expected != len(self.tensors):
            remedy = "fetch all shards again"
            raise CheckpointError(f"{self.path}: expected {expected} tensors, found {len(self.tensors)}; {remedy}")


class _Reader(GGUFReader):
    """A reader that notices the end of the file, beyond which the package's own finds nothing, as often as it looks."""

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[Any]:
        found = super()._get(offset, dtype, count, override_order)
        if len(found) < count:
            raise ValueError(f"{len(self.data)} bytes, where content goes on")
        return found


class _Shard(NamedTuple):
    """What one file has."""

    metadata: dict[str, object]
    tensors: list[GgufTensor]


def _open(path: Path) -> _Shard:
    try:
        reader = _Reader(path)
        shard = _Shard(
            {key: _value(field) for key, field in reader.fields.items()},
            [_tensor(path, tensor) for tensor in reader.tensors],
        )
    except _DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        remedy = f"fetch the file again, or the package gguf (this is {version('gguf')}) as a newer one"
        raise CheckpointError(f"{path}: expected a whole GGUF file, found {shortened(reason)}; {remedy}") from None
    if reader.byte_order != "I":
        raise CheckpointError(f"{path}: expected a file for this machine's byte order, found the other; {_REFETCH}")
    return shard


def _value(field: ReaderField) -> object:
    """Numbers in float32 are those that people wrote: 1e-05 for 9.999999747378752e-06."""
    if field.types and field.types[0] == GGUFValueType.FLOAT32:
        return float(str(field.parts[-1][0]))
    return field.contents()


def _tensor(path: Path, tensor: ReaderTensor) -> GgufTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    rows = tensor.data.reshape(shape[0], -1) if len(shape) == 1 else tensor.data.reshape(-1, tensor.data.shape[-1])
    return GgufTensor(path, tensor.name, tensor.tensor_type, shape, rows)


def _by_name(tensors: Iterable[GgufTensor]) -> Mapping[str, GgufTensor]:
    found: dict[str, GgufTensor] = {}
    for tensor in tensors:
        if tensor.name in found:
            raise tensor.refuse("each tensor in one shard", f"it in {found[tensor.name].path.name} too")
        found[tensor.name] = tensor
    return found


def _check_types(tensors: Iterable[GgufTensor]) -> None:
    """Check with a block of each type that it can be decoded."""
    for kind, tensor in {tensor.type: tensor for tensor in tensors}.items():
        try:
            decode(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            remedy = "fetch the model in another type, such as Q8_0 or BF16"
            raise tensor.refuse(f"a type that the package gguf {version('gguf')} decodes", kind.name, remedy) from None


def decode(rows: npt.NDArray[np.generic], kind: GGMLQuantizationType) -> npt.NDArray[np.float32]:
    """Values of `rows` [n, bytes or elements of a row].

    Raises:
        NotImplementedError: the package has no decoder for that type.
    """
    values: npt.NDArray[np.float32] = dequantize(rows, kind)
    return values
