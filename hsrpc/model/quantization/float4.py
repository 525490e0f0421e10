"""Weights of float4 codes (e2m1), two in a byte: `NVFP4` and `MXFP4` of ModelOpt and of compressed-tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from hsrpc.model.formats.codes import Code, CodedMatrix, Factor
from hsrpc.model.quantization.reader import Quantized, WeightTensors


class FactorTensor(NamedTuple):
    """The number for all scales of a weight."""

    end: str
    """End of its name"""
    does: Factor


@dataclass(frozen=True, slots=True)
class Float4:
    """Reads them, with a scale for some columns of a row, `NAME.weight_scale`."""

    codes: str
    """End of the name of the codes: uint8 [rows, columns / 2]."""
    group: int
    """Columns that share a scale."""
    stored: str
    """Element type of the scales in the files."""
    scale: torch.dtype
    """What they are."""
    factor: FactorTensor | None = None

    def find(self, weight: WeightTensors) -> Quantized | None:
        codes = weight.find(self.codes)
        if codes is None or codes.dtype != "U8":
            return None
        matrix = CodedMatrix(
            rows=weight.rows,
            columns=weight.columns,
            code=Code.E2M1,
            block=(1, self.group),
            scale=self.scale,
            factor=self.factor and self.factor.does,
        )
        codes.check(("U8",), (matrix.rows, matrix.used_bytes))
        scales = weight.need("weight_scale").check((self.stored,), matrix.grid)
        factor = None if self.factor is None else weight.need(self.factor.end).check(("F32",), (), (1,))
        return Quantized(matrix, scales, codes.fill, scales.fill, factor=None if factor is None else factor.fill)


def nvfp4(codes: str, factor: FactorTensor) -> Float4:
    """A reader of NVFP4: an e4m3 scale for 16 columns."""
    return Float4(codes, 16, "F8_E4M3", torch.float8_e4m3fn, factor)


def mxfp4(codes: str) -> Float4:
    """A reader of MXFP4: a power of two for 32 columns, as its exponent + 127."""
    return Float4(codes, 32, "U8", torch.float8_e8m0fnu)
