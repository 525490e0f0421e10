"""Layer weights: a part resident on the device, the rest in one pinned buffer a layer, which crosses the bus whole.

Where several GPUs load for each other, each has a part of that buffer pinned, and gets the others over the wire between
them: the layer is whole on each device. The buffer's front may be spread: each has a part of that on its device, and no
bus carries it.

Experts that come on demand are neither: they cross the bus one by one.

Each tensor lies in that buffer as its format packs it, and some of the resident ones lie so too. What is to be decoded
before it is used goes to another buffer on the device, the same for all layers, because the compute stream uses them
one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from hsrpc.engine.chosen_experts import ChosenExperts, ExpertDecoding
from hsrpc.model.formats.format import Encoded, PackedOperand, Packing
from hsrpc.plan.sizes import align


class PackedTensor(NamedTuple):
    """A tensor within packed memory."""

    name: str
    packing: Packing
    offset: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.packing.num_bytes

    def moved(self, distance: int) -> PackedTensor:
        """The tensor within memory that begins so much earlier."""
        return self._replace(offset=self.offset + distance)

    def data(self, memory: torch.Tensor) -> torch.Tensor:
        """Packed bytes of the tensor: uint8."""
        return memory[self.offset : self.end]

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

    @property
    def is_coded(self) -> bool:
        """Whether they are decoded before they are used."""
        return any(part.packing.decoded_bytes for part in self.of_first)


class OpenedLayer(NamedTuple):
    """A layer's weights as they are multiplied, and what the family adds to them."""

    tensors: Mapping[str, torch.Tensor]
    decodings: tuple[Callable[[], None], ...]
    """To call before the tensors are used: each decodes all that are packed in one way, but experts."""
    experts: ExpertDecoding | None = None
    """Decodes experts, once they are chosen; None: they are ready."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one layer."""

    resident: Mapping[str, torch.Tensor]
    """Those that stay ready on the device."""
    packed: torch.Tensor | None
    """Pinned bytes of the tensors that are streamed, as far as this GPU loads them; None where it loads none."""
    parts: tuple[PackedTensor, ...]
    """Tensors within the bytes that come to a buffer: first what is spread, then what all GPUs load together."""
    kept: tuple[KeptTensor, ...] = ()
    """Those that stay packed on the device."""
    experts: HostExperts | None = None
    """Experts that come on demand; they are not among the others."""
    numbers: Mapping[str, int] = field(default_factory=dict)
    """The expert to which a tensor belongs, by its name; others have none."""
    spread: torch.Tensor | None = None
    """uint8: what of the `parts` this GPU holds on its device for all; None where nothing is spread."""

    @property
    def bus_bytes(self) -> int:
        """Bytes that cross this GPU's bus in every step; 0 where none does."""
        return 0 if self.packed is None else len(self.packed)

    @property
    def spread_bytes(self) -> int:
        """Bytes that this GPU holds for all."""
        return 0 if self.spread is None else len(self.spread)

    @property
    def is_decoded(self) -> bool:
        """Some tensors are decoded on the device before they are used, other than experts."""
        return any(name not in self.numbers for name in self._coded)

    @property
    def has_coded_experts(self) -> bool:
        """Some experts' tensors are decoded on the device, once they are chosen."""
        on_demand = self.experts is not None and self.experts.is_coded
        return on_demand or any(name in self.numbers for name in self._coded)

    @property
    def _coded(self) -> Iterator[str]:
        parts = (*self.parts, *(each.part for each in self.kept))
        return (part.name for part in parts if part.packing.decoded_bytes)

    def few_rows(self, names: Collection[str]) -> Iterator[int]:
        """Most rows that are multiplied by those of `names` as they lie that stay packed; none of what cannot be."""
        return (few for part, _ in self.kept if part.name in names and (few := part.packing.few_rows))

    def open(
        self,
        buffer: torch.Tensor,
        decoded: torch.Tensor,
        tables: ChosenExperts | None = None,
        multiplied: Collection[str] = (),
    ) -> OpenedLayer:
        """All tensors, given the device buffers (bytes) with what is streamed, and of what is decoded.

        `tables`: what experts are decoded by, where there are coded ones. `multiplied`: those that a few rows are
        multiplied by as they lie, if they stay packed and their format can.
        """
        tensors: dict[str, torch.Tensor] = {}
        others, experts = list[Encoded[Packing]](), list[Encoded[Packing]]()
        for part, memory in (*((part, buffer) for part in self.parts), *self.kept):
            tensors[part.name] = operand = part.open(memory, decoded)
            if part.name in multiplied and memory is not buffer and part.packing.few_rows:
                tensors[part.name] = PackedOperand.of(operand, part.packing.product(part.data(memory)))
            elif part.packing.decoded_bytes:
                number = self.numbers.get(part.name)
                of_one = others if number is None else experts
                of_one.append(Encoded(part.packing, part.data(memory), operand, number or 0))
            decoded = decoded[align(part.packing.decoded_bytes) :]
        of_experts = None
        if experts:
            assert tables is not None  # there are coded ones
            of_experts = ExpertDecoding(tables, tables.in_place, decodings(experts, tables.moves))
        return OpenedLayer({**self.resident, **tensors}, decodings(others), of_experts)


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All weights of a model, where the plan wants them."""

    fixed: Mapping[str, torch.Tensor]
    layers: Sequence[LayerWeights]


def decodings(encoded: Iterable[Encoded[Packing]], moves: torch.Tensor | None = None) -> tuple[Callable[[], None], ...]:
    """Each decodes all that are packed in one way; see `Packing.decoding`."""
    alike: dict[type[Packing], list[Encoded[Packing]]] = {}
    for each in encoded:
        alike.setdefault(type(each.packing), []).append(each)
    return tuple(packing.decoding(together, moves) for packing, together in alike.items())


def arrange(packings: Iterable[tuple[str, Packing]]) -> tuple[tuple[PackedTensor, ...], int]:
    """Tensors one behind the other, each aligned, and the bytes of the packed buffer."""
    parts, offset = [], 0
    for name, packing in packings:
        parts.append(PackedTensor(name, packing, offset))
        offset += align(packing.num_bytes)
    return tuple(parts), offset
