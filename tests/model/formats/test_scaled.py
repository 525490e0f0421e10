"""Codes with scales: every code of every kind, blocks at the edges, zero points, groups, tensors of several sources."""

from __future__ import annotations

import pytest
import torch

from hsrpc.model.formats import codes
from hsrpc.model.formats.codes import Code, CodedMatrix, CodedParts, Factor
from hsrpc.model.formats.format import Encoded
from hsrpc.model.formats.scaled import Scaled, ScaledPacking
from hsrpc.model.tensor import TensorSpec
from hsrpc.plan.sizes import align

E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
MATRICES = {
    "blocks": CodedMatrix(rows=9, columns=40, code=Code.E4M3, block=(4, 16)),
    "rows": CodedMatrix(rows=7, columns=37, code=Code.E4M3, block=(1, 37), scale=torch.bfloat16),
    "whole": CodedMatrix(rows=7, columns=37, code=Code.E4M3, block=(7, 37)),
    "mxfp4": CodedMatrix(rows=5, columns=72, code=Code.E2M1, block=(1, 32), scale=E8M0),
    "nvfp4": CodedMatrix(rows=5, columns=40, code=Code.E2M1, block=(1, 16), scale=E4M3, factor=Factor.MULTIPLIES),
    "nvfp4-over": CodedMatrix(rows=5, columns=40, code=Code.E2M1, block=(1, 16), scale=E4M3, factor=Factor.DIVIDES),
    "w4": CodedMatrix(rows=5, columns=61, code=Code.UINT4, block=(1, 24), scale=torch.float16, zero=8),
    "w4-zeros": CodedMatrix(rows=5, columns=64, code=Code.UINT4, block=(1, 32), scale=torch.float16, zero=None),
    "w4-groups": CodedMatrix(
        rows=5, columns=48, code=Code.UINT4, block=(1, 16), scale=torch.bfloat16, zero=None, has_groups=True
    ),
    "w8": CodedMatrix(rows=5, columns=30, code=Code.UINT8, block=(1, 30), scale=torch.float32, zero=128),
}
"""A matrix of each kind that readers make."""


def value(code: int, kind: Code) -> float:
    """What a code means, by its definition."""
    if kind in (Code.UINT4, Code.UINT8):
        return code
    mantissa_bits, bias = (3, 7) if kind is Code.E4M3 else (1, 1)
    bits, least = (kind.bits - 1 - mantissa_bits, 1 << mantissa_bits)
    sign = (-1) ** (code >> (kind.bits - 1))
    exponent, mantissa = code >> mantissa_bits & ((1 << bits) - 1), code & (least - 1)
    if kind is Code.E4M3 and code & 0x7F == 0x7F:
        return float("nan")
    if exponent == 0:
        return sign * mantissa / least * 2.0 ** (1 - bias)
    return sign * (1 + mantissa / least) * 2.0 ** (exponent - bias)


def draw(parts: CodedParts) -> None:
    """All codes, and random scales, zero points and groups."""
    matrix, numbers = parts.matrix, torch.arange(parts.codes.numel()).view(parts.codes.shape)
    parts.codes.copy_(numbers * 7 % 256)
    scales = torch.rand(parts.scales.shape) + 0.01
    if matrix.scale is E8M0:
        parts.scales.view(torch.uint8).copy_(torch.randint(0, 255, parts.scales.shape))
    else:
        parts.scales.copy_(scales)
    if parts.zeros is not None:
        parts.zeros.random_(0, 17)
    if parts.groups is not None:
        parts.groups.copy_(torch.randperm(matrix.columns) % matrix.grid[1])
    if parts.factor is not None:
        parts.factor.fill_(0.37)


def expected(parts: CodedParts) -> torch.Tensor:
    """Weights by the definition, one by one: float32."""
    matrix, scales = parts.matrix, parts.scales.float()
    out = torch.empty(matrix.shape)
    if parts.factor is not None:
        scales = scales * parts.factor if matrix.factor is Factor.MULTIPLIES else scales / parts.factor
    for row in range(matrix.rows):
        for column in range(matrix.columns):
            group = column // matrix.block[1] if parts.groups is None else parts.groups[column]
            block = row // matrix.block[0], group
            byte = int(parts.codes[row, column * matrix.code.bits // 8])
            code = byte if matrix.code.bits == 8 else byte >> 4 * (column % 2) & 15
            zero = matrix.zero if parts.zeros is None else int(parts.zeros[block])
            out[row, column] = (value(code, matrix.code) - zero) * scales[block]
    return out


def packed(dtype: torch.dtype, *kinds: str) -> tuple[Encoded[ScaledPacking], torch.Tensor]:
    """A tensor of such sources, and the values that they mean."""
    torch.manual_seed(3)
    sources = tuple(MATRICES[kind] for kind in kinds)
    shape = (sum(source.rows for source in sources), sources[0].columns)
    packing = ScaledPacking(shape, dtype, sources)
    data = torch.zeros(packing.num_bytes, dtype=torch.uint8)
    wanted = []
    for parts in packing.parts(data):
        draw(parts)
        wanted.append(expected(parts))
    return Encoded(packing, data, torch.empty(shape, dtype=dtype)), torch.cat(wanted).to(dtype)


@pytest.mark.parametrize("at_once", [1, 100, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kinds", [*((kind,) for kind in MATRICES), ("blocks", "nvfp4", "nvfp4-over")])
def test_codes_mean_what_they_are_defined_to(
    kinds: tuple[str, ...], dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less its zero point, times its scale, however many rows are decoded at once."""
    monkeypatch.setattr(codes, "_DECODED_AT_ONCE", at_once)
    encoded, wanted = packed(dtype, *kinds)
    encoded.packing.decoding([encoded])()
    torch.testing.assert_close(encoded.operand, wanted, rtol=0, atol=0, equal_nan=True)


def test_sizes_are_those_of_codes_and_scales() -> None:
    """On the bus and on the host; decoded ones where they stay. Each part begins at a multiple of 16 bytes."""
    sources = (MATRICES["blocks"], MATRICES["nvfp4"])
    tensor, form = TensorSpec("w", (14, 40), ("a", "b"), (9, 5)), Scaled(torch.bfloat16, sources)
    packing, sizes = form.packing(tensor), form.sizes(tensor)
    assert packing.num_bytes == (368 + 9 * 4 + 12) + (112 + 16 + 4 + 12)
    assert sizes.bus_bytes == sizes.host_bytes == sizes.buffer_bytes == align(packing.num_bytes)
    assert sizes.resident_bytes == packing.decoded_bytes == 2 * 14 * 40
    assert sizes.device_bytes == sizes.decoded_bytes == align(1120)
    assert sizes.decode_traffic > sizes.bus_bytes + sizes.decoded_bytes


@pytest.mark.parametrize("kind", list(MATRICES))
def test_parts_lie_apart(kind: str) -> None:
    """Each is as large as it must be, and none is another's."""
    matrix = MATRICES[kind]
    data = torch.zeros(matrix.num_bytes, dtype=torch.uint8)
    parts = [part for part in matrix.parts(data)[1:] if part is not None]
    for part in parts:
        part.view(torch.uint8).fill_(1)
    assert data.sum() == sum(part.nbytes for part in parts)
    assert parts[0].shape == (matrix.rows, -(-matrix.columns * matrix.code.bits // 8))
