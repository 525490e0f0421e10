"""Weights of float4 codes (e2m1) with a power of two for 32 of a row: `mxfp4` as gpt-oss is published."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hsrpc.model.config_file import ConfigFile
from hsrpc.model.formats.codes import Code, CodedMatrix
from hsrpc.model.quantization.reader import Quantized, WeightTensors

GROUP = 32
"""Columns that share a scale."""


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """Reads them: `NAME_blocks` uint8 [rows, groups, 16] and `NAME_scales` uint8 [rows, groups], exponents + 127."""

    @classmethod
    def read(cls, section: ConfigFile) -> Mxfp4:
        """As `quantization_config` says; which modules have codes, the files say."""
        return cls()

    def find(self, weight: WeightTensors) -> Quantized | None:
        codes = weight.find("weight_blocks")
        if codes is None:
            return None
        matrix = CodedMatrix(
            rows=weight.rows,
            columns=weight.columns,
            code=Code.E2M1,
            block=(1, GROUP),
            scale=torch.float8_e8m0fnu,
        )
        scales = weight.need("weight_scales").check(("U8",), matrix.grid)
        codes.check(("U8",), (*matrix.grid, GROUP // 2))
        return Quantized(matrix, scales, codes.fill, scales.fill)
