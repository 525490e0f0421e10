"""Whole numbers as compressed-tensors has them: in words (`pack-quantized`), or a byte each (`int-quantized`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from hsrpc.model.formats.codes import CodedMatrix
from hsrpc.model.quantization.groups import CODES, SCALES, WORD_BITS, check_groups, group_sizes, rows_at_once, words_for
from hsrpc.model.quantization.reader import Fill, Quantized, Stored, WeightTensors
from hsrpc.model.quantization.words import compressed_zeros

_SCALARS: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))
"""Shapes of a number for a whole matrix."""
_BYTE_BITS = 8


@dataclass(frozen=True, slots=True)
class Integers:
    """What groups of modules may have: the shapes of a weight's tensors say what it has."""

    bits: tuple[int, ...]
    """Widths that codes in words may have; the most bits first."""
    sizes: frozenset[int]
    """Columns that share a scale, in each row."""
    whole: bool
    """Matrices may have one scale."""
    symmetric: bool
    """No matrix need have zero points."""

    def scales(self, weight: WeightTensors) -> tuple[Stored, tuple[int, int]]:
        """The scales, and the rows and columns that share one."""
        rows, columns, scales = weight.rows, weight.columns, weight.need("weight_scale")
        blocks: dict[tuple[int, ...], tuple[int, int]]
        blocks = {(rows, count): (1, size) for count, size in group_sizes(scales, columns, self.sizes).items()}
        if (rows, 1) in blocks:
            blocks[rows,] = blocks[rows, 1]
        if self.whole:
            blocks |= dict.fromkeys(_SCALARS, (rows, columns))
        return scales, blocks[scales.check(tuple(SCALES), *blocks).shape]

    def zeros(self, weight: WeightTensors, shape: tuple[int, ...], bits: int) -> Stored | None:
        """The zero points, where scales have that shape: in words, or a byte each; None: there are none."""
        zeros = weight.find("weight_zero_point") if self.symmetric else weight.need("weight_zero_point")
        if zeros is None:
            return None
        if zeros.dtype == "I32" and len(shape) == 2:
            return zeros.check(("I32",), (words_for(weight.rows, bits), shape[1]))
        return zeros.check(("I8",), shape)

    def quantized(self, weight: WeightTensors, bits: int, codes: Fill) -> Quantized:
        """A weight of codes of so many bits, with scales and what else there is; `codes` fills these.

        Columns are in their order where no tensor has the group of each.
        """
        scales, block = self.scales(weight)
        zeros = self.zeros(weight, scales.shape, bits)
        groups = weight.find("weight_g_idx")
        if groups is not None:
            groups.check(("I32",), (weight.columns,))
        matrix = CodedMatrix(
            rows=weight.rows,
            columns=weight.columns,
            code=CODES[bits],
            block=block,
            scale=SCALES[scales.dtype],
            zero=1 << bits - 1 if zeros is None else None,
            has_groups=groups is not None and block[1] < weight.columns,
        )
        return Quantized(
            matrix,
            scales,
            codes=codes,
            scales=scales.fill,
            zeros=None if zeros is None else partial(_fill_zeros, zeros, bits),
            groups=None if groups is None or not matrix.has_groups else partial(_fill_groups, groups, matrix),
        )


@dataclass(frozen=True, slots=True)
class Packed:
    """Reads codes in words."""

    integers: Integers

    def find(self, weight: WeightTensors) -> Quantized | None:
        codes = weight.find("weight_packed")
        if codes is None or codes.dtype == "U8":  # those are of float4
            return None
        shapes: dict[tuple[int, ...], int]
        shapes = {(weight.rows, words_for(weight.columns, bits)): bits for bits in self.integers.bits}
        bits = shapes[codes.check(("I32",), *shapes).shape]
        return self.integers.quantized(weight, bits, partial(_fill_words, codes))


@dataclass(frozen=True, slots=True)
class Bytes:
    """Reads a byte each, with a sign."""

    integers: Integers

    def find(self, weight: WeightTensors) -> Quantized | None:
        codes = weight.find("weight")
        if codes is None or codes.dtype != "I8":
            return None
        codes.check(("I8",), weight.shape)
        return self.integers.quantized(weight, _BYTE_BITS, partial(_fill_signed, codes))


def _fill_words(stored: Stored, out: torch.Tensor) -> None:
    """Copy words, which have the codes of a row one after the other, to bytes; some are filled up."""
    if out.is_contiguous() and out.shape[1] == WORD_BITS // 8 * stored.shape[1]:
        stored.file.read(stored.name, out.view(torch.int32).view(-1), stored.first)
        return
    for first, words in rows_at_once(stored):
        out[first : first + len(words)].copy_(words.view(torch.uint8)[:, : out.shape[1]])


def _fill_signed(stored: Stored, out: torch.Tensor) -> None:
    """Copy numbers with a sign, and count them from the least."""
    stored.fill(out)
    out ^= 0x80


def _fill_zeros(stored: Stored, bits: int, out: torch.Tensor) -> None:
    if stored.dtype == "I32":
        out.copy_(compressed_zeros(stored.load(), bits, len(out)))
    else:
        out.copy_(stored.load().view(out.shape).to(torch.int16) + (1 << bits - 1))


def _fill_groups(stored: Stored, matrix: CodedMatrix, out: torch.Tensor) -> None:
    """Copy the group of each column; -1 stands for columns in their order."""
    stored.fill(out)
    if bool((out == -1).any()):
        out.copy_(torch.arange(len(out)) // matrix.block[1])
    check_groups(stored, out, matrix.grid[1])
