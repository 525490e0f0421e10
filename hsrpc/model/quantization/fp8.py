"""Weights of float8 codes (e4m3): `fp8` as DeepSeek, Qwen and GLM publish it, and `fbgemm_fp8` of Llama."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hsrpc.model.config_file import ConfigFile
from hsrpc.model.formats.codes import Code, CodedMatrix, grid
from hsrpc.model.quantization.reader import Quantized, Stored, WeightTensors
from hsrpc.model.quantization.section import block_size, one_of

CODES = "F8_E4M3"
_FORMATS = ("e4m3", "float8_e4m3fn")
_SCALES = {
    "F32": torch.float32,
    "F64": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.float8_e8m0fnu,
}
_NAMES = ("weight_scale_inv", "weight_scale")
"""A weight is its code times its scale, by either name. Scales that are whole numbers are exponents of two, + 127."""


@dataclass(frozen=True, slots=True)
class Fp8:
    """Reads them with scales of blocks, rows or whole matrices."""

    block: tuple[int, int] | None
    """Rows and columns that share a scale; None: whole rows do, or all of a matrix, as the shape of the scales says."""

    @classmethod
    def read(cls, section: ConfigFile) -> Fp8:
        """As `quantization_config` says.

        Raises:
            CheckpointError: codes are of another type.
        """
        if section.has("fmt"):
            one_of(section, "fmt", _FORMATS)
        return cls(block_size(section, "weight_block_size"))

    def find(self, weight: WeightTensors) -> Quantized | None:
        codes = weight.find("weight")
        if codes is None or codes.dtype != CODES:
            return None
        codes.check((CODES,), weight.shape)
        scales = next((found for name in _NAMES if (found := weight.find(name)) is not None), None)
        if scales is None:
            names = " or ".join(map(weight.called, _NAMES))
            raise codes.refuse(f"scales beside it, {names}")
        matrix = CodedMatrix(
            rows=weight.rows,
            columns=weight.columns,
            code=Code.E4M3,
            block=self._block(weight.shape, scales),
            scale=_SCALES[scales.dtype],
        )
        return Quantized(matrix, scales, codes.fill, scales.fill)

    def _block(self, shape: tuple[int, int], scales: Stored) -> tuple[int, int]:
        """Rows and columns that share one of the scales."""
        rows, columns = shape
        if self.block is not None:
            height, width = grid(shape, self.block)
            scales.check(tuple(_SCALES), (height, 1, width, 1) if len(scales.shape) == 4 else (height, width))
            return self.block
        scales.check(tuple(_SCALES), (), (1,), (1, 1), (rows,), (rows, 1))
        return (1, columns) if scales.shape in ((rows,), (rows, 1)) and rows > 1 else shape
