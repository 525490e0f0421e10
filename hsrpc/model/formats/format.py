"""What a format answers: how many bytes a weight tensor or a cached row takes, and how one becomes the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeAlias, TypeVar

import torch
from torch.nn import functional

from hsrpc.model.formats.codes import CodedParts
from hsrpc.model.formats.rows import CodedRows, Codes, Rows, RowShape, ValueRows
from hsrpc.model.tensor import TensorSpec
from hsrpc.plan.sizes import TensorSizes
from hsrpc.schedule.blocks import BlockKind


class WeightSource(Protocol):
    """Anything that can fill packed tensors; safe to call from several threads at once."""

    def read(self, tensor: TensorSpec, out: torch.Tensor) -> None:
        """Fills `out`, contiguous and of the tensor's shape, in its own element type and on its own device."""

    def read_codes(self, tensor: TensorSpec, out: Sequence[CodedParts], dtype: torch.dtype) -> None:
        """Fills the parts of each of the tensor's sources, on their device, to be decoded to `dtype`."""


class Product(Protocol):
    """The product of a few rows with a weight that lies packed."""

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As `functional.linear` of x [n, in] with the weight [out, in] and the bias [out]: [n, out]."""


class PackedOperand(torch.Tensor):
    """An operand that is not decoded: `functional.linear` by it reads its packed bytes, and nothing else may use it."""

    product: Product

    @classmethod
    def of(cls, operand: torch.Tensor, product: Product) -> PackedOperand:
        """In place of `operand`, which `Packing.open` gives."""
        made = operand.as_subclass(cls)
        made.product = product
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func is not functional.linear:
            raise TypeError(f"{func} of a weight that is not decoded")
        x, weight, bias = args
        assert isinstance(weight, cls)  # x and bias are none
        return weight.product(x, bias)


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

    @property
    def few_rows(self) -> int:
        """Most rows that `product` multiplies in less time than decoding takes; 0: there is no such product."""
        return 0

    def product(self, data: torch.Tensor) -> Product:
        """What multiplies up to `few_rows` rows by the packed bytes `data` as they lie, on their device.

        Made once for the memory that they lie in, and called in every step.
        """
        raise NotImplementedError(f"{type(self).__name__} is multiplied once it is decoded")

    def fill(self, source: WeightSource, tensor: TensorSpec, data: torch.Tensor) -> None:
        """Read the packed bytes `data` of a tensor whose format is `AsPublished`. Here it lies ready there."""
        source.read(tensor, self.open(data, data[:0]))

    @classmethod
    def decoding(cls, tensors: Sequence[Encoded[Self]], moves: torch.Tensor | None = None) -> Callable[[], None]:
        """What writes the operands of all these tensors from their packed bytes, on the current stream.

        Together: a launch for each would take longer than decoding small ones. It is made once and called in every
        step. All are of one device and element type. Here there is nothing to write.

        `moves` (int64 [*], on that device) are read when it runs: of a tensor's `number`, how many bytes behind `data`
        its packed bytes lie by then; a tensor for which this is negative is left out. None: all, where they lie.
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
    number: int = 0
    """Its place in the `moves` by which some of several tensors are decoded."""


def moved(tensors: Sequence[Encoded[Packing_co]], moves: torch.Tensor | None) -> Iterator[Encoded[Packing_co]]:
    """Those that are decoded now, as they lie in host memory; see `Packing.decoding`."""
    places = None if moves is None else moves.tolist()
    for each in tensors:
        if places is None:
            yield each
        elif (move := places[each.number]) >= 0:
            start = each.data.storage_offset() + move
            yield each._replace(data=each.data.as_strided(each.data.shape, (1,), start))


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
    """The format of a kind of block."""

    dtype: torch.dtype
    """Type that is computed in."""
    codes: Codes | None = None
    """None: rows are numbers of that type."""

    @property
    def plain(self) -> CacheFormat:
        """Rows of numbers as they are computed."""
        return replace(self, codes=None)

    def rows(self, shape: RowShape) -> Rows:
        """Rows of those numbers."""
        return ValueRows(shape, self.dtype) if self.codes is None else CodedRows(shape, self.dtype, self.codes)


@dataclass(frozen=True, slots=True)
class Formats:
    """The formats of a model: of each weight tensor of its layers, and of each kind of block."""

    weight: Callable[[TensorSpec], WeightFormat]
    kv: CacheFormat
    activation: CacheFormat
    codes_weight: bool = False
    """Coded activations are multiplied with a [W_K W_V] that is coded alike; else with it as it is."""

    def holding(self, kinds: Collection[BlockKind]) -> Formats:
        """The same where blocks are of these kinds alone: what none holds is not rounded."""
        kv = self.kv if BlockKind.KV in kinds else self.kv.plain
        activation = self.activation if BlockKind.ACTIVATION in kinds else self.activation.plain
        return replace(self, kv=kv, activation=activation)
