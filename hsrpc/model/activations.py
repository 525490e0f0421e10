"""What a layer's input is kept as, and K and V that are made of it: exactly, or of what its row in 8 bits means.

In 8 bits K and V are made of rounded activations from the start, of new tokens as of cached ones: so they are the same
numbers wherever a token lies, and however often it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

from hsrpc.model.formats.rows import CodedRows, Rows
from hsrpc.model.layers import Affine, project, project_rows
from hsrpc.plan.plan import REGENERATE_ROWS

if TYPE_CHECKING:
    from hsrpc.model.family import Weights

CODED = "coded_kv_weight"
"""Name of [W_K W_V] as rows of codes, where these are multiplied: made in each step, once for each layer."""
_DECODED_CHANNELS = 1024
"""Output channels whose weights are decoded at once, where the hardware does not multiply codes."""


class KvProjection(NamedTuple):
    """What makes K and V of an activation."""

    of: Affine
    """A projection whose first rows make queries."""
    first: int
    """First of the rows that make K and V."""

    def weight(self, w: Weights) -> torch.Tensor:
        """[k+v, a]"""
        return w[self.of.weight][self.first :]

    def bias(self, w: Weights) -> torch.Tensor | None:
        """[k+v]"""
        bias = w.get(self.of.bias)
        return None if bias is None else bias[self.first :]


class Activations:
    """Activations as they are."""

    coded_weight_bytes = 0
    """Device memory for what `prepared` adds; 0: weights are multiplied as they are."""

    def __init__(self, rows: Rows, projection: KvProjection) -> None:
        self._rows = rows
        self._projection = projection

    def prepared(self, w: Weights, memory: torch.Tensor) -> tuple[Weights, Sequence[Callable[[], None]]]:
        """A layer's weights with what is made of them in `memory` (uint8 [coded_weight_bytes]), and what makes it.

        Made once for each place where the weights lie, and called in every step before they are used.
        """
        return w, ()

    def project(self, w: Weights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the layer's input x [n, a] as blocks have them, and [Q|K|V] of it, in one tensor."""
        return x, project(w, self._projection.of, x)

    def keys_values(self, w: Weights, rows: torch.Tensor, out: torch.Tensor) -> None:
        """[K|V] of such rows [n, columns] into `out` [n, k+v]."""
        project_rows(w, self._projection.of, rows, slice(self._projection.first, None), out)


class RoundedActivations(Activations):
    """Activations in 8 bits, decoded before they are multiplied."""

    def project(self, w: Weights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        of, first = self._projection
        rows = self._rows.encode(x)
        out = x.new_empty((len(x), len(w[of.weight])))
        project_rows(w, of, x, slice(0, first), out[:, :first])
        self.keys_values(w, rows, out[:, first:])
        return rows, out

    def keys_values(self, w: Weights, rows: torch.Tensor, out: torch.Tensor) -> None:
        """In pieces, which bounds the memory of decoded activations."""
        for part, target in zip(rows.split(REGENERATE_ROWS), out.split(REGENERATE_ROWS), strict=True):
            self._product(w, part, target)

    def _product(self, w: Weights, rows: torch.Tensor, out: torch.Tensor) -> None:
        of, first = self._projection
        project_rows(w, of, self._rows.decode(rows), slice(first, None), out)


class CodedActivations(RoundedActivations):
    """Activations in 8 bits, multiplied with a weight that is rounded alike, each output channel with a scale."""

    _rows: CodedRows

    def __init__(self, rows: CodedRows, projection: KvProjection, num_channels: int) -> None:
        super().__init__(rows, projection)
        self.coded_weight_bytes = num_channels * rows.columns

    def prepared(self, w: Weights, memory: torch.Tensor) -> tuple[Weights, Sequence[Callable[[], None]]]:
        coded = memory.view(-1, self._rows.columns)
        return {**w, CODED: coded}, (partial(self._rows.encode_into, coded, self._projection.weight(w)),)

    def _product(self, w: Weights, rows: torch.Tensor, out: torch.Tensor) -> None:
        coded, bias = w[CODED], self._projection.bias(w)
        x = self._rows.decode(rows)
        for start, end in pairwise((*range(0, len(coded), _DECODED_CHANNELS), len(coded))):
            weight = self._rows.decode(coded[start:end])
            out[:, start:end] = functional.linear(x, weight, None if bias is None else bias[start:end])


def make_activations(rows: Rows, projection: KvProjection, num_channels: int, *, codes_weight: bool) -> Activations:
    """What goes with that format of rows; `codes_weight`: codes are multiplied with codes."""
    if not isinstance(rows, CodedRows):
        return Activations(rows, projection)
    return CodedActivations(rows, projection, num_channels) if codes_weight else RoundedActivations(rows, projection)
