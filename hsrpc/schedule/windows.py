"""Sliding windows: in a layer that has one, a token sees itself and the `window - 1` tokens before it; None: all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Count = TypeVar("Count", int, float | npt.NDArray[np.float64])
"""A number, or many at once."""


@dataclass(frozen=True)
class LayerWindows:
    """The windows of a model's layers."""

    of_layers: tuple[int | None, ...]

    @cached_property
    def distinct(self) -> tuple[int | None, ...]:
        """Those that differ, the widest first: what any layer sees, the layers of the first see."""
        return tuple(sorted(set(self.of_layers), key=lambda window: -(window or math.inf)))

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """Number of each layer's window among the distinct ones."""
        return tuple(map(self.distinct.index, self.of_layers))

    @property
    def widest(self) -> int | None:
        return self.distinct[0]

    @property
    def shares(self) -> Iterator[tuple[int | None, float]]:
        """The distinct ones, each with its part of the layers."""
        counts = Counter(self.of_layers)
        return ((window, counts[window] / len(self.of_layers)) for window in self.distinct)


NO_WINDOWS = LayerWindows((None,))


def most_blocks(window: int, chunk: Count, block_size: int) -> Count:
    """Blocks that hold what a step of `chunk` tokens of a request sees and adds, wherever they begin.

    With the widest window of a model that is all that a request keeps.
    """
    return -(-(window + chunk - 2) // block_size) + 1


def first_visible(context: int, window: int | None) -> int:
    """First position that a query at position `context` sees."""
    return 0 if window is None else max(0, context - window + 1)
