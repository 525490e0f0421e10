"""The tensors of a model, as a family declares them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """The element type's name as settings have it, such as float16."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class TensorSpec:
    """A packed tensor: checkpoint tensors concatenated along dimension 0."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    source_rows: tuple[int, ...] = ()
    """Length of each source along dimension 0; empty: all the same."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def source_shapes(self) -> tuple[tuple[int, ...], ...]:
        rows = self.source_rows or (self.shape[0] // len(self.sources),) * len(self.sources)
        return tuple((count, *self.shape[1:]) for count in rows)
