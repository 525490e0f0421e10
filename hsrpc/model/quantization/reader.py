"""The contract between `Checkpoint` and what reads a kind of quantised weights.

A reader is made of what config.json says. Asked for a weight, it looks for its tensors, which the headers of the files
describe, and answers how they become codes and scales; it reads no data for that. So it answers

    None        the weight has no codes of this kind: it may be plain, as some tensors of most checkpoints are
    Quantized   the layout in which it is served (`CodedMatrix`), with shapes and types of all its tensors checked, and
                for each part of that layout (codes, scales, zeros, groups, factor) what fills it from the files
    an error    tensors are missing, truncated or of another type: it names the first one, what it should be, and what
                can be done (`Stored.refuse`)

Parts are filled once, when weights are loaded, by several threads: whatever layout the files have is turned then into
that of `hsrpc.model.formats.codes`. Which of all experts a weight is, where these are stacked in one tensor, and in
which order its rows are served, a reader need not know.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeAlias

import torch

from hsrpc.errors import CheckpointError
from hsrpc.model.formats.codes import CodedMatrix, CodedParts
from hsrpc.model.safetensors_file import DTYPES, SafetensorsFile
from hsrpc.model.tensor import Stacked

REFETCH = "fetch the checkpoint again"
Fill: TypeAlias = Callable[[torch.Tensor], None]
"""Writes one part of a matrix from the files to a tensor of its shape and type in host memory: see `CodedParts`."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint, or a part of one."""

    file: SafetensorsFile
    name: str
    """In the file."""
    shape: tuple[int, ...]
    first: int = 0
    """Elements of the tensor before this part."""

    @property
    def dtype(self) -> str:
        """Element type as safetensors calls it, such as F8_E4M3."""
        return self.file.entries[self.name].dtype

    def check(self, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> Stored:
        """This, which has one of these types and one of these shapes.

        Raises:
            CheckpointError: it has not.
        """
        if self.dtype not in dtypes or self.shape not in shapes:
            raise self.refuse(f"shape {' or '.join(str(list(shape)) for shape in shapes)} of {' or '.join(dtypes)}")
        return self

    def refuse(self, expected: str, remedy: str = REFETCH) -> CheckpointError:
        """What is wrong with it: its type and shape are said."""
        return self.file.refuse(expected, f"shape {list(self.shape)} of {self.dtype}", remedy, self.name)

    def part(self, index: int) -> Stored:
        """The part with that index along the first dimension."""
        shape = self.shape[1:]
        return Stored(self.file, self.name, shape, self.first + index * math.prod(shape))

    def load(self) -> torch.Tensor:
        """Its values, in host memory.

        Raises:
            CheckpointError: the file has become shorter.
        """
        out = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        self.file.read(self.name, out.view(-1), self.first)
        return out

    def read(self, out: torch.Tensor, *, transposed: bool = False) -> None:
        """Write its values, which are no codes, converted, to `out`, of one dimension and contiguous.

        Raises:
            CheckpointError: the file has become shorter, or a value is too large for the type of `out`.
        """
        if not transposed:
            self.file.read(self.name, out, self.first)
            return
        turned = torch.empty_like(out)
        self.file.read(self.name, turned, self.first)
        out.view(self.shape[::-1]).copy_(turned.view(self.shape).t())

    def fill(self, out: torch.Tensor) -> None:
        """Copy its values to `out`, which has as many elements: byte by byte where these have one, else converted."""
        dtype = DTYPES[self.dtype]
        if dtype.itemsize == 1:
            out = out.view(dtype)
        if out.dtype == dtype and out.is_contiguous():
            self.file.read(self.name, out.view(-1), self.first)
        else:
            out.copy_(self.load().view(out.shape))


@dataclass(frozen=True, slots=True)
class WeightTensors:
    """What a checkpoint has of one weight of a linear layer: each of its tensors is found by the end of its name."""

    name: str
    """The weight's name, canonical and without `.weight`; of all experts, where they are stacked in one tensor."""
    rows: int
    """Outputs"""
    columns: int
    """Inputs"""
    stored: Callable[[str], Stored | None]
    """The tensor that is called so, canonically."""
    missing: Callable[[str], CheckpointError]
    """What is said where there is none of that name."""
    stacked: Stacked | None = None
    """Which of several weights it is, where these are stacked in one tensor."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def find(self, end: str) -> Stored | None:
        """The tensor NAME.`end` such as `weight`, `weight_scale` or `qweight`; None: there is none.

        Where all experts are stacked in one tensor, it is the part of one of them, and called NAME and then `end`
        without `weight`: `gate_up_proj`, `gate_up_proj_scale`.

        Raises:
            CheckpointError: it should be stacked, and is not of so many.
        """
        found = self.stored(self.called(end))
        if found is None or self.stacked is None:
            return found
        count = self.stacked.count
        if found.shape[:1] != (count,):
            raise found.refuse(f"a shape that begins with {count}, one for each expert")
        return found.part(self.stacked.index)

    def need(self, end: str) -> Stored:
        """As `find`.

        Raises:
            CheckpointError: there is none.
        """
        found = self.find(end)
        if found is None:
            raise self.missing(self.called(end))
        return found

    def called(self, end: str) -> str:
        """Canonical name of the tensor with that `end`."""
        return f"{self.name}.{end}" if self.stacked is None else self.name + end.removeprefix("weight")


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight that has codes: the layout in which it is served, and what fills each part of it."""

    matrix: CodedMatrix
    stored: Stored
    """The tensor of the scales, for errors."""
    codes: Fill
    scales: Fill
    zeros: Fill | None = None
    groups: Fill | None = None
    factor: Fill | None = None

    def fill(self, out: CodedParts) -> None:
        """Read all parts.

        Raises:
            CheckpointError: a file has become shorter, or has a value that does not fit.
        """
        fills = (self.codes, self.scales, self.zeros, self.groups, self.factor)
        for fill, part in zip(fills, out[1:], strict=True):
            if fill is not None and part is not None:
                _fill(fill, part)

    def in_order(self, order: torch.Tensor) -> Quantized:
        """The same weight with other rows first: `order` int64 [rows] has for each its number in the checkpoint.

        As many of them share a scale as have one scale wherever their rows come from, often as many as before.
        """
        old = self.matrix
        blocks = order // old.block[0]
        starts = (blocks[1:] != blocks[:-1]).nonzero().flatten() + 1
        height = 1 if len(starts) == old.rows - 1 else math.gcd(*starts.tolist()) or old.rows
        scales = partial(_in_order, blocks[::height], old.grid)
        return replace(
            self,
            matrix=replace(old, block=(height, old.block[1])),
            codes=partial(_in_order, order, (old.rows, old.used_bytes), self.codes),
            scales=partial(scales, self.scales),
            zeros=None if self.zeros is None else partial(scales, self.zeros),
        )


def _fill(fill: Fill, out: torch.Tensor) -> None:
    """Write a part, wherever it lies: what reads files writes to host memory."""
    if out.device.type == "cpu":
        fill(out)
        return
    host = torch.empty(out.shape, dtype=out.dtype)
    fill(host)
    out.copy_(host)


def _in_order(rows: torch.Tensor, shape: tuple[int, int], fill: Fill, out: torch.Tensor) -> None:
    """Write those rows of what `fill` writes, of that shape, to `out`."""
    stored = torch.empty(shape, dtype=out.dtype)
    fill(stored)
    out.copy_(stored.view(torch.uint8)[rows].view(out.dtype))


class Reader(Protocol):
    """Reads one kind of quantised weights."""

    def find(self, weight: WeightTensors) -> Quantized | None:
        """How the weight's tensors become codes; None: it has none of this kind.

        Raises:
            CheckpointError: it has codes, and other tensors that belong to them are missing or misshapen.
        """


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Reads weights of several kinds, by the first reader that finds codes."""

    readers: tuple[Reader, ...]

    def find(self, weight: WeightTensors) -> Quantized | None:
        found = (reader.find(weight) for reader in self.readers)
        return next((each for each in found if each is not None), None)
