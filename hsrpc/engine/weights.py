"""Layer weights: a part resident on the device, the rest in one pinned buffer a layer, which crosses the bus whole.

What is streamed may be coded: then the matrices lie in that buffer as coded bytes, and are decoded on the device to
another one, the same for all layers, because the compute stream uses them one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hsrpc.model.formats.lossless import Coding


class Slice(NamedTuple):
    """A tensor within a packed buffer of bytes."""

    name: str
    shape: tuple[int, ...]
    offset: int


class CodedSlice(NamedTuple):
    """A coded tensor within a packed buffer, and where it is decoded to in another."""

    name: str
    coding: Coding
    offset: int
    target: int


class Decoding(NamedTuple):
    """A tensor to decode on the device before it is used."""

    coding: Coding
    data: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one layer."""

    resident: Mapping[str, torch.Tensor]
    packed: torch.Tensor | None
    """Pinned bytes of the tensors that are streamed; None where none is."""
    slices: tuple[Slice, ...]
    dtype: torch.dtype
    coded: tuple[CodedSlice, ...] = ()

    def on(self, buffer: torch.Tensor, decoded: torch.Tensor) -> dict[str, torch.Tensor]:
        """All tensors, given the device buffers (bytes) with a copy of `packed`, and of what is decoded from it."""
        targets = [Slice(each.name, each.coding.shape, each.target) for each in self.coded]
        return {**self.resident, **views(buffer, self.slices, self.dtype), **views(decoded, targets, self.dtype)}

    def decodings(self, buffer: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> tuple[Decoding, ...]:
        """What makes the coded ones of `tensors` from the copy of `packed`."""
        return tuple(
            Decoding(each.coding, buffer[each.offset : each.offset + each.coding.num_bytes], tensors[each.name])
            for each in self.coded
        )


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All weights of a model, where the plan wants them."""

    fixed: Mapping[str, torch.Tensor]
    layers: Sequence[LayerWeights]


def views(buffer: torch.Tensor, slices: Sequence[Slice], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors in a buffer of bytes."""
    return {s.name: _view(buffer, s, dtype) for s in slices}


def _view(buffer: torch.Tensor, s: Slice, dtype: torch.dtype) -> torch.Tensor:
    size = math.prod(s.shape) * dtype.itemsize
    return buffer[s.offset : s.offset + size].view(dtype).view(s.shape)
