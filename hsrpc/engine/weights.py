"""Layer weights: a part resident on the device, the rest in one pinned buffer a layer, which crosses the bus whole.

Experts that come on demand are neither: they cross the bus one by one.

Each tensor lies in that buffer as its format packs it, and some of the resident ones lie so too. What is to be decoded
before it is used goes to another buffer on the device, the same for all layers, because the compute stream uses them
one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hsrpc.model.formats.format import Encoded, Packing
from hsrpc.plan.sizes import align


class PackedTensor(NamedTuple):
    """A tensor within packed memory."""

    name: str
    packing: Packing
    offset: int = 0

    def data(self, memory: torch.Tensor) -> torch.Tensor:
        """Packed bytes of the tensor: uint8."""
        return memory[self.offset : self.offset + self.packing.num_bytes]

    def open(self, memory: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        """Operand to multiply by: a view of the memory, or of the front of `decoded`, where it is decoded to."""
        return self.packing.open(self.data(memory), decoded[: self.packing.decoded_bytes])


class KeptTensor(NamedTuple):
    """A tensor that stays on the device packed."""

    part: PackedTensor
    memory: torch.Tensor
    """uint8: of this tensor alone"""


class HostExperts(NamedTuple):
    """The experts of a layer that come on demand, in pinned memory."""

    memory: torch.Tensor
    """uint8 [E, bytes]: each expert is one piece."""
    parts: Mapping[str, tuple[int, PackedTensor]]
    """By name of a tensor its expert, and where in the expert's piece it lies."""

    @property
    def of_first(self) -> list[PackedTensor]:
        """The tensors of the first expert: those of all others lie alike."""
        return [part for expert, part in self.parts.values() if not expert]


class OpenedLayer(NamedTuple):
    """A layer's weights as they are multiplied, and what the family adds to them."""

    tensors: Mapping[str, torch.Tensor]
    decodings: tuple[Callable[[], None], ...]
    """To call before the tensors are used: each decodes all that are packed in one way."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one layer."""

    resident: Mapping[str, torch.Tensor]
    """Those that stay ready on the device."""
    packed: torch.Tensor | None
    """Pinned bytes of the tensors that are streamed; None where none is."""
    parts: tuple[PackedTensor, ...]
    """Tensors within `packed`."""
    kept: tuple[KeptTensor, ...] = ()
    """Those that stay packed on the device."""
    experts: HostExperts | None = None
    """Experts that come on demand; they are not among the others."""

    @property
    def bus_bytes(self) -> int:
        """Bytes that cross the bus in every step; 0 where all lie on the device."""
        return 0 if self.packed is None else len(self.packed)

    @property
    def is_decoded(self) -> bool:
        """Some tensors are decoded on the device before they are used."""
        return any(part.packing.decoded_bytes for part in (*self.parts, *(each.part for each in self.kept)))

    def open(self, buffer: torch.Tensor, decoded: torch.Tensor) -> OpenedLayer:
        """All tensors, given the device buffers (bytes) with a copy of `packed`, and of what is decoded."""
        tensors: dict[str, torch.Tensor] = {}
        encoded: dict[type[Packing], list[Encoded[Packing]]] = {}
        for part, memory in (*((part, buffer) for part in self.parts), *self.kept):
            tensors[part.name] = part.open(memory, decoded)
            if part.packing.decoded_bytes:
                each = Encoded(part.packing, part.data(memory), tensors[part.name])
                encoded.setdefault(type(part.packing), []).append(each)
                decoded = decoded[align(part.packing.decoded_bytes) :]
        decodings = tuple(packing.decoding(together) for packing, together in encoded.items())
        return OpenedLayer({**self.resident, **tensors}, decodings)


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All weights of a model, where the plan wants them."""

    fixed: Mapping[str, torch.Tensor]
    layers: Sequence[LayerWeights]


def arrange(packings: Iterable[tuple[str, Packing]]) -> tuple[tuple[PackedTensor, ...], int]:
    """Tensors one behind the other, each aligned, and the bytes of the packed buffer."""
    parts, offset = [], 0
    for name, packing in packings:
        parts.append(PackedTensor(name, packing, offset))
        offset += align(packing.num_bytes)
    return tuple(parts), offset
