"""Which bytes of a buffer were read and written last, by whom: exact for ranges, strided views and sets of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from math import gcd, prod
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Numbers: TypeAlias = npt.NDArray[np.int64]


class Actor(IntEnum):
    """Who reads and writes: the four streams, the stream that CUDA has where none is named, and the host."""

    LOAD = 0
    COMPUTE = 1
    STORE = 2
    GATHER = 3
    DEFAULT = 4
    HOST = 5

    def __str__(self) -> str:
        return self.name.lower()


_ACTORS = tuple(Actor)
_NUM_ACTORS = len(_ACTORS)


class Region(Protocol):
    """Bytes of a buffer."""

    @property
    def grain(self) -> int:
        """Bytes: all bounds of the region are multiples of it."""

    @property
    def end(self) -> int:
        """The byte behind its last one."""

    def covers(self, size: int) -> bool:
        """Whether it is all of a buffer of `size` bytes."""

    def max(self, numbers: Numbers, unit: int) -> int:
        """Largest of the region's numbers, where there is one for each `unit` bytes; `unit` divides `grain`."""

    def fill(self, numbers: Numbers, unit: int, number: int) -> None:
        """Set the region's numbers."""


class Box(NamedTuple):
    """A strided view: `run` bytes at `offset`, repeated `shape[i]` times at `strides[i]` bytes in each dimension i."""

    offset: int
    run: int
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Box:
        size, start = tensor.element_size(), int(tensor.storage_offset())
        if tensor.is_contiguous():
            return cls(start * size, tensor.numel() * size)
        dims = sorted((stride, count) for count, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        run = 1
        while dims and dims[0][0] <= run:  # neighbours; a dimension that overlaps another is wider than it
            stride, count = dims.pop(0)
            run += (count - 1) * stride
        return cls(
            start * size,
            run * size,
            tuple(count for _, count in dims),
            tuple(stride * size for stride, _ in dims),
        )

    @property
    def grain(self) -> int:
        return gcd(self.offset, self.run, *self.strides)

    @property
    def end(self) -> int:
        steps = ((count - 1) * stride for count, stride in zip(self.shape, self.strides, strict=True))
        return self.offset + self.run + sum(steps)

    def covers(self, size: int) -> bool:
        return self.run == size

    def max(self, numbers: Numbers, unit: int) -> int:
        return int(self._of(numbers, unit).max())

    def fill(self, numbers: Numbers, unit: int, number: int) -> None:
        self._of(numbers, unit)[...] = number

    def _of(self, numbers: Numbers, unit: int) -> Numbers:
        item = numbers.itemsize
        shape, strides = (*self.shape, self.run // unit), (*(stride // unit * item for stride in self.strides), item)
        return np.ndarray(shape, np.int64, numbers.data, self.offset // unit * item, strides)


class RowSet(NamedTuple):
    """Rows of `width` bytes that begin at `starts`."""

    starts: Numbers
    width: int

    @classmethod
    def of(cls, tensor: torch.Tensor, rows: Numbers) -> RowSet:
        """Rows of `tensor` [*, ...], each of them contiguous."""
        size = tensor.element_size()
        return cls((int(tensor.storage_offset()) + rows * tensor.stride(0)) * size, prod(tensor.shape[1:]) * size)

    @property
    def grain(self) -> int:
        return int(np.gcd.reduce(self.starts, initial=self.width))

    @property
    def end(self) -> int:
        return int(self.starts.max()) + self.width

    def covers(self, size: int) -> bool:
        return self.width == size

    def max(self, numbers: Numbers, unit: int) -> int:
        return int(numbers[self._indices(unit)].max())

    def fill(self, numbers: Numbers, unit: int, number: int) -> None:
        numbers[self._indices(unit)] = number

    def _indices(self, unit: int) -> Numbers:
        first, count = self.starts // unit, self.width // unit
        return first if count == 1 else first[:, None] + np.arange(count)


class AccessHistory:
    """Number of the last write and the last read by each actor, for each byte of a buffer.

    Numbers grow with time and begin at 1. While only all of it is accessed at once, ten numbers are kept; from then on
    ten for each unit, the largest piece of which all bounds so far are multiples, as far as parts were accessed.
    """

    __slots__ = ("_last", "_size", "_unit", "_units", "_whole")

    def __init__(self, size: int) -> None:
        self._size = size
        self._unit = size
        self._units: Numbers | None = None
        """[2 * actors, units] of the front of the buffer: writes by each actor, then reads. None: no unit differs."""
        self._whole = [0] * (2 * _NUM_ACTORS)
        """Writes by each actor, then reads, of the bytes behind that front."""
        self._last = [0] * (2 * _NUM_ACTORS)
        """Largest of each row."""

    def last(self, actor: Actor) -> int:
        """The actor's last access to any byte; 0: there is none."""
        return max(self._last[actor], self._last[_NUM_ACTORS + actor])

    def add(self, region: Region, actor: Actor, number: int, *, writes: bool) -> None:
        """Note an access; `number` is no smaller than those before."""
        row = actor if writes else _NUM_ACTORS + actor
        if region.covers(self._size):
            self._whole[row] = number
            if self._units is not None:
                self._units[row] = number
        else:
            region.fill(self._fine(region)[row], self._unit, number)
        self._last[row] = number

    def add_whole(self, actor: Actor, number: int) -> None:
        """Note the write that makes the buffer: the first access, to all of it."""
        self._whole[actor] = self._last[actor] = number

    def unordered(self, region: Region, actor: Actor, clock: Sequence[int], *, writes: bool) -> Iterator[Conflict]:
        """Accesses of others to the region that conflict with one by `actor`, who knows of those up to `clock`."""
        for row, latest in enumerate(self._last if writes else self._last[:_NUM_ACTORS]):
            other = row % _NUM_ACTORS
            if latest <= clock[other] or other == actor:
                continue
            number = latest if self._units is None else region.max(self._fine(region)[row], self._unit)
            if number > clock[other]:
                yield Conflict(_ACTORS[other], number, row < _NUM_ACTORS)

    def _fine(self, region: Region) -> Numbers:
        """Numbers in units that divide the region's bounds, as far as it goes."""
        unit = gcd(self._unit, region.grain)
        units = self._behind(0) if self._units is None else self._units
        if unit != self._unit:
            units = np.repeat(units, self._unit // unit, axis=1)
        if (end := region.end) > units.shape[1] * unit:
            more = min(self._size // unit, 2 * end // unit) - units.shape[1]
            units = np.concatenate((units, self._behind(more)), axis=1)
        self._unit, self._units = unit, units
        return units

    def _behind(self, count: int) -> Numbers:
        """Numbers of `count` units to which nothing happened apart from what happened to all."""
        return np.repeat(np.array(self._whole, dtype=np.int64)[:, None], count, axis=1)


class Conflict(NamedTuple):
    """An access that another one does not come after."""

    actor: Actor
    number: int
    writes: bool
