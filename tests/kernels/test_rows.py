"""Kernels that write and read rows of codes, held against the CPU's: the same bits."""

from __future__ import annotations

import pytest
import torch

from hsrpc.model.formats.rows import CodedRows, Codes, RowShape
from hsrpc.model.kernels.rows import decode, encode

SHAPES = [
    RowShape(1, (300,)),
    RowShape(5, (16, 16)),
    RowShape(2, (24, 40)),
    RowShape(3, (5, 7)),
    RowShape(33, (64, 64)),
]
"""A whole row, heads alike and not, and more of them than a program takes."""


def numbers(shape: RowShape, dtype: torch.dtype) -> torch.Tensor:
    """Rows of all sizes of numbers, with heads of zeros, ties between codes, and what is no number."""
    x = torch.randn(9, shape.width) * 2.0 ** torch.randint(-12, 12, (9, shape.width))
    x[1] = torch.arange(shape.width) % 64 - 20.0  # whole numbers and halves of a scale of 1
    x[1, ::2] += 0.5
    x[1, 0] = 127.0
    x[2] = 0.0
    x[3] *= 1e-30
    x[4, 1] = torch.nan
    x[5, 0] = torch.inf
    return x.to(dtype)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("codes", Codes)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encode(shape: RowShape, dtype: torch.dtype, codes: Codes) -> None:
    """All rows, and some to some; of strided values, without a byte beside."""
    rows, values = CodedRows(shape, dtype, codes), numbers(shape, dtype)
    strided = torch.cat((values, values), 1)[:, shape.width :]
    wanted = rows.encode(values)
    found = torch.full_like(wanted, 7)
    encode(rows, found, strided)
    check_same(rows, found, wanted)
    assert (found[:, shape.width : rows.first_scale] == 7).all()
    placed = torch.full((12, rows.columns), 7, dtype=torch.uint8)
    target_rows, source_rows = torch.tensor([11, 0, 4]), torch.tensor([8, 1, 1])
    encode(rows, placed, strided, target_rows=target_rows, source_rows=source_rows)
    check_same(rows, placed[target_rows], wanted[source_rows])
    encode(rows, placed, strided[:2], target_rows=torch.tensor([2, 3]))
    check_same(rows, placed[2:4], wanted[:2])
    encode(rows, placed, strided[:0], target_rows=target_rows[:0])
    assert (placed[[1, 5, 6, 7, 8, 9, 10]] == 7).all()


def check_same(rows: CodedRows, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """The same scales; and codes, but where a scale is no number."""
    (codes, scales), (wanted_codes, wanted_scales) = rows.parts(found), rows.parts(wanted)
    torch.testing.assert_close(scales, wanted_scales, rtol=0, atol=0, equal_nan=True)
    finite = rows.decode(wanted).isfinite()
    assert torch.equal(codes.view(torch.uint8)[finite], wanted_codes.view(torch.uint8)[finite])
    assert not rows.decode(found)[~finite].isfinite().any()


@pytest.mark.parametrize("codes", Codes)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode(shape: RowShape, dtype: torch.dtype, codes: Codes) -> None:
    """All codes, at any scale that the type takes."""
    rows = CodedRows(shape, dtype, codes)
    coded = torch.randint(0, 256, (5, rows.columns), dtype=torch.uint8)
    numbers, scales = rows.parts(coded)
    numbers.view(torch.uint8)[numbers.float().isnan()] = 0
    scales.copy_(2.0 ** torch.randint(-9, 2, scales.shape) * (1 + torch.rand(scales.shape)))
    torch.testing.assert_close(decode(rows, coded), rows.decode(coded), rtol=0, atol=0)
    assert decode(rows, coded[:0]).shape == (0, shape.width)
