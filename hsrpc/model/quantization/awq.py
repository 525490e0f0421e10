"""Weights as AWQ has them in its gemm version: words of neighbours along the rows, in an order of their own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from hsrpc.model.config_file import ConfigFile
from hsrpc.model.formats.codes import Code, CodedMatrix
from hsrpc.model.quantization.gptq import fill_transposed
from hsrpc.model.quantization.groups import SCALES, WORD_BITS, read_group_size, rows_at_once
from hsrpc.model.quantization.reader import Quantized, Stored, WeightTensors
from hsrpc.model.quantization.section import REMEDY, one_of
from hsrpc.model.quantization.words import awq_codes, awq_zeros

_BITS = 4
_PER_WORD = WORD_BITS // _BITS


@dataclass(frozen=True, slots=True)
class Awq:
    """Reads them."""

    size: int
    """Columns of a group"""
    symmetric: bool
    """There are no zero points: all are in the middle."""

    @classmethod
    def read(cls, section: ConfigFile) -> Awq:
        """As `quantization_config` says.

        Raises:
            CheckpointError: codes are of other bits, or of another version.
        """
        if section.values.get("bits") != _BITS:
            raise section.refuse("bits", str(_BITS), REMEDY)
        key = next((key for key in ("version", "checkpoint_format", "format") if section.has(key)), None)
        if key is not None:
            one_of(section, key, ("gemm", "GEMM"))
        return cls(read_group_size(section, "group_size"), not section.flag("zero_point", True))

    def find(self, weight: WeightTensors) -> Quantized | None:
        codes = weight.find("qweight")
        if codes is None:
            return None
        rows, columns = weight.rows, weight.columns
        if rows % _PER_WORD or columns % _PER_WORD:
            raise codes.refuse(f"rows and columns that are multiples of {_PER_WORD}, not {rows} and {columns}", REMEDY)
        codes.check(("I32",), (columns, rows // _PER_WORD))
        count, size = -(-columns // self.size), min(self.size, columns)
        scales = weight.need("scales").check(tuple(SCALES), (count, rows))
        zeros = weight.find("qzeros") if self.symmetric else weight.need("qzeros")
        if zeros is not None:
            zeros.check(("I32",), (count, rows // _PER_WORD))
        matrix = CodedMatrix(
            rows=rows,
            columns=columns,
            code=Code.UINT4,
            block=(1, size),
            scale=SCALES[scales.dtype],
            zero=None if zeros is not None else 1 << _BITS - 1,
        )
        return Quantized(
            matrix,
            scales,
            codes=partial(_fill_codes, codes),
            scales=partial(fill_transposed, scales),
            zeros=None if zeros is None else partial(_fill_zeros, zeros),
        )


def _fill_codes(stored: Stored, out: torch.Tensor) -> None:
    for first, words in rows_at_once(stored, _PER_WORD):
        awq_codes(words, out[:, first // 2 : (first + len(words)) // 2])


def _fill_zeros(stored: Stored, out: torch.Tensor) -> None:
    out.copy_(awq_zeros(stored.load()))
