"""The kernel that multiplies few rows by codes as they lie, held against decoding and then multiplying."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from hsrpc.model.formats.codes import Code, CodedMatrix, Factor
from hsrpc.model.formats.format import Encoded
from hsrpc.model.formats.scaled import ScaledPacking, decode_each
from hsrpc.model.kernels.products import Share, product

E8M0, E4M3, HALF = torch.float8_e8m0fnu, torch.float8_e4m3fn, torch.float16
TENSORS: dict[str, tuple[CodedMatrix, ...]] = {
    "fp8": tuple(CodedMatrix(rows=rows, columns=80, code=Code.E4M3, block=(4, 32)) for rows in (5, 1)),
    "fp8-rows": (CodedMatrix(rows=3, columns=40, code=Code.E4M3, block=(1, 40), scale=torch.bfloat16),),
    "mxfp4": (CodedMatrix(rows=3, columns=96, code=Code.E2M1, block=(1, 32), scale=E8M0),),
    "nvfp4": (
        CodedMatrix(rows=2, columns=48, code=Code.E2M1, block=(1, 16), scale=E4M3, factor=Factor.MULTIPLIES),
        CodedMatrix(rows=3, columns=48, code=Code.E2M1, block=(1, 16), scale=E4M3, factor=Factor.DIVIDES),
    ),
    "w4": (CodedMatrix(rows=3, columns=80, code=Code.UINT4, block=(1, 64), scale=HALF, zero=8),),
    "w4-zeros": (CodedMatrix(rows=3, columns=72, code=Code.UINT4, block=(1, 32), scale=HALF, zero=None),),
    "w8": (CodedMatrix(rows=3, columns=64, code=Code.UINT8, block=(1, 32), scale=torch.bfloat16, zero=128),),
}
"""Rows beyond a program's, several matrices in one tensor, columns beyond those that a program takes at once."""


def decoded(kind: str, dtype: torch.dtype) -> Encoded[ScaledPacking]:
    """Random codes that are numbers, and their weights."""
    sources = TENSORS[kind]
    packing = ScaledPacking((sum(source.rows for source in sources), sources[0].columns), dtype, sources)
    assert packing.few_rows
    data = torch.zeros(packing.num_bytes, dtype=torch.uint8)
    for parts in packing.parts(data):
        parts.codes.random_(0, 0x7F)
        if parts.matrix.scale is E8M0:
            parts.scales.view(torch.uint8).random_(120, 130)
        else:
            parts.scales.copy_(torch.rand(parts.scales.shape) + 0.01)
        if parts.zeros is not None:
            parts.zeros.random_(0, 17)
        if parts.factor is not None:
            parts.factor.fill_(0.37)
    each = Encoded(packing, data, torch.empty(packing.shape, dtype=dtype))
    decode_each([each])
    return each


@pytest.mark.parametrize(("rows", "bias"), [(1, True), (5, False)])
@pytest.mark.parametrize("kind", list(TENSORS))
def test_products_are_those_of_decoded_weights(kind: str, rows: int, bias: bool) -> None:
    """Also of more rows than a program takes."""
    shares = Share(1, 2, 8), Share(4, 2, 8)
    each = decoded(kind, torch.float32)
    x, added = torch.randn(rows, each.packing.shape[1]), torch.randn(each.packing.shape[0]) if bias else None
    found = product(each.packing, each.data, shares)(x, added)
    torch.testing.assert_close(found, functional.linear(x, each.operand, added), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", list(TENSORS))
def test_weights_are_rounded_as_they_are_decoded(kind: str) -> None:
    """A row with a single one gives the weights of a column, bit for bit."""
    each = decoded(kind, torch.float16)
    columns = torch.tensor([7, each.packing.shape[1] - 8])
    x = functional.one_hot(columns, each.packing.shape[1]).to(torch.float16)
    found = product(each.packing, each.data)(x, None)
    assert torch.equal(found, each.operand[:, columns].t())
