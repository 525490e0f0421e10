"""What a layer's input is kept as, and K and V that are made of it: exactly, or of what its row in 8 bits means.

In 8 bits K and V are made of rounded activations from the start, of new tokens as of cached ones: so they are the same
numbers wherever a token lies, and however often it is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

from hsrpc.model.formats.rows import CodedRows, Rows
from hsrpc.model.layers import Affine, project, project_rows
from hsrpc.plan.plan import REGENERATE_ROWS

if TYPE_CHECKING:
    from hsrpc.model.family import Weights

CODED, CODED_SCALES = "coded_kv_weight", "coded_kv_scales"
"""Names of [W_K W_V] as rows of codes, where these are multiplied, and of their scales, float32 [1, k+v]."""
_DECODED_CHANNELS = 1024
"""Output channels whose weights are decoded at once, where the hardware does not multiply codes."""
_PROBED, _CLOSE = 64, 1e-2
"""Rows and channels of the product that shows whether it does, and how near that must be."""
_log = logging.getLogger(__name__)


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
    projects_whole = True
    """Queries, keys and values of a layer's input are one product."""

    def __init__(self, rows: Rows, projection: KvProjection) -> None:
        self._rows = rows
        self._projection = projection

    def compile(self, device: torch.device) -> None:
        """Make ready for `device`. Here there is nothing to do."""

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

    projects_whole = False

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
    """Activations in 8 bits, multiplied with a weight that is rounded alike, each output channel with a scale.

    The weight is coded in every step, from what the layer is computed with: coding a layer's takes less than a
    hundredth of the time in which its tokens are rebuilt, and kept codes would take half of its bytes more.
    """

    _rows: CodedRows

    def __init__(self, rows: CodedRows, projection: KvProjection, num_channels: int) -> None:
        super().__init__(rows, projection)
        self._num_channels = num_channels
        self.coded_weight_bytes = num_channels * (rows.columns + torch.float32.itemsize)
        self._multiplies = False
        """The device multiplies codes; else they are decoded, which gives the same but for rounding."""

    def compile(self, device: torch.device) -> None:
        if device.type != "cuda":
            return
        try:
            self._multiplies = self._is_right(device)
        except (RuntimeError, ValueError) as error:
            _log.warning("float8 codes are decoded before they are multiplied: %s", error)

    def _is_right(self, device: torch.device) -> bool:
        """Whether a product of codes, rows and output lying as they do in a step, is what it should be."""
        size, (of, first) = (_PROBED, self._rows.shape.width), self._projection
        x, weight = (torch.randn(size, dtype=self._rows.computed, device=device) for _ in range(2))
        coded = self._rows.encode(weight)
        bias = torch.randn(first + _PROBED, dtype=x.dtype, device=device)
        w = {CODED: coded, CODED_SCALES: self._scales(coded).t(), of.bias: bias}
        found, wanted = x.new_empty(2, _PROBED, first + _PROBED)[:, :, first:]
        self._multiply(w, self._rows.encode(x), found)
        self._product(w, self._rows.encode(x), wanted)
        return bool((found - wanted).norm() < _CLOSE * wanted.norm())

    def prepared(self, w: Weights, memory: torch.Tensor) -> tuple[Weights, Sequence[Callable[[], None]]]:
        size = self._num_channels * self._rows.columns
        coded, scales = memory[:size].view(-1, self._rows.columns), memory[size:].view(torch.float32).unsqueeze(0)
        weight = self._projection.weight(w)

        def code() -> None:
            self._rows.encode_into(coded, weight)
            scales.copy_(self._scales(coded).t())

        return {**w, CODED: coded, CODED_SCALES: scales}, (code,)

    def keys_values(self, w: Weights, rows: torch.Tensor, out: torch.Tensor) -> None:
        (self._multiply if self._multiplies else super().keys_values)(w, rows, out)

    def _scales(self, rows: torch.Tensor) -> torch.Tensor:
        """Float32 [n, 1], contiguous."""
        return self._rows.parts(rows)[1].flatten(1).float()

    def _multiply(self, w: Weights, rows: torch.Tensor, out: torch.Tensor) -> None:
        """By the hardware's products, which sum in somewhat less than 32 bits: far below what codes leave out."""
        torch._scaled_mm(
            self._rows.parts(rows)[0],
            self._rows.parts(w[CODED])[0].t(),
            scale_a=self._scales(rows),
            scale_b=w[CODED_SCALES],
            bias=self._projection.bias(w),
            out_dtype=out.dtype,
            use_fast_accum=True,
            out=out,
        )

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
