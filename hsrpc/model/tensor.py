"""The tensors of a model, as a family declares them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch


class RowOrder(Protocol):
    """Where the rows of a checkpoint's tensors, one for each dimension of a head, go when they are packed."""

    def index(self) -> torch.Tensor:
        """Row in the sources, one after the other, of each row of the packed tensor: int64 [rows]."""


@dataclass(frozen=True)
class PairsApart:
    """Rows of heads whose rotation pairs neighbours, so that i pairs with i + width/2 instead; then other rows.

    Products of queries and keys, both arranged so, are the same.
    """

    heads: int
    head_dim: int
    width: int
    """Dimensions of a head that are rotated."""
    others: int = 0
    """Rows after those heads, which stay."""
    offset: int = 0
    """Dimensions of a head before those that are rotated."""

    def index(self) -> torch.Tensor:
        head = torch.arange(self.head_dim)
        pairs = head[self.offset : self.offset + self.width]
        pairs.copy_(pairs.view(-1, 2).t().flatten())
        rotated = torch.arange(self.heads)[:, None] * self.head_dim + head
        return torch.cat((rotated.flatten(), self.heads * self.head_dim + torch.arange(self.others)))


@dataclass(frozen=True)
class PartsTogether:
    """Rows of two parts head by head, so that the first parts of all heads come before the second ones."""

    heads: int
    first: int
    """Rows of a head's first part."""
    second: int

    def index(self) -> torch.Tensor:
        rows = torch.arange(self.heads * (self.first + self.second)).view(self.heads, -1)
        return torch.cat((rows[:, : self.first].flatten(), rows[:, self.first :].flatten()))


@dataclass(frozen=True)
class HeadsTogether:
    """Rows of Q, K and V head by head, so that all of Q come first, then all of K, then all of V."""

    heads: int
    head_dim: int

    def index(self) -> torch.Tensor:
        return torch.arange(3 * self.heads * self.head_dim).view(self.heads, 3, self.head_dim).transpose(0, 1).flatten()


def dtype_name(dtype: torch.dtype) -> str:
    """The element type's name as settings have it, such as float16."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Neighbours:
    """Rows of two projections that alternate, so that all of the first come before all of the second; in each of
    several tensors, one after the other."""

    width: int
    """Rows of each projection."""
    count: int = 1
    """Tensors."""

    def index(self) -> torch.Tensor:
        return torch.arange(2 * self.count * self.width).view(self.count, self.width, 2).transpose(1, 2).flatten()


@dataclass(frozen=True, slots=True)
class Stacked:
    """One of several tensors of one shape that a checkpoint may have as one: [count, *shape]."""

    source: str
    index: int
    count: int
    transposed: bool = False
    """Its two dimensions are exchanged there."""
    order: RowOrder | None = None
    """Order of its rows; None: they stay."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of all together, where one has this `shape` when it is packed."""
        return (self.count, *(reversed(shape) if self.transposed else shape))


@dataclass(frozen=True)
class TensorSpec:
    """A packed tensor: checkpoint tensors concatenated along dimension 0."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    source_rows: tuple[int, ...] = ()
    """Length of each source along dimension 0; empty: all the same."""
    order: RowOrder | None = None
    """None: rows stay in the order of the sources."""
    stacked: Stacked | None = None
    """Where it is read from in a checkpoint that has this instead of the sources."""
    mean: float = 0.0
    """Value of random weights: what a norm begins its training with."""
    exact: bool = False
    """It lies in float32, whatever type the model is computed in."""

    def dtype(self, computed: torch.dtype) -> torch.dtype:
        """Element type where the model is `computed` in that one."""
        return torch.float32 if self.exact else computed

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def source_shapes(self) -> tuple[tuple[int, ...], ...]:
        if len(self.sources) == 1:
            return (self.shape,)
        rows = self.source_rows or (self.shape[0] // len(self.sources),) * len(self.sources)
        return tuple((count, *self.shape[1:]) for count in rows)
