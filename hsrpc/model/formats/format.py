"""What a format answers: how many bytes a weight tensor or a cached row takes, and how one becomes the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, Self, TypeAlias, TypeVar

import torch

from hsrpc.model.formats.codes import CodedParts
from hsrpc.model.tensor import TensorSpec
from hsrpc.plan.sizes import CacheRow, TensorSizes
from hsrpc.schedule.blocks import BlockKind


class WeightSource(Protocol):
    """Anything that can fill packed tensors; safe to call from several threads at once."""

    def read(self, tensor: TensorSpec, out: torch.Tensor) -> None:
        """Fills `out`, contiguous and of the tensor's shape, in its own element type and on its own device."""

    def read_codes(self, tensor: TensorSpec, out: Sequence[CodedParts], dtype: torch.dtype) -> None:
        """Fills the parts of each of the tensor's sources, on their device, to be decoded to `dtype`."""


class Packing(ABC):
    """How one tensor lies in its packed bytes."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Packed bytes, without padding behind them."""

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the operand that `decoding` writes; 0: it lies ready in the packed bytes."""
        return 0

    @abstractmethod
    def open(self, data: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The operand that `layers.project` multiplies by: a view of the packed bytes `data` (uint8 [num_bytes]).

        Or a view of `target` (uint8 [decoded_bytes]), which holds it once it is decoded.
        """

    def fill(self, source: WeightSource, tensor: TensorSpec, data: torch.Tensor) -> None:
        """Read the packed bytes `data` of a tensor whose format is `AsPublished`. Here it lies ready there."""
        source.read(tensor, self.open(data, data[:0]))

    @classmethod
    def decoding(cls, tensors: Sequence[Encoded[Self]]) -> Callable[[], None]:
        """What writes the operands of all these tensors from their packed bytes, on the current stream.

        Together: a launch for each would take longer than decoding small ones. It is made once and called in every
        step. All are of one device and element type. Here there is nothing to write.
        """
        return _nothing


Packing_co = TypeVar("Packing_co", bound=Packing, covariant=True)


class Encoded(NamedTuple, Generic[Packing_co]):
    """A tensor that does not lie ready."""

    packing: Packing_co
    data: torch.Tensor
    """Packed bytes: uint8 [num_bytes]"""
    operand: torch.Tensor
    """What `packing.open` gives."""


def _nothing() -> None:
    """What is called to decode what lies ready."""


class Format(ABC):
    """What every format of a weight tensor answers."""

    @abstractmethod
    def sizes(self, tensor: TensorSpec) -> TensorSizes:
        """The tensor's bytes: expected ones, and bounds that loading holds packed weights to."""

    def place(self, values: torch.Tensor) -> torch.Tensor:
        """The operand of a tensor that stays on the device, from its values there: what a streamed one decodes to.

        Here the values themselves: packing loses nothing.
        """
        return values

    @abstractmethod
    def compile(self, device: torch.device) -> None:
        """Make ready what packing and decoding compile for the first time: several threads would do it at once."""


class AsPublished(Format):
    """A format whose packed bytes are read as they are: how they lie is known before."""

    @abstractmethod
    def packing(self, tensor: TensorSpec) -> Packing:
        """How the tensor is packed; `Packing.fill` reads it."""


class FromValues(Format):
    """A format that a tensor's values are packed to."""

    @abstractmethod
    def pack(self, values: torch.Tensor) -> tuple[Packing, torch.Tensor]:
        """Packed bytes (uint8) of a tensor's values, on their device; the host may wait for the current stream."""


WeightFormat: TypeAlias = AsPublished | FromValues
"""The format of a weight tensor."""


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """The format of a kind of block: rows of numbers of one type, which loads and stores copy as they are."""

    dtype: torch.dtype
    """Element type of the pool."""

    def row(self, width: int) -> CacheRow:
        """A row of `width` elements."""
        return CacheRow(width, width * self.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class Formats:
    """The formats of a model: of each weight tensor of its layers, and of each kind of block."""

    weight: Callable[[TensorSpec], WeightFormat]
    kv: CacheFormat
    activation: CacheFormat

    def cache(self, kind: BlockKind) -> CacheFormat:
        """The format of that kind of block."""
        return self.kv if kind is BlockKind.KV else self.activation
